// Terminal colours, only where they are wanted: on a terminal, unless NO_COLOR is set.

/** Functions that dress a text. */
export type Colors = Readonly<Record<'bold' | 'dim' | 'red' | 'green' | 'yellow' | 'cyan', (text: string) => string>>;

const CODES: Readonly<Record<keyof Colors, readonly [number, number]>> = {
  bold: [1, 22],
  dim: [2, 22],
  red: [31, 39],
  green: [32, 39],
  yellow: [33, 39],
  cyan: [36, 39],
};

/** Colours for a stream: plain text when it is no terminal or NO_COLOR is set and not empty (https://no-color.org). */
export function colorsFor(stream: { isTTY?: boolean }, env: NodeJS.ProcessEnv = process.env): Colors {
  return createColors(stream.isTTY === true && !env['NO_COLOR'] && env['TERM'] !== 'dumb');
}

/** Colours, or functions that change nothing. */
export function createColors(enabled: boolean): Colors {
  const style = (name: keyof Colors) => {
    const [open, close] = CODES[name];
    return (text: string): string => (enabled ? `\x1b[${open}m${text}\x1b[${close}m` : text);
  };
  return {
    bold: style('bold'),
    dim: style('dim'),
    red: style('red'),
    green: style('green'),
    yellow: style('yellow'),
    cyan: style('cyan'),
  };
}

/** The text without colours. */
export function plain(text: string): string {
  return text.replaceAll(/\x1b\[\d+m/g, '');
}

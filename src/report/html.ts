// Pieces of a page: escaping, numbers for people, tables. Text is escaped unless it is Html.

/** Markup that is safe to put into a page. */
export class Html {
  readonly markup: string;
  constructor(markup: string) {
    this.markup = markup;
  }
  toString(): string {
    return this.markup;
  }
}

/** Text for HTML and for attributes in double quotes. */
export function escape(text: string): string {
  return text
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;')
    .replaceAll("'", '&#39;');
}

type Part = string | number | Html | readonly Html[];

/** A template of markup: parts are escaped unless they are Html. */
export function html(strings: TemplateStringsArray, ...parts: readonly Part[]): Html {
  const put = (part: Part): string =>
    part instanceof Html
      ? part.markup
      : typeof part === 'string' || typeof part === 'number'
        ? escape(String(part))
        : part.map((p) => p.markup).join('');
  return new Html(strings.map((text, i) => (i === 0 ? text : put(parts[i - 1]) + text)).join(''));
}

/** A table of a report. */
export interface Table {
  readonly caption: string;
  /** Numbers go right. */
  readonly columns: readonly { readonly title: string; readonly numeric?: boolean }[];
  /** The first cell of a row names it. */
  readonly rows: readonly (readonly (string | Html)[])[];
  /** Rows to stress, by index. */
  readonly strong?: readonly number[];
}

/** A table in a box of its own that scrolls where the page is narrow. */
export function renderTable({ caption, columns, rows, strong = [] }: Table): Html {
  const cell = (content: string | Html, i: number): Html => {
    const kind = columns[i]?.numeric ? ' class="n"' : '';
    return i === 0 ? html`<th scope="row">${content}</th>` : new Html(`<td${kind}>${html`${content}`.markup}</td>`);
  };
  const head = columns.map(
    ({ title, numeric }) => new Html(`<th scope="col"${numeric ? ' class="n"' : ''}>${escape(title)}</th>`),
  );
  const body = rows.map(
    (row, i) => new Html(`<tr${strong.includes(i) ? ' class="strong"' : ''}>${row.map(cell).join('')}</tr>`),
  );
  return html`<div class="table" role="region" aria-label="${caption}" tabindex="0">
    <table>
      <caption>
        <span>${caption}</span>
      </caption>
      <thead>
        <tr>
          ${head}
        </tr>
      </thead>
      <tbody>
        ${body}
      </tbody>
    </table>
  </div>`;
}

/** A number with so many significant digits, a real minus, and no exponent where people would not write one. */
export function significant(value: number, digits = 3): string {
  if (value === 0) return '0';
  const magnitude = Math.abs(value);
  const text =
    magnitude >= 1e6 || magnitude < 1e-5
      ? magnitude.toExponential(digits - 1)
      : magnitude >= 10 ** digits
        ? String(Math.round(magnitude))
        : magnitude.toFixed(Math.min(20, Math.max(0, digits - 1 - Math.floor(Math.log10(magnitude)))));
  return value < 0 ? `−${text}` : text;
}

/** A number with so many decimals and a real minus; never "−0.0". */
export function fixed(value: number, decimals: number): string {
  const text = Math.abs(value).toFixed(decimals);
  return value < 0 && Number(text) !== 0 ? `−${text}` : text;
}

/** With its sign. */
export function signed(value: number, decimals: number): string {
  const text = fixed(value, decimals);
  return Number(text.replace('−', '-')) > 0 ? `+${text}` : text;
}

/** Bytes in decimal units, as disks count. */
export function bytes(value: number): string {
  const units = ['bytes', 'kB', 'MB', 'GB', 'TB'];
  let unit = 0;
  let left = value;
  while (left >= 999.5 && unit < units.length - 1) {
    left /= 1000;
    unit++;
  }
  return unit === 0 ? `${value} bytes` : `${significant(left)} ${units[unit]}`;
}

/** Ends of an interval by a formatter; '' when open. */
export function interval(low: number | null, high: number | null, format: (value: number) => string): string {
  return low === null || high === null ? '' : `${format(low)} to ${format(high)}`;
}

/** Words as a list: `a, b and c`. */
export function list(words: readonly string[]): string {
  return words.length < 2 ? words.join('') : `${words.slice(0, -1).join(', ')} and ${words[words.length - 1]}`;
}

/** `0.0105 ± 0.0017`: a value with half its interval, both to the second significant digit of that. */
export function measure(
  { value, low, high }: { value: number; low: number | null; high: number | null },
  options: { scale?: number; sign?: boolean } = {},
): string {
  const { scale = 1, sign = false } = options;
  if (low === null || high === null) return significant(scale * value);
  const margin = (scale * (high - low)) / 2;
  const decimals = margin > 0 ? Math.min(8, Math.max(0, 1 - Math.floor(Math.log10(margin)))) : 3;
  return `${(sign ? signed : fixed)(scale * value, decimals)} ± ${fixed(margin, decimals)}`;
}

// Written mathematics as tokens: LaTeX as models and benchmarks write it, plain text (`sqrt(2)/2`) and Unicode signs alike.

/** One token of an answer. */
export type Token =
  /** Digits with an optional point, thousands separators and exponents already resolved. */
  | { readonly type: 'number'; readonly text: string }
  /** A letter or a name with an index: `x`, `\alpha`, `x_1`. */
  | { readonly type: 'variable'; readonly text: string }
  /** `\frac`, `\sin`, `\pi` …, without the backslash. */
  | { readonly type: 'command'; readonly text: string }
  /** Words: a unit, a name, what stands in \text{…}. */
  | { readonly type: 'words'; readonly text: string }
  /** One of + - * / ^ _ ( ) [ ] { } < > = , : ; ! % $ | & and the set's braces `\{ \}`. */
  | { readonly type: 'sign'; readonly text: string };

/** Longest answer that is read as mathematics, characters. */
export const MAX_ANSWER_LENGTH = 2000;

const UNICODE: readonly (readonly [from: RegExp, to: string])[] = [
  [/[−–—]/g, '-'],
  [/[×✕]/g, '\\times '],
  [/[·⋅]/g, '\\cdot '],
  [/÷/g, '/'],
  [/√/g, '\\sqrt '],
  [/π/g, '\\pi '],
  [/θ/g, '\\theta '],
  [/∞/g, '\\infty '],
  [/≤|⩽/g, '\\le '],
  [/≥|⩾/g, '\\ge '],
  [/≠/g, '\\ne '],
  [/±/g, '\\pm '],
  [/[°º]/g, '^\\circ '],
  [/²/g, '^{2}'],
  [/³/g, '^{3}'],
  [/½/g, '\\frac{1}{2}'],
  [/¼/g, '\\frac{1}{4}'],
  [/¾/g, '\\frac{3}{4}'],
  [/∪/g, '\\cup '],
  [/∩/g, '\\cap '],
  [/∈/g, '\\in '],
  [/⟨/g, '\\langle '],
  [/⟩/g, '\\rangle '],
  [/∅/g, '\\emptyset '],
  [/[\u00a0\u2009\u202f]/g, ' '],
];

/** What only spaces or sizes things, and other names of the same. Order matters. */
const LATEX: readonly (readonly [from: RegExp, to: string])[] = [
  // Thousands: 10,\!080  10{,}080  10\,080
  [/(\d)(?:,\\!\s*|\{,\}\s*|\\,\s*)(?=\d{3}(?!\d))/g, '$1'],
  [
    /\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|biggl?|biggr?|displaystyle|textstyle|limits)(?![a-zA-Z])\s*\.?(?=[^a-zA-Z]|$|\\)/g,
    '',
  ],
  [/(?<!\\)\\[()[\]]/g, ' '],
  [/(?<!\\)\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])/g, ' '],
  [/\\[dtc]frac(?![a-zA-Z])/g, '\\frac'],
  [/\\[dt]?binom(?![a-zA-Z])/g, '\\binom'],
  [/\\(?:mbox|textrm|textbf|textit|textsf|mathrm|mathsf|mathbf|mathit|rm|operatorname\*?|text|hbox)\s*\{/g, '\\text{'],
  [/\\(?:leq|leqslant)(?![a-zA-Z])/g, '\\le '],
  [/\\(?:geq|geqslant)(?![a-zA-Z])/g, '\\ge '],
  [/\\neq(?![a-zA-Z])/g, '\\ne '],
  [/\\(?:ast|star)(?![a-zA-Z])/g, '*'],
  [/\\lvert|\\rvert|\\vert|\\mid/g, '|'],
  [/\\(?:lbrace)(?![a-zA-Z])/g, '\\{'],
  [/\\(?:rbrace)(?![a-zA-Z])/g, '\\}'],
  [/\\(?:lbrack)(?![a-zA-Z])/g, '['],
  [/\\(?:rbrack)(?![a-zA-Z])/g, ']'],
  [/\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])/g, '\\text{degree}'],
  [/\\varnothing/g, '\\emptyset'],
  [/\ba\.\s*m(?:\.|\b)/gi, 'AM'],
  [/\bp\.\s*m(?:\.|\b)/gi, 'PM'],
  [/\\\$/g, '$'],
  [/\\%/g, '%'],
  [/\\#/g, ''],
  [/\*\*/g, '^'],
  [/<=/g, '\\le '],
  [/>=/g, '\\ge '],
  [/\+\s*\/\s*-/g, '\\pm '],
];

/** Functions and constants that plain text writes without a backslash. */
const PLAIN_NAMES: Readonly<Record<string, string>> = {
  sqrt: 'sqrt',
  sin: 'sin',
  cos: 'cos',
  tan: 'tan',
  cot: 'cot',
  sec: 'sec',
  csc: 'csc',
  arcsin: 'arcsin',
  arccos: 'arccos',
  arctan: 'arctan',
  log: 'log',
  ln: 'ln',
  exp: 'exp',
  pi: 'pi',
  inf: 'infty',
  infinity: 'infty',
  theta: 'theta',
  alpha: 'alpha',
  beta: 'beta',
  lambda: 'lambda',
  abs: 'abs',
  pm: 'pm',
};

/** Units that are short enough to be taken for products of variables. */
const SHORT_UNITS: ReadonlySet<string> = new Set(
  'cm mm km nm kg mg lb lbs oz ft in yd mi hr hrs min sec ms mph km kmh kph ml mL kW Hz am pm AM PM cc sq cu rad deg'.split(
    ' ',
  ),
);

/** Words of two letters that answers are made of. */
const SHORT_WORDS: ReadonlySet<string> = new Set(['an', 'An', 'no', 'No', 'NO', 'of', 'is', 'to']);

/** Tokens of an answer, or undefined where it is too long or holds signs that mathematics has not. */
export function tokenize(answer: string): Token[] | undefined {
  if (answer.length > MAX_ANSWER_LENGTH) return undefined;
  let text = answer;
  for (const [from, to] of [...UNICODE, ...LATEX]) text = text.replace(from, to);
  const tokens: Token[] = [];
  let at = 0;
  // Inside brackets a comma separates; only outside can it group thousands.
  let depth = 0;
  const take = (pattern: RegExp): RegExpExecArray | undefined => {
    pattern.lastIndex = at;
    const match = pattern.exec(text);
    if (match) at += match[0].length;
    return match ?? undefined;
  };
  while (at < text.length) {
    if (take(/\s+/y)) continue;
    const grouped = depth === 0 ? take(/\d{1,3}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)?/y) : undefined;
    if (grouped) {
      tokens.push({ type: 'number', text: grouped[0].replaceAll(',', '') });
      continue;
    }
    const number = take(/(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?![\w.]))?/y);
    if (number) {
      tokens.push({ type: 'number', text: number[0] });
      continue;
    }
    if (text.startsWith('\\text{', at)) {
      const end = text.indexOf('}', at);
      if (end < 0) return undefined;
      pushWords(tokens, text.slice(at + 6, end));
      at = end + 1;
      continue;
    }
    const command = take(/\\([a-zA-Z]+)\*?/y);
    if (command) {
      tokens.push({ type: 'command', text: command[1] });
      continue;
    }
    const escaped = take(/\\[{}|\\&]/y);
    if (escaped) {
      if (escaped[0] === '\\{') depth++;
      if (escaped[0] === '\\}') depth--;
      tokens.push({ type: 'sign', text: escaped[0] === '\\|' ? '|' : escaped[0] });
      continue;
    }
    const letters = take(/[a-zA-Z]+(?:['’]s)?/y);
    if (letters) {
      pushLetters(tokens, letters[0]);
      continue;
    }
    const sign = take(/[-+*/^_()[\]{}<>=,:;!%$|&.'"?]/y);
    if (!sign) return undefined;
    if (/[([]/.test(sign[0])) depth++;
    if (/[)\]]/.test(sign[0])) depth--;
    tokens.push({ type: 'sign', text: sign[0] });
  }
  return tokens;
}

/** Content of \text{…}: a number, or words; numbers and signs among words are words too. */
function pushWords(tokens: Token[], content: string): void {
  const text = content.trim();
  if (/^(?:or|and)$/i.test(text)) tokens.push({ type: 'sign', text: ',' });
  else if (/^\d+(?:\.\d+)?$/.test(text)) tokens.push({ type: 'number', text });
  else if (text !== '') tokens.push({ type: 'words', text });
}

function pushLetters(tokens: Token[], letters: string): void {
  const last = tokens.at(-1);
  // \alpha and \sqrt were commands already; here plain names and runs of variables are told apart.
  if (/^(?:or|and)$/.test(letters)) tokens.push({ type: 'sign', text: ',' });
  else if (Object.hasOwn(PLAIN_NAMES, letters)) tokens.push({ type: 'command', text: PLAIN_NAMES[letters] });
  else if (letters === 'U' && last?.type === 'sign' && /[)\]]/.test(last.text))
    tokens.push({ type: 'command', text: 'cup' });
  else if (letters.length >= 3 || SHORT_UNITS.has(letters) || SHORT_WORDS.has(letters))
    tokens.push({ type: 'words', text: letters });
  else for (const letter of letters) tokens.push({ type: 'variable', text: letter });
}

/** Whether a token is this sign. */
export function is(token: Token | undefined, text: string): boolean {
  return token?.type === 'sign' && token.text === text;
}

/** Whether a token is this command. */
export function isCommand(token: Token | undefined, name: string): boolean {
  return token?.type === 'command' && token.text === name;
}

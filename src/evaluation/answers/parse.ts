// Answers as values: numbers and expressions, tuples and intervals, sets, matrices, equations, words.
import { exact, parseRational, type Expression, type FunctionName } from './expression.js';
import { tokenize, type Token } from './tokens.js';

/** What an answer says. */
export type Value =
  | {
      readonly kind: 'expression';
      readonly node: Expression;
      /** Words after it, lower case, e.g. `cm^2`; null without. */
      readonly unit: string | null;
      readonly percent: boolean;
    }
  /** In order, with its brackets: a tuple, an interval, a ratio (`:`). */
  | { readonly kind: 'list'; readonly open: string; readonly close: string; readonly items: readonly Value[] }
  /** In any order. */
  | { readonly kind: 'set'; readonly items: readonly Value[] }
  | { readonly kind: 'union'; readonly parts: readonly Value[] }
  | { readonly kind: 'matrix'; readonly rows: readonly (readonly Value[])[] }
  | { readonly kind: 'equation'; readonly left: Value; readonly right: Value }
  /** Digits in a base other than ten, as written. */
  | { readonly kind: 'based'; readonly digits: string; readonly base: number }
  | { readonly kind: 'words'; readonly text: string };

/** Thrown inside: this is not what the grammar knows. */
class NotMathematics extends Error {}

const CLOSING: Readonly<Record<string, string>> = { '(': ')', '[': ']', '{': '}', '\\{': '\\}', langle: 'rangle' };
const OPENING = new Set(Object.keys(CLOSING));
const CLOSERS = new Set(Object.values(CLOSING));

/** Depth of nesting at most: answers come from outside. */
const MAX_DEPTH = 60;

/** What an answer says; undefined when it is neither mathematics nor words. */
export function parseAnswer(answer: string): Value | undefined {
  const tokens = tokenize(answer);
  if (!tokens) return undefined;
  // An odd dollar sign is money; even ones set mathematics off.
  const dollars = tokens.filter((token) => is(token, '$')).length;
  let rest = tokens.filter((token) => !is(token, '$'));
  while (is(rest.at(-1), '.') || is(rest.at(-1), ',') || is(rest.at(-1), '?')) rest = rest.slice(0, -1);
  try {
    const value = parseItems(rest, 0);
    if (dollars % 2 === 1 && value.kind === 'expression') return { ...value, unit: value.unit ?? 'dollar' };
    return value;
  } catch (error) {
    if (error instanceof NotMathematics || error instanceof RangeError) return undefined;
    throw error;
  }
}

function is(token: Token | undefined, text: string): boolean {
  return token?.type === 'sign' && token.text === text;
}

const isCommand = (token: Token | undefined, name: string): boolean => token?.type === 'command' && token.text === name;

/** Parts between separators outside brackets. */
function split(
  tokens: readonly Token[],
  separates: (token: Token) => boolean,
): { parts: Token[][]; separators: Token[] } {
  const parts: Token[][] = [[]];
  const separators: Token[] = [];
  let depth = 0;
  for (const token of tokens) {
    if (token.type !== 'number' && token.type !== 'words' && token.type !== 'variable') {
      if (OPENING.has(token.text) || token.text === 'begin') depth++;
      if (CLOSERS.has(token.text) || token.text === 'end') depth--;
    }
    if (depth === 0 && separates(token)) {
      separators.push(token);
      parts.push([]);
    } else parts.at(-1)?.push(token);
  }
  return { parts, separators };
}

/** Several items separated by commas, `or`, `and` are a set; ± makes two. */
function parseItems(tokens: readonly Token[], depth: number): Value {
  if (depth > MAX_DEPTH) throw new NotMathematics();
  const parts = split(tokens, (token) => is(token, ',') || is(token, ';')).parts.filter((part) => part.length > 0);
  if (parts.length === 0) throw new NotMathematics();
  const items = parts.flatMap((part) => alternatives(part).map((tokens) => parseItem(tokens, depth + 1)));
  return items.length === 1 ? items[0] : { kind: 'set', items };
}

/** The readings of ± and ∓; inside a set its elements have them. */
function alternatives(tokens: readonly Token[]): (readonly Token[])[] {
  if (is(tokens[0], '\\{')) return [tokens];
  if (!tokens.some((token) => isCommand(token, 'pm') || isCommand(token, 'mp'))) return [tokens];
  return (['+', '-'] as const).map((sign) =>
    tokens.map((token): Token => {
      if (isCommand(token, 'pm')) return { type: 'sign', text: sign };
      if (isCommand(token, 'mp')) return { type: 'sign', text: sign === '+' ? '-' : '+' };
      return token;
    }),
  );
}

const RELATIONS: Readonly<Record<string, string>> = {
  '=': '=',
  '<': '<',
  '>': '>',
  le: '<=',
  ge: '>=',
  lt: '<',
  gt: '>',
  equiv: '=',
};

function parseItem(tokens: readonly Token[], depth: number): Value {
  if (depth > MAX_DEPTH) throw new NotMathematics();
  const membership = split(tokens, (token) => isCommand(token, 'in'));
  if (membership.parts.length === 2) return parseItem(membership.parts[1], depth + 1);
  const relation = split(
    tokens,
    (token) => token.type !== 'words' && token.type !== 'number' && Object.hasOwn(RELATIONS, token.text),
  );
  if (relation.separators.length > 0) {
    return parseRelation(
      relation.parts,
      relation.separators.map(({ text }) => RELATIONS[text]),
      depth,
    );
  }
  const union = split(tokens, (token) => isCommand(token, 'cup'));
  if (union.parts.length > 1) return { kind: 'union', parts: union.parts.map((part) => parseItem(part, depth + 1)) };
  const ratio = split(tokens, (token) => is(token, ':')).parts;
  if (ratio.length > 1) {
    return { kind: 'list', open: ':', close: ':', items: ratio.map((part) => parseItem(part, depth + 1)) };
  }
  return parseBracketed(tokens, depth) ?? parseBased(tokens) ?? parseExpressionOrWords(tokens);
}

function parseRelation(parts: readonly Token[][], signs: readonly string[], depth: number): Value {
  if (signs.every((sign) => sign === '=')) {
    // f = a = b: what it comes to stands last.
    const right = parseItem(parts[parts.length - 1], depth + 1);
    if (parts[0].every((token) => token.type === 'words')) return right;
    const left = parseItem(parts[0], depth + 1);
    return parts.length > 2 && !isName(left) ? right : { kind: 'equation', left, right };
  }
  // Inequalities of one variable are intervals.
  const infinite = (sign: '+' | '-'): Value =>
    expression({ kind: 'binary', op: sign, left: integer(0), right: { kind: 'constant', name: 'infty' } });
  const interval = (low: Value, lowOpen: boolean, high: Value, highOpen: boolean): Value => ({
    kind: 'list',
    open: lowOpen ? '(' : '[',
    close: highOpen ? ')' : ']',
    items: [low, high],
  });
  const values = parts.map((part) => parseItem(part, depth + 1));
  const strict = signs.map((sign) => sign.length === 1);
  const up = signs.every((sign) => sign.startsWith('<'));
  const down = signs.every((sign) => sign.startsWith('>'));
  if (!up && !down) throw new NotMathematics();
  if (values.length === 3 && isName(values[1])) {
    return up
      ? interval(values[0], strict[0], values[2], strict[1])
      : interval(values[2], strict[1], values[0], strict[0]);
  }
  if (values.length !== 2) throw new NotMathematics();
  const [left, right] = values;
  if (isName(left) === isName(right)) throw new NotMathematics();
  const bound = isName(left) ? right : left;
  const below = isName(left) === up;
  return below ? interval(infinite('-'), true, bound, strict[0]) : interval(bound, strict[0], infinite('+'), true);
}

/** Whether a value is a single variable. */
export function isName(value: Value): boolean {
  return value.kind === 'expression' && value.node.kind === 'variable' && value.unit === null;
}

/** A tuple, an interval, a set, a matrix that fills the whole item. */
function parseBracketed(tokens: readonly Token[], depth: number): Value | undefined {
  const [first] = tokens;
  const last = tokens.at(-1);
  if (isCommand(first, 'emptyset') && tokens.length === 1) return { kind: 'set', items: [] };
  if (isCommand(first, 'begin')) return parseMatrix(tokens, depth);
  if (!first || !last || first.type === 'number' || last.type === 'number' || tokens.length < 2) return undefined;
  const open = first.text;
  const close = last.text;
  // Intervals may open with ( and close with ].
  const pairs = open === '(' || open === '[' ? close === ')' || close === ']' : CLOSING[open] === close;
  if (!OPENING.has(open) || !pairs || !enclosed(tokens)) return undefined;
  const inside = tokens.slice(1, -1);
  if (inside.length === 0) {
    if (open !== '\\{') throw new NotMathematics();
    return { kind: 'set', items: [] };
  }
  const parts = split(inside, (token) => is(token, ',') || is(token, ';')).parts;
  if (open === '\\{' || (open === '{' && parts.length > 1)) {
    const value = parseItems(inside, depth + 1);
    return { kind: 'set', items: value.kind === 'set' ? value.items : [value] };
  }
  if (parts.length < 2) {
    if (open !== '(' || close !== ')') return undefined;
    // (C): a choice; (3 + 4): an expression.
    return inside.some((token) => token.type === 'words') ? parseItems(inside, depth + 1) : undefined;
  }
  return { kind: 'list', open, close, items: parts.map((part) => parseItem(part, depth + 1)) };
}

/** Whether the first token's bracket is closed by the last one. */
function enclosed(tokens: readonly Token[]): boolean {
  let depth = 0;
  for (const [i, token] of tokens.entries()) {
    if (token.type === 'number' || token.type === 'words' || token.type === 'variable') continue;
    if (OPENING.has(token.text)) depth++;
    if (CLOSERS.has(token.text)) depth--;
    if (depth === 0) return i === tokens.length - 1;
  }
  return false;
}

function parseMatrix(tokens: readonly Token[], depth: number): Value {
  const name = tokens[2];
  const from = tokens.findIndex((token) => is(token, '}')) + 1;
  const to = tokens.findLastIndex((token) => isCommand(token, 'end'));
  if (name?.type !== 'words' || !/^[pbvBV]?matrix$|^array$/.test(name.text) || to < from || tokens.length - to !== 4)
    throw new NotMathematics();
  let body = tokens.slice(from, to);
  // The columns of an array: {cc}.
  if (name.text === 'array' && is(body[0], '{')) body = body.slice(body.findIndex((token) => is(token, '}')) + 1);
  const rows = split(body, (token) => is(token, '\\\\')).parts.filter((row) => row.length > 0);
  return {
    kind: 'matrix',
    rows: rows.map((row) => split(row, (token) => is(token, '&')).parts.map((cell) => parseItem(cell, depth + 1))),
  };
}

function parseBased(tokens: readonly Token[]): Value | undefined {
  const flat = tokens.filter((token) => !is(token, '{') && !is(token, '}'));
  const [digits, underscore, base, ...more] = flat;
  if (digits?.type !== 'number' || !is(underscore, '_') || base?.type !== 'number' || more.length > 0) return undefined;
  return { kind: 'based', digits: digits.text.replace(/^0+(?=\d)/, ''), base: Number(base.text) };
}

function parseExpressionOrWords(tokens: readonly Token[]): Value {
  try {
    return new ExpressionParser(tokens).whole();
  } catch (error) {
    if (!(error instanceof NotMathematics)) throw error;
    const wordy = tokens.some((token) => token.type === 'words');
    const other = tokens.some(
      (token) => token.type === 'command' || (token.type === 'sign' && !/^[-().,'"&?!]$/.test(token.text)),
    );
    if (!wordy || other) throw error;
    return { kind: 'words', text: tokens.map(({ text }) => text).join(' ') };
  }
}

const integer = (n: number): Expression => ({ kind: 'number', value: { n: BigInt(n), d: 1n } });
const binary = (op: '+' | '-' | '*' | '/' | '^', left: Expression, right: Expression): Expression => ({
  kind: 'binary',
  op,
  left,
  right,
});
const call = (name: FunctionName, ...args: Expression[]): Expression => ({ kind: 'call', name, args });

function expression(node: Expression, unit: string | null = null, percent = false): Value {
  return { kind: 'expression', node, unit, percent };
}

const SIMPLE_FUNCTIONS = new Set([
  'sin',
  'cos',
  'tan',
  'cot',
  'sec',
  'csc',
  'arcsin',
  'arccos',
  'arctan',
  'ln',
  'exp',
  'abs',
]);
const INVERSES: Readonly<Record<string, FunctionName>> = { sin: 'arcsin', cos: 'arccos', tan: 'arctan' };

/** Recursive descent over the tokens of one expression. */
class ExpressionParser {
  readonly #tokens: Token[];
  #at = 0;
  #depth = 0;
  /** Inside |…| a bar closes. */
  #bars = 0;

  constructor(tokens: readonly Token[]) {
    this.#tokens = [...tokens];
  }

  /** The expression with what stands behind it: a unit, a percent sign. */
  whole(): Value {
    const node = this.#sum();
    let percent = false;
    if (is(this.#peek(), '%')) {
      percent = true;
      this.#at++;
    }
    const rest = this.#tokens.slice(this.#at);
    if (rest.length === 0) return expression(node, null, percent);
    if (rest[0].type !== 'words') throw new NotMathematics();
    const plain = rest.every(
      (token) => token.type !== 'command' && (token.type !== 'sign' || /^[\^/{}.()-]$/.test(token.text)),
    );
    if (!plain) throw new NotMathematics();
    const text = rest
      .map(({ text }) => text)
      .join(' ')
      .toLowerCase();
    if (/^percent/.test(text)) return expression(node, null, true);
    return expression(node, text, percent);
  }

  #peek(ahead = 0): Token | undefined {
    return this.#tokens[this.#at + ahead];
  }

  #next(): Token {
    const token = this.#peek();
    if (!token) throw new NotMathematics();
    this.#at++;
    return token;
  }

  #expect(sign: string): void {
    if (!is(this.#next(), sign)) throw new NotMathematics();
  }

  #sum(): Expression {
    if (++this.#depth > MAX_DEPTH) throw new NotMathematics();
    let node = this.#signed();
    for (;;) {
      const token = this.#peek();
      if (is(token, '+') || is(token, '-')) {
        this.#at++;
        node = binary(is(token, '+') ? '+' : '-', node, this.#product());
      } else break;
    }
    this.#depth--;
    return node;
  }

  #signed(): Expression {
    if (is(this.#peek(), '-')) {
      this.#at++;
      return binary('-', integer(0), this.#signedProduct());
    }
    if (is(this.#peek(), '+')) {
      this.#at++;
      return this.#signedProduct();
    }
    return this.#product();
  }

  #signedProduct(): Expression {
    if (is(this.#peek(), '-') || is(this.#peek(), '+')) throw new NotMathematics();
    return this.#product();
  }

  #product(): Expression {
    let node = this.#factor();
    for (;;) {
      const token = this.#peek();
      if (is(token, '*') || isCommand(token, 'cdot') || isCommand(token, 'times')) {
        this.#at++;
        node = binary('*', node, this.#factor());
      } else if (is(token, '/') || isCommand(token, 'div')) {
        this.#at++;
        node = binary('/', node, this.#factor());
      } else if (this.#startsFactor(token)) {
        // Two numbers side by side are no product.
        if (token?.type === 'number' && this.#tokens[this.#at - 1].type === 'number') throw new NotMathematics();
        node = binary('*', node, this.#power());
      } else return node;
    }
  }

  #startsFactor(token: Token | undefined): boolean {
    if (!token) return false;
    switch (token.type) {
      case 'number':
      case 'variable':
        return true;
      case 'words':
        return false;
      case 'command':
        return !/^(?:r?angle|rangle|end|cup|cap|in|to|le|ge|ne|pm|mp)$/.test(token.text);
      case 'sign':
        return (
          token.text === '(' || token.text === '{' || token.text === '[' || (token.text === '|' && this.#bars === 0)
        );
    }
  }

  #factor(): Expression {
    if (is(this.#peek(), '-')) {
      this.#at++;
      return binary('-', integer(0), this.#power());
    }
    if (is(this.#peek(), '+')) this.#at++;
    return this.#power();
  }

  #power(): Expression {
    let node = this.#primary();
    for (;;) {
      if (is(this.#peek(), '!')) {
        this.#at++;
        node = call('factorial', node);
      } else if (is(this.#peek(), '^')) {
        this.#at++;
        node = binary('^', node, this.#exponent());
      } else return node;
    }
  }

  #exponent(): Expression {
    if (is(this.#peek(), '-')) {
      this.#at++;
      return binary('-', integer(0), this.#primary());
    }
    return this.#primary();
  }

  #group(open: string): Expression {
    const bars = this.#bars;
    this.#bars = 0;
    const node = this.#sum();
    this.#expect(CLOSING[open]);
    this.#bars = bars;
    return node;
  }

  #primary(): Expression {
    const token = this.#next();
    switch (token.type) {
      case 'number':
        return this.#number(token.text);
      case 'variable':
        return this.#variable(token.text);
      case 'command':
        return this.#command(token.text);
      case 'words':
        throw new NotMathematics();
      case 'sign':
        if (token.text === '(' || token.text === '[' || token.text === '{') return this.#group(token.text);
        if (token.text === '|') {
          this.#bars++;
          const node = this.#sum();
          this.#expect('|');
          this.#bars--;
          return call('abs', node);
        }
        throw new NotMathematics();
    }
  }

  /** A number, or a mixed one: 1\frac{4}{5}, 3 1/2. */
  #number(text: string): Expression {
    const value = parseRational(text);
    if (!value) throw new NotMathematics();
    const node: Expression = { kind: 'number', value };
    if (!/^\d+$/.test(text)) return node;
    if (this.#peek()?.type === 'number' && is(this.#peek(1), '/') && this.#peek(2)?.type === 'number') {
      const numerator = this.#number(this.#next().text);
      this.#at++;
      return this.#mixed(node, binary('/', numerator, this.#number(this.#next().text)));
    }
    if (!isCommand(this.#peek(), 'frac')) return node;
    const before = [this.#at, this.#tokens.length];
    const saved = [...this.#tokens];
    this.#at++;
    const fraction = this.#fraction();
    const part = exact(fraction);
    if (part && part.n > 0n && part.n < part.d) return this.#mixed(node, fraction);
    // A product after all, as in 2\frac{x}{3}: read it again from there.
    this.#tokens.splice(0, this.#tokens.length, ...saved);
    this.#at = before[0];
    return node;
  }

  #mixed(whole: Expression, fraction: Expression): Expression {
    const part = exact(fraction);
    if (!part || part.n >= part.d) throw new NotMathematics();
    return binary('+', whole, fraction);
  }

  #variable(name: string): Expression {
    const index = this.#index();
    if (index === '') {
      if (name === 'i') return { kind: 'constant', name: 'i' };
      if (name === 'e') return { kind: 'constant', name: 'e' };
    }
    return { kind: 'variable', name: name + index };
  }

  /** x_1, x_{12}, x_n. */
  #index(): string {
    if (!is(this.#peek(), '_')) return '';
    this.#at++;
    const token = this.#next();
    if (token.type === 'number' || token.type === 'variable' || token.type === 'words') return `_${token.text}`;
    if (!is(token, '{')) throw new NotMathematics();
    let text = '_';
    while (!is(this.#peek(), '}')) text += this.#next().text;
    this.#at++;
    return text;
  }

  #fraction(): Expression {
    return binary('/', this.#argument(), this.#argument());
  }

  /** What a LaTeX command takes: a group, or one digit or letter. */
  #argument(): Expression {
    const token = this.#next();
    if (is(token, '{')) return this.#group('{');
    if (token.type === 'number' && /^\d+$/.test(token.text)) {
      if (token.text.length > 1) this.#tokens.splice(this.#at, 0, { type: 'number', text: token.text.slice(1) });
      return { kind: 'number', value: { n: BigInt(token.text[0]), d: 1n } };
    }
    if (token.type === 'variable') return this.#variable(token.text);
    if (token.type === 'command') return this.#command(token.text);
    throw new NotMathematics();
  }

  #command(name: string): Expression {
    switch (name) {
      case 'frac':
        return this.#fraction();
      case 'binom':
        return call('binomial', this.#argument(), this.#argument());
      case 'sqrt': {
        let degree: Expression = integer(2);
        if (is(this.#peek(), '[')) {
          this.#at++;
          degree = this.#group('[');
        }
        return call('root', degree, this.#primary());
      }
      case 'pi':
      case 'infty':
        return { kind: 'constant', name };
      case 'lfloor':
      case 'lceil': {
        const node = this.#sum();
        if (!isCommand(this.#next(), name.replace('l', 'r'))) throw new NotMathematics();
        return call(name === 'lfloor' ? 'floor' : 'ceil', node);
      }
      case 'log': {
        if (!is(this.#peek(), '_')) return call('log10', this.#operand());
        this.#at++;
        const base = this.#argument();
        return call('logBase', base, this.#operand());
      }
    }
    if (SIMPLE_FUNCTIONS.has(name)) {
      let power: Expression | undefined;
      if (is(this.#peek(), '^')) {
        this.#at++;
        power = this.#exponent();
      }
      const inverse = power && exact(power);
      if (inverse && inverse.n === -1n && inverse.d === 1n) {
        if (!Object.hasOwn(INVERSES, name)) throw new NotMathematics();
        return call(INVERSES[name], this.#operand());
      }
      const value = call(name as FunctionName, this.#operand());
      return power ? binary('^', value, power) : value;
    }
    if (
      /^(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|Delta|Gamma|Lambda|Omega|Phi|Psi|Sigma|Theta|ell)$/.test(
        name,
      )
    )
      return { kind: 'variable', name: name + this.#index() };
    throw new NotMathematics();
  }

  /** What a function without brackets applies to: factors side by side, up to the next function. */
  #operand(): Expression {
    // sin(x)^2 is the square of the sine.
    if (is(this.#peek(), '(') || is(this.#peek(), '{') || is(this.#peek(), '[')) return this.#primary();
    if (is(this.#peek(), '-')) return this.#factor();
    let node = this.#power();
    for (;;) {
      const token = this.#peek();
      const another = token?.type === 'command' && (SIMPLE_FUNCTIONS.has(token.text) || token.text === 'log');
      if (!this.#startsFactor(token) || another || is(token, '(')) return node;
      node = binary('*', node, this.#power());
    }
  }
}

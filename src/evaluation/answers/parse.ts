// Answers as values: numbers and expressions, tuples and intervals, sets, matrices, equations, words.
import type { Expression } from './expression.js';
import { CLOSING, MAX_DEPTH, NotMathematics, parseExpression, type Quantity } from './parse-expression.js';
import { is, isCommand, tokenize, type Token } from './tokens.js';

/** What an answer says. */
export type Value =
  | ({ readonly kind: 'expression' } & Quantity)
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

const OPENING = new Set(Object.keys(CLOSING));
const CLOSERS = new Set(Object.values(CLOSING));

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
  const infinite = (sign: '+' | '-'): Value => ({
    kind: 'expression',
    node: infinity(sign),
    unit: null,
    percent: false,
  });
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

function infinity(sign: '+' | '-'): Expression {
  const zero = { kind: 'number', value: { n: 0n, d: 1n } } as const;
  return { kind: 'binary', op: sign, left: zero, right: { kind: 'constant', name: 'infty' } };
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
    return { kind: 'expression', ...parseExpression(tokens) };
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

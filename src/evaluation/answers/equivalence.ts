// Whether two answers say the same: exactly where they are rational, at random points where they hold letters, part by part
// where they are tuples, sets, intervals or matrices. When in doubt they differ: a wrong answer accepted hides a worse model.
import { createRng } from '../../core/rng.js';
import { evaluate, exact, variablesOf, type Complex, type Expression } from './expression.js';
import { isName, parseAnswer, type Value } from './parse.js';

/** Relative difference of irrational numbers that is rounding. */
const TOLERANCE = 1e-10;

/**
 * Whether `answer` says the same as `expected`. Units and percent signs may be left out, but must agree when both have
 * them; decimals count as written (0.33 is not 1/3); the order counts in tuples and intervals, not in sets and lists of
 * solutions; `x = 5` is the same as `5`.
 */
export function equivalent(expected: string, answer: string): boolean {
  const [first, second] = [parseAnswer(expected), parseAnswer(answer)];
  if (first && second) return same(first, second);
  // What the grammar does not know must be written alike.
  const [a, b] = [squeeze(expected), squeeze(answer)];
  return a !== '' && a === b;
}

function squeeze(text: string): string {
  return (
    text
      .replaceAll(/\\(?:left|right|[!,;: ]|displaystyle)|\$/g, '')
      // A space between two numbers or words is no decoration: 14 4 is not 144.
      .replaceAll(/(?<!\w)\s+|\s+(?!\w)/g, '')
      .replaceAll(/\\[dt]frac/g, '\\frac')
      .replace(/\.$/, '')
  );
}

function same(a: Value, b: Value): boolean {
  const [left, right] = [unwrap(a), unwrap(b)];
  if (left.kind === 'equation' || right.kind === 'equation') return sameEquation(left, right);
  if (left.kind === 'words' || right.kind === 'words') return sameWords(left, right);
  if (left.kind === 'based' || right.kind === 'based') return sameBased(left, right);
  if (left.kind === 'set' && right.kind === 'set') return sameSet(left.items, right.items);
  if (left.kind === 'union' || right.kind === 'union') {
    const parts = (value: Value): readonly Value[] => (value.kind === 'union' ? value.parts : [value]);
    return sameSet(parts(left), parts(right));
  }
  if (left.kind === 'matrix' || right.kind === 'matrix') return sameMatrix(left, right);
  if (left.kind === 'list' && right.kind === 'list') {
    return left.open === right.open && left.close === right.close && sameItems(left.items, right.items);
  }
  return left.kind === 'expression' && right.kind === 'expression' && sameExpression(left, right);
}

/** A set of one is its element. */
function unwrap(value: Value): Value {
  return value.kind === 'set' && value.items.length === 1 ? unwrap(value.items[0]) : value;
}

function sameItems(a: readonly Value[], b: readonly Value[]): boolean {
  return a.length === b.length && a.every((item, i) => same(item, b[i]));
}

/** Each has its like in the other; what is listed twice counts once. */
function sameSet(a: readonly Value[], b: readonly Value[]): boolean {
  return a.every((x) => b.some((y) => same(x, y))) && b.every((y) => a.some((x) => same(x, y)));
}

/** Matrices cell by cell; a single row or column is also the tuple of its entries. */
function sameMatrix(a: Value, b: Value): boolean {
  if (a.kind === 'matrix' && b.kind === 'matrix') {
    return a.rows.length === b.rows.length && a.rows.every((row, i) => sameItems(row, b.rows[i]));
  }
  const [matrix, other] = a.kind === 'matrix' ? [a, b] : [b, a];
  if (matrix.kind !== 'matrix' || other.kind !== 'list' || !['(', 'langle'].includes(other.open)) return false;
  if (other.close !== { '(': ')', langle: 'rangle' }[other.open]) return false;
  const vector =
    matrix.rows.length === 1
      ? matrix.rows[0]
      : matrix.rows.every((row) => row.length === 1)
        ? matrix.rows.flat()
        : undefined;
  return vector !== undefined && sameItems(vector, other.items);
}

function sameBased(a: Value, b: Value): boolean {
  if (a.kind === 'based' && b.kind === 'based') return a.digits === b.digits && a.base === b.base;
  const [based, other] = a.kind === 'based' ? [a, b] : [b, a];
  // The question named the base: the digits alone will do.
  if (based.kind !== 'based' || other.kind !== 'expression' || other.node.kind !== 'number') return false;
  const { n, d } = other.node.value;
  return d === 1n && n.toString() === based.digits;
}

/** Lower case, without brackets, quotes and articles. */
function plainWords(text: string): string {
  return text
    .toLowerCase()
    .replaceAll(/[^\p{L}\p{N}+-]+/gu, ' ')
    .replace(/^ ?(?:the|an) /, '')
    .trim();
}

function sameWords(a: Value, b: Value): boolean {
  const text = (value: Value): string | undefined => {
    if (value.kind === 'words') return plainWords(value.text);
    // A choice: C, (C).
    if (value.kind === 'expression' && value.unit === null && !value.percent) {
      if (value.node.kind === 'variable') return plainWords(value.node.name);
      if (value.node.kind === 'constant' && (value.node.name === 'e' || value.node.name === 'i'))
        return value.node.name;
    }
    return undefined;
  };
  const [first, second] = [text(a), text(b)];
  return first !== undefined && first !== '' && first === second;
}

type ExpressionValue = Extract<Value, { kind: 'expression' }>;

function sameExpression(a: ExpressionValue, b: ExpressionValue): boolean {
  if (a.unit !== null && b.unit !== null && plainUnit(a.unit) !== plainUnit(b.unit)) return false;
  if (a.unit !== null && b.unit === null) {
    const measured = measuredIn(b.node, plainUnit(a.unit));
    if (measured) return sameNumber(a.node, measured);
  } else if (b.unit !== null && a.unit === null) return sameExpression(b, a);
  if (a.percent && b.percent) return sameNumber(a.node, b.node);
  if (a.percent || b.percent) {
    const [share, other] = a.percent ? [a.node, b.node] : [b.node, a.node];
    const hundredth: Expression = {
      kind: 'binary',
      op: '/',
      left: share,
      right: { kind: 'number', value: { n: 100n, d: 1n } },
    };
    return sameNumber(share, other) || sameNumber(hundredth, other);
  }
  return sameNumber(a.node, b.node);
}

/** The number of `2.5 h`, whose unit of one letter reads as a variable, where the other answer is in that unit. */
function measuredIn(node: Expression, unit: string): Expression | undefined {
  const product = node.kind === 'binary' && node.op === '*' && node.right.kind === 'variable';
  return product && node.right.name === unit ? node.left : undefined;
}

/** Spellings of units: plurals, powers, abbreviations. */
const UNITS: readonly (readonly [from: RegExp, to: string])[] = [
  [/[{}. ]+/g, ' '],
  [/\bsq(?:uare)?\s+(\w+)/g, '$1^2'],
  [/\bcu(?:bic)?\s+(\w+)/g, '$1^3'],
  [/\bcentimet(?:er|re)s?\b/g, 'cm'],
  [/\bkilomet(?:er|re)s?\b/g, 'km'],
  [/\bmillimet(?:er|re)s?\b/g, 'mm'],
  [/\bmet(?:er|re)s?\b/g, 'm'],
  [/\binch(?:es)?\b/g, 'in'],
  [/\b(?:feet|foot)\b/g, 'ft'],
  [/\byards?\b/g, 'yd'],
  [/\bmiles?\b/g, 'mi'],
  [/\b(?:hours?|hrs?)\b/g, 'h'],
  [/\b(?:minutes?|mins?)\b/g, 'min'],
  [/\b(?:seconds?|secs?)\b/g, 's'],
  [/\bdegrees?\b|\bdeg\b/g, 'degree'],
  [/\bper\b/g, '/'],
  [/\b(\w{3,}[^s\W])s\b/g, '$1'],
  [/\s+/g, ''],
];

function plainUnit(unit: string): string {
  return UNITS.reduce((text, [from, to]) => text.replace(from, to), unit.trim());
}

/** Points that expressions are compared at: none is special. */
function points(names: readonly string[]): Record<string, Complex>[] {
  const rng = createRng(20250101);
  return Array.from({ length: 12 }, (_, k) =>
    Object.fromEntries(
      names.map((name) => {
        const re = (rng.uniform() * 2.3 + 0.2) * (k % 3 === 0 || rng.uniform() < 0.5 ? 1 : -1);
        return [name, { re, im: k >= 8 ? rng.uniform() * 2 - 1 : 0 }];
      }),
    ),
  );
}

function sameNumber(a: Expression, b: Expression): boolean {
  const [x, y] = [exact(a), exact(b)];
  if (x && y) return x.n === y.n && x.d === y.d;
  const names = [...new Set([...variablesOf(a), ...variablesOf(b)])].sort();
  if (names.length === 0) {
    const [u, v] = [evaluate(a, {}), evaluate(b, {})];
    if (Math.abs(u.re) === Infinity || Math.abs(v.re) === Infinity) return u.re === v.re;
    return close(u, v);
  }
  let seen = 0;
  for (const point of points(names)) {
    const [u, v] = [evaluate(a, point), evaluate(b, point)];
    const finite = [u, v].map((z) => Number.isFinite(z.re) && Number.isFinite(z.im));
    if (!finite[0] && !finite[1]) continue;
    if (!finite[0] || !finite[1] || !close(u, v)) return false;
    seen++;
  }
  return seen >= 3;
}

function close(u: Complex, v: Complex): boolean {
  const size = Math.max(Math.hypot(u.re, u.im), Math.hypot(v.re, v.im));
  return Math.hypot(u.re - v.re, u.im - v.im) <= TOLERANCE * Math.max(size, 1e-3);
}

/** Names on the left of an answer: a variable, or a function of variables as in f(x). */
function nameOf(value: Value): string | undefined {
  if (value.kind !== 'expression') return undefined;
  if (isName(value) && value.node.kind === 'variable') return value.node.name;
  const { node } = value;
  if (node.kind === 'binary' && node.op === '*' && node.left.kind === 'variable' && node.right.kind === 'variable')
    return `${node.left.name}(${node.right.name})`;
  return undefined;
}

function sameEquation(a: Value, b: Value): boolean {
  if (a.kind === 'equation' && b.kind === 'equation') {
    const [first, second] = [nameOf(a.left), nameOf(b.left)];
    if (first !== undefined && first === second) return same(a.right, b.right);
    return proportional(a, b);
  }
  const [equation, value] = a.kind === 'equation' ? [a, b] : [b, a];
  // x = 5 for 5; an equation of two variables, y = 2x + 3, for its right side too.
  return equation.kind === 'equation' && nameOf(equation.left) !== undefined && same(equation.right, value);
}

/** Whether the two differences of sides vanish together: one is a multiple of the other. */
function proportional(a: Extract<Value, { kind: 'equation' }>, b: Extract<Value, { kind: 'equation' }>): boolean {
  const difference = ({ left, right }: typeof a): Expression | undefined =>
    left.kind === 'expression' && right.kind === 'expression'
      ? { kind: 'binary', op: '-', left: left.node, right: right.node }
      : undefined;
  const [first, second] = [difference(a), difference(b)];
  if (!first || !second) return false;
  const names = [...variablesOf(first)].sort();
  if (names.length === 0 || names.join() !== [...variablesOf(second)].sort().join()) return false;
  let ratio: Complex | undefined;
  let seen = 0;
  for (const point of points(names)) {
    const [u, v] = [evaluate(first, point), evaluate(second, point)];
    const size = v.re * v.re + v.im * v.im;
    const now = { re: (u.re * v.re + u.im * v.im) / size, im: (u.im * v.re - u.re * v.im) / size };
    if (!Number.isFinite(now.re) || !Number.isFinite(now.im)) continue;
    if (ratio && !close(ratio, now)) return false;
    ratio ??= now;
    seen++;
  }
  return seen >= 3 && ratio !== undefined && Math.hypot(ratio.re, ratio.im) > 1e-9;
}

// Expressions of answers: a tree, its exact value where it is rational, and its complex value at a point.

/** An expression. */
export type Expression =
  | { readonly kind: 'number'; readonly value: Rational }
  | { readonly kind: 'constant'; readonly name: 'pi' | 'e' | 'i' | 'infty' }
  | { readonly kind: 'variable'; readonly name: string }
  | {
      readonly kind: 'binary';
      readonly op: '+' | '-' | '*' | '/' | '^';
      readonly left: Expression;
      readonly right: Expression;
    }
  | { readonly kind: 'call'; readonly name: FunctionName; readonly args: readonly Expression[] };

/** A ratio of whole numbers in lowest terms; the denominator is positive. */
export interface Rational {
  readonly n: bigint;
  readonly d: bigint;
}

/** A complex number. */
export interface Complex {
  readonly re: number;
  readonly im: number;
}

/** Digits of exact numbers at most: answers may hold towers of powers. */
const MAX_BITS = 20_000;

export type FunctionName = keyof typeof FUNCTIONS;

const real = (re: number): Complex => ({ re, im: 0 });
const add = (a: Complex, b: Complex): Complex => ({ re: a.re + b.re, im: a.im + b.im });
const negate = (a: Complex): Complex => ({ re: -a.re, im: -a.im });
const multiply = (a: Complex, b: Complex): Complex => ({
  re: a.re * b.re - a.im * b.im,
  im: a.re * b.im + a.im * b.re,
});
const divide = (a: Complex, b: Complex): Complex => {
  const size = b.re * b.re + b.im * b.im;
  return { re: (a.re * b.re + a.im * b.im) / size, im: (a.im * b.re - a.re * b.im) / size };
};
const exp = (a: Complex): Complex => ({ re: Math.exp(a.re) * Math.cos(a.im), im: Math.exp(a.re) * Math.sin(a.im) });
const log = (a: Complex): Complex => ({ re: Math.log(Math.hypot(a.re, a.im)), im: Math.atan2(a.im, a.re) });
const I: Complex = { re: 0, im: 1 };

function power(a: Complex, b: Complex): Complex {
  if (b.im === 0 && Number.isInteger(b.re) && Math.abs(b.re) <= 1024) {
    let result = real(1);
    for (let i = 0; i < Math.abs(b.re); i++) result = multiply(result, a);
    return b.re < 0 ? divide(real(1), result) : result;
  }
  if (a.re === 0 && a.im === 0) return b.re > 0 ? real(0) : real(NaN);
  if (a.im === 0 && b.im === 0 && a.re > 0) return real(a.re ** b.re);
  return exp(multiply(b, log(a)));
}

const sin = (a: Complex): Complex => ({ re: Math.sin(a.re) * Math.cosh(a.im), im: Math.cos(a.re) * Math.sinh(a.im) });
const cos = (a: Complex): Complex => ({ re: Math.cos(a.re) * Math.cosh(a.im), im: -Math.sin(a.re) * Math.sinh(a.im) });
const onReals =
  (f: (x: number) => number) =>
  (a: Complex): Complex =>
    a.im === 0 ? real(f(a.re)) : real(NaN);

/** Functions by name; all take one argument unless said. */
const FUNCTIONS = {
  sin,
  cos,
  tan: (a: Complex) => divide(sin(a), cos(a)),
  cot: (a: Complex) => divide(cos(a), sin(a)),
  sec: (a: Complex) => divide(real(1), cos(a)),
  csc: (a: Complex) => divide(real(1), sin(a)),
  arcsin: onReals(Math.asin),
  arccos: onReals(Math.acos),
  arctan: onReals(Math.atan),
  ln: log,
  log10: (a: Complex) => divide(log(a), real(Math.LN10)),
  exp,
  abs: (a: Complex) => real(Math.hypot(a.re, a.im)),
  floor: onReals(Math.floor),
  ceil: onReals(Math.ceil),
  factorial: onReals((x) => {
    if (!Number.isInteger(x) || x < 0 || x > 170) return NaN;
    let product = 1;
    for (let i = 2; i <= x; i++) product *= i;
    return product;
  }),
  /** a-th root of b. */
  root: (a: Complex, b: Complex) =>
    // The real root of a negative number, as ∛ means it.
    a.im === 0 && b.im === 0 && b.re < 0 && Math.abs(a.re) % 2 === 1
      ? real(-((-b.re) ** (1 / a.re)))
      : power(b, divide(real(1), a)),
  /** Logarithm of b to the base a. */
  logBase: (a: Complex, b: Complex) => divide(log(b), log(a)),
  /** b out of a. */
  binomial: (a: Complex, b: Complex) => {
    let result = 1;
    for (let i = 1; i <= b.re && i < 1000; i++) result *= (a.re - b.re + i) / i;
    return a.im === 0 && b.im === 0 && Number.isInteger(b.re) ? real(result) : real(NaN);
  },
} as const;

/** Complex value of an expression; parts are not finite where it has none. */
export function evaluate(node: Expression, point: Readonly<Record<string, Complex>>): Complex {
  switch (node.kind) {
    case 'number':
      return real(toNumber(node.value));
    case 'constant':
      return { pi: real(Math.PI), e: real(Math.E), i: I, infty: real(Infinity) }[node.name];
    case 'variable':
      return point[node.name] ?? real(NaN);
    case 'binary': {
      const [a, b] = [evaluate(node.left, point), evaluate(node.right, point)];
      switch (node.op) {
        case '+':
          return add(a, b);
        case '-':
          return add(a, negate(b));
        case '*':
          return multiply(a, b);
        case '/':
          return divide(a, b);
        case '^':
          return power(a, b);
      }
      break;
    }
    case 'call': {
      const values = node.args.map((arg) => evaluate(arg, point));
      const apply: (...args: Complex[]) => Complex = FUNCTIONS[node.name];
      return apply(...values);
    }
  }
  return real(NaN);
}

/** Names of the variables in an expression. */
export function variablesOf(node: Expression, found = new Set<string>()): Set<string> {
  if (node.kind === 'variable') found.add(node.name);
  if (node.kind === 'binary') for (const part of [node.left, node.right]) variablesOf(part, found);
  if (node.kind === 'call') for (const part of node.args) variablesOf(part, found);
  return found;
}

/** Exact value, or undefined where it is not a rational number that can be written down. */
export function exact(node: Expression): Rational | undefined {
  switch (node.kind) {
    case 'number':
      return node.value;
    case 'constant':
    case 'variable':
      return undefined;
    case 'binary': {
      const [a, b] = [exact(node.left), exact(node.right)];
      return a && b && exactBinary(node.op, a, b);
    }
    case 'call': {
      const args = node.args.map(exact);
      const [a, b] = args;
      if (!a || args.includes(undefined)) return undefined;
      if (node.name === 'factorial' && a.d === 1n && a.n >= 0n && a.n <= 1000n) {
        let product = 1n;
        for (let i = 2n; i <= a.n; i++) product *= i;
        return rational(product, 1n);
      }
      if (node.name === 'binomial' && b && a.d === 1n && b.d === 1n && b.n >= 0n && b.n <= 1000n && a.n >= b.n) {
        let result = 1n;
        for (let i = 1n; i <= b.n; i++) result = (result * (a.n - b.n + i)) / i;
        return rational(result, 1n);
      }
      if (node.name === 'root' && b && a.n === 2n && a.d === 1n) return exactRoot(b);
      if (node.name === 'abs') return { n: a.n < 0n ? -a.n : a.n, d: a.d };
      return undefined;
    }
  }
}

function exactBinary(op: '+' | '-' | '*' | '/' | '^', a: Rational, b: Rational): Rational | undefined {
  switch (op) {
    case '+':
      return rational(a.n * b.d + b.n * a.d, a.d * b.d);
    case '-':
      return rational(a.n * b.d - b.n * a.d, a.d * b.d);
    case '*':
      return rational(a.n * b.n, a.d * b.d);
    case '/':
      return b.n === 0n ? undefined : rational(a.n * b.d, a.d * b.n);
    case '^': {
      if (b.d !== 1n || (a.n === 0n && b.n <= 0n)) return undefined;
      const times = b.n < 0n ? -b.n : b.n;
      const bits = Math.max(a.n.toString(2).length, a.d.toString(2).length);
      if (times > 10_000n || Number(times) * bits > MAX_BITS) return undefined;
      return b.n < 0n ? rational(a.d ** times, a.n ** times) : rational(a.n ** times, a.d ** times);
    }
  }
}

/** Square root where it is rational. */
function exactRoot({ n, d }: Rational): Rational | undefined {
  const root = (x: bigint): bigint | undefined => {
    if (x < 0n) return undefined;
    let guess = BigInt(Math.floor(Math.sqrt(Number(x))));
    for (let i = 0; i < 4; i++) if (guess > 0n) guess = (guess + x / guess) / 2n;
    for (const candidate of [guess - 1n, guess, guess + 1n])
      if (candidate >= 0n && candidate * candidate === x) return candidate;
    return undefined;
  };
  const [top, bottom] = [root(n), root(d)];
  return top !== undefined && bottom !== undefined ? rational(top, bottom) : undefined;
}

/** n / d in lowest terms. */
export function rational(n: bigint, d: bigint): Rational | undefined {
  if (n.toString(2).length > MAX_BITS || d.toString(2).length > MAX_BITS) return undefined;
  let [a, b] = [n < 0n ? -n : n, d < 0n ? -d : d];
  while (b !== 0n) [a, b] = [b, a % b];
  const sign = d < 0n ? -1n : 1n;
  return a === 0n ? { n: 0n, d: 1n } : { n: (sign * n) / a, d: (sign * d) / a };
}

/** Digits as written, `12`, `.5`, `6.7e-5`. */
export function parseRational(text: string): Rational | undefined {
  const [, whole, fraction = '', power = '0'] = /^(\d*)\.?(\d*)(?:[eE]([+-]?\d+))?$/.exec(text) ?? [];
  if (whole === undefined || whole + fraction === '') return undefined;
  const shift = Number(power) - fraction.length;
  if (Math.abs(shift) > 5000) return undefined;
  const n = BigInt(whole + fraction);
  return shift >= 0 ? rational(n * 10n ** BigInt(shift), 1n) : rational(n, 10n ** BigInt(-shift));
}

function toNumber({ n, d }: Rational): number {
  const [a, b] = [Number(n), Number(d)];
  if (Number.isFinite(a) && Number.isFinite(b)) return a / b;
  const shift = BigInt(Math.max(n.toString(2).length, d.toString(2).length) - 900);
  return Number(n >> shift) / Number(d >> shift);
}

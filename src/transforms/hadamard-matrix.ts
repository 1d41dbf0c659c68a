// Hadamard matrices from number theory: H [m, m] of ±1 with H·Hᵀ = m·I, for m = 1 and multiples of 4. Powers of two come from
// Sylvester's doubling when transforms are applied; here are the odd ones: Paley's two constructions over prime fields and
// fields of p² elements (Paley 1933), and Williamson's from four symmetric circulants (Williamson 1944), found by a search
// that a subgroup of the multiplicative group makes small.
import { GyreError } from '../core/errors.js';

/** How a base matrix is made. */
export type HadamardConstruction = 'sylvester' | 'paley1' | 'paley2' | 'williamson';

/** A Hadamard matrix that is no product of a smaller one with Sylvester's. */
export interface HadamardBase {
  readonly construction: HadamardConstruction;
  readonly order: number;
  /** [order, order], row-major, ±1. */
  readonly signs: Int8Array;
}

/** Largest base matrix that is built: dense rows of it are applied to every vector. */
const MAX_BASE = 1024;
/** Most classes of the multiplicative group in Williamson's search: 2^classes sequences, compared in pairs. */
const MAX_CLASSES = 9;

const made = new Map<number, HadamardBase | undefined>();

/**
 * The base matrix of order n = m · 2ᵏ: the smallest m that one of the constructions gives.
 * @returns undefined when there is none (n neither 1, 2 nor a multiple of 4, or beyond these constructions).
 */
export function findHadamardBase(n: number): HadamardBase | undefined {
  if (!Number.isSafeInteger(n) || n < 1) return undefined;
  let m = n;
  while (m % 2 === 0) m /= 2;
  if (m === 1) return { construction: 'sylvester', order: 1, signs: Int8Array.of(1) };
  for (m *= 4; m <= Math.min(n, MAX_BASE); m *= 2) {
    if (n % m !== 0) return undefined;
    if (!made.has(m)) made.set(m, build(m));
    const base = made.get(m);
    if (base) return base;
  }
  return undefined;
}

/** As {@link findHadamardBase}. @throws GyreError `unsupported`. */
export function hadamardBase(n: number): HadamardBase {
  const base = findHadamardBase(n);
  if (base) return base;
  throw new GyreError('unsupported', `no Hadamard matrix of order ${n} can be built`, {
    remedy: 'orders are 1, 2 and multiples of 4 that Paley, Williamson and doubling reach',
  });
}

function build(m: number): HadamardBase | undefined {
  const first = character(m - 1);
  if (first && (m - 1) % 4 === 3) return { construction: 'paley1', order: m, signs: paley1(m - 1, first) };
  const second = character(m / 2 - 1);
  if (second && (m / 2 - 1) % 4 === 1) return { construction: 'paley2', order: m, signs: paley2(m / 2 - 1, second) };
  const signs = isPrime(m / 4) ? williamson(m / 4) : undefined;
  return signs && { construction: 'williamson', order: m, signs };
}

function isPrime(n: number): boolean {
  if (n < 2) return false;
  for (let d = 2; d * d <= n; d++) if (n % d === 0) return false;
  return true;
}

/** χ(a − b) of elements a and b (numbered 0 … q − 1): 1 for squares, −1 for the others, 0 for 0. */
type Character = (a: number, b: number) => number;

/** The quadratic character of the field of q elements, for q a prime or the square of one. */
function character(q: number): Character | undefined {
  if (q % 2 === 0) return undefined;
  if (isPrime(q)) {
    const legendre = legendreTable(q);
    return (a, b) => legendre[(a - b + q) % q];
  }
  const p = Math.round(Math.sqrt(q));
  if (p * p !== q || !isPrime(p)) return undefined;
  // GF(p²) = GF(p)(√r) with r no square: an element is a square there exactly when its norm a² − r·b² is one in GF(p).
  const legendre = legendreTable(p);
  const r = legendre.indexOf(-1);
  return (x, y) => {
    const a = ((x % p) - (y % p) + p) % p;
    const b = (Math.floor(x / p) - Math.floor(y / p) + p) % p;
    return legendre[(((a * a - r * b * b) % p) + p) % p];
  };
}

function legendreTable(p: number): Int8Array {
  const table = new Int8Array(p).fill(-1);
  table[0] = 0;
  for (let x = 1; x < p; x++) table[(x * x) % p] = 1;
  return table;
}

/** q ≡ 3 (mod 4): H = I + S, S = [[0, 1ᵀ], [−1, Q]] with Q the matrix of χ(i − j), which is skew. */
function paley1(q: number, chi: Character): Int8Array {
  const m = q + 1;
  return Int8Array.from({ length: m * m }, (_, at) => {
    const [i, j] = [Math.floor(at / m), at % m];
    if (i === 0) return 1;
    if (j === 0) return -1;
    return i === j ? 1 : chi(i - 1, j - 1);
  });
}

/**
 * q ≡ 1 (mod 4): C = [[0, 1ᵀ], [1, Q]] is symmetric with C·C = q·I; its entries c become c·[[1, 1], [1, −1]], and those of
 * the diagonal [[1, −1], [−1, −1]].
 */
function paley2(q: number, chi: Character): Int8Array {
  const m = 2 * (q + 1);
  return Int8Array.from({ length: m * m }, (_, at) => {
    const [row, column] = [Math.floor(at / m), at % m];
    const [i, j] = [row >> 1, column >> 1];
    const [s, t] = [row & 1, column & 1];
    if (i === j) return s === 0 && t === 0 ? 1 : -1;
    const c = i === 0 || j === 0 ? 1 : chi(i - 1, j - 1);
    return s === 1 && t === 1 ? -c : c;
  });
}

/**
 * Order 4n from symmetric circulants A, B, C, D of ±1 with A² + B² + C² + D² = 4n·I: equivalently, sequences whose periodic
 * autocorrelations add up to 0 off the origin. Sought among sequences that are constant on the classes of a subgroup of
 * the multiplicative group mod n that contains −1: the fewer classes, the smaller the search.
 */
function williamson(n: number): Int8Array | undefined {
  for (let classes = 1; classes <= MAX_CLASSES; classes++) {
    if ((n - 1) % classes !== 0 || ((n - 1) / classes) % 2 !== 0) continue;
    const rows = williamsonRows(n, classes);
    if (rows) return williamsonArray(n, rows);
  }
  return undefined;
}

function williamsonRows(n: number, classes: number): readonly Int8Array[] | undefined {
  // x and its class: powers of a generator g, class = exponent mod `classes`; −1 = g^((n−1)/2) lies in class 0.
  const classOf = new Int32Array(n);
  for (let e = 0, x = 1, g = generator(n); e < n - 1; e++, x = (x * g) % n) classOf[x] = e % classes;
  const leaders = Array.from({ length: classes }, (_, c) => classOf.indexOf(c, 1));
  const sequences = Array.from({ length: 2 ** classes }, (_, bits) =>
    Int8Array.from({ length: n }, (_, x) => (x === 0 || (bits >> classOf[x]) & 1 ? 1 : -1)),
  );
  const correlations = sequences.map((s) =>
    leaders.map((shift) => s.reduce((sum, value, x) => sum + value * s[(x + shift) % n], 0)),
  );
  const key = (i: number, j: number, sign: number): string =>
    correlations[i].map((value, c) => sign * (value + correlations[j][c])).join();
  const pairs = new Map<string, readonly [number, number]>();
  for (let i = 0; i < sequences.length; i++) for (let j = i; j < sequences.length; j++) pairs.set(key(i, j, 1), [i, j]);
  for (const [i, j] of pairs.values()) {
    const other = pairs.get(key(i, j, -1));
    if (other) return [i, j, ...other].map((at) => sequences[at]);
  }
  return undefined;
}

/** A generator of the multiplicative group mod a prime. */
function generator(n: number): number {
  for (let g = 2; ; g++) {
    let order = 1;
    for (let x = g % n; x !== 1; x = (x * g) % n) order++;
    if (order === n - 1 || n <= 3) return n === 2 ? 1 : g;
  }
}

/** Williamson's array of circulants: [[A, B, C, D], [−B, A, −D, C], [−C, D, A, −B], [−D, −C, B, A]]. */
function williamsonArray(n: number, rows: readonly Int8Array[]): Int8Array {
  const array = [
    [1, 2, 3, 4],
    [-2, 1, -4, 3],
    [-3, 4, 1, -2],
    [-4, -3, 2, 1],
  ];
  const m = 4 * n;
  return Int8Array.from({ length: m * m }, (_, at) => {
    const [row, column] = [Math.floor(at / m), at % m];
    const entry = array[Math.floor(row / n)][Math.floor(column / n)];
    const value = rows[Math.abs(entry) - 1][((column % n) - (row % n) + n) % n];
    return Math.sign(entry) * value;
  });
}

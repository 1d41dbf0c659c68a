// Choosing the next token from logits: greedy, temperature, top-k, top-p. Linear time in the vocabulary, seeded.
import { GyreError, ensure } from '../core/errors.js';
import type { Rng } from '../core/rng.js';

/** How tokens are drawn. The filters apply in this order, as in Transformers: temperature, top-k, top-p. */
export interface SamplingOptions {
  /** Divides the logits; 0 (the default) takes the most likely token always. */
  readonly temperature?: number;
  /** Keep the k most likely tokens; 0 (the default) keeps all. */
  readonly topK?: number;
  /** Keep the fewest most likely tokens whose probability reaches p; 1 (the default) keeps all. */
  readonly topP?: number;
}

/** Draws tokens from rows of logits; holds scratch memory of one vocabulary. */
export interface Sampler {
  /**
   * The id drawn from one row of logits (not changed) with the next number of `rng`; greedy sampling draws none.
   * @throws GyreError `non-finite` when the row holds no finite maximum.
   */
  readonly sample: (logits: Float32Array, rng: Rng) => number;
}

/** A sampler for these options. @throws GyreError `usage` for options out of range. */
export function createSampler(options: SamplingOptions = {}): Sampler {
  const { temperature = 0, topK = 0, topP = 1 } = options;
  ensure(
    Number.isFinite(temperature) && temperature >= 0,
    'usage',
    () => `temperature must be at least 0, found ${temperature}`,
  );
  ensure(Number.isInteger(topK) && topK >= 0, 'usage', () => `top-k must be a whole number from 0, found ${topK}`);
  ensure(topP > 0 && topP <= 1, 'usage', () => `top-p must be above 0 and at most 1, found ${topP}`);
  if (temperature === 0) return { sample: argmax };
  if (topK === 0 && topP === 1) return { sample: drawUnfiltered(temperature) };
  let weights = new Float64Array(0);
  let ids = new Int32Array(0);
  return {
    sample: (logits, rng) => {
      const n = logits.length;
      if (ids.length !== n) {
        weights = new Float64Array(n);
        ids = new Int32Array(n);
      }
      const max = logits[argmax(logits)];
      let sum = 0;
      for (let i = 0; i < n; i++) {
        // NaN compares false and counts as impossible: one bad logit among good ones is no reason to stop.
        const weight = logits[i] > -Infinity ? Math.exp((logits[i] - max) / temperature) : 0;
        weights[i] = weight;
        sum += weight;
        ids[i] = i;
      }
      let kept = n;
      if (topK > 0 && topK < n) {
        kept = selectTop(ids, weights, kept, () => 1, topK);
        sum = total(ids, weights, kept);
      }
      if (topP < 1) {
        // Tokens less likely than (1 − p) / n are less than 1 − p all together: the nucleus never reaches them.
        const floor = ((1 - topP) * sum) / kept;
        let candidates = 0;
        for (let i = 0; i < kept; i++) if (weights[ids[i]] >= floor) ids[candidates++] = ids[i];
        kept = selectTop(ids, weights, candidates, (id) => weights[id], topP * sum);
        sum = total(ids, weights, kept);
      }
      return draw(ids, weights, kept, rng.uniform() * sum);
    },
  };
}

/** Logits whose weights are summed together; a draw goes through one such block again. */
const BLOCK = 1024;
/** Steps of {@link weightOf}'s table between powers of two; two to a power, so that an integer splits into both by its bits. */
const STEPS = 256;
const STEP_BITS = 8;
const STEP = Math.LN2 / STEPS;
const FRACTIONS = Float64Array.from({ length: STEPS }, (_, i) => 2 ** (i / STEPS));
/** e^(−700) is 2^(−1010). */
const POWERS = Float64Array.from({ length: 1012 }, (_, i) => 2 ** -i);

/** e^x for x ≤ 0, within 2e-14; 0 below −700 and for NaN. A vocabulary of them takes a quarter of Math.exp's time. */
function weightOf(x: number): number {
  if (!(x > -700)) return 0;
  const step = (x / STEP) | 0;
  const rest = x - step * STEP;
  const near = 1 + rest * (1 + rest * (1 / 2 + rest * (1 / 6 + rest * (1 / 24))));
  return FRACTIONS[step & (STEPS - 1)] * POWERS[-(step >> STEP_BITS)] * near;
}

/** Draws by temperature alone: nothing has to be kept per id, only sums of blocks. */
function drawUnfiltered(temperature: number): Sampler['sample'] {
  let sums = new Float64Array(0);
  return (logits, rng) => {
    const n = logits.length;
    const blocks = Math.ceil(n / BLOCK);
    if (sums.length !== blocks) sums = new Float64Array(blocks);
    const max = logits[argmax(logits)];
    const inverse = 1 / temperature;
    let sum = 0;
    for (let b = 0; b < blocks; b++) {
      const end = Math.min(n, (b + 1) * BLOCK);
      let part = 0;
      // NaN counts as impossible: one bad logit among good ones is no reason to stop.
      for (let i = b * BLOCK; i < end; i++) part += weightOf((logits[i] - max) * inverse);
      sums[b] = part;
      sum += part;
    }
    let rest = rng.uniform() * sum;
    let last = 0;
    for (let b = 0; b < blocks; b++) {
      if (rest >= sums[b]) {
        rest -= sums[b];
        continue;
      }
      const end = Math.min(n, (b + 1) * BLOCK);
      for (let i = b * BLOCK; i < end; i++) {
        const weight = weightOf((logits[i] - max) * inverse);
        if (weight === 0) continue;
        last = i;
        rest -= weight;
        if (rest < 0) return i;
      }
      return last; // rounding put the point at the very end of the block
    }
    return argmax(logits); // … or of all blocks
  };
}

/** Index of the largest value, the first of equals. @throws GyreError `non-finite` when there is none or it is infinite. */
export function argmax(logits: Float32Array): number {
  let best = -1;
  let max = -Infinity;
  for (let i = 0; i < logits.length; i++) {
    if (logits[i] > max) {
      max = logits[i];
      best = i;
    }
  }
  if (best < 0 || max === Infinity) {
    throw new GyreError('non-finite', 'the logits of the next token are not finite', {
      remedy: 'the model or its quantization is broken: `gyre inspect` it, or evaluate it on a text',
    });
  }
  return best;
}

/**
 * Reorders `ids[0 … count)` so that the heaviest come first, as few as have a total measure of at least `goal`, and
 * returns how many those are (at least 1). Quickselect by measure: expected time linear in `count`. Of equal weights the
 * smaller id goes first, so the choice does not depend on the order of arrival.
 */
function selectTop(
  ids: Int32Array,
  weights: Float64Array,
  count: number,
  measure: (id: number) => number,
  goal: number,
): number {
  const before = (a: number, b: number): boolean => weights[a] > weights[b] || (weights[a] === weights[b] && a < b);
  let lo = 0;
  let hi = count;
  let missing = goal;
  while (hi - lo > 1) {
    const pivot = medianOfThree(ids, before, lo, (lo + hi) >>> 1, hi - 1);
    let i = lo;
    let measured = 0;
    // Afterwards [lo, i) come before the pivot, which stands at i.
    let at = -1;
    for (let j = lo; j < hi; j++) {
      const id = ids[j];
      if (id === pivot) at = j;
      if (!before(id, pivot)) continue;
      measured += measure(id);
      ids[j] = ids[i];
      ids[i] = id;
      if (i === at) at = j;
      i++;
    }
    ids[at] = ids[i];
    ids[i] = pivot;
    if (measured >= missing) {
      hi = i;
    } else if (measured + measure(pivot) >= missing || i + 1 === hi) {
      return i + 1;
    } else {
      missing -= measured + measure(pivot);
      lo = i + 1;
    }
  }
  return Math.max(hi, 1);
}

function medianOfThree(
  ids: Int32Array,
  before: (a: number, b: number) => boolean,
  x: number,
  y: number,
  z: number,
): number {
  const [a, b, c] = [ids[x], ids[y], ids[z]];
  if (before(a, b)) return before(b, c) ? b : before(a, c) ? c : a;
  return before(a, c) ? a : before(b, c) ? c : b;
}

function total(ids: Int32Array, weights: Float64Array, count: number): number {
  let sum = 0;
  for (let i = 0; i < count; i++) sum += weights[ids[i]];
  return sum;
}

/** The id at `point` along the weights laid end to end. */
function draw(ids: Int32Array, weights: Float64Array, count: number, point: number): number {
  let rest = point;
  let last = ids[0];
  for (let i = 0; i < count; i++) {
    const id = ids[i];
    if (weights[id] === 0) continue;
    last = id;
    rest -= weights[id];
    if (rest < 0) return id;
  }
  return last; // rounding put the point at the very end
}

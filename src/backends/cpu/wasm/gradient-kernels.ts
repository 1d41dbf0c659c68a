// Wrappers of the gradient kernels: each stages its operands in the arena, in bands of rows where they may be large, runs
// the kernel over the pool's threads and copies results out.
import { ensure } from '../../../core/errors.js';
import type { AdamWStep, ElementLoss } from '../../../ops/gradients.js';
import type { KernelPool } from '../pool.js';
import type { Pointer } from './arena.js';
import type { RopeTable, RowTransform } from './forward-kernels.js';
import { checkGrid, checkLength, CHUNK, panelBytes, panelColumns } from './transform-kernels.js';

/** Rows whose contributions to a weight's gradient are summed together, as in the kernels. */
const ROW_CHUNK = 64;
/** Elements per partial sum of a loss, as in the kernels. */
const LOSS_CHUNK = 4096;
/** Operands are staged in bands of about this many bytes. */
const BAND_BYTES = 8 * 1024 * 1024;
/** Elements of light elementwise work below which a second thread does not pay. */
const LIGHT_WORK = 16_384;

/** Rows of a band: about BAND_BYTES, a multiple of ROW_CHUNK so that sums are cut alike. */
function bandRows(rowBytes: number): number {
  return Math.max(1, Math.floor(BAND_BYTES / rowBytes / ROW_CHUNK)) * ROW_CHUNK;
}

/** Calls `body` with row ranges of a band's size. */
function eachBand(rows: number, size: number, body: (begin: number, end: number) => void): void {
  for (let begin = 0; begin < rows; begin += size) body(begin, Math.min(begin + size, rows));
}

/** Adds partial sums [chunks, n] (f64, at `partial`) to `sums`, in chunk order. */
function addChunks(pool: KernelPool, partial: Pointer, chunks: number, sums: Float64Array): void {
  const { f64 } = pool.arena;
  for (let c = 0, at = partial >>> 3; c < chunks; c++) for (let i = 0; i < sums.length; i++, at++) sums[i] += f64[at];
}

/** dx and ∂weight of out = x·weight/norm, rows of weight.length. */
export function rmsNormGradient(
  pool: KernelPool,
  x: Float32Array,
  weight: Float32Array,
  eps: number,
  dy: Float32Array,
  dx: Float32Array,
  dWeight: Float32Array,
): void {
  const n = weight.length;
  const rows = x.length / n;
  ensure(Number.isInteger(rows), 'tensor-shape', () => `rmsNormGradient: ${x.length} elements are not rows of ${n}`);
  checkLength('gradient', dy, x.length);
  const sums = new Float64Array(n);
  const { arena } = pool;
  pool.ensureScratch(64);
  eachBand(rows, bandRows(n * 4), (begin, end) =>
    arena.scoped(() => {
      const count = end - begin;
      const from = arena.pushF32(x.subarray(begin * n, end * n));
      const g = arena.pushF32(dy.subarray(begin * n, end * n));
      const w = arena.pushF32(weight);
      const chunks = Math.ceil(count / ROW_CHUNK);
      const partial = arena.scratch(chunks * n * 8);
      pool.run('rmsNormGradient', chunks, [from, g, g, count, n, w, eps, partial]);
      arena.readF32(g, dx.subarray(begin * n, end * n));
      addChunks(pool, partial, chunks, sums);
    }),
  );
  dWeight.set(sums);
}

/** gateUp, out [rows, 2n], dy [rows, n]. */
export function siluMulGradient(
  pool: KernelPool,
  gateUp: Float32Array,
  rows: number,
  dy: Float32Array,
  out: Float32Array,
): void {
  const n = dy.length / rows;
  checkLength('gate and up', gateUp, 2 * dy.length);
  const { arena } = pool;
  eachBand(rows, bandRows(n * 12), (begin, end) =>
    arena.scoped(() => {
      const from = arena.pushF32(gateUp.subarray(begin * 2 * n, end * 2 * n));
      const g = arena.pushF32(dy.subarray(begin * n, end * n));
      pool.run('siluMulGradient', end - begin, [from, g, from, n], Math.ceil(LIGHT_WORK / 2 / n));
      arena.readF32(from, out.subarray(begin * 2 * n, end * 2 * n));
    }),
  );
}

/** Arguments of {@link splitHeadsGradient}. */
export interface SplitHeadsGradientArguments {
  readonly qkv: Float32Array;
  readonly dq: Float32Array;
  readonly dk: Float32Array;
  readonly dv: Float32Array;
  readonly out: Float32Array;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly batch: number;
  readonly start: number;
  readonly rope: RopeTable;
  readonly qNorm?: Float32Array;
  readonly kNorm?: Float32Array;
  readonly eps: number;
}

/** Returns the gradients of the per-head norms, [headDim] each (zeros without norms). */
export function splitHeadsGradient(
  pool: KernelPool,
  args: SplitHeadsGradientArguments,
): { qNorm: Float64Array; kNorm: Float64Array } {
  const { heads, kvHeads, headDim, batch, start, rope, eps } = args;
  const width = (heads + 2 * kvHeads) * headDim;
  const rows = args.qkv.length / width;
  const tokens = rows / batch;
  checkLength('gradient of q', args.dq, rows * heads * headDim);
  checkLength('gradient of k', args.dk, rows * kvHeads * headDim);
  checkLength('gradient of v', args.dv, rows * kvHeads * headDim);
  ensure(start + tokens <= rope.positions, 'context-length', () => `rotary tables cover ${rope.positions} positions`);
  const sums = new Float64Array(2 * headDim);
  const { arena } = pool;
  // Whole sequences, so that a row's position follows from its place in the band.
  const bandSize = Math.max(1, Math.floor(BAND_BYTES / (width * 8 * tokens))) * tokens;
  eachBand(rows, bandSize, (begin, end) =>
    arena.scoped(() => {
      const count = end - begin;
      const part = (values: Float32Array): Pointer =>
        arena.pushF32(values.subarray((values.length / rows) * begin, (values.length / rows) * end));
      const norm = (values: Float32Array | undefined): Pointer => (values ? arena.pushF32(values) : 0);
      const out = arena.scratch(count * width * 4);
      const chunks = Math.ceil(count / ROW_CHUNK);
      const partial = arena.scratch(chunks * headDim * 16);
      pool.run('splitHeadsGradient', chunks, [
        part(args.qkv),
        part(args.dq),
        part(args.dk),
        part(args.dv),
        out,
        count,
        heads,
        kvHeads,
        headDim,
        norm(args.qNorm),
        norm(args.kNorm),
        eps,
        rope.cos,
        rope.sin,
        rope.rotaryDim,
        start,
        tokens,
        partial,
      ]);
      arena.readF32(out, args.out.subarray(begin * width, end * width));
      addChunks(pool, partial, chunks, sums);
    }),
  );
  return { qNorm: sums.slice(0, headDim), kNorm: sums.slice(headDim) };
}

/** Arguments of {@link attentionGradient}. */
export interface AttentionGradientArguments {
  readonly q: Float32Array;
  readonly k: Float32Array;
  readonly v: Float32Array;
  readonly dy: Float32Array;
  readonly dq: Float32Array;
  readonly dk: Float32Array;
  readonly dv: Float32Array;
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly scale: number;
  readonly window?: number;
}

/** Gradients of causal attention over whole sequences from position 0. */
export function attentionGradient(pool: KernelPool, args: AttentionGradientArguments): void {
  const { batch, heads, kvHeads, headDim, scale, window } = args;
  const rows = args.q.length / (heads * headDim);
  const tokens = rows / batch;
  checkLength('dy', args.dy, args.q.length);
  for (const part of [args.k, args.v]) checkLength('k or v', part, rows * kvHeads * headDim);
  const { arena } = pool;
  pool.ensureScratch(8 * (tokens + 8) * 4);
  const perSequence = tokens * (heads + kvHeads) * headDim * 12;
  eachBand(batch, Math.max(pool.threads, Math.floor((4 * BAND_BYTES) / perSequence)), (begin, end) =>
    arena.scoped(() => {
      const of = (values: Float32Array): Float32Array =>
        values.subarray((values.length / batch) * begin, (values.length / batch) * end);
      const [q, k, v, g] = [args.q, args.k, args.v, args.dy].map((values) => arena.pushF32(of(values)));
      const outputs = [args.dq, args.dk, args.dv].map(of);
      const [dq, dk, dv] = outputs.map((values) => arena.scratch(values.byteLength));
      pool.run('attentionGradient', (end - begin) * kvHeads, [
        q,
        k,
        v,
        g,
        dq,
        dk,
        dv,
        tokens,
        heads,
        kvHeads,
        headDim,
        window ?? 0,
        scale,
      ]);
      [dq, dk, dv].forEach((pointer, i) => arena.readF32(pointer, outputs[i]));
    }),
  );
}

/** Gradient of a transform of activation rows: dx, and sums for theta [krot, channels / 2] and the scales [channels]. */
export function rotateGradient(
  pool: KernelPool,
  transform: RowTransform,
  x: Float32Array,
  dy: Float32Array,
  dx: Float32Array,
  theta: Float32Array,
  scales: Float32Array,
): void {
  const { spec, table, scales: factors } = transform.resident;
  const { channels, krot } = spec;
  const rows = x.length / channels;
  checkLength('gradient', dy, x.length);
  const groupSize = krot ? spec.groupSize : channels;
  const half = groupSize / 2;
  const groups = channels / groupSize;
  const { arena } = pool;
  pool.ensureScratch(krot * half * 16 + panelBytes(groupSize, 2 * CHUNK));
  const angleSums = new Float64Array(theta.length);
  const scaleSums = new Float64Array(channels);
  eachBand(rows, bandRows(channels * 16), (begin, end) =>
    arena.scoped(() => {
      const count = end - begin;
      const bytes = count * channels * 4;
      const source = arena.pushF32(x.subarray(begin * channels, end * channels));
      const gradient = arena.pushF32(dy.subarray(begin * channels, end * channels));
      const [xT, yT, gT] = [arena.scratch(bytes), arena.scratch(bytes), arena.scratch(bytes)];
      pool.run('transpose', Math.ceil(count / 32), [source, xT, count, channels]);
      pool.run('transpose', Math.ceil(count / 32), [gradient, gT, count, channels]);
      if (krot > 0) {
        const panel = panelColumns(groupSize);
        pool.ensureScratch(panelBytes(groupSize, panel));
        const units = groups * Math.ceil(count / panel);
        pool.run('transformChannels', units, [xT, yT, count, groupSize, krot, table, factors, 0, panel]);
        const chunks = Math.ceil(count / CHUNK);
        const partial = arena.scratch(chunks * theta.length * 8);
        pool.run('rotationGradient', groups * chunks, [yT, gT, gT, count, groupSize, krot, table, partial, groups]);
        // [chunk][group][rotation][pair] → [rotation][group][pair].
        const { f64 } = arena;
        for (let c = 0, at = partial >>> 3; c < chunks; c++)
          for (let g = 0; g < groups; g++)
            for (let k = 0; k < krot; k++)
              for (let p = 0; p < half; p++, at++) angleSums[k * (channels / 2) + g * half + p] += f64[at];
      }
      const sums = arena.scratch(channels * 8);
      pool.run('scaleAndDot', channels, [gT, xT, count, factors, sums], Math.ceil(LIGHT_WORK / count));
      for (let c = 0; c < channels; c++) scaleSums[c] += arena.f64[(sums >>> 3) + c];
      pool.run('transpose', Math.ceil(channels / 32), [gT, gradient, channels, count]);
      arena.readF32(gradient, dx.subarray(begin * channels, end * channels));
    }),
  );
  theta.set(angleSums);
  scales.set(scaleSums);
}

/** A free grid: scales and zeros [channels / groupSize, columns]. */
export interface FreeGrid {
  readonly scales: Float32Array;
  readonly zeros: Float32Array;
  readonly columns: number;
  readonly groupSize: number;
  readonly bits: number;
}

/** Columns of a unit of the grid kernels. */
const GRID_COLUMNS = 64;

/** Rounds w [channels, columns] onto a free grid; with `gradient`, returns the gradients instead. */
export function freeGrid(
  pool: KernelPool,
  w: Float32Array,
  grid: FreeGrid,
  out: Float32Array,
  gradient?: { readonly dy: Float32Array; readonly scales: Float32Array; readonly zeros: Float32Array },
): void {
  const { columns, groupSize, bits } = grid;
  const channels = w.length / columns;
  checkGrid(channels, groupSize);
  const groups = channels / groupSize;
  for (const values of [grid.scales, grid.zeros]) checkLength('grid', values, groups * columns);
  if (gradient) checkLength('gradient', gradient.dy, w.length);
  eachGroupBand(pool, groups, groupSize, columns, (band) => {
    const at = [band.push(w, groupSize, 0), band.push(grid.scales, 1, 1), band.push(grid.zeros, 1, 0)];
    if (!gradient) {
      band.run('gridForward', [...at, at[0], band.columns, groupSize, 2 ** bits - 1]);
      band.read(at[0], groupSize, out);
      return;
    }
    const g = band.push(gradient.dy, groupSize, 0);
    const sums = [band.take(1), band.take(1)];
    band.run('gridGradient', [...at, g, g, ...sums, band.columns, groupSize, 2 ** bits - 1]);
    band.read(g, groupSize, out);
    band.read(sums[0], 1, gradient.scales);
    band.read(sums[1], 1, gradient.zeros);
  });
}

/** Rows of x [channels, columns] times the scales [channels / groupSize, columns] of their groups. */
export function scaleGroups(
  pool: KernelPool,
  x: Float32Array,
  columns: number,
  scales: Float32Array,
  groupSize: number,
  out: Float32Array,
): void {
  const channels = x.length / columns;
  checkGrid(channels, groupSize);
  checkLength('scales', scales, (channels / groupSize) * columns);
  eachGroupBand(pool, channels / groupSize, groupSize, columns, (band) => {
    const at = band.push(x, groupSize, 0);
    band.run('scaleGroups', [at, band.push(scales, 1, 1), at, band.columns, groupSize]);
    band.read(at, groupSize, out);
  });
}

/** Σ over each group's rows of x·dy, both [channels, columns]: [channels / groupSize, columns]. */
export function sumGroups(
  pool: KernelPool,
  x: Float32Array,
  columns: number,
  groupSize: number,
  dy: Float32Array,
  out: Float32Array,
): void {
  const channels = x.length / columns;
  checkGrid(channels, groupSize);
  checkLength('gradient', dy, x.length);
  eachGroupBand(pool, channels / groupSize, groupSize, columns, (band) => {
    const sums = band.take(1);
    band.run('sumGroups', [band.push(x, groupSize, 0), band.push(dy, groupSize, 0), sums, band.columns, groupSize]);
    band.read(sums, 1, out);
  });
}

/** Whole groups of matrices [rows·groups, columns] staged in the arena, columns padded to vectors of four. */
interface GroupBand {
  /** Padded columns. */
  readonly columns: number;
  /** Stages this band of a matrix with `rows` rows per group; padding gets `fill`. */
  push(values: Float32Array, rows: number, fill: number): Pointer;
  /** Room for `rows` rows per group. */
  take(rows: number): Pointer;
  /** Copies this band of a matrix out. */
  read(pointer: Pointer, rows: number, to: Float32Array): void;
  /** Runs a kernel whose units are (group, GRID_COLUMNS columns). */
  run(kernel: string, args: readonly number[]): void;
}

function eachGroupBand(
  pool: KernelPool,
  groups: number,
  groupSize: number,
  columns: number,
  body: (band: GroupBand) => void,
): void {
  const padded = Math.ceil(columns / 4) * 4;
  const { arena } = pool;
  eachBand(groups, Math.max(1, Math.floor((4 * BAND_BYTES) / (groupSize * padded * 12))), (begin, end) =>
    arena.scoped(() =>
      body({
        columns: padded,
        take: (rows) => arena.scratch((end - begin) * rows * padded * 4),
        push: (values, rows, fill) => {
          const source = values.subarray(begin * rows * columns, end * rows * columns);
          if (padded === columns) return arena.pushF32(source);
          const count = source.length / columns;
          const pointer = arena.scratch(count * padded * 4);
          const { f32 } = arena;
          f32.fill(fill, pointer >>> 2, (pointer >>> 2) + count * padded);
          for (let r = 0; r < count; r++)
            f32.set(source.subarray(r * columns, (r + 1) * columns), (pointer >>> 2) + r * padded);
          return pointer;
        },
        read: (pointer, rows, to) => {
          const target = to.subarray(begin * rows * columns, end * rows * columns);
          if (padded === columns) return arena.readF32(pointer, target);
          const count = target.length / columns;
          for (let r = 0; r < count; r++)
            arena.readF32(pointer + r * padded * 4, target.subarray(r * columns, (r + 1) * columns));
        },
        run: (kernel, args) =>
          pool.run(
            kernel,
            (end - begin) * Math.ceil(padded / GRID_COLUMNS),
            args,
            Math.ceil(LIGHT_WORK / (groupSize * GRID_COLUMNS)),
          ),
      }),
    ),
  );
}

/** Mean loss over elements; the gradient goes to `out`. */
export function elementLoss(
  pool: KernelPool,
  prediction: Float32Array,
  target: Float32Array,
  loss: ElementLoss,
  out: Float32Array,
): number {
  checkLength('target', target, prediction.length);
  const { arena } = pool;
  const beta = loss.kind === 'mse' ? 0 : loss.beta;
  ensure(loss.kind === 'mse' || beta > 0, 'usage', () => `smooth-L1 needs a positive beta, found ${beta}`);
  const count = prediction.length;
  let sum = 0;
  eachBand(count, Math.floor(BAND_BYTES / 4 / LOSS_CHUNK) * LOSS_CHUNK, (begin, end) =>
    arena.scoped(() => {
      const p = arena.pushF32(prediction.subarray(begin, end));
      const t = arena.pushF32(target.subarray(begin, end));
      const chunks = Math.ceil((end - begin) / LOSS_CHUNK);
      const partial = arena.scratch(chunks * 8);
      pool.run('elementLoss', chunks, [p, t, p, end - begin, beta, 1 / count, partial], 4);
      for (let c = 0; c < chunks; c++) sum += arena.f64[(partial >>> 3) + c];
      arena.readF32(p, out.subarray(begin, end));
    }),
  );
  return sum / count;
}

/** What rows of logits are compared with: target classes, or other logits. */
export type LogitTarget = { readonly targets: Int32Array } | { readonly reference: Float32Array };

/** Mean loss of rows of logits [rows, n] (cross-entropy, or KL from the reference); the gradient goes to `out`. */
export function logitLoss(
  pool: KernelPool,
  logits: Float32Array,
  rows: number,
  against: LogitTarget,
  out: Float32Array,
): number {
  const n = logits.length / rows;
  const reference = 'reference' in against ? against.reference : undefined;
  if (reference) checkLength('reference logits', reference, logits.length);
  const { arena } = pool;
  let total = 0;
  eachBand(rows, bandRows(n * 12), (begin, end) =>
    arena.scoped(() => {
      const count = end - begin;
      const x = arena.pushF32(logits.subarray(begin * n, end * n));
      const y = reference ? arena.pushF32(reference.subarray(begin * n, end * n)) : 0;
      const sums = arena.scratch(count * 64);
      const minRows = Math.ceil(LIGHT_WORK / n);
      pool.run('scoreRows', count, [x, y, n, sums], minRows);
      pool.run('logitGradient', count, [x, y, sums, x, n, 1 / rows], minRows);
      const result = out.subarray(begin * n, end * n);
      arena.readF32(x, result);
      for (let r = 0; r < count; r++) {
        const at = (sums >>> 3) + r * 8;
        const [top, sum, , , sumRef, , cross] = arena.f64.subarray(at, at + 7);
        if ('targets' in against) {
          const target = against.targets[begin + r];
          ensure(target >= 0 && target < n, 'usage', () => `target ${target} is outside ${n} classes`);
          total += top + Math.log(sum) - logits[(begin + r) * n + target];
          result[r * n + target] -= 1 / rows;
        } else {
          total += cross / sumRef + Math.log(sum) - Math.log(sumRef);
        }
      }
    }),
  );
  return total / rows;
}

/** One AdamW step in place on p, m, v. */
export function adamW(
  pool: KernelPool,
  p: Float32Array,
  g: Float32Array,
  m: Float32Array,
  v: Float32Array,
  step: AdamWStep,
): void {
  for (const values of [g, m, v]) checkLength('gradient or moment', values, p.length);
  const { arena } = pool;
  const { learningRate, beta1, beta2, eps, weightDecay } = step;
  const settings = [learningRate, beta1, beta2, eps, weightDecay, 1 - beta1 ** step.step, 1 - beta2 ** step.step];
  eachBand(p.length, BAND_BYTES / 4, (begin, end) =>
    arena.scoped(() => {
      const at = [p, g, m, v].map((values) => arena.pushF32(values.subarray(begin, end)));
      pool.run('adamW', end - begin, [...at, ...settings], LIGHT_WORK);
      arena.readF32(at[0], p.subarray(begin, end));
      arena.readF32(at[2], m.subarray(begin, end));
      arena.readF32(at[3], v.subarray(begin, end));
    }),
  );
}

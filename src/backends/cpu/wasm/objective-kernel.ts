// The layer objective's two kernels with their state in the arena.
import { ensure } from '../../../core/errors.js';
import type { KernelPool } from '../pool.js';
import type { Pointer } from './arena.js';
import {
  checkGrid,
  checkLength,
  checkRotation,
  CHUNK,
  panelBytes,
  panelColumns,
  reciprocals,
  rotationTableBytes,
  smallDivisor,
  TILE,
  writeAngles,
  writePairs,
  type RotationSpec,
} from './transform-kernels.js';

/** What an objective is made of. */
export interface ObjectiveSpec extends RotationSpec {
  /** [channels, columns]. */
  readonly weight: Float32Array;
  readonly columns: number;
  readonly bits: number;
  /** Channels per grid group; this or `groupSize` divides the other. */
  readonly gridGroupSize: number;
}

/** Scratch the kernels keep before their tiles. */
const SCRATCH_HEAD = 8192;

/** Ŵ(θ, s) = T⁻¹(Q(T(W))) and its gradient; see TransformObjective in the op contract. Holds four matrices of W's size. */
export class ObjectiveKernel {
  readonly #pool: KernelPool;
  readonly #spec: RotationSpec;
  readonly #columns: number;
  readonly #gridSize: number;
  readonly #levels: number;
  readonly #chunks: number;
  readonly #sums: number;
  #pointers: { w: Pointer; y: Pointer; out: Pointer; gradient: Pointer } & Record<
    'ranges' | 'table' | 'scales' | 'inverse' | 'partial' | 'reduced',
    Pointer
  >;
  #evaluated = false;
  #disposed = false;

  constructor(pool: KernelPool, spec: ObjectiveSpec) {
    const { channels, columns, gridGroupSize, krot } = spec;
    checkRotation(spec);
    checkGrid(channels, gridGroupSize);
    checkLength('weight', spec.weight, channels * columns);
    // Without rotations the group only says what is worked on at a time.
    const groupSize = krot ? spec.groupSize : smallDivisor(gridGroupSize);
    ensure(
      gridGroupSize % groupSize === 0 || groupSize % gridGroupSize === 0,
      'unsupported',
      () => `rotation groups of ${groupSize} and grid groups of ${gridGroupSize} channels do not nest`,
      'choose group sizes where one divides the other',
    );
    this.#pool = pool;
    this.#spec = { channels, groupSize, krot, pairs: spec.pairs };
    this.#columns = columns;
    this.#gridSize = gridGroupSize;
    this.#levels = 2 ** spec.bits - 1;
    this.#chunks = Math.ceil(columns / CHUNK);
    this.#sums = krot * (channels / 2) + channels;
    const { arena } = pool;
    const matrix = channels * columns * 4;
    const taken: Pointer[] = [];
    const take = (bytes: number): Pointer => {
      const pointer = arena.alloc(bytes);
      taken.push(pointer);
      return pointer;
    };
    try {
      this.#pointers = {
        w: take(matrix),
        y: take(matrix),
        out: take(matrix),
        gradient: take(matrix),
        ranges: take((channels / gridGroupSize) * Math.ceil(columns / TILE) * TILE * 8),
        table: take(rotationTableBytes(this.#spec)),
        scales: take(channels * 4),
        inverse: take(channels * 4),
        partial: take(this.#chunks * this.#sums * 8),
        reduced: take(this.#sums * 8),
      };
    } catch (error) {
      for (const pointer of taken) arena.free(pointer);
      throw error;
    }
    arena.f32.set(spec.weight, this.#pointers.w >>> 2);
    writePairs(pool, this.#pointers.table, this.#spec);
    const panels = panelBytes(groupSize, Math.max(panelColumns(groupSize), 2 * CHUNK));
    pool.ensureScratch(SCRATCH_HEAD + panels + Math.max(16, krot * (groupSize / 2) * 16));
  }

  /** Ŵ [channels, columns] into `out`, for theta [krot, channels / 2] and weight-side scales [channels]. */
  forward(theta: Float32Array, scales: Float32Array, out: Float32Array): void {
    const { channels, groupSize, krot } = this.#spec;
    const { arena } = this.#pool;
    const p = this.#pointers;
    this.#check();
    checkLength('theta', theta, krot * (channels / 2));
    checkLength('scales', scales, channels);
    checkLength('result', out, channels * this.#columns);
    writeAngles(this.#pool, p.table, this.#spec, theta);
    arena.f32.set(scales, p.scales >>> 2);
    arena.f32.set(reciprocals(scales), p.inverse >>> 2);
    const block = Math.max(groupSize, this.#gridSize);
    const panel = panelColumns(groupSize);
    this.#pool.run(
      'objectiveForward',
      (channels / block) * Math.ceil(this.#columns / panel),
      [p.w, p.y, p.out, p.ranges, ...this.#shape(), p.table, p.scales, p.inverse, this.#levels, panel],
      Math.ceil(20_000 / (block * Math.min(this.#columns, panel) * (krot + 1))),
    );
    arena.readF32(p.out, out);
    this.#evaluated = true;
  }

  /** Gradients at the last {@link forward}, given ∂L/∂Ŵ [channels, columns]. */
  backward(gradient: Float32Array): { theta: Float64Array; scales: Float64Array } {
    const { channels, groupSize, krot } = this.#spec;
    const { arena } = this.#pool;
    const p = this.#pointers;
    this.#check();
    ensure(this.#evaluated, 'backend', 'objective: backward before forward');
    checkLength('gradient', gradient, channels * this.#columns);
    arena.f32.set(gradient, p.gradient >>> 2);
    const block = Math.max(groupSize, this.#gridSize);
    this.#pool.run(
      'objectiveBackward',
      (channels / block) * this.#chunks,
      [p.w, p.y, p.out, p.gradient, p.ranges, ...this.#shape(), p.table, p.scales, p.inverse, this.#levels, p.partial],
      Math.ceil(20_000 / (block * Math.min(this.#columns, CHUNK) * (krot + 1))),
    );
    this.#pool.run('reduceChunks', this.#sums, [p.partial, this.#chunks, this.#sums, p.reduced], 4096);
    const at = p.reduced >>> 3;
    const angles = krot * (channels / 2);
    return { theta: arena.f64.slice(at, at + angles), scales: arena.f64.slice(at + angles, at + this.#sums) };
  }

  /** Frees the state. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    for (const pointer of Object.values(this.#pointers)) this.#pool.arena.free(pointer);
  }

  #check(): void {
    ensure(!this.#disposed, 'backend', 'objective: used after dispose');
  }

  #shape(): number[] {
    const { channels, groupSize, krot } = this.#spec;
    return [channels, this.#columns, groupSize, this.#gridSize, krot];
  }
}

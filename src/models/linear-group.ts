// A linear group: the linears that read one input. Those with equal transforms rotate once and run as one merged product.
import type { HostTensor } from '../core/tensor.js';
import { elementCount, floats } from '../core/tensor.js';
import type {
  ActivationGrid,
  Backend,
  HadamardTransform,
  LinearSource,
  PairwiseTransform,
  QuantizedWeight,
  Tensor,
  TransformHandle,
} from '../ops/backend.js';
import type { DecodeProduct } from '../ops/decode.js';

/** One linear of a group as read from a checkpoint. */
export interface LinearPart {
  readonly source: LinearSource;
  readonly transform?: PairwiseTransform;
}

/** Options of {@link LinearGroup.load}. */
export interface LinearGroupOptions {
  /** Default true; false keeps linears with equal transforms apart (ablation). */
  readonly share?: boolean;
  /** A transform of the group's input, once, before those of its parts. */
  readonly before?: HadamardTransform;
  /** Grid of the inputs of quantized linears, after their transforms; linears left in 16 bits take theirs as they are. */
  readonly activations?: ActivationGrid;
}

/** A linear group resident on a backend; output columns in the order of its parts. */
export class LinearGroup {
  readonly #backend: Backend;
  readonly #before: TransformHandle | undefined;
  readonly #products: readonly DecodeProduct[];

  private constructor(backend: Backend, before: TransformHandle | undefined, products: readonly DecodeProduct[]) {
    this.#backend = backend;
    this.#before = before;
    this.#products = products;
  }

  /** Loads the parts, merging neighbours that share transform and grid. */
  static async load(
    backend: Backend,
    parts: readonly LinearPart[],
    options: LinearGroupOptions = {},
  ): Promise<LinearGroup> {
    const { before, activations } = options;
    const runs: LinearPart[][] = [];
    for (const part of parts) {
      const last = runs.at(-1);
      if (last && options.share !== false && mergeable(last[0], part)) last.push(part);
      else runs.push([part]);
    }
    const products: DecodeProduct[] = [];
    for (const run of runs) {
      const { transform } = run[0];
      products.push({
        transform: transform && (await backend.loadTransform(transform)),
        weight: await backend.loadLinear(rounding(mergeSources(run.map((part) => part.source)), activations)),
      });
    }
    return new LinearGroup(backend, before && (await backend.loadTransform(before)), products);
  }

  /** Bytes read per row of input. */
  get bytes(): number {
    return this.#products.reduce((sum, p) => sum + p.weight.bytes, 0);
  }

  /** Products per call: 1 when the whole group shares its transform. */
  get products(): number {
    return this.#products.length;
  }

  /**
   * The products, for a backend that decodes models as a whole; undefined when the input takes a transform of the group's own and then
   * one of theirs.
   */
  get decodeProducts(): readonly DecodeProduct[] | undefined {
    const before = this.#before;
    if (!before) return this.#products;
    if (this.#products.some(({ transform }) => transform)) return undefined;
    return this.#products.map(({ weight }) => ({ weight, transform: before }));
  }

  /** x [rows, in] → [rows, Σ out], plus `residual` when the group is one product. */
  async forward(x: Tensor, residual?: Tensor): Promise<Tensor> {
    const backend = this.#backend;
    const turned = this.#before ? await backend.rotate(x, this.#before) : x;
    const outputs: Tensor[] = [];
    for (const { transform, weight } of this.#products) {
      const input = transform ? await backend.rotate(turned, transform) : turned;
      outputs.push(await backend.linear(input, weight, residual));
      if (transform) backend.free(input);
    }
    if (turned !== x) backend.free(turned);
    if (outputs.length === 1) return outputs[0];
    const merged = await backend.concatColumns(outputs);
    backend.free(...outputs);
    return merged;
  }

  release(): void {
    this.#backend.release(this.#before);
    for (const { transform, weight } of this.#products) this.#backend.release(transform, weight);
  }
}

function rounding(source: LinearSource, activations: ActivationGrid | undefined): LinearSource {
  return activations && source.kind === 'quantized' ? { ...source, activations } : source;
}

function mergeable(a: LinearPart, b: LinearPart): boolean {
  return sameTransform(a.transform, b.transform) && sameGrid(a.source, b.source) && !a.source.bias === !b.source.bias;
}

function sameGrid(a: LinearSource, b: LinearSource): boolean {
  if (a.kind === 'dense') return b.kind === 'dense' && a.weight.dtype === b.weight.dtype;
  return b.kind === 'quantized' && a.weight.bits === b.weight.bits && a.weight.groupSize === b.weight.groupSize;
}

/** Whether two transforms are equal to the byte. */
export function sameTransform(a: PairwiseTransform | undefined, b: PairwiseTransform | undefined): boolean {
  if (a === b) return true;
  if (!a || !b) return false;
  return (
    a.channels === b.channels &&
    a.groupSize === b.groupSize &&
    a.krot === b.krot &&
    equal(a.pairs, b.pairs) &&
    equal(a.theta, b.theta) &&
    equal(a.channelScales, b.channelScales)
  );
}

function equal(a: ArrayLike<number>, b: ArrayLike<number>): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

/** Stacks linears along their outputs. */
function mergeSources(sources: readonly LinearSource[]): LinearSource {
  if (sources.length === 1) return sources[0];
  const bias =
    sources[0].bias &&
    concat(
      Float32Array,
      sources.map((s) => s.bias ?? new Float32Array(0)),
    );
  const quantized = sources.flatMap((s) => (s.kind === 'quantized' ? [s.weight] : []));
  if (quantized.length > 0) {
    const weight: QuantizedWeight = {
      ...quantized[0],
      outFeatures: quantized.reduce((sum, w) => sum + w.outFeatures, 0),
      codes: concat(
        Uint8Array,
        quantized.map((w) => w.codes),
      ),
      zeros: concat(
        Uint8Array,
        quantized.map((w) => w.zeros),
      ),
      scales: concat(
        Float32Array,
        quantized.map((w) => w.scales),
      ),
    };
    return { kind: 'quantized', weight, bias };
  }
  const dense = sources.flatMap((s) => (s.kind === 'dense' ? [s.weight] : []));
  return { kind: 'dense', weight: stackRows(dense), bias };
}

/** [a, n], [b, n], … → [a + b + …, n], keeping the dtype. */
export function stackRows(tensors: readonly HostTensor[]): HostTensor {
  const [first] = tensors;
  if (tensors.length === 1) return first;
  const shape = [tensors.reduce((sum, t) => sum + t.shape[0], 0), ...first.shape.slice(1)];
  if (tensors.every((t) => t.data instanceof Float64Array)) {
    const values = new Float64Array(elementCount(shape));
    tensors.reduce((at, t) => (values.set(t.data as Float64Array, at), at + t.data.length), 0);
    return { dtype: 'f64', shape, data: values };
  }
  const data =
    first.dtype === 'bf16' || first.dtype === 'f16'
      ? new Uint16Array(elementCount(shape))
      : new Float32Array(elementCount(shape));
  let offset = 0;
  for (const t of tensors) {
    data.set(data instanceof Uint16Array ? (t.data as Uint16Array) : floats(t), offset);
    offset += t.data.length;
  }
  return { dtype: data instanceof Uint16Array ? first.dtype : 'f32', shape, data };
}

function concat<T extends Uint8Array | Float32Array>(make: new (n: number) => T, arrays: readonly T[]): T {
  const out = new make(arrays.reduce((sum, a) => sum + a.length, 0));
  let offset = 0;
  for (const a of arrays) {
    out.set(a, offset);
    offset += a.length;
  }
  return out;
}

// Hadamard transforms of rows in f32, any order and any stride of the transformed axis: a workgroup holds a few vectors in
// workgroup memory, the power-of-two part is log₂ p passes of butterflies there, and the base matrix's rows are added up on the
// way out. Bytes moved: the input once, the output once, signs from cache. Longer vectors than workgroup memory holds go in
// two stages, H = (B ⊗ I)(I ⊗ S), each this kernel.
import { defineKernel, read, variants, write } from '../kernel.js';
import { LINEAR_GROUP } from '../tensor.js';

/** One stage: B ⊗ S of order m · p along an axis. */
export interface HadamardStage {
  /** Order of the base matrix; 1 for none. */
  readonly m: number;
  /** Order of Sylvester's matrix, a power of two. */
  readonly p: number;
  /** Elements between two neighbours of the axis. */
  readonly inner: number;
}

/** See {@link hadamardKernel}. */
export interface HadamardVariant extends HadamardStage {
  /** Vectors at a time. */
  readonly together: number;
  /** Transforms `out` itself. */
  readonly inPlace: boolean;
}

/** Bytes of workgroup memory. */
export const hadamardMemory = ({ m, p }: Pick<HadamardStage, 'm' | 'p'>, together: number): number =>
  4 * m * p * together;

/**
 * Vector v of `vectors` starts at (v / inner) · m·p·inner + v % inner. `signs` [m, m]: ±1, of B or, for the inverse, of Bᵀ
 * (unread when m is 1). One workgroup per `together` vectors.
 */
export const hadamardKernel = variants(({ m, p, inner, together, inPlace }: HadamardVariant) => {
  const n = m * p;
  const size = n * together;
  const threads = Math.min(256, Math.max(32, 2 ** Math.floor(Math.log2(size / 2))));
  // Neighbouring threads take neighbouring elements in memory: of one vector, or of neighbouring vectors across an inner axis.
  const contiguous = inner === 1;
  const [element, vector] = contiguous ? [`i % ${n}u`, `i / ${n}u`] : [`i / ${together}u`, `i % ${together}u`];
  return defineKernel({
    name: `hadamard.${n}${m > 1 ? `.base${m}` : ''}${contiguous ? '' : `.inner${inner}`}${inPlace ? '.inPlace' : ''}`,
    buffers: { ...(inPlace ? {} : { x: read('f32') }), signs: read('f32'), out: write('f32') } as {
      x: ReturnType<typeof read>;
      signs: ReturnType<typeof read>;
      out: ReturnType<typeof write>;
    },
    params: { vectors: 'u32', scale: 'f32' },
    body: /* wgsl */ `
${LINEAR_GROUP}
const N = ${n}u;
const P = ${p}u;
var<workgroup> values: array<f32, ${size}>;
fn place(v: u32, e: u32) -> u32 { return (v / ${inner}u) * ${n * inner}u + v % ${inner}u + e * ${inner}u; }
@compute @workgroup_size(${threads})
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let first = linearGroup(group, groups) * ${together}u;
  for (var i = lid; i < ${size}u; i += ${threads}u) {
    let v = min(first + ${vector}, params.vectors - 1u);
    values[i] = params.scale * ${inPlace ? 'out' : 'x'}[place(v, ${element})];
  }
  for (var reach = 1u; reach < P; reach *= 2u) {
    workgroupBarrier();
    for (var t = lid; t < ${size / 2}u; t += ${threads}u) {
${
  contiguous
    ? `      let i = (t / reach) * 2u * reach + t % reach;
      let j = i + reach;`
    : `      let pair = t / ${together}u;
      let i = ((pair / reach) * 2u * reach + pair % reach) * ${together}u + t % ${together}u;
      let j = i + reach * ${together}u;`
}
      let a = values[i];
      let b = values[j];
      values[i] = a + b;
      values[j] = a - b;
    }
  }
  workgroupBarrier();
  for (var i = lid; i < ${size}u; i += ${threads}u) {
    let e = ${element};
    let v = ${vector};
${
  m === 1
    ? '    let y = values[i];'
    : `    var y = 0.0;
    let row = (e / P) * ${m}u;
    let home = ${contiguous ? `v * N + e % P` : `(e % P) * ${together}u + v`};
    for (var c = 0u; c < ${m}u; c++) { y = fma(signs[row + c], values[home + c * ${contiguous ? 'P' : `${p * together}u`}], y); }`
}
    if (first + v < params.vectors) { out[place(first + v, e)] = y; }
  }
}`,
  });
});

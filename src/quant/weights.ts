// Moving a group's weights between the checkpoint's [out, in] on the host and channel-major [in, cols] on a backend.
import { hostTensor } from '../core/tensor.js';
import type { Backend, GridSpec, PairwiseTransform, QuantizedWeight, RoundedWeight, Tensor } from '../ops/backend.js';
import type { QuantizedPart } from './types.js';

/** Stacks [out_i, in] weights and transposes them: [in, Σ out_i]. */
export async function channelMajor(
  backend: Backend,
  weights: readonly Float32Array[],
  inFeatures: number,
): Promise<Tensor> {
  const cols = weights.reduce((sum, w) => sum + w.length / inFeatures, 0);
  let stacked = weights[0];
  if (weights.length > 1) {
    stacked = new Float32Array(cols * inFeatures);
    let offset = 0;
    for (const w of weights) {
      stacked.set(w, offset);
      offset += w.length;
    }
  }
  const rows = await backend.upload(hostTensor('f32', [cols, inFeatures], stacked));
  const transposed = await backend.transpose(rows);
  backend.free(rows);
  return transposed;
}

/** Splits a rounded [in, cols] weight into one stored linear per projection, [out, in] order. */
export function splitRounded(
  rounded: Pick<RoundedWeight, 'codes' | 'zeros' | 'scales'>,
  grid: GridSpec,
  inFeatures: number,
  outFeatures: readonly number[],
  transform?: PairwiseTransform,
): QuantizedPart[] {
  const cols = outFeatures.reduce((a, b) => a + b, 0);
  const groups = inFeatures / grid.groupSize;
  let begin = 0;
  return outFeatures.map((out) => {
    const weight: QuantizedWeight = {
      bits: grid.bits,
      groupSize: grid.groupSize,
      inFeatures,
      outFeatures: out,
      codes: transposeColumns(rounded.codes, inFeatures, cols, begin, new Uint8Array(out * inFeatures)),
      zeros: transposeColumns(rounded.zeros, groups, cols, begin, new Uint8Array(out * groups)),
      scales: transposeColumns(rounded.scales, groups, cols, begin, new Float32Array(out * groups)),
    };
    begin += out;
    return transform ? { weight, transform } : { weight };
  });
}

/** Columns [begin, begin + out.length / rows) of [rows, cols] as [columns, rows], in tiles that stay in cache. */
function transposeColumns<T extends Uint8Array | Float32Array>(
  data: T,
  rows: number,
  cols: number,
  begin: number,
  out: T,
): T {
  const count = out.length / rows;
  const tile = 64;
  for (let r0 = 0; r0 < rows; r0 += tile) {
    const r1 = Math.min(r0 + tile, rows);
    for (let c0 = 0; c0 < count; c0 += tile) {
      const c1 = Math.min(c0 + tile, count);
      for (let c = c0; c < c1; c++) for (let r = r0; r < r1; r++) out[c * rows + r] = data[r * cols + begin + c];
    }
  }
  return out;
}

// Scores of logits against targets and a reference.
import { ensure } from '../../core/errors.js';
import type { RowScores, Tensor } from '../../ops/backend.js';
import type { GpuDevice } from './device.js';
import { SCORE_VALUES, scoreKernel, scoreOnceKernel } from './kernels/score.js';
import { own, spread, type GpuTensor } from './tensor.js';

/** See InferenceOps.score. */
export async function score(
  gpu: GpuDevice,
  logits: GpuTensor,
  targets: Int32Array,
  reference?: Tensor,
): Promise<RowScores> {
  const { rows, cols: vocab } = logits.matrix;
  const compared = reference && own(reference);
  ensure(
    targets.length === rows && (!compared || compared.elements === logits.elements),
    'tensor-shape',
    () => `${targets.length} targets and a reference of [${compared?.shape.join(', ')}] for ${rows} × ${vocab} logits`,
  );
  for (const target of targets)
    ensure(target >= 0 && target < vocab, 'usage', () => `target ${target} is outside the vocabulary of ${vocab}`);
  const ids = gpu.buffer(targets.byteLength);
  gpu.upload(ids, targets);
  const out = gpu.buffer(rows * SCORE_VALUES * 4);
  const params = { rows, vocab };
  if (!compared && vocab % 4 === 0)
    gpu.dispatch(scoreOnceKernel, { logits, values: logits, targets: ids, out }, params, spread(rows));
  else
    gpu.dispatch(
      scoreKernel(compared !== undefined),
      { logits, reference: compared ?? logits, targets: ids, out },
      params,
      spread(rows),
    );
  // From here on nothing but the read is waited for: the inputs are the caller's again.
  const bytes = await gpu.read(out, 0, rows * SCORE_VALUES * 4);
  gpu.release(ids);
  gpu.release(out);
  const values = new Float32Array(bytes);
  const indices = new Uint32Array(bytes);
  const nll = new Float64Array(rows);
  const hit = new Uint8Array(rows);
  const kl = new Float64Array(rows);
  const agree = new Uint8Array(rows);
  for (let r = 0; r < rows; r++) {
    const at = r * SCORE_VALUES;
    const logSum = Math.log(values[at + 2]);
    nll[r] = logSum - values[at + 3];
    hit[r] = indices[at + 1] === targets[r] ? 1 : 0;
    const total = values[at + 6];
    kl[r] = values[at + 7] / total + logSum - Math.log(total);
    agree[r] = indices[at + 1] === indices[at + 5] ? 1 : 0;
  }
  return compared ? { nll, hit, kl, agree } : { nll, hit };
}

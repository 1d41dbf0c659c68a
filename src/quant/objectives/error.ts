// Relative output error of a rounded weight, the number every recipe reports and the searches minimise.
import { GyreError } from '../../core/errors.js';
import type { Backend, Tensor } from '../../ops/backend.js';
import type { GroupTask } from '../types.js';

/** tr((Ŵ−W)·H·(Ŵ−W)ᵀ) / tr(W·H·Wᵀ) for channel-major weights [in, cols]. */
export async function quadraticError(backend: Backend, gram: Tensor, estimate: Tensor, w: Tensor): Promise<number> {
  return (
    (await quadraticForm(backend, gram, await backend.addScaled(estimate, w, -1), true)) /
    (await quadraticForm(backend, gram, w))
  );
}

/** tr(DᵀHD). Frees `d` when asked to. */
export async function quadraticForm(backend: Backend, gram: Tensor, d: Tensor, freeD = false): Promise<number> {
  const product = await backend.matmul(gram, d);
  const value = await backend.dot(d, product);
  backend.free(product, freeD ? d : undefined);
  return value;
}

/** The task's Gram matrix; the pipeline gives it to every recipe that says it needs one. */
export function requireGram(task: GroupTask): Tensor {
  if (!task.gram) throw new GyreError('calibration', `${task.names[0]}: this recipe needs calibration statistics`);
  return task.gram;
}

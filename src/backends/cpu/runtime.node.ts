// ONNX Runtime's native CPU build.
import * as ort from 'onnxruntime-node';
import type { Runtime } from './runtime-types.js';

export const runtime: Runtime = {
  name: 'onnxruntime-node',
  InferenceSession: ort.InferenceSession,
  Tensor: ort.Tensor,
};

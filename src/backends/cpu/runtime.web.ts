// ONNX Runtime's WebAssembly build, for browsers.
import * as ort from 'onnxruntime-web/wasm';
import type { Runtime } from './runtime.js';

/** Threads need a cross-origin-isolated page (SharedArrayBuffer); ONNX Runtime uses one without. */
export function openRuntime(threads: number): Runtime {
  ort.env.wasm.numThreads = typeof SharedArrayBuffer === 'undefined' ? 1 : threads;
  return { name: 'onnxruntime-web', InferenceSession: ort.InferenceSession, Tensor: ort.Tensor };
}

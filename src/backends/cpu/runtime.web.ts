// ONNX Runtime's WebAssembly build, for browsers.
import * as ort from 'onnxruntime-web/wasm';
import type { Fetches, Runtime, RuntimeSession } from './runtime-types.js';

/** Threads need a cross-origin-isolated page (SharedArrayBuffer); ONNX Runtime uses one without. */
export function openRuntime(threads: number): Runtime {
  ort.env.wasm.numThreads = typeof SharedArrayBuffer === 'undefined' ? 1 : threads;
  return { name: 'onnxruntime-web', InferenceSession: { create: createSession }, Tensor: ort.Tensor };
}

/** A session that fills the outputs it is given: ONNX Runtime's own copies them into its memory and never back. */
async function createSession(model: Uint8Array, options: ort.InferenceSession.SessionOptions): Promise<RuntimeSession> {
  const session = await ort.InferenceSession.create(model, options);
  return {
    async run(feeds, fetches: Fetches) {
      const outputs = await session.run(feeds, Object.keys(fetches));
      for (const [name, wanted] of Object.entries(fetches)) {
        if (wanted) (wanted.data as Float32Array).set(outputs[name].data as Float32Array);
      }
    },
    release: () => session.release(),
  };
}

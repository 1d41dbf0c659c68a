// What the CPU backend uses of ONNX Runtime's API; the native and the WebAssembly build both have it.
import type { InferenceSession, Tensor } from 'onnxruntime-common';

/** Outputs of a run by name: a tensor to fill, or null for one that nobody reads. */
export type Fetches = Readonly<Record<string, Tensor | null>>;

/** A loaded model. */
export interface RuntimeSession {
  run(feeds: Readonly<Record<string, Tensor>>, fetches: Fetches): Promise<unknown>;
  release(): Promise<void>;
}

/** The part of ONNX Runtime's API that the CPU backend uses. */
export interface Runtime {
  readonly name: string;
  readonly InferenceSession: {
    create(model: Uint8Array, options: InferenceSession.SessionOptions): Promise<RuntimeSession>;
  };
  readonly Tensor: typeof Tensor;
}

// Picks ONNX Runtime's build for where we run: onnxruntime-node in Node.js, onnxruntime-web (WebAssembly) in a browser.
import { inNode } from '../../core/environment.js';
import type { Runtime } from './runtime-types.js';

let runtime: Promise<Runtime> | undefined;

/** Loads ONNX Runtime once. `threads` only matters for the browser build, whose threads are per page. */
export function loadRuntime(threads: number): Promise<Runtime> {
  runtime ??= inNode
    ? import('./runtime.node.js').then((m) => m.runtime)
    : import('./runtime.web.js').then((m) => m.openRuntime(threads));
  return runtime;
}

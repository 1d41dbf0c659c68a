// Picks ONNX Runtime's build for where we run: onnxruntime-node in Node.js, onnxruntime-web (WebAssembly) in a browser.
import type { Runtime } from './runtime-types.js';

/** True in Node.js (and Bun and Deno's compatibility layer), false in a browser. */
export const inNode = typeof process !== 'undefined' && typeof process.versions?.node === 'string';

let runtime: Promise<Runtime> | undefined;

/** Loads ONNX Runtime once. `threads` only matters for the browser build, whose threads are per page. */
export function loadRuntime(threads: number): Promise<Runtime> {
  runtime ??= inNode
    ? import('./runtime.node.js').then((m) => m.runtime)
    : import('./runtime.web.js').then((m) => m.openRuntime(threads));
  return runtime;
}

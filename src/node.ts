// gyre's public API in Node.js: everything of `gyre`, models by folder or hub id, and quantization to disk.
export * from './index.js';
export { hubCacheDir } from './formats/hub-request.node.js';
export { resolveModel, type ResolvedModel, type ResolveOptions } from './formats/hub.node.js';
export { folderFiles, openFile } from './formats/source.node.js';
export { quantizeCheckpoint, type QuantizeReport } from './quantize.node.js';

// Public face of formats/: checkpoints and their layouts, in any JavaScript engine. Disk and hub: index.node.ts.
export * from './huggingface-config.js';
export * from './int4.js';
export * from './quantization-config.js';
export * from './quantized-linear.js';
export * from './safetensors-writer.js';
export * from './safetensors.js';
export * from './source.js';
export * from './source.web.js';

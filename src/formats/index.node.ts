// Public face of formats/ in Node.js: disk, hub, atomic writes.
export * from './atomic.node.js';
export * from './hub.node.js';
export { datasetFile, PARQUET_BRANCH, type DatasetFile } from './hub-dataset.node.js';
export { HUB_URL, hubCacheDir, type HubOptions } from './hub-request.node.js';
export * from './safetensors-writer.node.js';
export * from './source.node.js';

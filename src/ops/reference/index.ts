// Public face of the reference backend.
export { createReferenceBackend, readF64 } from './backend.js';

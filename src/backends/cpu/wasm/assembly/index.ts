// The CPU kernels, compiled from AssemblyScript to WebAssembly with SIMD (scripts/build-wasm.mjs). Pure functions over raw
// pointers: no allocation, no mutable globals, so that instances in several threads can share one memory. Kernels that
// the pool splits take (begin, end, scratch, …): units [begin, end) of their outputs and a scratch area of their thread.
export { transformChannels, rotationGradient, multiplyAddPeak } from './rotation';
export { fakeQuantize } from './grid';
export { objectiveForward, objectiveBackward, reduceChunks } from './objective';
export { gptqBlock } from './gptq';
export { descentBlock } from './descent';
export { cholesky, invertLower, transpose } from './linalg';
export { rmsNorm, siluMul, rotateRows, splitHeads } from './forward';
export { attention, attentionForest, appendCache } from './attention';
export { hadamardRows } from './hadamard';
export { quantizeRows, encodeRows, appendQuantized, decodeCache, attentionQuantized } from './activations';
export {
  quantizeActivations, gemvNibbles, gemvBytes, packPanels, dequantizePanels, prepareActivations, gemvF32, gemvF16, gemvBf16, decodeRows,
} from './products';
export { scoreRows } from './score';
export {
  rmsNormGradient, siluMulGradient, splitHeadsGradient, scaleAndDot, gridForward, gridGradient, scaleGroups, sumGroups, elementLoss, logitGradient, adamW,
} from './gradients';
export { attentionGradient } from './attention-gradient';

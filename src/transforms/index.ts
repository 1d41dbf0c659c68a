// Transforms of a linear layer's input: what the quantizers learn and the checkpoints carry.
export {
  applyToActivations,
  identityTransform,
  mergeEqual,
  randomPairs,
  xorPairs,
  roundTransform,
  transformWeightRows,
} from './pairwise.js';
export { validateGrouping, validatePairs, validateTransform, type PairLayout } from './validate.js';
export {
  applyHadamard,
  hadamardTransform,
  largestHadamardOrder,
  randomHadamard,
  rotateColumns,
  rotateRows,
  type HadamardOptions,
  type RandomHadamard,
} from './hadamard.js';
export { findHadamardBase, hadamardBase, type HadamardBase, type HadamardConstruction } from './hadamard-matrix.js';

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

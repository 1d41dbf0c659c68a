// Training over the op contract: the tape, AdamW, schedules. Inference never imports this room.
export { ADAM_DEFAULTS, cosineRate, Optimizer, type OptimizerOptions, type ParameterGroup } from './optimizer.js';
export { constant, parameter, Tape, Variable, type Loss, type RotationLayout, type TapeOptions } from './tape.js';

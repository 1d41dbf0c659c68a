// Public face of tokenizer/.
export * from './chat.js';
export * from './stream-decoder.js';
export * from './tokenizer.js';

// Residual streams of calibration sequences, kept between blocks: in memory, or wherever the store that is given puts them.

/** The two residual streams: of the original model, and of the model quantized so far. */
export type Stream = 'reference' | 'quantized';

/** Keeps one array of a fixed length per stream and sequence; writing replaces. */
export interface ActivationStore {
  write(stream: Stream, sequence: number, values: Float32Array): Promise<void>;
  /** @throws Error for a sequence never written. */
  read(stream: Stream, sequence: number): Promise<Float32Array>;
}

/** A store in memory. */
export function memoryActivations(): ActivationStore {
  const kept = new Map<string, Float32Array>();
  return {
    write: async (stream, sequence, values) => {
      kept.set(`${stream} ${sequence}`, values);
    },
    read: async (stream, sequence) => {
      const values = kept.get(`${stream} ${sequence}`);
      if (!values) throw new Error(`the ${stream} stream of sequence ${sequence} was never written`);
      return values;
    },
  };
}

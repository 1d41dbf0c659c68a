// Drift along a chain: how far a quantized model is from its reference at each position of long texts, as one JSON object.
import { z } from 'zod';

/** Value of `kind` in a drift file. */
export const DRIFT_KIND = 'gyre.drift';

const measure = z.object({ value: z.number(), low: z.number().nullable(), high: z.number().nullable() });

export const driftSchema = z.object({
  kind: z.literal(DRIFT_KIND),
  schemaVersion: z.literal(1),
  version: z.string(),
  model: z.object({ name: z.string(), fingerprint: z.string() }),
  reference: z.object({ name: z.string(), fingerprint: z.string() }),
  /** Texts the numbers are means over, in words and in number. */
  text: z.string(),
  chains: z.int().min(1),
  /** Runs of positions [from, to), in order. */
  positions: z
    .array(
      z.object({
        from: z.int().min(0),
        to: z.int().min(1),
        /** KL(reference ‖ model), nats per token. */
        kl: measure,
        /** Share of positions with the same most likely next token, 0 … 1. */
        top1Agreement: measure,
      }),
    )
    .min(1),
});
export type DriftResult = z.output<typeof driftSchema>;

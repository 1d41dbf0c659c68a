// Options of `gyre eval`: the command and what it runs read the same ones.
import { z } from 'zod';
import { decimalNumber, modelSchema, oneOf, runtimeSchema, wholeNumber } from './options.js';

/** Options of the command as commander collects them. */
export const evalSchema = z.object({
  ...modelSchema,
  ...runtimeSchema,
  text: z.array(z.string()).optional(),
  reference: z.string().optional(),
  seqLen: wholeNumber(2, 10_000_000).optional(),
  samples: wholeNumber(1).optional(),
  protocol: oneOf(['windows', 'strided', 'rolling']).optional(),
  stride: wholeNumber(1).optional(),
  startToken: oneOf(['none', 'once', 'each']).optional(),
  perDocument: z.boolean().optional(),
  tasks: z.string().optional(),
  drift: z.string().optional(),
  listTasks: z.boolean().optional(),
  data: z.string().optional(),
  limit: wholeNumber(1).optional(),
  fewShot: wholeNumber(0, 256).optional(),
  nSamples: wholeNumber(1, 1024).optional(),
  maxTokens: wholeNumber(1).optional(),
  temperature: decimalNumber({ min: 0 }).optional(),
  topP: decimalNumber({ above: 0, max: 1 }).optional(),
  topK: wholeNumber(0).optional(),
  thinking: z.boolean(),
  batchSize: wholeNumber(1, 4096),
  seed: wholeNumber(0),
  out: z.string().optional(),
  cache: z.union([z.string(), z.literal(false)]),
});

/** Options of the command, checked. */
export type EvalOptions = z.output<typeof evalSchema>;

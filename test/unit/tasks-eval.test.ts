// Task accuracy: reading tasks, and judging with a decoder and a tokenizer that answer what they are told to.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { createRng } from '../../src/core/rng.js';
import { evaluateTasks, judge, parseTasks, taskSet, type TaskSample } from '../../src/evaluation/index.js';
import type { Decoder } from '../../src/models/decoder.js';
import type { Backend, SequenceCopy, Tensor } from '../../src/ops/backend.js';
import type { Tokenizer } from '../../src/tokenizer/index.js';

const tasks = taskSet(createRng(1), 10);
const END = 255;

/** Characters as ids. */
const tokenizer = {
  bosTokenId: undefined,
  eosTokenIds: [END],
  encode: (text: string) => Int32Array.from([...text].map((c) => c.charCodeAt(0))),
  decode: (ids: Int32Array) => String.fromCharCode(...ids),
  applyChatTemplate: (messages: readonly { content: string }[]) => `Q:${messages[0].content}\n`,
} as unknown as Tokenizer;

let backend: Backend;

/** A cache whose keys and values are the text itself. */
interface TextCache {
  readonly batch: number;
  readonly capacity: number;
  readonly texts: string[];
}

/** A decoder that answers each question with a text of its own, from logits made for the purpose. */
function scripted(answers: ReadonlyMap<string, string>): Decoder {
  const shape = { layers: 1, kvHeads: 1, headDim: 1 };
  return {
    backend,
    config: { vocabSize: 256, maxPositions: 4096, eosTokenIds: [], ropeScaling: { type: 'default' }, ...shape },
    createCache: async (batch: number, capacity: number): Promise<TextCache> => ({
      batch,
      capacity,
      texts: Array.from({ length: batch }, () => ''),
    }),
    copySequences: async (from: TextCache, to: TextCache, copies: readonly SequenceCopy[]) => {
      for (const copy of copies) to.texts[copy.to] = from.texts[copy.from].slice(0, copy.tokens);
    },
    releaseCache: () => undefined,
    prepareDecode: async () => undefined,
    hidden: async (ids: Int32Array, { cache, starts }: { cache: TextCache; starts: Int32Array }): Promise<Tensor> => {
      const { texts } = cache;
      const width = ids.length / texts.length;
      for (const [i, start] of starts.entries())
        texts[i] = texts[i].slice(0, start) + String.fromCharCode(...ids.subarray(i * width, (i + 1) * width));
      const logits = new Float32Array(256 * texts.length);
      for (const [i, text] of texts.entries()) {
        const at = text.indexOf('\n');
        const answer = answers.get(text.slice(2, at)) ?? '';
        const next = at < 0 ? END : answer.charCodeAt(text.length - at - 1) || END;
        logits[i * 256 + next] = 1;
      }
      return backend.upload({ dtype: 'f32', shape: [texts.length, 256], data: logits });
    },
    // A copy: both are freed.
    logits: async (hidden: Tensor) =>
      backend.upload({ dtype: 'f32', shape: hidden.shape, data: await backend.download(hidden) }),
  } as unknown as Decoder;
}

beforeAll(async () => {
  backend = await openBackend('reference');
});
afterAll(async () => {
  await backend.dispose();
});

describe('evaluateTasks', () => {
  it('counts right answers by kind', async () => {
    const wrong = new Set([tasks[2].question, tasks[7].question]);
    const answer = (t: TaskSample): string => `<think>${t.steps}</think>${wrong.has(t.question) ? '-1' : t.answer}`;
    const answers = new Map(tasks.map((t) => [t.question, answer(t)]));
    const result = await evaluateTasks(scripted(answers), tokenizer, tasks, { batchSize: 4 });
    expect(result).toMatchObject({ tasks: 10, correct: 8, accuracy: 0.8 });
    expect(result.kinds.reduce((sum, k) => sum + k.correct, 0)).toBe(8);
    expect(result.answers.map((a) => a.correct)).toEqual(tasks.map((t) => !wrong.has(t.question)));
    expect(result.answers[0].text).toBe(answer(tasks[0]));
    expect(result.accuracyStandardError).toBeCloseTo(Math.sqrt(0.16 / 10));
  });

  it('takes no answer for a wrong one', () => {
    expect(judge(tasks[0], '<think>1+1')).toMatchObject({ answer: null, correct: false });
  });
});

describe('parseTasks', () => {
  it('reads what the generator writes', () => {
    const text = tasks.map((t) => JSON.stringify(t)).join('\n');
    expect(parseTasks(`${text}\n\n`, 'tasks.jsonl')).toEqual(tasks);
  });

  it.each([
    ['x', /line 1: not JSON/],
    [`${JSON.stringify(tasks[0])}\n{"kind":"addition"}`, /line 2: /],
    ['{"kind":"chess","difficulty":1,"question":"?","answer":"1"}', /line 1: kind/],
    ['\n\n', /no tasks/],
  ])('names the line that is wrong: %s', (text, message) => {
    expect(() => parseTasks(text, 'tasks.jsonl')).toThrow(message);
  });
});

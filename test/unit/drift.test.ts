// Drift on the bundled model: against itself nothing moves; against a copy rounded to 2 bits the numbers say where.
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { evaluateDrift, parseTasks } from '../../src/evaluation/index.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import type { Decoder } from '../../src/models/decoder.js';
import type { Backend } from '../../src/ops/backend.js';
import { loadTokenizer, type Tokenizer } from '../../src/tokenizer/index.js';

const MODEL = path.join(import.meta.dirname, '../../models/gyre-14m');

describe('evaluateDrift', () => {
  let backend: Backend;
  let original: Decoder;
  let rounded: Decoder;
  let tokenizer: Tokenizer;
  const tasks = parseTasks(readFileSync(path.join(MODEL, 'eval/tasks.jsonl'), 'utf8'), 'tasks.jsonl').slice(0, 2);

  beforeAll(async () => {
    backend = await openBackend('cpu');
    const files = await folderFiles(MODEL);
    const source = await openModel(files);
    tokenizer = await loadTokenizer(files);
    original = await loadDecoder(backend, source);
    rounded = await loadDecoder(backend, source, { roundWeights: { bits: 2, groupSize: 128 } });
    await source.checkpoint.close();
  });
  afterAll(async () => backend.dispose());

  it('finds none between a model and itself', async () => {
    const drift = await evaluateDrift(original, original, tokenizer, tasks, { maxTokens: 24 });
    expect(drift.kl.value).toBeLessThan(1e-9);
    expect(drift.top1Agreement).toEqual({ value: 1, low: 1, high: 1 });
    expect([drift.departed, drift.medianDeparture, drift.sameAnswerAfterDeparture]).toEqual([0, null, 0]);
    expect(drift.correct).toBe(drift.referenceCorrect);
    expect(drift.byPosition.reduce((sum, p) => sum + p.tokens, 0)).toBe(drift.chainTokens);
    expect(drift.byLength.reduce((sum, l) => sum + l.tasks, 0)).toBe(tasks.length);
    expect(drift.byPosition[0]).toMatchObject({ from: 0, to: 16 });
  });

  it('says where a model rounded to 2 bits departs', async () => {
    const drift = await evaluateDrift(rounded, original, tokenizer, tasks, { maxTokens: 24 });
    expect(drift.kl.value).toBeGreaterThan(0.01);
    expect(drift.top1Agreement.value).toBeLessThan(1);
    expect(drift.departed).toBeGreaterThan(0);
    const departures = drift.outcomes.flatMap((o) => (o.departure === null ? [] : [o.departure]));
    expect(departures).toHaveLength(drift.departed);
    expect(departures).toContain(drift.medianDeparture);
    expect(Math.max(...departures)).toBeLessThanOrEqual(24);
    expect(drift.sameAnswerAfterDeparture).toBeLessThanOrEqual(drift.sameAnswer);
  });

  it('refuses an empty list of tasks', async () => {
    await expect(evaluateDrift(original, original, tokenizer, [])).rejects.toThrow(/no tasks/);
  });
});

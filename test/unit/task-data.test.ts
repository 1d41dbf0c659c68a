// Task files and their data: every bundled definition, odd and damaged files, limits, prompts as the harness writes them.
import { existsSync, readFileSync } from 'node:fs';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { loadRows, loadTask, taskNames } from '../../src/evaluation/data.node.js';
import {
  parseTaskDefinition,
  type ChoicesTask,
  type GenerationTask,
  type TaskDefinition,
} from '../../src/evaluation/definition.js';
import {
  choiceItems,
  completionItems,
  drawnWindows,
  fewShotCount,
  generationItems,
  taskTexts,
  type ItemOptions,
} from '../../src/evaluation/items.js';
import { readRows, type Row } from '../../src/evaluation/rows.js';
import { evalFolder } from '../support/eval-data.js';
import { digest, fakeHub, MEMBER_TOKEN } from '../support/fake-hub.js';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'gyre-tasks-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const names = await taskNames();
const parquetFile = (name: string): Uint8Array =>
  readFileSync(path.join(import.meta.dirname, `../fixtures/parquet/${name}.parquet`));
const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
const choices = async (name: string): Promise<ChoicesTask> => {
  const task = await loadTask(name);
  if (task.type !== 'choices') throw new Error(`${name} has no choices`);
  return task;
};
const generation = async (name: string): Promise<GenerationTask> => {
  const task = await loadTask(name);
  if (task.type !== 'generation') throw new Error(`${name} is not generated`);
  return task;
};

describe('task files', () => {
  it.each(names)('%s is valid and called like its file', async (name) => {
    expect((await loadTask(name)).name).toBe(name);
  });

  it('are those of the issue', () => {
    const wanted =
      'wikitext2 c4 ptb piqa hellaswag arc_easy arc_challenge winogrande lambada boolq openbookqa mmlu gsm8k math500 aime24 aime25 gpqa_diamond mmlu_pro chains';
    for (const name of wanted.split(' ')) expect(names).toContain(name);
  });

  it('may lie anywhere: one file is a task', async () => {
    const own = JSON.parse(readFileSync(path.join(import.meta.dirname, '../../tasks/piqa.json'), 'utf8')) as Record<
      string,
      unknown
    >;
    const file = path.join(folder, 'mine.json');
    await writeFile(file, JSON.stringify({ ...own, name: 'mine' }));
    expect((await loadTask(file)).name).toBe('mine');
  });

  it.each<[string, (task: Record<string, unknown>) => void, RegExp]>([
    ['an unknown field', (t) => (t['promt'] = 'x'), /promt/],
    ['no revision', (t) => delete (t['source'] as Record<string, unknown>)['revision'], /source\.revision/],
    ['a branch as revision', (t) => ((t['source'] as Record<string, unknown>)['revision'] = 'main'), /40 hexadecimal/],
    ['a split without files', (t) => (t['split'] = 'dev'), /no 'dev'/],
    ['an unknown metric', (t) => (t['metrics'] = ['f1']), /metrics/],
    ['an unknown kind', (t) => (t['type'] = 'ranking'), /type/],
    ['neither prompt nor contexts', (t) => delete t['prompt'], /prompt and choices/],
    [
      'a path that climbs',
      (t) =>
        ((t['source'] as { splits: Record<string, unknown> }).splits = { validation: [{ path: '../../etc/passwd' }] }),
      /relative path/,
    ],
  ])('are refused with %s', (_, change, message) => {
    const task = JSON.parse(readFileSync(path.join(import.meta.dirname, '../../tasks/piqa.json'), 'utf8')) as Record<
      string,
      unknown
    >;
    change(task);
    expect(() => parseTaskDefinition(JSON.stringify(task), 'piqa.json')).toThrow(message);
  });

  it('name what is there when there is none of the name', async () => {
    await expect(loadTask('arc_hard')).rejects.toMatchObject({
      code: 'not-found',
      remedy: expect.stringContaining('arc_easy') as string,
    });
    expect(() => parseTaskDefinition('{"schemaVersion": 1', 'x.json')).toThrow(
      expect.objectContaining({ code: 'file-corrupt' }),
    );
    expect(() => parseTaskDefinition('x'.repeat(300_000), 'x.json')).toThrow(
      expect.objectContaining({ code: 'limit-exceeded' }),
    );
  });
});

describe('readRows', () => {
  const rows = [
    { question: 'a, "b"\nc', answer: 1 },
    { question: 'd', answer: 2 },
  ];
  it.each<[string, Uint8Array, Row[]]>([
    ['x.jsonl', bytes(`${JSON.stringify(rows[0])}\n\n${JSON.stringify(rows[1])}\n`), rows],
    ['x.json', bytes(JSON.stringify(rows)), rows],
    ['x.json.gz', gzipSync(rows.map((row) => JSON.stringify(row)).join('\n')), rows],
    [
      'x.csv',
      bytes('question,answer\r\n"a, ""b""\nc",1\r\nd,2\r\n'),
      rows.map((row) => ({ ...row, answer: String(row.answer) })),
    ],
    ['x.raw', bytes(' = Title = \n \n text\n'), [{ text: ' = Title = \n' }, { text: '' }, { text: ' text\n' }]],
  ])('reads %s', async (name, content, wanted) => {
    expect(await readRows(content, name)).toEqual(wanted);
    expect(await readRows(content, name, { limit: 1 })).toEqual(wanted.slice(0, 1));
  });

  it.each<[string, string, Uint8Array, string]>([
    ['a line cut short', 'x.jsonl', bytes('{"a": 1}\n{"a": '), 'line 2'],
    ['a line that is no object', 'x.jsonl', bytes('{"a": 1}\n[2]'), 'line 2'],
    ['a list cut short', 'x.json', bytes('[{"a": 1}, {"a"'), 'not JSON'],
    ['a quote that never closes', 'x.csv', bytes('a,b\n1,"2\n3,4\n'), 'never closed'],
    ['a record with too few fields', 'x.csv', bytes('a,b\n1\n'), 'record 2'],
    ['bytes that are no text', 'x.jsonl', Uint8Array.of(0x7b, 0xff, 0xfe), 'UTF-8'],
    ['gzip cut short', 'x.jsonl.gz', gzipSync('{"a": 1}\n'.repeat(500)).subarray(0, 40), 'gzip'],
    ['Parquet that is none', 'x.parquet', bytes('PAR1 and nothing more'), 'Parquet'],
    ['an empty Parquet file', 'x.parquet', new Uint8Array(0), 'Parquet'],
  ])('refuses %s', async (_, name, content, message) => {
    await expect(readRows(content, name)).rejects.toMatchObject({
      code: 'file-corrupt',
      message: expect.stringContaining(message) as string,
    });
  });

  it('reads Parquet as the hub holds it: nested columns, gaps, compressions, row groups', async () => {
    const count = 25;
    const arc = await readRows(parquetFile('arc-snappy'), 'arc.parquet');
    expect(arc).toHaveLength(count);
    // The 13th row is of the second row group.
    expect(arc[13]).toEqual({
      id: 'Made_13',
      question: 'Which of these is 13 more than 13? Größe: ½',
      choices: { text: ['26', '13', '13, or so'], label: ['A', 'B', 'C'] },
      answerKey: 'A',
    });
    const mixed = Array.from({ length: count }, (_, i) => ({
      ind: i,
      label: i % 4,
      endings: [0, 1, 2, 3].map((k) => `ends ${i}.${k}`),
      answer: i % 2 === 0,
      subject: i < 13 ? 'some_subject' : 'another',
      note: i % 5 === 0 ? undefined : `n${i}`,
      score: i / 8,
    }));
    for (const name of ['mixed-zstd', 'mixed-gzip']) {
      const rows = await readRows(parquetFile(name), `${name}.parquet`);
      expect(rows.map((row) => ({ ...row, note: row['note'] ?? undefined }))).toEqual(mixed);
      expect(await readRows(parquetFile(name), `${name}.parquet`, { limit: 3 })).toEqual(rows.slice(0, 3));
    }
    const [item] = choiceItems(await choices('arc_easy'), arc);
    expect([item.id, item.continuations, item.answer]).toEqual(['Made_0', [' 0', ' 0'], 1]);
    const cut = parquetFile('arc-snappy').slice(0, -9);
    await expect(readRows(cut, 'x.parquet')).rejects.toMatchObject({ code: 'file-corrupt' });
    const flipped = Uint8Array.from(parquetFile('arc-snappy'));
    flipped.fill(0xff, 40, 200);
    await expect(readRows(flipped, 'x.parquet')).rejects.toMatchObject({ code: 'file-corrupt' });
  });

  it('knows no other formats', async () => {
    await expect(readRows(bytes('x'), 'x.arrow')).rejects.toMatchObject({ code: 'unsupported' });
    await expect(readRows(bytes('x'), 'x.parquet.gz')).rejects.toMatchObject({ code: 'unsupported' });
  });
});

describe('questions', () => {
  it('of ARC are put as in lm-evaluation-harness', async () => {
    const row = {
      id: 'q7',
      question: 'What is wet?',
      choices: { text: ['Sand', 'Wäter'], label: ['A', 'B'] },
      answerKey: 'B',
    };
    const [item] = choiceItems(await choices('arc_easy'), [row]);
    expect(item).toEqual({
      id: 'q7',
      group: null,
      contexts: ['Question: What is wet?\nAnswer:', 'Question: What is wet?\nAnswer:'],
      continuations: [' Sand', ' Wäter'],
      bytes: [4, 6],
      answer: 1,
    });
  });

  it('of WinoGrande differ before the gap and end alike', async () => {
    const row = {
      sentence: 'The cup was in the bag because _ was small, a_b.',
      option1: 'cup',
      option2: 'bag',
      answer: '2',
    };
    const [item] = choiceItems(await choices('winogrande'), [row]);
    expect(item.contexts).toEqual(['The cup was in the bag because cup', 'The cup was in the bag because bag']);
    expect(item.continuations).toEqual([' was small, a_b.', ' was small, a_b.']);
    expect(item.answer).toBe(1);
  });

  it('of HellaSwag are cleaned', async () => {
    const row = {
      ind: 3,
      activity_label: 'Baking',
      ctx_a: 'A man bakes.',
      ctx_b: 'he Then',
      endings: ['[header] eats [title] Bread', 'runs'],
      label: '0',
    };
    const [item] = choiceItems(await choices('hellaswag'), [row]);
    expect(item.contexts[0]).toBe('Baking: A man bakes. He then');
    expect(item.continuations).toEqual(['  eats. Bread', ' runs']);
  });

  it('of LAMBADA ask for the last word', async () => {
    const task = await loadTask('lambada');
    if (task.type !== 'completion') throw new Error('no completion');
    const [item] = completionItems(task, [{ text: 'He looked at the sea' }]);
    expect([item.contexts, item.continuations]).toEqual([['He looked at the'], [' sea']]);
  });

  it('of BoolQ and MMLU take labels and subjects', async () => {
    const [boolq] = choiceItems(await choices('boolq'), [
      { passage: 'Title -- P.', question: 'is it', idx: 3, label: 1 },
    ]);
    expect([boolq.contexts[0], boolq.continuations, boolq.answer]).toEqual([
      'Title -- P.\nQuestion: is it?\nAnswer:',
      [' no', ' yes'],
      1,
    ]);
    const task = await choices('mmlu');
    const row = (subject: string, n: number): Row => ({
      question: ` ${subject} ${n}? `,
      subject,
      choices: ['w', 'x', 'y', 'z'],
      answer: n % 4,
    });
    const examples = ['some_subject', 'other'].flatMap((subject) => [0, 1, 2].map((n) => row(subject, n)));
    const [item] = choiceItems(task, [row('some_subject', 9)], { fewShot: 2, examples });
    expect(item.group).toBe('some_subject');
    expect(item.contexts[0]).toBe(
      'The following are multiple choice questions (with answers) about some subject.\n\n' +
        'some_subject 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n' +
        'some_subject 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n' +
        'some_subject 9?\nA. w\nB. x\nC. y\nD. z\nAnswer:',
    );
    expect(() => choiceItems(task, [row('other', 1)], { fewShot: 4, examples })).toThrow(/the split has 3/);
  });

  it('of GPQA are shuffled by seed, and the letter follows', async () => {
    const task = await generation('gpqa_diamond');
    const row = {
      'Record ID': 'r',
      Question: ' Why? ',
      'Correct Answer': 'right\n',
      'Incorrect Answer 1': 'w1',
      'Incorrect Answer 2': 'w2',
      'Incorrect Answer 3': 'w3',
    };
    const rows = Array.from({ length: 40 }, () => row);
    const items = generationItems(task, rows, { seed: 3 });
    expect(new Set(items.map(({ answer }) => answer))).toEqual(new Set(['A', 'B', 'C', 'D']));
    for (const { answer, prompt } of items) expect(prompt).toContain(`\n${answer}) right`);
    expect(generationItems(task, rows, { seed: 3 })).toEqual(items);
    expect(generationItems(task, rows, { seed: 4 })).not.toEqual(items);
    expect(items[0].prompt).toMatch(/is one of ABCD\. [^]*\n\nWhy\?\n\nA\) \w+\nB\) \w+\nC\) \w+\nD\) \w+$/);
  });

  it('say which row lacks a column or an answer', async () => {
    const task = await choices('piqa');
    const good = { goal: 'g', sol1: 'a', sol2: 'b', label: 0 };
    expect(() => choiceItems(task, [good, { goal: 'g', sol1: 'a', label: 1 }])).toThrow(
      /piqa, row 2: no column 'sol2'/,
    );
    expect(() => choiceItems(task, [{ ...good, label: -1 }])).toThrow(/names none of 2 choices/);
    expect(() => choiceItems(task, [])).toThrow(/no questions/);
    expect(() => fewShotCount({ ...task, fewShot: undefined }, 3)).toThrow(/no split/);
  });

  it('draw the examples of the harness', async () => {
    const task = await choices('piqa');
    const row = (goal: string): Row => ({ goal, sol1: 'a', sol2: 'b', label: 0 });
    const rows = Array.from({ length: 6 }, (_, i) => row(`g${i}`));
    const examples = Array.from({ length: 40 }, (_, i) => row(`e${i}`));
    const drawn = (options: ItemOptions): string[][] =>
      choiceItems(task, rows, { fewShot: 3, examples, ...options }).map(({ contexts: [context] }) =>
        [...context.matchAll(/Question: (\w+)/g)].map(([, goal]) => goal),
      );
    // By Python: rnd = random.Random(1234); for each question rnd.sample(examples, 3).
    expect(drawn({})).toEqual([
      ['e28', 'e7', 'e0', 'g0'],
      ['e5', 'e37', 'e2', 'g1'],
      ['e5', 'e6', 'e22', 'g2'],
      ['e15', 'e1', 'e22', 'g3'],
      ['e39', 'e30', 'e29', 'g4'],
      ['e9', 'e5', 'e11', 'g5'],
    ]);
    expect(drawn({ limit: 2 })).toEqual(drawn({}).slice(0, 2));
    expect(drawn({ seed: 1234 })).toEqual(drawn({}));
    expect(drawn({ seed: 2 })).not.toEqual(drawn({}));
  });

  it('are never examples of themselves where both come from one split', async () => {
    const piqa = await choices('piqa');
    const task: ChoicesTask = {
      ...piqa,
      fewShot: { split: piqa.split, count: 0, sampler: 'random', separator: '\n\n' },
    };
    const row = (i: number): Row => ({ goal: `g${i}`, sol1: 'a', sol2: 'b', label: 0 });
    const rows = Array.from({ length: 9 }, (_, i) => row(i));
    // Read twice, as the loader does: equal rows, not the same objects.
    const items = choiceItems(task, rows, { fewShot: 3, examples: Array.from({ length: 9 }, (_, i) => row(i)) });
    for (const [i, { contexts }] of items.entries()) {
      expect(contexts[0].match(new RegExp(`g${i}\\n`, 'g'))).toHaveLength(1);
      expect(contexts[0].match(/Question/g)).toHaveLength(4);
    }
  });
});

describe('drawnWindows', () => {
  /** A start token, then a token for each character that says which row and place it is of. */
  const texts = Array.from({ length: 30 }, (_, row) => 'x'.repeat((row * 7) % 23) + String(row % 10));
  const encode = (row: number): Int32Array =>
    Int32Array.from({ length: ((row * 7) % 23) + 1 }, (_, at) => 1000 * row + at);
  const draw = (seqLen: number, windows = 12): Int32Array => {
    let row = -1;
    const rows = new Map(texts.map((text, i) => [text + String(i), i]));
    return drawnWindows(
      texts.map((text, i) => text + String(i)),
      { windows, seed: 0 },
      seqLen,
      (text) => encode((row = rows.get(text) ?? row)),
    );
  };

  it('are those that the papers draw', () => {
    const tokens = draw(8);
    const places = Array.from({ length: 12 }, (_, i) => [Math.floor(tokens[8 * i] / 1000), tokens[8 * i] % 1000]);
    // By Python: random.seed(0); randint over rows until one has more than 8 tokens, randint(0, tokens - 8 - 1).
    expect(places).toEqual([
      [12, 6],
      [8, 2],
      [15, 3],
      [29, 4],
      [15, 2],
      [18, 1],
      [16, 2],
      [9, 2],
      [3, 9],
      [25, 2],
      [29, 8],
      [22, 2],
    ]);
    for (let i = 0; i < tokens.length; i++) expect(tokens[i] - tokens[i - (i % 8)]).toBe(i % 8);
    expect([...draw(8, 3)]).toEqual([...tokens.slice(0, 24)]);
  });

  it('refuse a length that no row has', () => {
    expect(() => draw(23)).toThrow(/none of 30 rows has more than 23 tokens/);
  });
});

describe('loadRows', () => {
  it('finds data by the names people use', async () => {
    const data = path.join(folder, 'data');
    await mkdir(path.join(data, 'allenai/openbookqa/main'), { recursive: true });
    await writeFile(path.join(data, 'piqa.jsonl'), '{"goal":"g","sol1":"a","sol2":"b","label":0}\n');
    await writeFile(path.join(data, 'ptb.test.txt'), ' no it was \n yes \n');
    const piqa = await loadRows(await loadTask('piqa'), 'validation', { data });
    expect(piqa).toMatchObject({ revision: null, rows: [{ goal: 'g' }], files: [{ name: 'piqa.jsonl' }] });
    const ptb = await loadTask('ptb');
    if (ptb.type !== 'text') throw new Error('no text');
    expect(taskTexts(ptb, (await loadRows(ptb, 'test', { data })).rows).join(ptb.join)).toBe('no it was yes');
    await expect(loadRows(ptb, 'test', { offline: true, cacheDir: folder })).rejects.toMatchObject({
      code: 'not-found',
      remedy: expect.stringContaining('ptb') as string,
    });
    await expect(loadRows(ptb, 'test', { data: path.join(folder, 'nowhere') })).rejects.toMatchObject({
      code: 'not-found',
    });
    // The pinned file under its own path keeps its checksum.
    await writeFile(path.join(data, 'allenai/openbookqa/main/test-00000-of-00001.parquet'), 'something else');
    await expect(loadRows(await loadTask('openbookqa'), 'test', { data })).rejects.toMatchObject({
      code: 'file-corrupt',
      message: expect.stringContaining('SHA-256') as string,
    });
  });

  it('brings the chains along', async () => {
    const { rows } = await loadRows(await loadTask('chains'), 'test');
    expect(rows.length).toBeGreaterThan(100);
  });

  describe('from a hub', () => {
    const content = bytes('{"text": "It was a dark night"}\n');
    const commit = '1'.repeat(40);
    const converted = '2'.repeat(40);
    const setUp = async (access: 'public' | 'gated' = 'public') => {
      const hub = await fakeHub([
        {
          kind: 'dataset',
          name: 'me/set',
          commits: {
            [commit]: { 'data/test.jsonl': content },
            [converted]: { 'default/test/0000.parquet': parquetFile('text-plain') },
          },
          refs: { main: commit, 'refs/convert/parquet': converted },
          access,
        },
      ]);
      return { hub, where: { hubUrl: hub.url, cacheDir: await mkdtemp(path.join(folder, 'hub-')) } };
    };
    const task = (file: { path: string; sha256?: string }, revision = commit): TaskDefinition =>
      parseTaskDefinition(
        JSON.stringify({
          schemaVersion: 1,
          name: 'mine',
          title: 'Mine',
          version: 0,
          type: 'text',
          source: { dataset: 'me/set', revision, splits: { test: [file] }, gated: true },
          split: 'test',
          columns: ['text'],
          text: '{{ text }}',
          join: '\n',
        }),
        'mine.json',
      );
    const lines = { path: 'data/test.jsonl' };

    it('fetches a pinned file once and checks it', async () => {
      const { hub, where } = await setUp();
      const found = await loadRows(task(lines), 'test', where);
      expect(found).toMatchObject({
        revision: commit,
        rows: [{ text: 'It was a dark night' }],
        files: [{ name: 'data/test.jsonl', sha256: digest('sha256', content) }],
      });
      const before = hub.log.length;
      const pinned = task({ ...lines, sha256: found.files[0].sha256 });
      expect((await loadRows(pinned, 'test', { ...where, offline: true })).rows).toHaveLength(1);
      expect(hub.log).toHaveLength(before);
      await expect(loadRows(task({ ...lines, sha256: '0'.repeat(64) }), 'test', where)).rejects.toMatchObject({
        code: 'file-corrupt',
      });
    });

    it('reads the Parquet conversion, and says at which commit', async () => {
      const { hub, where } = await setUp();
      const own = task({ path: 'default/test/0000.parquet' }, 'refs/convert/parquet');
      const found = await loadRows(own, 'test', where);
      expect(found.revision).toBe(converted);
      expect(found.rows).toEqual([{ text: 'one' }, { text: 'two' }]);
      expect(hub.storageLog).toHaveLength(1);
    });

    it('says how to go on without it', async () => {
      const { where } = await setUp();
      await expect(loadRows(task(lines), 'test', { ...where, offline: true })).rejects.toMatchObject({
        code: 'not-found',
        remedy: expect.stringContaining('--data') as string,
      });
      await expect(loadRows(task({ path: 'data/other.jsonl' }), 'test', where)).rejects.toMatchObject({
        code: 'file-missing',
      });
    });

    it('tells gated sets from missing ones', async () => {
      const { where } = await setUp('gated');
      await expect(loadRows(task(lines), 'test', where)).rejects.toMatchObject({
        code: 'network',
        remedy: expect.stringMatching(/accept its terms on the hub and set HF_TOKEN/) as string,
      });
      expect((await loadRows(task(lines), 'test', { ...where, token: MEMBER_TOKEN })).rows).toHaveLength(1);
    });
  });
});

describe.skipIf(evalFolder === undefined)('real sets (need ../shared/data/eval)', () => {
  const data = evalFolder ?? '';
  it.each([
    ['gsm8k', 1319],
    ['math500', 500],
    ['aime25', 30],
  ] as const)('%s', async (name, count) => {
    const task = await generation(name);
    const { rows, files } = await loadRows(task, task.split, { data });
    const items = generationItems(task, rows);
    expect(items).toHaveLength(count);
    expect(new Set(items.map(({ id }) => id)).size).toBe(count);
    for (const { prompt, answer } of items) {
      expect(prompt).toMatch(/\\boxed\{\}\.$/);
      expect(answer).not.toBe('');
    }
    expect(files[0].name).toBe(`${name}-test.jsonl`);
    if (name !== 'math500') for (const { answer } of items) expect(answer).toMatch(/^-?[\d,]+$/);
  });

  it('WikiText-2 has its lines and headings', async () => {
    const task = await loadTask('wikitext2_tokens');
    if (task.type !== 'text') throw new Error('no text');
    if (!existsSync(path.join(data, 'wiki.test.tokens'))) return;
    const texts = taskTexts(task, (await loadRows(task, 'test', { data })).rows);
    expect(texts).toHaveLength(4358);
    expect(texts.filter((text) => / = [^=]+ = \n$/.test(text) && !text.includes('= =')).length).toBeGreaterThan(50);
  });
});

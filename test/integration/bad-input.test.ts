// What quantizing refuses or survives: each bad input gives an error that names the thing and says what to do, leaves no
// output and touches no earlier one; killed and stopped runs go on to the same bytes.
import { spawn, spawnSync, type ChildProcess } from 'node:child_process';
import { closeSync, existsSync, openSync, writeSync } from 'node:fs';
import { copyFile, mkdir, mkdtemp, open, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, it, onTestFinished, vi } from 'vitest';
import { openBackend } from '../../src/backends/registry.js';
import { GyreError, type ErrorCode } from '../../src/core/errors.js';
import { createRng } from '../../src/core/rng.js';
import type { HostTensor } from '../../src/core/tensor.js';
import { SafetensorsFile } from '../../src/formats/safetensors.js';
import { writeSafetensors } from '../../src/formats/safetensors-writer.node.js';
import { folderFiles, openFile } from '../../src/formats/source.node.js';
import { collect, contextLength, generate } from '../../src/generate/index.js';
import { loadDecoder, openModel } from '../../src/models/load.js';
import type { QuantizePlan } from '../../src/quant/plan.js';
import { RECIPES } from '../../src/quant/recipes/index.js';
import { isBlockRecipe } from '../../src/quant/types.js';
import { quantizeCheckpoint, type QuantizeOptions, type QuantizeReport } from '../../src/quantize.node.js';
import { FIXTURES } from '../support/pipeline.js';
import { rawSafetensors } from '../unit/formats/helpers.js';

const ROOT = path.resolve(import.meta.dirname, '../..');
const BUNDLED = path.join(ROOT, 'models/gyre-14m');
const FIXTURE_VOCAB = 96;

let scratch: string;
/** Fresh for each test. */
let model: string;
let out: string;
let count = 0;
beforeAll(async () => {
  scratch = await mkdtemp(path.join(tmpdir(), 'gyre-bad-input-'));
});
beforeEach(() => {
  model = path.join(scratch, `model-${++count}`);
  out = path.join(scratch, `out-${count}`);
});
afterAll(() => rm(scratch, { recursive: true, force: true }));

/** Copies a fixture's config and weights into `model`. */
async function copyFixture(name = 'qwen3'): Promise<void> {
  await mkdir(model, { recursive: true });
  const names = (await readdir(path.join(FIXTURES, name))).filter((file) => /^(config\.json|model.*)$/.test(file));
  for (const file of names) await copyFile(path.join(FIXTURES, name, file), path.join(model, file));
}

async function copyTokenizer(): Promise<void> {
  for (const file of ['tokenizer.json', 'tokenizer_config.json']) {
    await copyFile(path.join(BUNDLED, file), path.join(model, file));
  }
}

/** Changes `model`'s config.json. */
async function editConfig(changes: Readonly<Record<string, unknown>>): Promise<void> {
  const file = path.join(model, 'config.json');
  const config = JSON.parse(await readFile(file, 'utf8')) as Record<string, unknown>;
  await writeFile(file, JSON.stringify({ ...config, ...changes }));
}

/** Rewrites `model`'s model.safetensors with changed tensors; undefined leaves one out. */
async function editTensors(change: (name: string, tensor: HostTensor) => HostTensor | undefined): Promise<void> {
  const name = path.join(model, 'model.safetensors');
  const file = await SafetensorsFile.open(await openFile(name));
  const tensors: [string, HostTensor][] = [];
  for (const tensor of file.tensors.keys()) {
    const changed = change(tensor, await file.read(tensor));
    if (changed) tensors.push([tensor, changed]);
  }
  await file.close();
  await writeSafetensors(
    name,
    tensors.map(([tensor, { dtype, shape, data }]) => ({ name: tensor, dtype, shape, data: () => data })),
  );
}

/** Sets one element of a tensor of f32. */
function poison(target: string, index: number, value: number) {
  return editTensors((name, tensor) => {
    if (name === target) tensor.data[index] = value;
    return tensor;
  });
}

/** Multiplies tensors of f32 whose names match. */
function magnify(pattern: RegExp, factor: number) {
  return editTensors((name, tensor) => {
    if (!pattern.test(name)) return tensor;
    return { ...tensor, data: (tensor.data as Float32Array).map((v) => v * factor) };
  });
}

function randomIds(sequences: number, length: number, vocab = FIXTURE_VOCAB) {
  const rng = createRng(3);
  const ids = Int32Array.from({ length: sequences * length }, () => rng.int(0, vocab));
  return { ids, sequences, length, description: 'random' };
}

/** Quantizes `model` into `out`: small groups, few steps, one thread, random calibration tokens unless texts are given. */
function quantize(options: Partial<QuantizeOptions> = {}): Promise<QuantizeReport> {
  return quantizeCheckpoint({
    model,
    out,
    method: 'rtn',
    groupSize: 32,
    krot: 2,
    steps: 3,
    threads: 1,
    ...(options.calib ? { calibSamples: 2, seqLen: 16 } : { calibrationTokens: randomIds(4, 16) }),
    ...options,
  });
}

/** Expects a GyreError that names the thing and has a remedy, and (unless `keeps`) that nothing is left of the run. */
async function expectRefused(
  run: () => Promise<unknown>,
  code: ErrorCode,
  message: RegExp,
  options: { remedy?: RegExp; keeps?: boolean } = {},
): Promise<GyreError> {
  const error: unknown = await run().then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  expect(error, String(error)).toBeInstanceOf(GyreError);
  const found = error as GyreError;
  expect(`${found.code}: ${found.message}`).toMatch(new RegExp(`^${code}: `));
  expect(found.message).toMatch(message);
  expect(found.remedy ?? '').toMatch(options.remedy ?? /./);
  if (!options.keeps) {
    expect(existsSync(out)).toBe(false);
    expect(existsSync(`${out}.partial`)).toBe(false);
  }
  return found;
}

async function folderBytes(folder: string): Promise<Record<string, string>> {
  const files: Record<string, string> = {};
  for (const name of (await readdir(folder)).sort()) {
    files[name] = (await readFile(path.join(folder, name))).toString('base64');
  }
  return files;
}

async function logitsOf(folder: string, ids: Int32Array): Promise<Float32Array> {
  const backend = await openBackend('cpu', { threads: 1 });
  const source = await openModel(await folderFiles(folder));
  try {
    const decoder = await loadDecoder(backend, source);
    return await backend.download(await decoder.logits(await decoder.hidden(ids)));
  } finally {
    await source.checkpoint.close();
    await backend.dispose();
  }
}

interface Shape {
  readonly hidden: number;
  readonly intermediate: number;
  readonly layers: number;
  readonly vocab: number;
  readonly headDim: number;
}

/** A random Llama checkpoint in `model`. */
async function makeRandomModel({ hidden, intermediate, layers, vocab, headDim }: Shape): Promise<void> {
  await mkdir(model, { recursive: true });
  const rng = createRng(11);
  const matrix = (name: string, rows: number, columns: number) => {
    const data = Float32Array.from({ length: rows * columns }, () => rng.normal() * columns ** -0.5);
    return { name, dtype: 'f32' as const, shape: [rows, columns], data: () => data };
  };
  const norm = (name: string) => ({
    name,
    dtype: 'f32' as const,
    shape: [hidden],
    data: () => new Float32Array(hidden).fill(1),
  });
  const blocks = Array.from({ length: layers }, (_, i) => {
    const prefix = `model.layers.${i}`;
    return [
      norm(`${prefix}.input_layernorm.weight`),
      norm(`${prefix}.post_attention_layernorm.weight`),
      ...['q', 'k', 'v'].map((p) => matrix(`${prefix}.self_attn.${p}_proj.weight`, 2 * headDim, hidden)),
      matrix(`${prefix}.self_attn.o_proj.weight`, hidden, 2 * headDim),
      matrix(`${prefix}.mlp.gate_proj.weight`, intermediate, hidden),
      matrix(`${prefix}.mlp.up_proj.weight`, intermediate, hidden),
      matrix(`${prefix}.mlp.down_proj.weight`, hidden, intermediate),
    ];
  });
  const tensors = [matrix('model.embed_tokens.weight', vocab, hidden), ...blocks.flat(), norm('model.norm.weight')];
  await writeSafetensors(path.join(model, 'model.safetensors'), tensors);
  const config = {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    vocab_size: vocab,
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: layers,
    num_attention_heads: 2,
    num_key_value_heads: 2,
    head_dim: headDim,
    max_position_embeddings: 128,
    rms_norm_eps: 1e-6,
    tie_word_embeddings: true,
    hidden_act: 'silu',
  };
  await writeFile(path.join(model, 'config.json'), JSON.stringify(config));
}

describe('a damaged model.safetensors', () => {
  const f32 = (shape: number[], begin: number, end: number) => ({ dtype: 'F32', shape, data_offsets: [begin, end] });
  const bytes = (n: number) => new Uint8Array(n);
  const cases: [string, () => Promise<unknown>, ErrorCode, RegExp][] = [
    ['is missing', () => rm(weights()), 'file-missing', /model\.safetensors/],
    ['is empty', () => truncate(weights(), 0), 'file-corrupt', /model\.safetensors: truncated/],
    ['ends inside its header', () => truncate(weights(), 100), 'file-corrupt', /model\.safetensors: truncated/],
    ['ends inside its data', () => shorten(10), 'file-corrupt', /model\.safetensors: tensor \S+ claims bytes/],
    ['is longer than its header says', () => lengthen(8), 'file-corrupt', /model\.safetensors: 8 bytes after the last/],
    ['claims a header of 4 GB', () => raw('{}', bytes(0), 2n ** 32n), 'limit-exceeded', /header claims 4294967296/],
    ['claims a header past its end', () => raw('{}', bytes(0), 999n), 'file-corrupt', /header claims 999 bytes/],
    ['has a header that is not JSON', () => raw('{"a": '), 'file-corrupt', /model\.safetensors: .*not valid JSON/],
    [
      'has overlapping tensors',
      () => raw({ a: f32([2], 0, 8), b: f32([2], 4, 12) }, bytes(12)),
      'file-corrupt',
      /tensor b overlaps/,
    ],
    ['has a hole', () => raw({ a: f32([2], 0, 8), b: f32([1], 12, 16) }, bytes(16)), 'file-corrupt', /hole .*tensor b/],
    [
      'has sizes that do not fit',
      () => raw({ a: f32([3], 0, 8) }, bytes(8)),
      'file-corrupt',
      /tensor a: .*12 bytes.* 8/,
    ],
    ['has offsets that go back', () => raw({ a: f32([2], 8, 0) }, bytes(8)), 'file-corrupt', /tensor a claims bytes 8/],
    ['has an impossible shape', () => raw({ a: f32([1e9, 1e9], 0, 8) }, bytes(8)), 'limit-exceeded', /tensor a/],
  ];
  const weights = (): string => path.join(model, 'model.safetensors');
  const raw = async (header: unknown, data?: Uint8Array, claimed?: bigint) =>
    writeFile(weights(), rawSafetensors(header, data, claimed));
  const shorten = async (by: number) => truncate(weights(), (await readFile(weights())).length - by);
  const lengthen = async (by: number) => truncate(weights(), (await readFile(weights())).length + by);

  it.each(cases)('%s', async (_, damage, code, message) => {
    await copyFixture();
    await damage();
    await expectRefused(() => quantize(), code, message);
  });

  it('lacks a shard, or disagrees with the index', async () => {
    await copyFixture('llama3');
    const index = path.join(model, 'model.safetensors.index.json');
    const whole = await readFile(index, 'utf8');
    await writeFile(index, whole.replace('model.norm.weight', 'model.nrom.weight'));
    await expectRefused(() => quantize(), 'file-corrupt', /index\.json .*model\.nrom\.weight/);
    await writeFile(index, whole);
    await rm(path.join(model, 'model-00002-of-00002.safetensors'));
    await expectRefused(() => quantize(), 'file-missing', /model-00002-of-00002\.safetensors/);
  });
});

describe('tensors that do not fit the config', () => {
  const names = [
    'model.embed_tokens.weight',
    'model.layers.1.self_attn.k_proj.weight',
    'model.layers.1.self_attn.q_norm.weight',
    'model.layers.0.post_attention_layernorm.weight',
    'model.layers.1.mlp.down_proj.weight',
    'model.norm.weight',
  ];
  it.each(names)('%s is named before anything is written', async (target) => {
    await copyFixture();
    await editTensors((name, tensor) => {
      if (name !== target) return tensor;
      const [rows, ...rest] = tensor.shape;
      const kept = tensor.data.subarray(0, tensor.data.length - tensor.data.length / rows);
      return { ...tensor, shape: [rows - 1, ...rest], data: kept };
    });
    await expectRefused(() => quantize(), 'tensor-shape', new RegExp(`${target}: expected shape .* found`));
    await copyFixture();
    await editTensors((name, tensor) => (name === target ? undefined : tensor));
    await expectRefused(() => quantize(), 'tensor-missing', new RegExp(`no tensor ${target}`));
  });

  it('a head of its own that is not there is missed', async () => {
    await copyFixture();
    await editConfig({ tie_word_embeddings: false });
    await expectRefused(() => quantize(), 'tensor-missing', /no tensor lm_head\.weight/);
  });
});

describe('a config', () => {
  const cases: [string, Record<string, unknown>, ErrorCode, RegExp, RegExp][] = [
    [
      'of an unknown architecture',
      { architectures: ['MambaForCausalLM'] },
      'unsupported',
      /"MambaForCausalLM"/,
      /LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM/,
    ],
    [
      'of an unknown RoPE type',
      { rope_scaling: { rope_type: 'longrope', factor: 4 } },
      'unsupported',
      /RoPE type "longrope"/,
      /default, linear, dynamic, llama3, yarn/,
    ],
    [
      'whose RoPE lacks its factor',
      { rope_scaling: { rope_type: 'linear' } },
      'config-invalid',
      /linear needs factor/,
      /./,
    ],
    ['of another activation', { hidden_act: 'gelu' }, 'unsupported', /"gelu"/, /silu/],
    ['with a nonsense size', { hidden_size: -3 }, 'config-invalid', /hidden_size/, /./],
    ['that is quantized by others', { quantization_config: { quant_method: 'fp8' } }, 'unsupported', /"fp8"/, /16-bit/],
  ];
  it.each(cases)('%s', async (_, changes, code, message, remedy) => {
    await copyFixture();
    await editConfig(changes);
    await expectRefused(() => quantize(), code, message, { remedy });
  });

  it('that is missing or no JSON', async () => {
    await copyFixture();
    await writeFile(path.join(model, 'config.json'), '{"a": ');
    await expectRefused(() => quantize(), 'file-corrupt', /config\.json/);
    await rm(path.join(model, 'config.json'));
    await expectRefused(() => quantize(), 'file-missing', /config\.json/);
  });
});

describe('a model that is quantized already', () => {
  it.each(['rtn', 'paroquant'])('by %s is refused', async (method) => {
    await copyFixture();
    await quantize({ method });
    [model, out] = [out, `${out}-again`];
    await expectRefused(() => quantize({ method }), 'unsupported', /quantized already/, { remedy: /16-bit/ });
  });
});

describe('NaN and infinity in weights', () => {
  const places: [string, number][] = [
    ['model.layers.0.self_attn.q_proj.weight', 7],
    ['model.layers.1.mlp.down_proj.weight', 100],
    ['model.layers.1.self_attn.k_norm.weight', 3],
    ['model.layers.0.input_layernorm.weight', 0],
    ['model.norm.weight', 5],
    ['model.embed_tokens.weight', 95 * 64],
  ];
  it.each(places)('in %s are named', async (name, index) => {
    for (const [method, value] of [
      ['rtn', Infinity],
      ['gptq', NaN],
    ] as const) {
      await copyFixture();
      await poison(name, index, value);
      const run = () => quantize({ method });
      await expectRefused(run, 'non-finite', new RegExp(name.replaceAll('.', '\\.')), { keeps: true });
      expect(existsSync(out)).toBe(false);
      await rm(`${out}.partial`, { recursive: true, force: true });
    }
  });

  it('in a bias are named', async () => {
    await copyFixture('qwen2');
    await poison('model.layers.1.self_attn.v_proj.bias', 2, -Infinity);
    await expectRefused(() => quantize(), 'non-finite', /layers\.1\.self_attn\.v_proj\.bias: element 2/, {
      keeps: true,
    });
  });
});

describe('activations that overflow', () => {
  type Case = [string, [RegExp, number][], RegExp];
  const cases: Case[] = [
    ['at the embedding', [[/embed_tokens/, 1e25]], /embed_tokens/],
    ['before attention', [[/layers\.1\.input_layernorm/, 1e25]], /inputs of qkv of block 1/],
    [
      'after attention',
      [
        [/layers\.0\.input_layernorm/, 1e16],
        [/layers\.0\.self_attn\.v_proj/, 1e6],
      ],
      /inputs of o of block 0/,
    ],
    ['before the MLP', [[/layers\.1\.post_attention_layernorm/, 1e25]], /inputs of gateUp of block 1/],
    ['inside the MLP', [[/layers\.0\.post_attention_layernorm/, 1e13]], /inputs of down of block 0/],
    [
      'at the end of a block',
      [
        [/post_attention_layernorm/, 1e8],
        [/down_proj/, 1e5],
      ],
      /output of block 0|outputs of down of block 0/,
    ],
  ];
  const recipes = RECIPES.filter((r) => r.needs !== 'nothing');
  it.each(cases.flatMap((c) => recipes.map((r) => [r.name, ...c, r] as const)))(
    '%s: %s',
    async (method, _, changes, message, recipe) => {
      await copyFixture();
      for (const [pattern, factor] of changes) await magnify(pattern, factor);
      // Rotations have norms folded into the linears: then it is these whose values no grid can hold. Recipes of whole
      // blocks look at residual streams, and some at inputs.
      const others = [
        ...(recipe.defaults?.rotate ? [/_proj\.weight: its values are too large/] : []),
        ...(isBlockRecipe(recipe) ? [/output of block \d/] : []),
      ];
      const expected = new RegExp([message, ...others].map(({ source }) => source).join('|'));
      await expectRefused(() => quantize({ method }), 'non-finite', expected, { keeps: true });
      expect(existsSync(out)).toBe(false);
    },
  );

  it.each(RECIPES.map((r) => r.name))('weights that no f16 scale can hold are named: %s', async (method) => {
    await copyFixture();
    await magnify(/layers\.1\.mlp\.up_proj/, 1e12);
    const run = () => quantize({ method });
    await expectRefused(run, 'non-finite', /layers\.1\.mlp\.up_proj\.weight/, { keeps: true });
    expect(existsSync(out)).toBe(false);
  });
});

describe('a block that does nothing', () => {
  it.each(RECIPES.map((r) => r.name))('(its inputs are all zero) is quantized by %s like others', async (method) => {
    await copyFixture();
    await magnify(/layers\.1\.(input_layernorm|post_attention_layernorm|self_attn\.v_proj)/, 0);
    await quantize({ method });
    const ids = Int32Array.of(1, 5, 9, 80);
    const [expected, found] = [await logitsOf(model, ids), await logitsOf(out, ids)];
    expect(Math.hypot(...found.map((v, i) => v - expected[i])) / Math.hypot(...expected)).toBeLessThan(0.5);
  });
});

describe('calibration', () => {
  const text = path.join(BUNDLED, 'eval/prose/01-fiction-nineteenth-century.txt');
  const given = async (name: string, content: string | Uint8Array): Promise<string> => {
    const file = path.join(scratch, `${count}-${name}`);
    await writeFile(file, content);
    return file;
  };
  const tiny: Shape = { hidden: 32, intermediate: 64, layers: 1, vocab: 4096, headDim: 16 };
  beforeEach(async () => {
    await makeRandomModel(tiny);
    await copyTokenizer();
  });

  const cases: [string, string, string | Uint8Array | undefined, ErrorCode, RegExp][] = [
    ['text too short', 'short.txt', 'Too short.', 'calibration', /too short: \d+ tokens in \S*short\.txt, .* needs 16/],
    ['text empty', 'empty.txt', ' \n', 'calibration', /empty\.txt is empty/],
    ['text not there', 'none.txt', undefined, 'file-missing', /none\.txt/],
    ['text not UTF-8', 'latin.txt', Uint8Array.of(0x66, 0xfc, 0x72), 'calibration', /latin\.txt is not UTF-8/],
    ['jsonl with a broken line', 'bad.jsonl', '{"text": "a"}\n{"text": \n', 'calibration', /bad\.jsonl, line 2/],
    ['jsonl without text', 'other.jsonl', '{"prompt": "a"}\n', 'calibration', /other\.jsonl, line 1/],
    ['jsonl with nothing in it', 'blank.jsonl', '{"text": ""}\n\n', 'calibration', /blank\.jsonl is empty/],
  ];
  it.each(cases)('%s', async (_, name, content, code, message) => {
    const file = content === undefined ? path.join(scratch, `${count}-${name}`) : await given(name, content);
    for (const dryRun of [true, false]) {
      await expectRefused(() => quantize({ method: 'gptq', calib: [file], dryRun }), code, message);
    }
  });

  it('a folder is no text', async () => {
    await expectRefused(() => quantize({ method: 'gptq', calib: [scratch] }), 'file-missing', /is not a file/);
  });

  it('sequences longer than the context', async () => {
    const run = () => quantize({ method: 'gptq', calib: [text], seqLen: 129 });
    await expectRefused(run, 'context-length', /129 tokens .* 128/, { remedy: /--seq-len/ });
  });

  it('no sequences at all', async () => {
    await expectRefused(() => quantize({ method: 'gptq', calib: [text], calibSamples: 0 }), 'usage', /at least one/);
  });

  it('tokens of the wrong number', async () => {
    const calibrationTokens = { ...randomIds(4, 16), sequences: 5 };
    await expectRefused(() => quantize({ method: 'gptq', calibrationTokens }), 'calibration', /5 × 16 ids, found 64/);
  });

  it('without a tokenizer', async () => {
    await rm(path.join(model, 'tokenizer.json'));
    for (const calib of [[text], undefined]) {
      const run = () => quantize({ method: 'gptq', calib, calibrationTokens: undefined, seqLen: 16 });
      await expectRefused(run, 'file-missing', /no tokenizer\.json/, { remedy: /AutoTokenizer/ });
    }
  });

  it('with the tokenizer of another model', async () => {
    await rm(model, { recursive: true });
    await copyFixture();
    await copyTokenizer();
    const run = () => quantize({ method: 'gptq', calib: [text] });
    await expectRefused(run, 'calibration', /token id \d+ .* vocabulary of 96/, { remedy: /tokenizer\.json/ });
  });

  it('written by a broken model itself', async () => {
    await magnify(/up_proj|gate_proj/, 1e30);
    const run = () => quantize({ method: 'gptq', calibrationTokens: undefined, calibSamples: 2, seqLen: 16 });
    await expectRefused(run, 'non-finite', /logits .* not finite/, { remedy: /gyre inspect/ });
  });

  it('of non-ASCII text works', async () => {
    const words = 'Grüße, Ærøskøbing! Привет, мир. 量子化された重み。 مرحبا بالعالم 👩‍👩‍👧‍👦 e\u0301 \u{1F600}\n'.repeat(8);
    const file = await given('ünïcode-文.txt', `\uFEFF${words}`);
    const lines = await given('lines.jsonl', `\uFEFF${JSON.stringify({ text: words })}\r\n`);
    const report = await quantize({ method: 'gptq', calib: [file, lines] });
    expect(report.calibration).toContain('ünïcode-文.txt');
    expect((await logitsOf(out, Int32Array.of(1, 2, 3))).every(Number.isFinite)).toBe(true);
  });

  it('a failed run does not stand in the way of the next one', async () => {
    const file = await given('short.txt', 'Only some ten tokens of text are in here, hardly more.');
    await expectRefused(() => quantize({ method: 'gptq', calib: [file], seqLen: 100 }), 'calibration', /too short/);
    await quantize({ method: 'gptq', calib: [file], seqLen: 8 });
    expect(existsSync(out)).toBe(true);
  });
});

describe('inputs that the group size does not divide', () => {
  const cases: [number, number | undefined, RegExp][] = [
    [172, undefined, /down: its 172 input channels .* left in 16 bits/],
    [352, 32, /down: its 352 input channels .* groups of 32 instead/],
    [2752, 64, /down: its 2752 input channels .* groups of 64 instead/],
    [10944, 64, /down: its 10944 input channels .* groups of 64 instead/],
  ];
  const ids = Int32Array.of(1, 5, 9, 80);

  describe.each(cases)('%i', (intermediate, groupSize, note) => {
    // The recipes that look at inputs need the Gram matrix of 10944 channels: minutes, for nothing that 2752 doesn't show.
    const methods = RECIPES.filter((r) => intermediate < 1000 || r.name === 'rtn').map((r) => r.name);
    it.each(methods)('is planned, reported, quantized by %s, and runs', async (method) => {
      await makeRandomModel({ hidden: 64, intermediate, layers: 1, vocab: FIXTURE_VOCAB, headDim: 32 });
      let plan: QuantizePlan | undefined;
      const report = await quantize({ method, groupSize: 128, onPlan: (p) => (plan = p) });
      expect(plan?.notes.join('\n')).toMatch(note);
      expect(report.notes.join('\n')).toMatch(note);
      expect(plan?.decisions.down).toMatchObject(groupSize ? { kind: 'quantize', groupSize } : { kind: 'keep' });
      const shards = (await readdir(out)).filter((name) => name.endsWith('.safetensors'));
      const names: string[] = [];
      for (const shard of shards) {
        const file = await SafetensorsFile.open(await openFile(path.join(out, shard)));
        names.push(...file.tensors.keys());
        await file.close();
      }
      const prefix = 'model.layers.0.mlp.down_proj';
      expect(names.includes(`${prefix}.weight`)).toBe(groupSize === undefined);
      const packed = report.layout === 'gyre' ? 'codes' : 'qweight';
      expect(names.includes(`${prefix}.${packed}`)).toBe(groupSize !== undefined);
      const [expected, found] = [await logitsOf(model, ids), await logitsOf(out, ids)];
      const error = Math.hypot(...found.map((v, i) => v - expected[i])) / Math.hypot(...expected);
      expect(error).toBeGreaterThan(0);
      expect(error).toBeLessThan(0.5);
    });
  });

  it.each(RECIPES.map((r) => r.name))('of the hidden state leave what reads it in 16 bits: %s', async (method) => {
    await makeRandomModel({ hidden: 72, intermediate: 128, layers: 2, vocab: FIXTURE_VOCAB, headDim: 32 });
    const report = await quantize({ method, groupSize: 64 });
    expect(report.notes.join('\n')).toMatch(/qkv: its 72 .*\n.*gateUp: its 72/);
    expect((await logitsOf(out, ids)).every(Number.isFinite)).toBe(true);
  });

  it('everywhere is refused with the way out', async () => {
    await makeRandomModel({ hidden: 20, intermediate: 172, layers: 1, vocab: FIXTURE_VOCAB, headDim: 10 });
    await expectRefused(() => quantize(), 'unsupported', /no linear/, { remedy: /--group-size -1/ });
    await quantize({ groupSize: -1 });
    expect((await logitsOf(out, ids)).every(Number.isFinite)).toBe(true);
  });
});

describe('an output that is taken', () => {
  beforeEach(() => copyFixture());

  it('by the result of other settings stays as it is', async () => {
    await quantize();
    const before = await folderBytes(out);
    const run = () => quantize({ bits: 3 });
    await expectRefused(run, 'output-exists', /other settings or another model/, { keeps: true, remedy: /--out/ });
    await poison('model.layers.0.self_attn.q_proj.weight', 0, 0.5);
    await expectRefused(() => quantize(), 'output-exists', /other settings or another model/, { keeps: true });
    expect(await folderBytes(out)).toEqual(before);
    expect(existsSync(`${out}.partial`)).toBe(false);
  });

  it('by the result of an equal run is finished already', async () => {
    expect((await quantize()).skipped).toBe(false);
    const before = await folderBytes(out);
    expect((await quantize()).skipped).toBe(true);
    expect(await folderBytes(out)).toEqual(before);
  });

  it('by a file', async () => {
    await writeFile(out, 'mine');
    await expectRefused(() => quantize(), 'output-exists', /is not a folder/, { keeps: true });
    expect(await readFile(out, 'utf8')).toBe('mine');
    const below = () => quantize({ out: path.join(out, 'below') });
    await expectRefused(below, 'output-exists', /is not a folder/, { keeps: true });
  });

  it.each(['notes.txt', 'gyre.json'])('by files of others (%s)', async (name) => {
    await mkdir(out);
    await writeFile(path.join(out, name), 'mine');
    await expectRefused(() => quantize(), 'output-exists', /not of this run/, { keeps: true });
    expect(await folderBytes(out)).toEqual({ [name]: Buffer.from('mine').toString('base64') });
    expect(existsSync(`${out}.partial`)).toBe(false);
  });

  it.each(['notes.txt', 'gyre.json'])('by files of others where it would grow (%s)', async (name) => {
    await mkdir(`${out}.partial`);
    await writeFile(path.join(`${out}.partial`, name), 'mine');
    await expectRefused(() => quantize(), 'output-exists', /not gyre's: /, { keeps: true, remedy: /--out/ });
    expect(await folderBytes(`${out}.partial`)).toEqual({ [name]: Buffer.from('mine').toString('base64') });
    expect(existsSync(out)).toBe(false);
  });

  it('by the model itself', async () => {
    const before = await folderBytes(model);
    await expectRefused(() => quantize({ out: model }), 'output-exists', /not of this run/, { keeps: true });
    expect(await folderBytes(model)).toEqual(before);
  });

  it('by nothing but an empty folder is free', async () => {
    await mkdir(out);
    await quantize();
    expect(await readdir(out)).toContain('gyre.json');
  });
});

describe('a run that was stopped', () => {
  beforeEach(() => copyFixture());

  /** Stops a run when its second block begins. */
  async function stopped(options: Partial<QuantizeOptions> = {}): Promise<void> {
    const controller = new AbortController();
    const run = quantize({
      method: 'gptq',
      ...options,
      signal: controller.signal,
      onProgress: ({ stage, done }) => {
        if (stage === 'quantize' && done === 1) controller.abort();
      },
    });
    await expectRefused(() => run, 'interrupted', /finished blocks are kept/, { keeps: true, remedy: /--resume/ });
    expect(existsSync(out)).toBe(false);
  }

  it('is not gone over without --resume, nor resumed with other settings', async () => {
    await stopped();
    const before = await folderBytes(`${out}.partial`);
    const again = () => quantize({ method: 'gptq' });
    await expectRefused(again, 'output-exists', /unfinished run of this command/, { keeps: true, remedy: /--resume/ });
    const other = () => quantize({ method: 'gptq', bits: 3, resume: true });
    await expectRefused(other, 'output-exists', /unfinished run with other settings/, { keeps: true, remedy: /--out/ });
    expect(await folderBytes(`${out}.partial`)).toEqual(before);
    await quantize({ method: 'gptq', resume: true });
    expect(existsSync(`${out}.partial`)).toBe(false);
  });

  it('--resume with nothing to resume is an ordinary run', async () => {
    expect((await quantize({ resume: true })).skipped).toBe(false);
  });
});

describe('two runs on one folder', () => {
  it('the second is told who is at it', async () => {
    await copyFixture();
    let second: Promise<unknown> | undefined;
    const first = quantize({
      method: 'gptq',
      onProgress: () => {
        second ??= expectRefused(
          () => quantize({ method: 'gptq', resume: true }),
          'output-busy',
          /in use by process \d+/,
          {
            keeps: true,
            remedy: new RegExp(String(process.pid)),
          },
        );
      },
    });
    expect((await first).skipped).toBe(false);
    expect(second).toBeDefined();
    await second;
  });
});

describe('a full disk', () => {
  beforeEach(() => copyFixture());

  it('while writing keeps what is finished; the run goes on when there is room', async () => {
    const probe = await open(import.meta.filename, 'r');
    const prototype = Object.getPrototypeOf(probe) as {
      write: (...args: unknown[]) => Promise<{ bytesWritten: number }>;
    };
    await probe.close();
    const original = prototype.write;
    let full = false;
    const spy = vi.spyOn(prototype, 'write').mockImplementation(async function (this: unknown, ...args: unknown[]) {
      if (full) throw Object.assign(new Error('ENOSPC: no space left on device'), { code: 'ENOSPC' });
      return original.apply(this, args);
    });
    onTestFinished(() => spy.mockRestore());
    const run = (options: Partial<QuantizeOptions> = {}) =>
      quantize({ method: 'gptq', ...options, onProgress: ({ done }) => (full ||= done === 1) });
    await expectRefused(run, 'disk-full', /out-\d+\.partial\/model-00002/, { keeps: true, remedy: /space/ });
    expect(existsSync(out)).toBe(false);
    const kept = (await readdir(`${out}.partial`)).sort();
    expect(kept).toEqual(['gyre.json', 'model-00001-of-00003.record.json', 'model-00001-of-00003.safetensors']);
    spy.mockRestore();
    await run({ resume: true });
    const resumed = await folderBytes(out);
    out = `${out}-whole`;
    await quantize({ method: 'gptq' });
    expect(resumed).toEqual(await folderBytes(out));
  });

  it('is real on a file system of 1 MB, and seen beforehand where it can be', async ({ skip }) => {
    const disk = path.join(scratch, 'disk');
    await mkdir(disk);
    const mounted = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk]);
    if (mounted.status !== 0) skip(`a tmpfs can't be mounted here: ${String(mounted.stderr ?? mounted.error)}`);
    onTestFinished(() => void spawnSync('umount', [disk]));
    out = path.join(disk, 'out');
    const ballast = path.join(disk, 'ballast');
    await writeFile(ballast, new Uint8Array(980_000));
    await expectRefused(() => quantize(), 'disk-full', /needs about .* are free/, { remedy: /--out/ });
    await rm(ballast);
    // The room goes away while the first block is at work.
    const fill = () => existsSync(ballast) || fillDisk(ballast);
    await expectRefused(() => quantize({ method: 'gptq', onProgress: fill }), 'disk-full', /disk is full/, {
      keeps: true,
    });
    expect(existsSync(out)).toBe(false);
    await rm(ballast);
    await quantize({ method: 'gptq', resume: true });
    expect(await readdir(out)).toContain('model.safetensors.index.json');
  });

  function fillDisk(file: string): void {
    const handle = openSync(file, 'w');
    const piece = new Uint8Array(4096);
    try {
      while (writeSync(handle, piece) > 0);
    } catch {
      // Full.
    }
    closeSync(handle);
  }
});

describe('a prompt longer than the context', () => {
  it.each([
    ['qwen3', 64],
    ['qwen3-yarn', 64],
    ['llama-dynamic', 32],
    ['llama-linear', 64],
  ])('is refused: %s', async (fixture, context) => {
    const backend = await openBackend('cpu', { threads: 1 });
    onTestFinished(() => backend.dispose());
    const source = await openModel(await folderFiles(path.join(FIXTURES, fixture)));
    onTestFinished(() => source.checkpoint.close());
    const decoder = await loadDecoder(backend, source);
    expect(contextLength(source.config)).toBe(context);
    const prompt = Int32Array.from({ length: context }, (_, i) => i % FIXTURE_VOCAB);
    const run = () => collect(generate(decoder, prompt));
    await expectRefused(run, 'context-length', new RegExp(`prompt has ${context} tokens.* ${context} `));
    const { ids, summary } = await collect(generate(decoder, prompt.subarray(1), { stopIds: [] }));
    expect([ids.length, summary.reason]).toEqual([1, 'length']);
  });
});

describe('the result does not depend on the threads', () => {
  it.each(RECIPES.map((r) => r.name))('%s', async (method) => {
    // Wide enough that the work is really split.
    await makeRandomModel({ hidden: 128, intermediate: 384, layers: 2, vocab: FIXTURE_VOCAB, headDim: 64 });
    await quantize({ method, threads: 2, steps: 5, calibrationTokens: randomIds(24, 48) });
    const two = await folderBytes(out);
    out = `${out}-one`;
    await quantize({ method, threads: 1, steps: 5, calibrationTokens: randomIds(24, 48) });
    expect(two).toEqual(await folderBytes(out));
  });
});

describe('the command line', () => {
  const args = (...more: string[]) =>
    `quantize ${model} --out ${out} --calib ${path.join(BUNDLED, 'eval/prose/01-fiction-nineteenth-century.txt')}
    --calib-samples 16 --seq-len 64 --steps 60 --krot 4 --group-size 64 --threads 1`
      .split(/\s+/)
      .concat(more);

  interface Run {
    readonly child: ChildProcess;
    readonly ended: Promise<{ code: number | null; signal: NodeJS.Signals | null; stderr: string }>;
  }
  function gyre(more: readonly string[]): Run {
    const env = { ...process.env, HF_HUB_OFFLINE: '1' };
    const child = spawn(process.execPath, [path.join(ROOT, 'bin/gyre.js'), ...more], {
      env,
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    onTestFinished(() => void child.kill('SIGKILL'));
    let stderr = '';
    child.stderr.on('data', (data: Buffer) => (stderr += data.toString()));
    const ended = new Promise<Awaited<Run['ended']>>((resolve) => {
      child.on('close', (code, signal) => resolve({ code, signal, stderr }));
    });
    return { child, ended };
  }
  /** Waits until a shard of the run is there: the next block is under way. */
  async function shardThere(index: number, run: Run): Promise<void> {
    const file = path.join(`${out}.partial`, `model-0000${index}-of-00005.safetensors`);
    while (!existsSync(file)) {
      expect(run.child.exitCode, 'the run ended too early').toBe(null);
      await sleep(3);
    }
  }
  beforeEach(async () => {
    await makeRandomModel({ hidden: 128, intermediate: 384, layers: 4, vocab: 4096, headDim: 64 });
    await copyTokenizer();
  });

  it('killed in mid-block, again and again, resumes to the bytes of a run that was left alone', async () => {
    const whole = `${out}-whole`;
    const alone = await gyre(args().map((arg) => (arg === out ? whole : arg))).ended;
    expect(alone.code, alone.stderr).toBe(0);

    for (const [index, more] of [
      [1, []],
      [2, ['--resume']],
      [4, ['--resume']],
    ] as const) {
      const run = gyre(args(...more));
      await shardThere(index, run);
      if (index === 1) {
        // While it lives, nobody else gets in.
        const busy = await gyre(args('--resume')).ended;
        expect(busy.code).toBe(1);
        expect(busy.stderr).toMatch(new RegExp(`in use by process ${run.child.pid}`));
        expect(run.child.exitCode).toBe(null);
      } else {
        await sleep(20);
      }
      run.child.kill('SIGKILL');
      expect((await run.ended).signal).toBe('SIGKILL');
      expect(existsSync(out)).toBe(false);
    }
    // What a write that was cut short leaves behind.
    const litter = '.model-00005-of-00005.safetensors.tmp-999999999-0123456789ab';
    await writeFile(path.join(`${out}.partial`, litter), 'half');
    const refused = await gyre(args()).ended;
    expect(refused.code).toBe(1);
    expect(refused.stderr).toMatch(/unfinished run[\s\S]*--resume/);
    const resumed = await gyre(args('--resume')).ended;
    expect(resumed.code, resumed.stderr).toBe(0);
    expect(await folderBytes(out)).toEqual(await folderBytes(whole));
    expect(existsSync(`${out}.partial`)).toBe(false);
  });

  it('stops on Ctrl-C with 130 and can be resumed', async () => {
    const run = gyre(args());
    await shardThere(1, run);
    run.child.kill('SIGINT');
    const stopped = await run.ended;
    expect(stopped.code, stopped.stderr).toBe(130);
    expect(stopped.stderr).toMatch(/Stopping at the next safe point[\s\S]*--resume/);
    expect(existsSync(out)).toBe(false);
    expect(existsSync(path.join(`${out}.partial`, 'model-00005-of-00005.safetensors'))).toBe(false);
    const resumed = await gyre(args('--resume')).ended;
    expect(resumed.code, resumed.stderr).toBe(0);
    expect(await readdir(out)).toContain('gyre.json');
  });
});

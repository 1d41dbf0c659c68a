// Quantized linears in each layout: round trips, and checkpoints that are wrong in one tensor.
import { describe, expect, it } from 'vitest';
import { roundToF16, type TypedArray } from '../../../src/core/dtype.js';
import { createRng } from '../../../src/core/rng.js';
import {
  groupSizeOf,
  layoutProblem,
  parseQuantizationConfig,
  quantizationConfigJson,
  type QuantizationConfig,
  type QuantizationMethod,
  type StoredBits,
} from '../../../src/formats/quantization-config.js';
import {
  isQuantized,
  quantizedLinearEntries,
  readQuantizedLinear,
  type StoredQuantizedLinear,
} from '../../../src/formats/quantized-linear.js';
import { Checkpoint } from '../../../src/formats/safetensors.js';
import { encodeSafetensors, type TensorEntry } from '../../../src/formats/safetensors-writer.js';
import { memoryFiles } from '../../../src/formats/source.js';
import { expectError } from './helpers.js';

const MODULE = 'model.layers.0.mlp.down_proj';

interface Shape {
  inFeatures: number;
  outFeatures: number;
  groupSize: number;
  bits: StoredBits;
  krot?: number;
  bias?: boolean;
}

function makeLinear({ inFeatures, outFeatures, groupSize, bits, krot, bias }: Shape): StoredQuantizedLinear {
  const rng = createRng(7);
  const groups = inFeatures / groupSize;
  const half = (): number => roundToF16(0.1 + rng.uniform());
  return {
    bits,
    groupSize,
    inFeatures,
    outFeatures,
    codes: Uint8Array.from({ length: inFeatures * outFeatures }, () => rng.int(0, 2 ** bits)),
    zeros: Uint8Array.from({ length: groups * outFeatures }, () => rng.int(0, 2 ** bits)),
    scales: Float32Array.from({ length: groups * outFeatures }, half),
    ...(bias ? { bias: Float32Array.from({ length: outFeatures }, half) } : {}),
    ...(krot === undefined
      ? {}
      : {
          transform: {
            channels: inFeatures,
            groupSize,
            krot,
            pairs: Int16Array.from(Array.from({ length: krot * groups }, () => [...rng.permutation(groupSize)]).flat()),
            theta: Float32Array.from({ length: (krot * inFeatures) / 2 }, half),
            channelScales: Float32Array.from({ length: inFeatures }, half),
          },
        }),
  };
}

function configOf(method: QuantizationMethod, shape: Shape): QuantizationConfig {
  return {
    method,
    bits: shape.bits,
    groupSize: shape.groupSize === shape.inFeatures ? -1 : shape.groupSize,
    krot: shape.krot ?? 0,
    modulesToNotConvert: [],
    groupSizeOverrides: {},
  };
}

async function checkpointOf(entries: TensorEntry[]): Promise<Checkpoint> {
  return Checkpoint.open(memoryFiles('m', { 'model.safetensors': await encodeSafetensors(entries) }));
}

const cases: [string, QuantizationMethod, Shape][] = [
  ['paroquant', 'paroquant', { inFeatures: 64, outFeatures: 24, groupSize: 32, bits: 4, krot: 2 }],
  ['paroquant with bias', 'paroquant', { inFeatures: 64, outFeatures: 8, groupSize: 16, bits: 4, krot: 1, bias: true }],
  ['awq', 'awq', { inFeatures: 96, outFeatures: 16, groupSize: 32, bits: 4 }],
  ['awq per channel', 'awq', { inFeatures: 40, outFeatures: 16, groupSize: 40, bits: 4, bias: true }],
  ['gyre 2 bits', 'gyre', { inFeatures: 64, outFeatures: 5, groupSize: 32, bits: 2, krot: 3 }],
  ['gyre 3 bits per channel', 'gyre', { inFeatures: 27, outFeatures: 7, groupSize: 27, bits: 3, bias: true }],
  ['gyre 8 bits', 'gyre', { inFeatures: 12, outFeatures: 3, groupSize: 6, bits: 8 }],
  ['gyre scales only', 'gyre', { inFeatures: 12, outFeatures: 3, groupSize: 6, bits: 4, krot: 0 }],
];

describe('round trip', () => {
  it.each(cases)('%s', async (_, method, shape) => {
    const linear = makeLinear(shape);
    const checkpoint = await checkpointOf(quantizedLinearEntries(MODULE, linear, method));
    expect(isQuantized(checkpoint, MODULE)).toBe(true);
    expect(isQuantized(checkpoint, 'lm_head')).toBe(false);
    expect(await readQuantizedLinear(checkpoint, MODULE, configOf(method, shape))).toEqual(linear);
  });

  it('a module with a group size of its own', async () => {
    const shape: Shape = { inFeatures: 48, outFeatures: 8, groupSize: 16, bits: 4, krot: 2 };
    const linear = makeLinear(shape);
    const checkpoint = await checkpointOf(quantizedLinearEntries(MODULE, linear, 'paroquant'));
    const config = { ...configOf('paroquant', shape), groupSize: 32, groupSizeOverrides: { [MODULE]: 16 } };
    expect(await readQuantizedLinear(checkpoint, MODULE, config)).toEqual(linear);
    await expectError(
      () => readQuantizedLinear(checkpoint, MODULE, { ...config, groupSizeOverrides: {} }),
      'tensor-shape',
      /48 inputs are no multiple of the group size 32/,
    );
  });
});

describe('what a layout cannot hold', () => {
  it('is known beforehand and refused when writing', async () => {
    expect(layoutProblem('awq', { inFeatures: 64, outFeatures: 12, bits: 4, groupSize: 32 })).toMatch(
      /12 is no multiple/,
    );
    expect(layoutProblem('paroquant', { inFeatures: 64, outFeatures: 8, bits: 3, groupSize: 32 })).toMatch(
      /4 bits, not 3/,
    );
    expect(layoutProblem('gyre', { inFeatures: 60, outFeatures: 8, bits: 3, groupSize: 32 })).toMatch(/60 inputs/);
    expect(layoutProblem('gyre', { inFeatures: 64, outFeatures: 3, bits: 3, groupSize: 32 })).toBeUndefined();
    await expectError(
      () => quantizedLinearEntries('m', makeLinear({ inFeatures: 8, outFeatures: 4, groupSize: 8, bits: 4 }), 'awq'),
      'tensor-shape',
      /m: the awq layout packs 8/,
    );
  });

  it('values that are not rounded to f16 yet', async () => {
    const linear = makeLinear({ inFeatures: 8, outFeatures: 8, groupSize: 8, bits: 4, krot: 1 });
    linear.transform?.theta.set([0.1]);
    await expectError(
      () => quantizedLinearEntries('m', linear, 'paroquant'),
      'usage',
      /m\.theta: element 0, 0\.1.* is not an f16 value/,
    );
    linear.scales[3] = NaN;
    await expectError(
      () => quantizedLinearEntries('m', linear, 'paroquant'),
      'non-finite',
      /m\.scales: element 3 is NaN/,
    );
  });

  it('a transform in the awq layout, none in paroquant', async () => {
    await expectError(
      () =>
        quantizedLinearEntries(
          'm',
          makeLinear({ inFeatures: 8, outFeatures: 8, groupSize: 8, bits: 4, krot: 1 }),
          'awq',
        ),
      'usage',
      /no place for a transform/,
    );
    await expectError(
      () =>
        quantizedLinearEntries('m', makeLinear({ inFeatures: 8, outFeatures: 8, groupSize: 8, bits: 4 }), 'paroquant'),
      'usage',
      /needs a transform/,
    );
  });
});

describe('quantization_config', () => {
  it('is read in all three schemas and written back', () => {
    const configs = [
      { quant_method: 'paroquant', bits: 4, group_size: 128, krot: 8 },
      {
        quant_method: 'awq',
        bits: 4,
        group_size: 128,
        zero_point: true,
        version: 'gemm',
        modules_to_not_convert: ['lm_head'],
      },
      {
        quant_method: 'gyre',
        version: 1,
        bits: 3,
        group_size: -1,
        krot: 4,
        transform_group_size: 64,
        recipe: 'smoothrot',
        group_size_overrides: { a: 32, b: -1 },
      },
    ];
    for (const json of configs) {
      const config = parseQuantizationConfig(json);
      expect(config).toBeDefined();
      if (config) expect(quantizationConfigJson(config)).toEqual(json);
    }
    expect(parseQuantizationConfig(undefined)).toBeUndefined();
    expect(parseQuantizationConfig(null)).toBeUndefined();
    const own = parseQuantizationConfig(configs[2]);
    if (own) expect(['a', 'b', 'c', 'toString'].map((name) => groupSizeOf(own, name, 96))).toEqual([32, 96, 96, 96]);
  });

  it.each(['gptq', 'bitsandbytes', 'fp8', 'compressed-tensors'])('%s is not supported', async (method) => {
    await expectError(
      () => parseQuantizationConfig({ quant_method: method }),
      'unsupported',
      new RegExp(`"${method}"`),
      /paroquant, awq, gyre/,
    );
  });

  it.each([
    [{ quant_method: 'paroquant', bits: 3, group_size: 128, krot: 8 }, /bits/],
    [{ quant_method: 'paroquant', bits: 4, group_size: 128 }, /krot/],
    [{ quant_method: 'paroquant', bits: 4, group_size: 0, krot: 8 }, /group_size/],
    [{ quant_method: 'awq', bits: 4, group_size: 128, version: 'gemv' }, /version: only the gemm version/],
    [{ quant_method: 'awq', bits: 4, group_size: 128, zero_point: false }, /zero_point/],
    [{ quant_method: 'gyre', version: 0, bits: 4, group_size: 128 }, /version/],
    [{ bits: 4 }, /quant_method/],
    ['awq', /whole file/],
  ])('%j is invalid', async (json, message) => {
    await expectError(() => parseQuantizationConfig(json), 'config-invalid', message);
  });
});

describe('checkpoints that are wrong', () => {
  const shape: Shape = { inFeatures: 32, outFeatures: 8, groupSize: 16, bits: 4, krot: 2 };
  const config = configOf('paroquant', shape);

  /** The tensors of a good linear, one of them changed. */
  async function broken(
    suffix: string,
    change: (entry: TensorEntry) => Partial<TensorEntry> | undefined,
  ): Promise<Checkpoint> {
    const entries: TensorEntry[] = [];
    for (const entry of quantizedLinearEntries(MODULE, makeLinear({ ...shape, bias: true }), 'paroquant')) {
      const changed = entry.name.endsWith(suffix) ? change(entry) : {};
      if (changed) entries.push({ ...entry, ...changed });
    }
    return checkpointOf(entries);
  }
  const edited = async (suffix: string, edit: (data: TypedArray) => void): Promise<Checkpoint> =>
    broken(suffix, (entry) => ({
      data: async () => {
        const data = (await entry.data()).slice();
        edit(data);
        return data;
      },
    }));
  const read = (checkpoint: Checkpoint): Promise<unknown> => readQuantizedLinear(checkpoint, MODULE, config);

  it.each(['.qweight', '.qzeros', '.scales', '.theta', '.pairs', '.channel_scales'])('%s missing', async (suffix) => {
    const checkpoint = await broken(suffix, () => undefined);
    await expectError(
      () => read(checkpoint),
      'tensor-missing',
      new RegExp(`no tensor ${MODULE.replaceAll('.', '\\.')}\\${suffix}`),
    );
  });

  it.each([
    ['.scales', 0x7e00, /\.scales: element 0 is NaN/],
    ['.theta', 0x7c00, /\.theta: element 0 is Infinity/],
    ['.channel_scales', 0xfc00, /\.channel_scales: element 0 is -Infinity/],
    ['.bias', 0x7e00, /\.bias: element 0 is NaN/],
  ])('non-finite %s', async (suffix, bits, message) => {
    const checkpoint = await edited(suffix, (data) => ((data as Uint16Array)[0] = bits));
    await expectError(() => read(checkpoint), 'non-finite', message);
  });

  it.each([
    [
      'twice',
      (data: Int16Array) => (data[1] = data[0]),
      /rotation 0, channels 0 to 16: expected a permutation of 0 … 15, found \d+ twice/,
    ],
    ['too large', (data: Int16Array) => (data[16 + 32] = 16), /rotation 1, channels 16 to 32: .* found 16 in it/],
    ['negative', (data: Int16Array) => (data[0] = -1), /found -1/],
  ])('pairs with a channel %s', async (_, edit, message) => {
    const checkpoint = await edited('.pairs', (data) => edit(data as Int16Array));
    await expectError(() => read(checkpoint), 'file-corrupt', message);
  });

  it('a channel scale of 0', async () => {
    const checkpoint = await edited('.channel_scales', (data) => ((data as Uint16Array)[5] = 0));
    await expectError(() => read(checkpoint), 'file-corrupt', /channel 5 is 0/);
  });

  it('shapes and types that do not fit', async () => {
    const good = await broken('none', () => ({}));
    await expectError(
      () => readQuantizedLinear(good, MODULE, { ...config, krot: 3 }),
      'tensor-shape',
      /theta: expected shape \[3, 16\], found \[2, 16\]/,
    );
    await expectError(
      () => readQuantizedLinear(good, MODULE, { ...config, groupSize: 8 }),
      'tensor-shape',
      /qzeros: expected shape \[4, 1\], found \[2, 1\]/,
    );
    const wide = await broken('.pairs', () => ({ dtype: 'i32', data: () => new Int32Array(64) }));
    await expectError(() => read(wide), 'tensor-shape', /pairs: expected int16, found i32/);
    const flat = await broken('.qweight', () => ({ shape: [32] }));
    await expectError(() => read(flat), 'tensor-shape', /expected two dimensions, found \[32\]/);
  });

  it('zero points out of range (gyre)', async () => {
    const gyre: Shape = { inFeatures: 8, outFeatures: 2, groupSize: 4, bits: 2 };
    const entries = quantizedLinearEntries('m', makeLinear(gyre), 'gyre').map((entry) =>
      entry.name === 'm.zeros' ? { ...entry, data: () => Uint8Array.of(0, 1, 2, 4) } : entry,
    );
    const checkpoint = await checkpointOf(entries);
    await expectError(
      () => readQuantizedLinear(checkpoint, 'm', configOf('gyre', gyre)),
      'file-corrupt',
      /zero point 4 at 3 does not fit 2 bits/,
    );
  });
});

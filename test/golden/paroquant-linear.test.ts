// The ParoQuant layout against golden files made apart from src/: bits of the packing, and the function in float64.
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { floats, type HostTensor } from '../../src/core/tensor.js';
import { packGemm, packGemmTransposed, transpose2d, unpackGemm, unpackGemmTransposed } from '../../src/formats/int4.js';
import { parseQuantizationConfig, type QuantizationConfig } from '../../src/formats/quantization-config.js';
import {
  quantizedLinearEntries,
  readQuantizedLinear,
  type StoredQuantizedLinear,
} from '../../src/formats/quantized-linear.js';
import { Checkpoint, SafetensorsFile } from '../../src/formats/safetensors.js';
import { encodeSafetensors, type TensorEntry } from '../../src/formats/safetensors-writer.js';
import { memoryFiles, memorySource } from '../../src/formats/source.js';

const root = path.resolve(import.meta.dirname, '../..');
const goldens = [
  {
    name: 'own generator',
    file: path.join(import.meta.dirname, '../fixtures/golden/quantized-linear.safetensors'),
    groupSize: 64,
    krot: 3,
    tolerance: 1e-12,
  },
  // Its outputs are stored in f32.
  {
    name: 'project oracle',
    file: path.join(root, '../shared/golden/paroquant-linear.safetensors'),
    groupSize: 128,
    krot: 8,
    tolerance: 1e-6,
  },
];
const STORED = ['qweight', 'qzeros', 'scales', 'theta', 'pairs', 'channel_scales', 'bias'];

function values(tensor: HostTensor): Float64Array {
  return tensor.data instanceof Float64Array ? tensor.data : Float64Array.from(floats(tensor));
}

/** x ⊙ a, then the rotations; float64. */
function rotate(x: Float64Array, linear: StoredQuantizedLinear): Float64Array {
  const { transform } = linear;
  if (!transform) return x;
  const { channels, groupSize, krot, pairs, theta, channelScales } = transform;
  const out = x.slice();
  for (let row = 0; row < x.length; row += channels) {
    for (let c = 0; c < channels; c++) out[row + c] *= channelScales[c];
    for (let k = 0; k < krot; k++) {
      for (let p = 0; p < channels / 2; p++) {
        const base = row + Math.floor((2 * p) / groupSize) * groupSize;
        const i = base + pairs[k * channels + 2 * p];
        const j = base + pairs[k * channels + 2 * p + 1];
        const angle = theta[(k * channels) / 2 + p];
        const [a, b] = [out[i], out[j]];
        out[i] = a * Math.cos(angle) + b * Math.sin(angle);
        out[j] = b * Math.cos(angle) - a * Math.sin(angle);
      }
    }
  }
  return out;
}

/** The grid values [out, in], float64. */
function dequantize(linear: StoredQuantizedLinear): Float64Array {
  const { inFeatures, outFeatures, groupSize, codes, zeros, scales } = linear;
  const groups = inFeatures / groupSize;
  return Float64Array.from({ length: outFeatures * inFeatures }, (_, n) => {
    const g = Math.floor(n / inFeatures) * groups + Math.floor((n % inFeatures) / groupSize);
    return (codes[n] - zeros[g]) * scales[g];
  });
}

function product(x: Float64Array, w: Float64Array, inFeatures: number, bias?: Float32Array): Float64Array {
  const rows = x.length / inFeatures;
  const cols = w.length / inFeatures;
  return Float64Array.from({ length: rows * cols }, (_, n) => {
    const [r, c] = [Math.floor(n / cols), n % cols];
    let sum = bias?.[c] ?? 0;
    for (let i = 0; i < inFeatures; i++) sum += x[r * inFeatures + i] * w[c * inFeatures + i];
    return sum;
  });
}

/** Largest difference relative to the largest expected value. */
function difference(found: Float64Array, expected: Float64Array): number {
  expect(found.length).toBe(expected.length);
  const largest = expected.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
  return found.reduce((m, v, i) => Math.max(m, Math.abs(v - expected[i])), 0) / largest;
}

describe.each(goldens)('golden linear ($name)', ({ file, groupSize, krot, tolerance }) => {
  const present = existsSync(file);
  const test = it.skipIf(!present);
  if (!present) it.skip(`(not here: ${path.relative(root, file)})`, () => undefined);

  async function load(): Promise<{
    file: SafetensorsFile;
    checkpoint: Checkpoint;
    config: QuantizationConfig;
    linear: StoredQuantizedLinear;
  }> {
    const golden = await SafetensorsFile.open(memorySource(path.basename(file), new Uint8Array(readFileSync(file))));
    const entries: TensorEntry[] = [];
    for (const name of STORED.filter((stored) => golden.tensors.has(stored))) {
      const tensor = await golden.read(name);
      entries.push({ name: `m.${name}`, dtype: tensor.dtype, shape: tensor.shape, data: () => tensor.data });
    }
    const checkpoint = await Checkpoint.open(
      memoryFiles('golden', { 'model.safetensors': await encodeSafetensors(entries) }),
    );
    const config = parseQuantizationConfig({ quant_method: 'paroquant', bits: 4, group_size: groupSize, krot });
    if (!config) throw new Error('no config');
    return { file: golden, checkpoint, config, linear: await readQuantizedLinear(checkpoint, 'm', config) };
  }

  test('unpacks codes and zero points bit for bit', async () => {
    const { file: golden, linear } = await load();
    expect(linear.codes).toEqual((await golden.read('codes')).data);
    expect(linear.zeros).toEqual((await golden.read('zeros_int')).data);
  });

  test('packs codes and zero points bit for bit, from either layout', async () => {
    const { file: golden, linear } = await load();
    const { inFeatures, outFeatures } = linear;
    const groups = inFeatures / groupSize;
    const codes = (await golden.read('codes')).data as Uint8Array;
    const zeros = (await golden.read('zeros_int')).data as Uint8Array;
    const qweight = (await golden.read('qweight')).data as Int32Array;
    const qzeros = (await golden.read('qzeros')).data as Int32Array;
    expect(packGemmTransposed(codes, inFeatures, outFeatures)).toEqual(qweight);
    expect(packGemm(transpose2d(codes, outFeatures, inFeatures), inFeatures, outFeatures)).toEqual(qweight);
    expect(packGemmTransposed(zeros, groups, outFeatures)).toEqual(qzeros);
    expect(unpackGemmTransposed(qweight, inFeatures, outFeatures)).toEqual(codes);
    expect(unpackGemm(qweight, inFeatures, outFeatures)).toEqual(transpose2d(codes, outFeatures, inFeatures));
  });

  test('writes the same tensors that it read', async () => {
    const { file: golden, linear } = await load();
    const entries = quantizedLinearEntries('m', linear, 'paroquant');
    expect(entries.map((entry) => entry.name).sort()).toEqual(
      STORED.filter((name) => golden.tensors.has(name))
        .map((name) => `m.${name}`)
        .sort(),
    );
    for (const entry of entries) {
      const expected = await golden.read(entry.name.slice(2));
      expect({ name: entry.name, dtype: entry.dtype, shape: entry.shape, data: await entry.data() }).toEqual({
        name: entry.name,
        ...expected,
      });
    }
  });

  test('computes x_rotated, y and weight_dequant', async () => {
    const { file: golden, linear } = await load();
    const x = values(await golden.read('x'));
    const rotated = rotate(x, linear);
    expect(difference(rotated, values(await golden.read('x_rotated')))).toBeLessThan(tolerance);
    const y = product(rotated, dequantize(linear), linear.inFeatures, linear.bias);
    const expected = values(await golden.read('y'));
    expect(difference(y, expected)).toBeLessThan(tolerance);
    const dense = product(x, values(await golden.read('weight_dequant')), linear.inFeatures, linear.bias);
    expect(difference(dense, expected)).toBeLessThan(tolerance);
  });
});

describe('own golden file', () => {
  it('is what its generator makes', async () => {
    const { makeGolden } = await import('../fixtures/golden/make.js');
    const made = await SafetensorsFile.open(memorySource('made', await makeGolden()));
    const stored = await SafetensorsFile.open(memorySource('stored', new Uint8Array(readFileSync(goldens[0].file))));
    for (const name of STORED) expect(await made.read(name)).toEqual(await stored.read(name));
    // Engines may differ in the last bits of cos and log.
    for (const name of ['x', 'y', 'x_rotated', 'weight_dequant']) {
      expect(difference(values(await made.read(name)), values(await stored.read(name)))).toBeLessThan(1e-12);
    }
  });
});

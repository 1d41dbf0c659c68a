// Bit packing: round trips against a slow bit-by-bit definition, and speed.
import { describe, expect, it } from 'vitest';
import { createRng } from '../../../src/core/rng.js';
import {
  AWQ_ORDER,
  packBits,
  packGemm,
  packGemmTransposed,
  packedRowBytes,
  transpose2d,
  unpackBits,
  unpackGemm,
  unpackGemmTransposed,
} from '../../../src/formats/int4.js';
import { expectError } from './helpers.js';

function codes(n: number, bits: number, seed = 1): Uint8Array {
  const rng = createRng(seed);
  return Uint8Array.from({ length: n }, () => rng.int(0, 2 ** bits));
}

describe('AWQ GEMM layout', () => {
  it.each([
    [1, 8],
    [3, 16],
    [130, 72],
    [64, 64],
  ])('%i × %i', (rows, cols) => {
    const values = codes(rows * cols, 4);
    const packed = packGemm(values, rows, cols);
    for (const [n, column] of AWQ_ORDER.entries()) {
      for (let w = 0; w < packed.length; w++) expect((packed[w] >>> (4 * n)) & 15).toBe(values[8 * w + column]);
    }
    expect(unpackGemm(packed, rows, cols)).toEqual(values);
    const transposed = transpose2d(values, rows, cols);
    expect(packGemmTransposed(transposed, rows, cols)).toEqual(packed);
    expect(unpackGemmTransposed(packed, rows, cols)).toEqual(transposed);
  });

  it('refuses what it cannot hold', async () => {
    await expectError(
      () => packGemm(new Uint8Array(12), 1, 12),
      'tensor-shape',
      /eight output columns .* found 12/,
      /gyre/,
    );
    await expectError(
      () => packGemm(Uint8Array.of(0, 0, 0, 16, 0, 0, 0, 0), 1, 8),
      'tensor-shape',
      /does not fit 4 bits/,
    );
    await expectError(
      () => packGemmTransposed(new Uint8Array(7), 1, 8),
      'tensor-shape',
      /expected 8 elements, found 7/,
    );
  });
});

describe('gyre layout', () => {
  it.each([2, 3, 4, 8].flatMap((bits) => [1, 7, 8, 9, 16, 29].map((n) => [bits, n])))(
    '%i bits, rows of %i',
    (bits, n) => {
      const rows = 5;
      const values = codes(rows * n, bits, bits * 100 + n);
      const packed = packBits(values, rows, n, bits);
      expect(packed.length).toBe(rows * packedRowBytes(n, bits));
      const slow = new Uint8Array(packed.length);
      for (let r = 0; r < rows; r++) {
        for (let bit = 0; bit < n * bits; bit++) {
          const code = values[r * n + Math.floor(bit / bits)];
          if ((code >> (bit % bits)) & 1) slow[r * packedRowBytes(n, bits) + (bit >> 3)] |= 1 << (bit & 7);
        }
      }
      expect(packed).toEqual(slow);
      expect(unpackBits(packed, rows, n, bits)).toEqual(values);
    },
  );

  it('refuses codes that do not fit', async () => {
    await expectError(() => packBits(Uint8Array.of(8), 1, 1, 3), 'tensor-shape', /does not fit 3 bits/);
    await expectError(
      () => packBits(Uint8Array.of(0, 0, 0, 0, 0, 0, 0, 4), 1, 8, 2),
      'tensor-shape',
      /does not fit 2 bits/,
    );
    await expectError(() => unpackBits(new Uint8Array(2), 1, 8, 3), 'tensor-shape', /expected 3 bytes, found 2/);
  });
});

it('packs and unpacks quickly', () => {
  const [rows, cols] = [2048, 4096];
  const values = codes(rows * cols, 3);
  const rate = (run: () => unknown): number => {
    run();
    const start = performance.now();
    run();
    return (rows * cols) / 1e3 / (performance.now() - start);
  };
  const packed = packGemm(values, rows, cols);
  const bits = packBits(values, rows, cols, 3);
  const rates = {
    packGemm: rate(() => packGemm(values, rows, cols)),
    unpackGemm: rate(() => unpackGemm(packed, rows, cols)),
    packGemmTransposed: rate(() => packGemmTransposed(values, rows, cols)),
    unpackGemmTransposed: rate(() => unpackGemmTransposed(packed, rows, cols)),
    packBits3: rate(() => packBits(values, rows, cols, 3)),
    unpackBits3: rate(() => unpackBits(bits, rows, cols, 3)),
    transpose: rate(() => transpose2d(values, rows, cols)),
  };
  if (process.env.GYRE_TEST_VERBOSE) console.log('million codes per second', rates);
  // Far below what is expected, so that a busy machine passes: this guards against a slow path, not a slow day.
  for (const [name, value] of Object.entries(rates)) expect(value, name).toBeGreaterThan(15);
});

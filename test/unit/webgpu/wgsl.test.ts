// Every variant of the fast kernels, the ones for GPUs that tests don't have too, is valid WGSL: Dawn's null backend has all features.
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { activationKernel } from '../../../src/backends/webgpu/fast/activations.js';
import { decodeAttentionKernel } from '../../../src/backends/webgpu/fast/attention.js';
import { wholeAttentionKernel } from '../../../src/backends/webgpu/fast/attention-whole.js';
import { batchGemmKernel } from '../../../src/backends/webgpu/fast/batch-gemm.js';
import { BATCH_GEMM_SHAPES } from '../../../src/backends/webgpu/fast/batch-products.js';
import { batchTiledKernel } from '../../../src/backends/webgpu/fast/batch-tiled.js';
import { flashKernel } from '../../../src/backends/webgpu/fast/flash.js';
import { GEMM_TILES, gemmKernel, scaledGemmKernel } from '../../../src/backends/webgpu/fast/gemm.js';
import { gemvKernel } from '../../../src/backends/webgpu/fast/gemv.js';
import { denseGemvKernel } from '../../../src/backends/webgpu/fast/gemv-dense.js';
import { rotateRowsKernel } from '../../../src/backends/webgpu/fast/rotate-rows.js';
import { rotateDenseKernel } from '../../../src/backends/webgpu/fast/rotate-dense.js';
import { embedTokensKernel, samplePickKernel, sampleSpansKernel } from '../../../src/backends/webgpu/fast/sample.js';
import { splitHeadsGradientKernel } from '../../../src/backends/webgpu/kernels/backward.js';
import { narrowKernel } from '../../../src/backends/webgpu/kernels/convert.js';
import { packColumnsKernel, packRowsKernel } from '../../../src/backends/webgpu/kernels/half-operands.js';
import { rmsNormHalfKernel } from '../../../src/backends/webgpu/kernels/norm.js';
import { splitHeadsKernel } from '../../../src/backends/webgpu/kernels/rope.js';
import { siluMulHalfKernel } from '../../../src/backends/webgpu/kernels/silu.js';
import { integerMatrixKernel, integerMatrixTile } from '../../../src/backends/webgpu/fast/gemm-integer.js';
import { hadamardRowsKernel, signsOf } from '../../../src/backends/webgpu/fast/hadamard.js';
import { encodeSlicesKernel, normCodesKernel, rowSliceKernel } from '../../../src/backends/webgpu/fast/row-slices.js';
import { unpackGridKernel } from '../../../src/backends/webgpu/kernels/activation-grid.js';
import { rowKernel } from '../../../src/backends/webgpu/fast/row.js';
import type { Kernel } from '../../../src/backends/webgpu/kernel.js';
import { hadamardTransform } from '../../../src/transforms/index.js';

const bools = [false, true];
const llama = signsOf(hadamardTransform(14336).base);
const kernels: Kernel[] = [
  ...(['f16', 'bf16', 'f32'] as const).map(embedTokensKernel),
  packRowsKernel,
  packColumnsKernel(),
  ...GEMM_TILES.map((tile) =>
    scaledGemmKernel({ ...tile, weights: 'f16', groupSize: 0, bias: false, residual: false }),
  ),
  sampleSpansKernel,
  samplePickKernel,
  ...bools.flatMap((f16) =>
    bools.flatMap((shuffle) => [
      ...[1, 2, 4].map((split) =>
        gemvKernel({ f16, shuffle, rows: 4, teams: 4, split, batch: 2, groupSize: 128, residual: true, bias: true }),
      ),
      ...bools.map((bias) =>
        gemvKernel({
          f16,
          shuffle,
          rows: 4,
          teams: 4,
          split: 2,
          batch: 1,
          groupSize: 64,
          residual: false,
          bias,
          products: 3,
        }),
      ),
      ...(['f16', 'bf16'] as const).map((weights) =>
        denseGemvKernel({ f16, shuffle, rows: 4, teams: 2, batch: 2, weights }),
      ),
      ...(['norm', 'silu', 'attention', 'plain'] as const).flatMap((source) =>
        [0, 4].flatMap((stages) =>
          [128, 256].map((threads) => activationKernel({ shuffle, source, stages, threads, splits: 5, headDim: 64 })),
        ),
      ),
      ...[16, 64, 128, 256].map((headDim) =>
        decodeAttentionKernel({
          shuffle,
          heads: 8,
          kvHeads: 2,
          headDim,
          rotaryDim: headDim,
          qkNorm: true,
          splits: 4,
          window: 0,
          together: 4,
          teams: 4,
          unroll: 4,
        }),
      ),
      ...([4, 8] as const).flatMap((bits) =>
        bools.map((turn) =>
          decodeAttentionKernel({
            shuffle,
            heads: 8,
            kvHeads: 2,
            headDim: 128,
            rotaryDim: 128,
            qkNorm: false,
            splits: 4,
            window: 0,
            together: 4,
            teams: 4,
            unroll: 4,
            grid: { bits, clip: 1 },
            turn,
          }),
        ),
      ),
      ...[8, 32].flatMap((teams) =>
        bools.map((qkNorm) =>
          wholeAttentionKernel({
            shuffle,
            heads: 8,
            kvHeads: 2,
            rotaryDim: 128,
            qkNorm,
            window: 0,
            teams,
            unroll: 2,
            stages: qkNorm ? 4 : 0,
          }),
        ),
      ),
    ]),
  ),
  ...(['int4', 'f16', 'bf16'] as const).flatMap((weights) => [
    ...[...BATCH_GEMM_SHAPES, { rows: 32, warps: 8, warpsM: 2, tileK: 256, depth: 1 }].flatMap((shape) =>
      ([16, 32] as const).map((columns) =>
        batchGemmKernel({ ...shape, columns, weights, groupSize: 128, residual: true, bias: true }),
      ),
    ),
    ...bools.map((f16) => batchTiledKernel({ f16, columns: 24, weights, groupSize: 64, residual: true, bias: true })),
  ]),
  ...([4, 8] as const).flatMap((bits) =>
    bools.map((bias) => integerMatrixKernel({ ...integerMatrixTile(2048, 4096), bits, bias, residual: !bias })),
  ),
  hadamardRowsKernel({
    channels: 14336,
    inner: 1,
    m: 28,
    p: 512,
    signs: llama,
    halves: true,
    threads: 256,
    bits: 4,
    ahead: 8,
  }),
  ...(['norm', 'silu', 'attention', 'plain'] as const).flatMap((source) =>
    bools.map((codes) =>
      rowKernel({
        source,
        channels: 14336,
        hadamard: { m: 28, p: 512, inner: 1, signs: llama },
        codes,
        threads: 1024,
        memory: 49152,
        subgroups: codes,
        splits: 4,
        headDim: 128,
      }),
    ),
  ),
  ...(['silu', 'attention', 'plain'] as const).flatMap((source) =>
    bools.flatMap((values) =>
      bools.map((shuffle) =>
        rowSliceKernel({
          source,
          rows: 40,
          columns: 128,
          sylvester: source !== 'attention',
          scale: 0.5,
          values,
          threads: 1024,
          shuffle,
          splits: 5,
        }),
      ),
    ),
  ),
  encodeSlicesKernel(14336),
  normCodesKernel(4096),
  ...bools.flatMap((f16) => [4, 8].map((bits) => unpackGridKernel(128, bits as 4 | 8, f16))),
  ...bools.flatMap((f16) => [
    ...[32, 64, 128].map((groupSize) => rotateRowsKernel({ f16, krot: 8, groupSize })),
    rmsNormHalfKernel(true, { f16 }),
    siluMulHalfKernel({ f16 }),
    narrowKernel(f16),
    splitHeadsKernel({ headDim: 128, rotaryDim: 64, qNorm: true, kNorm: false, half: { f16 } }),
    splitHeadsGradientKernel({ headDim: 80, rotaryDim: 32, norm: f16 }),
  ]),
  ...[16, 32, 64].map((tile) => rotateDenseKernel({ rows: 256, tile })),
  ...GEMM_TILES.flatMap((tile) =>
    (['f16', 'bf16', 'int4'] as const).flatMap((weights) =>
      bools.map((both) => gemmKernel({ ...tile, weights, groupSize: 128, bias: both, residual: both })),
    ),
  ),
  ...[16, 64, 80, 128].flatMap((headDim) =>
    (['rows', 'cache', 'forest'] as const).flatMap((source) =>
      [4, 8].map((warps) => flashKernel({ headDim, source, warps })),
    ),
  ),
];

const dawn = await import('webgpu').then(
  (module: { create(options: string[]): GPU; globals: object }) => module,
  () => undefined,
);
// The package is optional for users; in CI it must be there.
const missing = dawn || process.env.CI === 'true' ? undefined : 'the optional package webgpu is not installed';

describe.skipIf(missing)(`WGSL${missing ? `: skipped, ${missing}` : ''}`, () => {
  // Kept: a device must not outlive the instance it came from.
  let gpu: GPU;
  let device: GPUDevice;
  beforeAll(async () => {
    if (!dawn) throw new Error('the package webgpu is not installed');
    Object.assign(globalThis, dawn.globals);
    gpu = dawn.create(['backend=null', 'enable-dawn-features=allow_unsafe_apis']);
    const adapter = await gpu.requestAdapter();
    if (!adapter) throw new Error('Dawn has no null backend');
    device = await adapter.requestDevice({
      requiredFeatures: ['shader-f16', 'subgroups', 'chromium-experimental-subgroup-matrix' as GPUFeatureName],
    });
  });

  it.each(kernels.map((kernel) => [kernel.name, kernel] as const))('%s', async (_, kernel) => {
    device.pushErrorScope('validation');
    device.createShaderModule({ code: kernel.code });
    const error = await device.popErrorScope();
    expect(error?.message).toBeUndefined();
  });

  // Plans ask what a device allows before they take the others.
  it.each(kernels.filter(({ name }) => !/^(gemv|attention\.whole)/.test(name)).map((k) => [k.name, k] as const))(
    '%s binds no more buffers than every GPU allows',
    (_, kernel) => {
      expect(Object.keys(kernel.buffers).length).toBeLessThanOrEqual(8);
    },
  );

  afterAll(() => device.destroy());

  it('refuses what is not WGSL', async () => {
    device.pushErrorScope('validation');
    device.createShaderModule({ code: 'fn main( {' });
    expect((await device.popErrorScope())?.message).toMatch(/parsing WGSL/);
  });
});

// Conformance cases of the forward pass. Tolerances: u = unit roundoff, λ as in duo.ts; each formula stands by its case.
import { fromFloat32, type FloatDType } from '../../src/core/dtype.js';
import type { Rng } from '../../src/core/rng.js';
import { hostTensor } from '../../src/core/tensor.js';
import type { AttentionShape, LinearSource, Tensor, WeightBits } from '../../src/ops/backend.js';
import { dequantize } from '../../src/ops/reference/linear.js';
import { readF64 } from '../../src/ops/reference/backend.js';
import {
  closeArrays,
  LAMBDA,
  largestRow,
  maxAbs,
  norm,
  randomQuantized,
  randomTransform,
  type Duo,
  type Twin,
} from './duo.js';
import type { ConformanceCase } from './suite.js';

const FLOATS: readonly FloatDType[] = ['f32', 'f16', 'bf16'];
const ROWS = [1, 2, 3, 4, 5, 17];

/** [in, out, group size], with channel counts that are no power of two and outputs that fill no vector. */
const LINEARS = [
  [172, 24, 43],
  [172, 7, 4],
  [172, 40, 172],
  [352, 33, 32],
  [352, 64, 352],
  [384, 96, 128],
  [2752, 20, 64],
  [2752, 9, 2752],
] as const;

function denseSource(
  duo: Duo,
  dtype: FloatDType,
  outFeatures: number,
  inFeatures: number,
  bias: boolean,
): LinearSource {
  const values = duo.normals(outFeatures * inFeatures);
  return {
    kind: 'dense',
    weight: hostTensor(dtype, [outFeatures, inFeatures], fromFloat32(values, dtype)),
    bias: bias ? duo.normals(outFeatures) : undefined,
  };
}

/** The weight's values [out, in] in float64. */
async function weightOf(duo: Duo, source: LinearSource): Promise<Float64Array> {
  return source.kind === 'quantized' ? dequantize(source.weight) : readF64(await duo.oracle.upload(source.weight));
}

/**
 * One product of every row count against the oracle. Tolerance per output: λ·√(n + 2)·u·(Σ|x_i·w_i| + |bias| +
 * |residual|) for n products and two additions. Where the allowance permits int16 activations, each x_i is off by a
 * uniform error of at most δ_g/2, δ_g = max|x_g| / 32767: a standard deviation of √(Σ_g max|x_g|²·‖w_g‖²)·2^-15/√12,
 * of which 2^-14 instead of 2^-15/√12 is 7. Operands rounded to f16 (c each) add λ·√2·c·√(Σ x_i²·w_i²) besides.
 */
async function checkLinear(duo: Duo, source: LinearSource): Promise<void> {
  const handle = await duo.subject.loadLinear(source);
  const expectedHandle = await duo.oracle.loadLinear(source);
  const { inFeatures, outFeatures } = expectedHandle;
  if (handle.inFeatures !== inFeatures || handle.outFeatures !== outFeatures || !(handle.bytes > 0)) {
    throw new Error(`handle says ${handle.inFeatures} → ${handle.outFeatures}, ${handle.bytes} bytes`);
  }
  const weight = await weightOf(duo, source);
  const groupSize = source.kind === 'quantized' ? source.weight.groupSize : inFeatures;
  for (const rows of ROWS) {
    const x = await duo.input([rows, inFeatures]);
    const residual = rows % 2 === 1 ? await duo.input([rows, outFeatures]) : undefined;
    const int16 = source.kind === 'quantized' && rows <= duo.allowance.int16Rows;
    const tolerance = (at: number): number => {
      const r = Math.floor(at / outFeatures);
      const o = at % outFeatures;
      let magnitude = Math.abs(source.bias?.[o] ?? 0) + Math.abs(residual?.host[at] ?? 0);
      let squares = 0;
      for (let i = 0; i < inFeatures; i++) {
        const product = x.host[r * inFeatures + i] * weight[o * inFeatures + i];
        magnitude += Math.abs(product);
        squares += product ** 2;
      }
      let activationRounding = 0;
      for (let g = 0; int16 && g < inFeatures; g += groupSize) {
        const peak = maxAbs(x.host, r * inFeatures + g, groupSize);
        activationRounding += (peak * norm(weight, o * inFeatures + g, groupSize)) ** 2;
      }
      return (
        LAMBDA * Math.sqrt(inFeatures + 2) * duo.allowance.roundoff * magnitude +
        LAMBDA * Math.SQRT2 * duo.allowance.activationRoundoff * Math.sqrt(squares) +
        2 ** -14 * Math.sqrt(activationRounding)
      );
    };
    const actual = await duo.subject.linear(x.subject, handle, residual?.subject);
    const expected = await duo.oracle.linear(x.oracle, expectedHandle, residual?.oracle);
    await duo.close(actual, expected, tolerance, `${rows} rows`);
    duo.subject.free(actual);
  }
  duo.subject.release(handle);
}

function linearCases(): ConformanceCase[] {
  return LINEARS.flatMap(([inFeatures, outFeatures, groupSize], n): ConformanceCase[] => {
    const bias = n % 2 === 0;
    const shape = `${inFeatures} → ${outFeatures}${bias ? ' + bias' : ''}`;
    return [
      ...FLOATS.map((dtype) => ({
        op: 'linear' as const,
        also: ['loadLinear', 'release'] as const,
        name: `${shape}, ${dtype}`,
        run: (duo: Duo) => checkLinear(duo, denseSource(duo, dtype, outFeatures, inFeatures, bias)),
      })),
      ...([2, 3, 4, 8] as const).map((bits: WeightBits) => ({
        op: 'linear' as const,
        also: ['loadLinear', 'release'] as const,
        name: `${shape}, ${bits} bits in groups of ${groupSize}`,
        run: (duo: Duo) =>
          checkLinear(duo, {
            kind: 'quantized',
            weight: randomQuantized(outFeatures, inFeatures, bits, groupSize, duo.rng),
            bias: bias ? duo.normals(outFeatures) : undefined,
          }),
      })),
    ];
  });
}

/** Looking a row up computes nothing but (code − zero)·scale: at most 9 + 11 bits, exact in f32. Tolerance 0. */
function embedCases(): ConformanceCase[] {
  const check = async (duo: Duo, source: LinearSource): Promise<void> => {
    const ids = Int32Array.of(0, 16, 3, 3, 9);
    const actual = await duo.subject.embed(await duo.subject.loadLinear(source), ids);
    const expected = await duo.oracle.embed(await duo.oracle.loadLinear(source), ids);
    await duo.close(actual, expected, duo.allowance.roundoff > 2 ** -24 ? 2 ** -8 : 0);
  };
  return [
    ...FLOATS.map((dtype) => ({
      op: 'embed' as const,
      name: `17 × 172, ${dtype}`,
      run: (duo: Duo) => check(duo, denseSource(duo, dtype, 17, 172, false)),
    })),
    ...([2, 3, 4, 8] as const).map((bits) => ({
      op: 'embed' as const,
      name: `17 × 352, ${bits} bits in groups of 32`,
      run: (duo: Duo) => check(duo, { kind: 'quantized', weight: randomQuantized(17, 352, bits, 32, duo.rng) }),
    })),
  ];
}

/** Moving values about is exact. */
function movingCases(): ConformanceCase[] {
  return [
    {
      op: 'upload',
      also: ['download'],
      name: 'every float dtype',
      run: async (duo) => {
        for (const dtype of [...FLOATS, 'f64'] as const) {
          const host = hostTensor(dtype, [3, 43], fromFloat32(duo.normals(129), dtype));
          const actual = await duo.subject.upload(host);
          await duo.close(actual, await duo.oracle.upload(host), 0, dtype);
          duo.subject.free(actual, undefined);
        }
      },
    },
    {
      op: 'download',
      also: ['free'],
      name: 'a download is a copy: later changes of one do not reach the other',
      run: async (duo) => {
        const x = await duo.input([2, 5]);
        (await duo.subject.download(x.subject)).fill(7);
        closeArrays(await duo.subject.download(x.subject), x.host, 0, 'second download');
      },
    },
    {
      op: 'sliceRows',
      name: 'first, middle, last rows, none; a slice as an input',
      run: async (duo) => {
        const x = await duo.input([17, 172]);
        for (const [begin, end] of [
          [0, 1],
          [5, 9],
          [16, 17],
          [0, 17],
        ]) {
          const actual = duo.subject.sliceRows(x.subject, begin, end);
          const expected = duo.oracle.sliceRows(x.oracle, begin, end);
          await duo.close(actual, expected, 0, `rows ${begin} … ${end}`);
          await duo.close(
            await duo.subject.transpose(actual),
            await duo.oracle.transpose(expected),
            0,
            'its transpose',
          );
        }
      },
    },
    {
      op: 'gatherRows',
      name: 'some, in another order, one repeated; gathered rows as an input',
      run: async (duo) => {
        for (const cols of [172, 43]) {
          const x = await duo.input([17, cols]);
          for (const rows of [Int32Array.of(16), Int32Array.of(3, 0, 3, 16, 9, 8, 7, 6, 5, 4, 3, 2)]) {
            const actual = await duo.subject.gatherRows(x.subject, rows);
            const expected = await duo.oracle.gatherRows(x.oracle, rows);
            await duo.close(actual, expected, 0, `rows ${rows.join()}`);
            await duo.close(await duo.subject.transpose(actual), await duo.oracle.transpose(expected), 0, 'transposed');
          }
        }
      },
    },
    {
      op: 'concatColumns',
      name: 'three widths, one part alone',
      run: async (duo) => {
        for (const rows of [1, 17]) {
          const parts = [await duo.input([rows, 43]), await duo.input([rows, 1]), await duo.input([rows, 64])];
          for (const used of [parts, parts.slice(0, 1)]) {
            const actual = await duo.subject.concatColumns(used.map((part) => part.subject));
            await duo.close(actual, await duo.oracle.concatColumns(used.map((part) => part.oracle)), 0);
          }
        }
      },
    },
  ];
}

/** Tolerance: λ·(√n + 4)·u·|y|: the sum of n squares, a root, a division and two products. */
function rmsNormCases(): ConformanceCase[] {
  return [16, 172, 352, 2752].map((n) => ({
    op: 'rmsNorm' as const,
    name: `${n} channels`,
    run: async (duo: Duo) => {
      for (const rows of ROWS) {
        const x = await duo.input([rows, n]);
        const weight = await duo.input([n]);
        const expected = await duo.oracle.rmsNorm(x.oracle, weight.oracle, 1e-6);
        const y = readF64(expected);
        const tolerance = (at: number): number =>
          LAMBDA * (Math.sqrt(n) + 4) * duo.activationRoundoff * Math.abs(y[at]);
        await duo.close(await duo.subject.rmsNorm(x.subject, weight.subject, 1e-6), expected, tolerance);
      }
      // A row of zeros has no direction: eps keeps it at zero.
      const zeros = await duo.input([1, n], new Float32Array(n));
      const ones = await duo.input([n], new Float32Array(n).fill(1));
      const actual = await duo.subject.rmsNorm(zeros.subject, ones.subject, 1e-6);
      await duo.close(actual, zeros.oracle, 0, 'a row of zeros');
    },
  }));
}

/**
 * Rotations keep the norm of a group, and each adds an error of a few u of what it turns. Tolerance:
 * λ·(K + 1)·u·‖y_group‖₂.
 */
function rotateCases(): ConformanceCase[] {
  const shapes = [
    [172, 4, 3],
    [172, 172, 8],
    [352, 32, 8],
    [384, 128, 8],
    [2752, 64, 2],
    [384, 128, 1],
    [384, 128, 0],
  ] as const;
  return shapes.map(([channels, groupSize, krot]) => ({
    op: 'rotate' as const,
    also: ['loadTransform'] as const,
    name: `${channels} channels in groups of ${groupSize}, K = ${krot}`,
    run: async (duo: Duo) => {
      const transform = randomTransform(channels, groupSize, krot, duo.rng);
      const handle = await duo.subject.loadTransform(transform);
      if (handle.channels !== channels) throw new Error(`handle says ${handle.channels} channels`);
      for (const rows of ROWS) {
        const x = await duo.input([rows, channels]);
        const expected = await duo.oracle.rotate(x.oracle, await duo.oracle.loadTransform(transform));
        const y = readF64(expected);
        const tolerance = (at: number): number =>
          LAMBDA * (krot + 1) * duo.activationRoundoff * norm(y, Math.floor(at / groupSize) * groupSize, groupSize);
        await duo.close(await duo.subject.rotate(x.subject, handle), expected, tolerance, `${rows} rows`);
      }
      duo.subject.release(handle);
    },
  }));
}

/** Head layouts: [heads, kvHeads, headDim]. */
const HEADS = [
  [4, 4, 16],
  [6, 2, 24],
  [8, 1, 64],
  [4, 2, 80],
  [4, 2, 128],
] as const;

/**
 * Tolerance: λ·(√d + 6)·u·√2·max|head| for q and k (a norm over d = headDim, then two products and a sum); 0 for v.
 */
function splitHeadsCases(): ConformanceCase[] {
  return HEADS.flatMap(([heads, kvHeads, headDim]) =>
    [true, false].map((norms) => ({
      op: 'splitHeads' as const,
      also: ['loadRope'] as const,
      name: `${heads}/${kvHeads} heads of ${headDim}${norms ? ' with norms' : ', half of each head rotated'}`,
      run: async (duo: Duo) => {
        // Partial rotary dimensions where there are no norms, so that both occur.
        const rotaryDim = norms ? headDim : headDim / 2;
        const angles = Float32Array.from({ length: 40 * (rotaryDim / 2) }, () => 6 * duo.rng.uniform());
        const cos = angles.map(Math.cos);
        const sin = angles.map(Math.sin);
        const rope = await duo.subject.loadRope(cos, sin, rotaryDim);
        if (rope.positions !== 40) throw new Error(`RoPE tables say ${rope.positions} positions`);
        const oracleRope = await duo.oracle.loadRope(cos, sin, rotaryDim);
        for (const [batch, tokens, start] of [
          [1, 1, 0],
          [1, 17, 0],
          [1, 1, 39],
          [3, 5, 7],
          [3, 5, Int32Array.of(35, 0, 7)],
        ] as const) {
          const qkv = await duo.input([batch * tokens, (heads + 2 * kvHeads) * headDim]);
          const qNorm = norms ? await duo.input([headDim]) : undefined;
          const kNorm = norms ? await duo.input([headDim]) : undefined;
          const options = { heads, kvHeads, headDim, batch, start, eps: 1e-6 };
          const actual = await duo.subject.splitHeads(qkv.subject, {
            ...options,
            rope,
            qNorm: qNorm?.subject,
            kNorm: kNorm?.subject,
          });
          const expected = await duo.oracle.splitHeads(qkv.oracle, {
            ...options,
            rope: oracleRope,
            qNorm: qNorm?.oracle,
            kNorm: kNorm?.oracle,
          });
          for (const part of ['q', 'k', 'v'] as const) {
            const y = readF64(expected[part]);
            const tolerance = (at: number): number =>
              LAMBDA *
              (Math.sqrt(headDim) + 6) *
              duo.activationRoundoff *
              Math.SQRT2 *
              maxAbs(y, Math.floor(at / headDim) * headDim, headDim);
            const what = `${part} of batch ${batch}, ${tokens} tokens from ${String(start)}`;
            // Values are only moved, and rounded where heads are.
            const rounding = duo.allowance.activationRoundoff;
            const moved = (at: number): number => rounding * Math.abs(y[at]) + (rounding > 0 ? duo.smallest : 0);
            await duo.close(actual[part], expected[part], part === 'v' ? moved : tolerance, what);
          }
        }
        duo.subject.release(rope);
      },
    })),
  );
}

/**
 * A logit is off by δ = λ·u·√d·‖q‖‖k‖·scale at most, a softmax weight by 2δ and λ·u·(√n + 8) relative (exponential,
 * sum of n, division), and the output is an average of values. Tolerance: (2δ + λ·u·(√n + 8))·max|v|, for the largest
 * ‖q‖‖k‖. A cache that rounds by c moves a logit by c·‖q‖‖k‖·scale and a value by c·max|v| besides: (2c·‖q‖‖k‖·scale +
 * c)·max|v| more.
 */
function attentionTolerance(
  duo: Duo,
  [q, k, v]: readonly Twin[],
  shape: AttentionShape,
  scale: number,
  cacheRoundoff = 0,
): number {
  const { headDim } = shape;
  const tokens = k.shape[0];
  const logit = largestRow(q.host, headDim) * largestRow(k.host, headDim) * scale;
  const delta = Math.sqrt(headDim) * logit;
  return (
    (LAMBDA * duo.allowance.roundoff * (2 * delta + Math.sqrt(tokens) + 8) + cacheRoundoff * (2 * logit + 1)) *
    maxAbs(v.host)
  );
}

/** Rows of sequence-major host data [batch, tokens, width] for tokens [begin, end) of every sequence. */
function takeTokens(
  host: Float32Array,
  batch: number,
  tokens: number,
  width: number,
  begin: number,
  end: number,
): Float32Array {
  const out = new Float32Array(batch * (end - begin) * width);
  for (let b = 0; b < batch; b++) {
    const rows = host.subarray((b * tokens + begin) * width, (b * tokens + end) * width);
    out.set(rows, b * (end - begin) * width);
  }
  return out;
}

function attentionCases(): ConformanceCase[] {
  return HEADS.flatMap(([heads, kvHeads, headDim]) =>
    [undefined, 1, 4].flatMap((window) =>
      [1, 3].map((batch): ConformanceCase => ({
        op: 'attention',
        also: ['createKvCache', 'release'],
        name: `${heads}/${kvHeads} heads of ${headDim}, batch ${batch}${window ? `, window ${window}` : ''}: whole, and prefill + token by token`,
        run: async (duo) => {
          const shape = { heads, kvHeads, headDim };
          const tokens = 19;
          const q = await duo.input([batch * tokens, heads * headDim]);
          const k = await duo.input([batch * tokens, kvHeads * headDim]);
          const v = await duo.input([batch * tokens, kvHeads * headDim]);
          const scale = headDim ** -0.5;
          const options = { ...shape, batch, scale, window, start: 0 };
          const tolerance = attentionTolerance(duo, [q, k, v], shape, scale);
          const cached = attentionTolerance(duo, [q, k, v], shape, scale, duo.allowance.cacheRoundoff);
          const expected = await duo.oracle.attention(q.oracle, k.oracle, v.oracle, options);
          const whole = await duo.subject.attention(q.subject, k.subject, v.subject, options);
          await duo.close(whole, expected, tolerance, 'whole');

          // The same tokens through a cache in chunks must see the same past. Twice: rewinding to 0 is allowed.
          const cache = await duo.subject.createKvCache({ batch, kvHeads, headDim, capacity: tokens + 2 });
          if (cache.batch !== batch || cache.capacity < tokens + 2) throw new Error('cache has the wrong shape');
          for (const chunks of [
            [0, 13, 14, 15, 16, 17, 18, 19],
            [0, 1, 6, 19],
          ]) {
            for (let n = 1; n < chunks.length; n++) {
              const [begin, end] = [chunks[n - 1], chunks[n]];
              const chunk = async (twin: Twin): Promise<Tensor> => {
                const width = twin.shape[1];
                const host = takeTokens(twin.host, batch, tokens, width, begin, end);
                return duo.subject.upload(hostTensor('f32', [batch * (end - begin), width], host));
              };
              const [cq, ck, cv] = [await chunk(q), await chunk(k), await chunk(v)];
              const actual = await duo.subject.attention(cq, ck, cv, { ...options, cache, start: begin });
              const part = takeTokens(Float32Array.from(readF64(expected)), batch, tokens, heads * headDim, begin, end);
              closeArrays(
                await duo.subject.download(actual),
                part,
                // `part` went through f32.
                cached + 2 ** -24 * maxAbs(part),
                `tokens ${begin} … ${end} through the cache`,
              );
              duo.subject.free(cq, ck, cv, actual);
            }
          }
          duo.subject.release(cache, undefined);
        },
      })),
    ),
  );
}

/**
 * Sequences at different positions: prompts of unlike lengths padded on the right, sequences copied into another cache
 * (forks included), then a chunk for each that starts where its own tokens end. Every sequence must see what it sees alone.
 */
function raggedCases(): ConformanceCase[] {
  return HEADS.flatMap(([heads, kvHeads, headDim]) =>
    [undefined, 4].flatMap((window) =>
      // A single token each, a few, and more than backends keep for their decoding kernels.
      [1, 5, 12].map((tokens): ConformanceCase => ({
        op: 'attention',
        also: ['createKvCache', 'copySequences', 'release'],
        name: `${heads}/${kvHeads} heads of ${headDim}${window ? `, window ${window}` : ''}: ${tokens} tokens after forks of unlike lengths`,
        run: async (duo) => {
          const shape = { heads, kvHeads, headDim };
          const scale = headDim ** -0.5;
          const lengths = [9, 2, 14];
          const longest = Math.max(...lengths);
          const parents = Int32Array.of(2, 0, 0, 1, 2);
          const rows = longest + tokens;
          const inputs = async (count: number): Promise<[Twin, Twin, Twin]> => [
            await duo.input([count, heads * headDim]),
            await duo.input([count, kvHeads * headDim]),
            await duo.input([count, kvHeads * headDim]),
          ];
          const [pq, pk, pv] = await inputs(lengths.length * longest);
          const [cq, ck, cv] = await inputs(parents.length * tokens);
          const prompts = await duo.subject.createKvCache({
            batch: lengths.length,
            kvHeads,
            headDim,
            capacity: longest,
          });
          const forks = await duo.subject.createKvCache({
            batch: parents.length,
            kvHeads,
            headDim,
            capacity: rows + 3,
          });
          const first = { ...shape, batch: lengths.length, scale, window, start: 0, cache: prompts };
          duo.subject.free(await duo.subject.attention(pq.subject, pk.subject, pv.subject, first));
          // Into the larger cache in two steps, the second of which forks inside it.
          const copy = (from: number, to: number, of = from): { from: number; to: number; tokens: number } => ({
            from,
            to,
            tokens: lengths[of],
          });
          await duo.subject.copySequences(prompts, forks, [copy(2, 0), copy(0, 1), copy(1, 3)]);
          await duo.subject.copySequences(forks, forks, [copy(1, 2, 0), copy(0, 4, 2)]);
          const starts = parents.map((parent) => lengths[parent]);
          const actual = await duo.subject.download(
            await duo.subject.attention(cq.subject, ck.subject, cv.subject, {
              ...shape,
              batch: parents.length,
              scale,
              window,
              start: starts,
              cache: forks,
            }),
          );
          for (const [i, parent] of parents.entries()) {
            const joined = (prompt: Twin, chunk: Twin): Float32Array => {
              const width = prompt.shape[1];
              const begin = parent * longest * width;
              return Float32Array.from([
                ...prompt.host.subarray(begin, begin + lengths[parent] * width),
                ...chunk.host.subarray(i * tokens * width, (i + 1) * tokens * width),
              ]);
            };
            const count = lengths[parent] + tokens;
            const q = await duo.input([count, heads * headDim], joined(pq, cq));
            const k = await duo.input([count, kvHeads * headDim], joined(pk, ck));
            const v = await duo.input([count, kvHeads * headDim], joined(pv, cv));
            const alone = { ...shape, batch: 1, scale, window, start: 0 };
            const expected = readF64(await duo.oracle.attention(q.oracle, k.oracle, v.oracle, alone));
            const width = heads * headDim;
            closeArrays(
              actual.subarray(i * tokens * width, (i + 1) * tokens * width),
              expected.subarray(lengths[parent] * width),
              attentionTolerance(duo, [q, k, v], shape, scale, duo.allowance.cacheRoundoff) +
                2 ** -24 * maxAbs(expected),
              `sequence ${i}`,
            );
          }
          duo.subject.release(prompts, forks);
        },
      })),
    ),
  );
}

/** Tolerance: (16 + 2·|gate|)·u·|y|: an exponential is as precise as its argument; and 2^-100 where it underflows. */
function siluMulCases(): ConformanceCase[] {
  return [4, 43, 172, 2752].map((n) => ({
    op: 'siluMul' as const,
    name: `${n} channels`,
    run: async (duo: Duo) => {
      for (const rows of ROWS) {
        const gateUp = duo.normals(rows * 2 * n).map((z) => 3 * z);
        gateUp.set([100, -100, 0, -20], 0);
        const x = await duo.input([rows, 2 * n], gateUp);
        const expected = await duo.oracle.siluMul(x.oracle);
        const y = readF64(expected);
        const tolerance = (at: number): number => {
          const gate = gateUp[Math.floor(at / n) * 2 * n + (at % n)];
          return (16 + 2 * Math.abs(gate)) * duo.activationRoundoff * Math.abs(y[at]) + duo.smallest;
        };
        await duo.close(await duo.subject.siluMul(x.subject), expected, tolerance, `${rows} rows`);
      }
    },
  }));
}

/** Tolerance in nats: λ·u·(√vocab + 4·max|z| + 4): a sum of exponentials of logits z, its logarithm, differences. */
function scoreCases(): ConformanceCase[] {
  return [5, 512, 4097].flatMap((vocab) =>
    [true, false].map((withReference) => ({
      op: 'score' as const,
      name: `${vocab} tokens${withReference ? ', against a reference' : ''}`,
      run: async (duo: Duo) => {
        for (const rows of [1, 3, 17]) {
          const noise = (scale: number): Float32Array => duo.normals(rows * vocab).map((z) => scale * z);
          const base = noise(4);
          const logits = await duo.input([rows, vocab], base);
          const small = noise(0.3);
          const reference = withReference
            ? await duo.input(
                [rows, vocab],
                base.map((z, i) => z + small[i]),
              )
            : undefined;
          // Every other row is asked for its most likely token, one of them for the second of two that are.
          const targets = Int32Array.from({ length: rows }, (_, r) => {
            const row = base.subarray(r * vocab, (r + 1) * vocab);
            return r % 2 === 0 ? row.indexOf(row.reduce((a, b) => Math.max(a, b))) : duo.rng.int(0, vocab);
          });
          const actual = await duo.subject.score(logits.subject, targets, reference?.subject);
          const expected = await duo.oracle.score(logits.oracle, targets, reference?.oracle);
          const peak = Math.max(maxAbs(base), maxAbs(reference?.host ?? base));
          const tolerance = LAMBDA * duo.allowance.roundoff * (Math.sqrt(vocab) + 4 * peak + 4);
          closeArrays(actual.nll, expected.nll, tolerance, 'nll');
          closeArrays(actual.hit, expected.hit, 0, 'hit');
          if ((actual.kl === undefined) === withReference || (actual.agree === undefined) === withReference) {
            throw new Error('kl and agree must be there if and only if there is a reference');
          }
          closeArrays(actual.kl ?? [], expected.kl ?? [], tolerance, 'kl');
          closeArrays(actual.agree ?? [], expected.agree ?? [], 0, 'agree');
        }
      },
    })),
  );
}

/** Sequences that branch, packed: parents of each token in preorder, −1 for the first of a tree. */
const FORESTS: readonly (readonly number[])[] = [
  [-1],
  // Two sequences side by side.
  [-1, 0, 1, 2, 3, -1, 5, 6, 7, 8, 9, 10],
  // A trunk of six, branches of one to three tokens, one of them branching again; then a tree of branches at its root.
  [-1, 0, 1, 2, 3, 4, 5, 6, 7, 5, 9, 10, 9, 12, 5, 5, -1, 16, 16, 18, 16],
];

/** Three trees whose branches leave long trunks at several places, so that tiles of keys and of rows hold parts of many. */
export function largeForest(rng: Rng): number[] {
  const parents: number[] = [];
  const grow = (from: number, length: number): void => {
    for (let i = 0; i < length; i++) parents.push(i === 0 ? from : parents.length - 1);
  };
  for (const trunk of [7, 45, 70]) {
    const root = parents.length;
    grow(-1, trunk);
    // In preorder later branches leave the trunk earlier.
    const leaves = Array.from({ length: 5 }, () => rng.int(Math.floor(trunk / 2), trunk)).sort((a, b) => b - a);
    for (const at of leaves) grow(root + at, rng.int(1, 12));
  }
  return parents;
}

/** Ends and positions of tokens with these parents. */
export function forestOf(parents: readonly number[]): { ends: Int32Array; positions: Int32Array } {
  const rows = parents.length;
  const ends = Int32Array.from(parents, (_, row) => row + 1);
  for (let row = rows - 1; row >= 0; row--)
    if (parents[row] >= 0) ends[parents[row]] = Math.max(ends[parents[row]], ends[row]);
  const positions = new Int32Array(rows);
  for (const [row, parent] of parents.entries()) positions[row] = parent < 0 ? 0 : positions[parent] + 1;
  return { ends, positions };
}

/** Packed rows against the same sequences, each on its own; tolerance as attention's. */
function forestCases(): ConformanceCase[] {
  return HEADS.flatMap(([heads, kvHeads, headDim]) =>
    [undefined, 1, 4].map((window): ConformanceCase => ({
      op: 'attention',
      name: `${heads}/${kvHeads} heads of ${headDim}${window ? `, window ${window}` : ''}: sequences with common beginnings, packed`,
      run: async (duo) => {
        const shape = { heads, kvHeads, headDim };
        const scale = headDim ** -0.5;
        for (const parents of [...FORESTS, largeForest(duo.rng)]) {
          const rows = parents.length;
          const { ends, positions } = forestOf(parents);
          const q = await duo.input([rows, heads * headDim]);
          const k = await duo.input([rows, kvHeads * headDim]);
          const v = await duo.input([rows, kvHeads * headDim]);
          const options = { ...shape, scale, window, batch: rows, start: positions, ends };
          const expected = await duo.oracle.attention(q.oracle, k.oracle, v.oracle, options);
          const actual = await duo.subject.attention(q.subject, k.subject, v.subject, options);
          await duo.close(actual, expected, attentionTolerance(duo, [q, k, v], shape, scale), `${rows} rows`);
          duo.subject.free(actual);
        }
      },
    })),
  );
}

/** Every case of {@link InferenceOps}. */
export const inferenceCases: readonly ConformanceCase[] = [
  ...movingCases(),
  ...linearCases(),
  ...embedCases(),
  ...rmsNormCases(),
  ...rotateCases(),
  ...splitHeadsCases(),
  ...attentionCases(),
  ...raggedCases(),
  ...forestCases(),
  ...siluMulCases(),
  ...scoreCases(),
];

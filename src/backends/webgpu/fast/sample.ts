// The step around the blocks of a decode plan: embedding of the last token, and choosing the next one, on the GPU, so that the
// host never has to read a token before it can submit the next step. Bytes: a row of the table; 4 per logit for
// the largest one; with a temperature the logits twice more, with top-k or top-p up to 32 times, from cache.
import { defineKernel, read, write, type Kernel } from '../kernel.js';

/** Element type of the embedding table. */
export type EmbeddingType = 'f16' | 'bf16' | 'f32';

/** tokens [batch] → x [batch, hidden] f32, from table [vocab, hidden]. Workgroups: hidden / 256, batch. */
export function embedTokensKernel(type: EmbeddingType): Kernel<'tokens' | 'table' | 'x', 'hidden' | 'vocab'> {
  const value = {
    f32: 'bitcast<f32>(table[token * params.hidden + c])',
    f16: 'unpack2x16float(table[(token * params.hidden + c) / 2u])[c & 1u]',
    bf16: 'bitcast<f32>((table[(token * params.hidden + c) / 2u] >> ((c & 1u) * 16u)) << 16u)',
  }[type];
  return defineKernel({
    name: `embedTokens.${type}`,
    buffers: { tokens: read('u32'), table: read('u32'), x: write('f32') },
    params: { hidden: 'u32', vocab: 'u32' },
    body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let c = id.x;
  if (c >= params.hidden) { return; }
  // NO_TOKEN stays inside the table; whoever reads it back stops.
  let token = min(tokens[id.y], params.vocab - 1u);
  x[id.y * params.hidden + c] = ${value};
}`,
  });
}

/** Chosen where a row of logits holds no finite maximum: for the host to refuse. */
export const NO_TOKEN = 0xffffffff;

/** Logits a workgroup of {@link sampleSpansKernel} looks at. */
export const SAMPLE_SPAN = 2048;
const THREADS = 256;

/**
 * First pass of sampling, over spans of the vocabulary: logits [batch, vocab] → spans [batch, groups] of (max, index as bits,
 * Σ exp((l − max)/T), 0). Workgroups: ceil(vocab / SAMPLE_SPAN), batch.
 */
export const sampleSpansKernel = defineKernel({
  name: 'sample.spans',
  buffers: { logits: read('f32'), settings: read('vec4<f32>'), spans: write('vec4<f32>') },
  params: { vocab: 'u32' },
  body: /* wgsl */ `
var<workgroup> best: array<f32, ${THREADS}>;
var<workgroup> where_: array<u32, ${THREADS}>;
var<workgroup> sums: array<f32, ${THREADS}>;
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let base = wg.y * params.vocab;
  let first = wg.x * ${SAMPLE_SPAN}u;
  let last = min(first + ${SAMPLE_SPAN}u, params.vocab);
  var top = -3.4e38; var at = first;
  for (var i = first + local; i < last; i += ${THREADS}u) {
    let l = logits[base + i];
    if (l > top) { top = l; at = i; }
  }
  best[local] = top; where_[local] = at;
  for (var step = ${THREADS / 2}u; step > 0u; step /= 2u) {
    workgroupBarrier();
    if (local < step) {
      let other = best[local + step];
      // The lower index wins a tie, as it does for an argmax on the host.
      if (other > best[local] || (other == best[local] && where_[local + step] < where_[local])) {
        best[local] = other; where_[local] = where_[local + step];
      }
    }
  }
  workgroupBarrier();
  let temperature = settings[wg.y].x;
  var sum = 0.0;
  if (temperature > 0.0) {
    for (var i = first + local; i < last; i += ${THREADS}u) { sum += exp((logits[base + i] - best[0]) / temperature); }
  }
  sums[local] = sum;
  for (var step = ${THREADS / 2}u; step > 0u; step /= 2u) {
    workgroupBarrier();
    if (local < step) { sums[local] += sums[local + step]; }
  }
  if (local == 0u) { spans[wg.y * groups.x + wg.x] = vec4(best[0], bitcast<f32>(where_[0]), sums[0], 0.0); }
}`,
});

/**
 * Second pass, one workgroup per sequence: picks the token, stores it as the next input and in a ring of the last steps, at slot
 * position modulo `ring`, for the host to read when it likes; advances the position, up to the sequence's last one.
 *
 * settings [batch]: (temperature, top-p, top-k, last position); temperature 0 takes the maximum. Otherwise the logits at or above a
 * threshold take part: the top-k-th largest, and the largest threshold whose tail holds top-p of the probability, both found by
 * bisection over the logits' bits (32 passes over the vocabulary at most, none without top-k and top-p); ties at the threshold all
 * take part. The choice among them is by Gumbel noise from a counter-based generator keyed by (seed, position): the same on every
 * machine, whatever shares the batch, up to the rounding of the logits.
 */
export const samplePickKernel = defineKernel({
  name: 'sample.pick',
  buffers: {
    logits: read('f32'),
    settings: read('vec4<f32>'),
    seeds: read('u32'),
    spans: read('vec4<f32>'),
    tokens: write('u32'),
    positions: write('u32'),
    history: write('u32'),
  },
  params: { vocab: 'u32', spanCount: 'u32', batch: 'u32', ring: 'u32' },
  body: /* wgsl */ `
var<workgroup> values: array<f32, ${THREADS}>;
var<workgroup> indices: array<u32, ${THREADS}>;

fn hash(x: u32) -> u32 {
  // PCG output permutation (O'Neill 2014; Jarzynski and Olano 2020).
  let state = x * 747796405u + 2891336453u;
  let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
  return (word >> 22u) ^ word;
}
// A logit's bits as an unsigned number in the same order, and back.
fn ordered(l: f32) -> u32 { let b = bitcast<u32>(l); return select(b | 0x80000000u, ~b, (b >> 31u) == 1u); }
fn unordered(u: u32) -> f32 { return bitcast<f32>(select(~u, u & 0x7fffffffu, (u >> 31u) == 1u)); }

fn total(local: u32, mine: f32) -> f32 {
  workgroupBarrier();
  values[local] = mine;
  for (var step = ${THREADS / 2}u; step > 0u; step /= 2u) {
    workgroupBarrier();
    if (local < step) { values[local] += values[local + step]; }
  }
  workgroupBarrier();
  return workgroupUniformLoad(&values[0]);
}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let b = wg.x;
  let base = b * params.vocab;
  let temperature = settings[b].x; let topP = settings[b].y; let topK = settings[b].z;
  var top = -3.4e38; var at = 0u;
  for (var i = local; i < params.spanCount; i += ${THREADS}u) {
    let span = spans[b * params.spanCount + i];
    if (span.x > top) { top = span.x; at = bitcast<u32>(span.y); }
  }
  values[local] = top; indices[local] = at;
  for (var step = ${THREADS / 2}u; step > 0u; step /= 2u) {
    workgroupBarrier();
    if (local < step) {
      let other = values[local + step];
      if (other > values[local] || (other == values[local] && indices[local + step] < indices[local])) {
        values[local] = other; indices[local] = indices[local + step];
      }
    }
  }
  workgroupBarrier();
  top = workgroupUniformLoad(&values[0]);
  at = workgroupUniformLoad(&indices[0]);
  if (temperature > 0.0) {
    var mass = 0.0;
    for (var i = local; i < params.spanCount; i += ${THREADS}u) {
      let span = spans[b * params.spanCount + i];
      mass += span.z * exp((span.x - top) / temperature);
    }
    mass = total(local, mass);
    // The highest threshold that keeps enough: the set only grows as it falls.
    var threshold = 0u;
    if (topK > 0.0 || topP < 1.0) {
      // First the k-th largest, then, among those, top-p.
      for (var pass_ = 0u; pass_ < 2u; pass_++) {
        if ((pass_ == 0u && topK <= 0.0) || (pass_ == 1u && topP >= 1.0)) { continue; }
        var kept = mass;
        if (pass_ == 1u && topK > 0.0) {
          var mine = 0.0;
          for (var i = local; i < params.vocab; i += ${THREADS}u) {
            let l = logits[base + i];
            if (ordered(l) >= threshold) { mine += exp((l - top) / temperature); }
          }
          kept = total(local, mine);
        }
        var low = threshold; var high = ordered(top);
        for (var bit = 0u; bit < 32u && low < high; bit++) {
          let middle = low + (high - low + 1u) / 2u;
          var mine = 0.0;
          for (var i = local; i < params.vocab; i += ${THREADS}u) {
            let l = logits[base + i];
            if (ordered(l) >= middle) { mine += select(exp((l - top) / temperature), 1.0, pass_ == 0u); }
          }
          let sum = total(local, mine);
          if (sum >= select(topP * kept, topK, pass_ == 0u)) { low = middle; } else { high = middle - 1u; }
        }
        threshold = low;
      }
    }
    let key = hash(seeds[b] ^ hash(positions[b]));
    var best = -3.4e38; var choice = at;
    for (var i = local; i < params.vocab; i += ${THREADS}u) {
      let l = logits[base + i];
      if (ordered(l) >= threshold) {
        let u = (f32(hash(key ^ hash(i)) >> 8u) + 0.5) * ${2 ** -24};
        let score = (l - top) / temperature - log(-log(u));
        if (score > best) { best = score; choice = i; }
      }
    }
    workgroupBarrier();
    values[local] = best; indices[local] = choice;
    for (var step = ${THREADS / 2}u; step > 0u; step /= 2u) {
      workgroupBarrier();
      if (local < step && values[local + step] > values[local]) {
        values[local] = values[local + step]; indices[local] = indices[local + step];
      }
    }
    workgroupBarrier();
    at = indices[0];
  }
  // NaN is above nothing, and nothing is above infinity.
  if (!(top > -3.4e38 && top < 3.4e38)) { at = ${NO_TOKEN}u; }
  if (local == 0u) {
    history[(positions[b] % params.ring) * params.batch + b] = at;
    tokens[b] = at;
    if (positions[b] < u32(settings[b].w)) { positions[b] += 1u; }
  }
}`,
});

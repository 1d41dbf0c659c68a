// Gradient of the pairwise transform on rows of activations. A workgroup takes one group of channels and every
// `workgroups`-th tile of rows: it turns the tile forwards, then walks back through the rotations with ∂y beside it. Element e
// of row r lies at [e][r], as in the forward kernel. Bytes moved: x twice, ∂y once, ∂x once, tables from cache.
import { defineKernel, read, variants, write } from '../kernel.js';

const THREADS = 128;

/** Bytes of workgroup memory for tiles of `rows` rows. */
export function rotationGradientMemory(groupSize: number, rows: number): number {
  return 8 * groupSize * (rows === 1 ? 1 : rows + 1);
}

/**
 * Workgroups: (stretches of rows, groups of channels). `parts` [stretches · lanes, krot · channels / 2 + channels]: sums of
 * ∂θ, then of ∂a, over a stretch's rows; the lanes share the rows of a tile.
 */
export const rotationGradientKernel = variants((groupSize: number, rows: number, lanes: number) => {
  const stride = rows === 1 ? 1 : rows + 1;
  const share = rows / lanes;
  const accumulate = (entries: number, at: string, term: (row: string) => string): string => /* wgsl */ `
    for (var n = lid; n < ${entries * lanes}u; n += ${THREADS}u) {
      let lane = n % ${lanes}u;
      let p = n / ${lanes}u;
      var sum = 0.0;
      ${at}
      for (var m = 0u; m < ${share}u; m++) {
        let r = lane * ${share}u + m;
        sum += ${term('r')};
      }
      let slot = (group.x * ${lanes}u + lane) * perPart + entry;
      // Every slot has one thread, the same for every tile.
      if (begun) { parts[slot] += sum; } else { parts[slot] = sum; }
    }`;
  const turn = (tiles: readonly string[], sign: string): string => /* wgsl */ `
    for (var n = lid; n < ${(groupSize / 2) * rows}u; n += ${THREADS}u) {
      let entry = k * (params.channels / 2u) + begin / 2u + n / ${rows}u;
      let pair = pairs[entry];
      let c = turns[entry].x;
      let s = ${sign}turns[entry].y;
      let i = (pair & 0xffffu) * ${stride}u + n % ${rows}u;
      let j = (pair >> 16u) * ${stride}u + n % ${rows}u;
${tiles
  .map((t) => `      { let a = ${t}[i]; let b = ${t}[j]; ${t}[i] = a * c + b * s; ${t}[j] = b * c - a * s; }`)
  .join('\n')}
    }
    workgroupBarrier();`;
  return defineKernel({
    name: `rotationGradient.g${groupSize}.${rows}rows`,
    buffers: {
      x: read('f32'),
      dy: read('f32'),
      scales: read('f32'),
      pairs: read('u32'),
      turns: read('vec2<f32>'),
      dx: write('f32'),
      parts: write('f32'),
    },
    params: { rows: 'u32', channels: 'u32', krot: 'u32' },
    body: /* wgsl */ `
const G = ${groupSize}u;
const R = ${rows}u;
var<workgroup> y: array<f32, ${groupSize * stride}>;
var<workgroup> g: array<f32, ${groupSize * stride}>;
@compute @workgroup_size(${THREADS})
fn main(
  @builtin(local_invocation_index) lid: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let begin = group.y * G;
  let perPart = params.krot * (params.channels / 2u) + params.channels;
  var begun = false;
  for (var first = group.x * R; first < params.rows; first += groups.x * R) {
    workgroupBarrier();
    for (var n = lid; n < G * R; n += ${THREADS}u) {
      let e = n % G;
      let r = n / G;
      let at = (first + r) * params.channels + begin + e;
      var value = 0.0;
      var slope = 0.0;
      if (first + r < params.rows) { value = x[at] * scales[begin + e]; slope = dy[at]; }
      y[e * ${stride}u + r] = value;
      g[e * ${stride}u + r] = slope;
    }
    workgroupBarrier();
    for (var k = 0u; k < params.krot; k++) {
${turn(['y'], '')}
    }
    for (var n = 0u; n < params.krot; n++) {
      let k = params.krot - 1u - n;
${accumulate(
  groupSize / 2,
  `let entry = k * (params.channels / 2u) + begin / 2u + p;
      let i = (pairs[entry] & 0xffffu) * ${stride}u;
      let j = (pairs[entry] >> 16u) * ${stride}u;`,
  (r) => `g[i + ${r}] * y[j + ${r}] - g[j + ${r}] * y[i + ${r}]`,
)}
      workgroupBarrier();
${turn(['y', 'g'], '-')}
    }
    // The values before their scales, without what turning there and back has rounded off.
    for (var n = lid; n < G * R; n += ${THREADS}u) {
      let e = n % G;
      let r = n / G;
      var value = 0.0;
      if (first + r < params.rows) { value = x[(first + r) * params.channels + begin + e]; }
      y[e * ${stride}u + r] = value;
    }
    workgroupBarrier();
${accumulate(
  groupSize,
  `let entry = params.krot * (params.channels / 2u) + begin + p;
      let i = p * ${stride}u;`,
  (r) => `g[i + ${r}] * y[i + ${r}]`,
)}
    for (var n = lid; n < G * R; n += ${THREADS}u) {
      let e = n % G;
      let r = n / G;
      if (first + r < params.rows) {
        dx[(first + r) * params.channels + begin + e] = g[e * ${stride}u + r] * scales[begin + e];
      }
    }
    begun = true;
  }
}`,
  });
});

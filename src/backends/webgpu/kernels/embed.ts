// Rows of a weight by index. Bytes moved: the rows asked for, their grids, the output.
import { defineKernel, read, variants, write } from '../kernel.js';
import { weightAt, formatName, type WeightFormat } from './weights.js';

/** weights [vocab, cols], ids → out [ids, cols]; `count` = ids · cols. */
export const embedKernel = variants((format: WeightFormat) =>
  defineKernel({
    name: `embed.${formatName(format)}`,
    buffers: { weights: read('u32'), grids: read('u32'), ids: read('u32'), out: write('f32') },
    params: { count: 'u32', cols: 'u32', wordsPerRow: 'u32', groupsPerRow: 'u32', groupSize: 'u32' },
    body: /* wgsl */ `
${weightAt(format)}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let stride = groups.x * 256u;
  for (var i = id.x; i < params.count; i += stride) {
    let column = i % params.cols;
    out[i] = weightAt(ids[i / params.cols], column, column / params.groupSize);
  }
}`,
  }),
);

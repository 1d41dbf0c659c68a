// Copies sequences between key/value caches. Bytes moved: keys and values of the copied tokens, read and written once.
import { defineKernel, read, variants, write, type BufferSpec, type Kernel } from '../kernel.js';

type Buffers = 'keys' | 'values' | 'toKeys' | 'toValues' | 'copies';
type Params = 'kvHeads' | 'words' | 'capacity' | 'toCapacity';

/**
 * Tokens 0 … tokens − 1 of sequences into others; `copies` are (from, to, tokens). Caches [batch, kvHeads, capacity, words].
 * With `within` a cache is copied into itself (a buffer can't be bound twice), into sequences that no copy reads.
 * Workgroups: any number, copies · kvHeads.
 */
export const copySequencesKernel = variants((within: boolean): Kernel<Buffers, Params> => {
  const sources = { keys: read('u32'), values: read('u32') };
  const [keys, values] = within ? ['toKeys', 'toValues'] : ['keys', 'values'];
  return defineKernel<Buffers, Params>({
    name: `copySequences${within ? '.within' : ''}`,
    buffers: {
      ...(within ? {} : sources),
      toKeys: write('u32'),
      toValues: write('u32'),
      copies: read('u32'),
    } as Record<Buffers, BufferSpec>,
    params: { kvHeads: 'u32', words: 'u32', capacity: 'u32', toCapacity: 'u32' },
    body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
) {
  let copy = (group.y / params.kvHeads) * 3u;
  let head = group.y % params.kvHeads;
  let count = copies[copy + 2u] * params.words;
  let source = (copies[copy] * params.kvHeads + head) * params.capacity * params.words;
  let to = (copies[copy + 1u] * params.kvHeads + head) * params.toCapacity * params.words;
  for (var i = group.x * 256u + local; i < count; i += groups.x * 256u) {
    toKeys[to + i] = ${keys}[source + i];
    toValues[to + i] = ${values}[source + i];
  }
}`,
  });
});

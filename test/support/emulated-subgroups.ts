// Kernels with shuffles on GPUs whose subgroups have another size, or none: shuffles look other lanes up in workgroup memory.
import type { Kernel } from '../../src/backends/webgpu/kernel.js';

/**
 * `kernel` with runs of `lanes` threads in place of subgroups. Takes kernels that call subgroupShuffle and subgroupShuffleXor in uniform
 * control flow, in `main`, on variables of type f32, or as named in `types`.
 */
export function emulatedSubgroups<B extends string, P extends string>(
  kernel: Kernel<B, P>,
  lanes: number,
  types: Readonly<Record<string, 'vec4<f32>' | 'u32'>> = {},
): Kernel<B, P> {
  const threads = Number(/@workgroup_size\((\d+)\)/.exec(kernel.code)?.[1]);
  const thread = /@builtin\(local_invocation_index\) (\w+): u32/.exec(kernel.code)?.[1];
  if (!thread || threads % lanes !== 0) throw new Error(`${kernel.name} can't be cut into runs of ${lanes} threads`);
  const lane = /@builtin\(subgroup_invocation_id\) (\w+): u32,?/.exec(kernel.code);
  let code = kernel.code.replace('enable subgroups;', '');
  if (lane)
    code = code
      .replace(lane[0], '')
      .replace(/(fn main\([\s\S]*?\) \{)/, `$1\n  let ${lane[1]} = ${thread} % ${lanes}u;`);
  code = code.replace(
    /subgroupShuffle(Xor)?\(([^,()]+), ([^()]+)\)/g,
    (_, xor: string | undefined, value: string, at: string) => {
      const home = xor ? `${thread} ^ (${at})` : `${thread} / ${lanes}u * ${lanes}u + (${at})`;
      const look = (v: string): string => `emulatedLookup(vec4<f32>(${v}), ${thread}, ${home})`;
      if (types[value] === 'vec4<f32>') return look(value);
      return types[value] === 'u32' ? `bitcast<u32>(${look(`bitcast<f32>(${value})`)}.x)` : `${look(value)}.x`;
    },
  );
  const helper = `var<workgroup> emulated: array<vec4<f32>, ${threads}>;
fn emulatedLookup(value: vec4<f32>, thread: u32, home: u32) -> vec4<f32> {
  emulated[thread] = value;
  workgroupBarrier();
  let found = emulated[home];
  workgroupBarrier();
  return found;
}
@compute`;
  return { ...kernel, name: `${kernel.name}.emulated${lanes}`, code: code.replace('@compute', helper) };
}

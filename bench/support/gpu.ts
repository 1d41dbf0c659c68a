// Timing of GPU kernels: many dispatches in one pass between two timestamps, variants interleaved, medians.
import { median } from './results.js';
import type { GpuDevice, PreparedDispatch } from '../../src/backends/webgpu/device.js';
import { defineKernel, read, write } from '../../src/backends/webgpu/kernel.js';

/** Something to time. */
export interface GpuCandidate {
  readonly name: string;
  /** Dispatches of one repetition, run in order; several so that caches see fresh data. */
  readonly dispatches: readonly PreparedDispatch[];
}

/** Seconds per dispatch: the median over rounds of passes that last about `milliseconds`, after warming up. */
export async function timeDispatches(
  gpu: GpuDevice,
  candidates: readonly GpuCandidate[],
  { rounds = 5, milliseconds = 10 }: { rounds?: number; milliseconds?: number } = {},
): Promise<Map<string, number>> {
  const { device } = gpu;
  const queries = device.createQuerySet({ type: 'timestamp', count: 2 });
  const resolved = device.createBuffer({ size: 16, usage: GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC });
  const staging = device.createBuffer({ size: 16, usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ });
  const once = async (dispatches: readonly PreparedDispatch[], loops: number): Promise<number> => {
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass({
      timestampWrites: { querySet: queries, beginningOfPassWriteIndex: 0, endOfPassWriteIndex: 1 },
    });
    for (let i = 0; i < loops; i++)
      for (const { kernel, bindGroup, groups } of dispatches) {
        pass.setPipeline(kernel.pipeline as GPUComputePipeline);
        pass.setBindGroup(0, bindGroup);
        pass.dispatchWorkgroups(groups[0], groups[1] ?? 1, groups[2] ?? 1);
      }
    pass.end();
    encoder.resolveQuerySet(queries, 0, 2, resolved, 0);
    encoder.copyBufferToBuffer(resolved, 0, staging, 0, 16);
    device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPUMapMode.READ);
    const [begin, end] = new BigInt64Array(staging.getMappedRange().slice(0));
    staging.unmap();
    return (Number(end - begin) * 1e-9) / (loops * dispatches.length);
  };
  // Kernels are compiled then.
  for (const { dispatches } of candidates) gpu.run(dispatches);
  await gpu.sync();
  // How many repetitions fill a pass: from one repetition, then from a longer one, since the first is slow.
  const loops = new Map<string, number>();
  for (const { name, dispatches } of candidates) {
    let count = 1;
    for (let i = 0; i < 2; i++) {
      const seconds = (await once(dispatches, count)) * dispatches.length;
      count = Math.max(1, Math.min(Math.ceil(2000 / dispatches.length), Math.ceil(milliseconds / 1000 / seconds)));
    }
    loops.set(name, count);
  }
  const times = new Map<string, number[]>(candidates.map((c) => [c.name, []]));
  for (let round = 0; round < rounds; round++)
    for (const { name, dispatches } of candidates) times.get(name)?.push(await once(dispatches, loops.get(name) ?? 1));
  await gpu.sync();
  queries.destroy();
  resolved.destroy();
  staging.destroy();
  return new Map([...times].map(([name, list]) => [name, median(list)]));
}

const copyKernel = defineKernel({
  name: 'copy',
  buffers: { x: read('vec4<u32>'), y: write('vec4<u32>') },
  params: { count: 'u32' },
  body: /* wgsl */ `
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) local: u32) {
  let stride = groups.x * 256u;
  var i = wg.x * 256u + local;
  for (; i + 3u * stride < params.count; i += 4u * stride) {
    let a = x[i]; let b = x[i + stride]; let c = x[i + 2u * stride]; let d = x[i + 3u * stride];
    y[i] = a; y[i + stride] = b; y[i + 2u * stride] = c; y[i + 3u * stride] = d;
  }
  for (; i < params.count; i += stride) { y[i] = x[i]; }
}`,
});

/** Bytes per second of a copy between two large buffers, counting bytes read and bytes written: the best grid of several. */
export async function copyBandwidth(gpu: GpuDevice, bytes = 1 << 30): Promise<number> {
  const x = randomBuffer(gpu, bytes, (i) => i * 2654435761);
  const y = gpu.buffer(bytes);
  const candidates = [528, 1056, 2112, 4224, 16896, 65535].map((groups) => ({
    name: `copy ${groups}`,
    dispatches: [gpu.prepare(copyKernel, { x, y }, { count: bytes / 16 }, [groups])],
  }));
  const times = await timeDispatches(gpu, candidates, { milliseconds: 20 });
  gpu.release(x);
  gpu.release(y);
  return (2 * bytes) / Math.min(...times.values());
}

/** A buffer of random words (not zeros: they can run faster than real data). */
export function randomBuffer(gpu: GpuDevice, bytes: number, make: (word: number) => number): GPUBuffer {
  const buffer = gpu.buffer(bytes);
  const block = new Uint32Array(1 << 18);
  for (let i = 0; i < block.length; i++) block[i] = make(i) >>> 0;
  for (let at = 0; at < bytes; at += block.byteLength)
    gpu.upload(buffer, block.subarray(0, Math.min(block.length, (bytes - at) >> 2)), at);
  return buffer;
}

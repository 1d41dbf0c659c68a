// Where WebGPU comes from: the browser's navigator.gpu, or Dawn (the `webgpu` package) in Node.js.
import { inNode } from '../../core/environment.js';
import { GyreError } from '../../core/errors.js';

/** WebGPU's entry point on this machine. @throws GyreError `unsupported` with what to install. */
export async function webgpuEntry(): Promise<GPU> {
  if (inNode) return (await import('./provider.node.js')).dawn();
  const gpu = (navigator as Partial<Navigator>).gpu;
  if (!gpu)
    throw new GyreError('unsupported', 'this browser has no WebGPU', {
      remedy: 'use a recent Chrome, Edge, Safari or Firefox over https (or localhost), or the CPU backend',
    });
  return gpu;
}

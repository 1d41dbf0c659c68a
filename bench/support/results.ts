// What every benchmark shares: medians, and a JSON record that names the machine and the versions.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { cpus, loadavg, totalmem } from 'node:os';
import path from 'node:path';
import { VERSION } from '../../src/version.js';

const ROOT = path.join(import.meta.dirname, '../..');

/** The middle value. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[sorted.length >> 1];
}

/** Four significant digits. */
export function round(x: number): number {
  return Number(x.toPrecision(4));
}

/** Machine, versions, load. */
export function machine(): Record<string, unknown> {
  const manifest = path.join(ROOT, 'node_modules/onnxruntime-node/package.json');
  const ort = existsSync(manifest) ? (JSON.parse(readFileSync(manifest, 'utf8')) as { version: string }) : undefined;
  return {
    date: new Date().toISOString(),
    gyre: VERSION,
    node: process.version,
    ...(ort && { onnxruntime: ort.version }),
    cpu: cpus()[0].model,
    cores: cpus().length,
    memoryGB: round(totalmem() / 1e9),
    load: loadavg().map(round),
  };
}

/** bench/results, or the folder GYRE_BENCH_OUT (where the checkout is not the place for results). */
export function resultFolder(): string {
  return process.env.GYRE_BENCH_OUT ?? path.join(ROOT, 'bench/results');
}

/** Writes <name>.json into {@link resultFolder}. */
export function writeResult(name: string, result: object): void {
  const folder = resultFolder();
  mkdirSync(folder, { recursive: true });
  writeFileSync(path.join(folder, `${name}.json`), `${JSON.stringify({ machine: machine(), ...result }, null, 2)}\n`);
}

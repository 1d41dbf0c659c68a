// What every benchmark shares: medians, and a JSON record that names the machine and the versions.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
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
  const ort = JSON.parse(readFileSync(path.join(ROOT, 'node_modules/onnxruntime-node/package.json'), 'utf8')) as {
    version: string;
  };
  return {
    date: new Date().toISOString(),
    gyre: VERSION,
    node: process.version,
    onnxruntime: ort.version,
    cpu: cpus()[0].model,
    cores: cpus().length,
    memoryGB: round(totalmem() / 1e9),
    load: loadavg().map(round),
  };
}

/** Writes bench/results/<name>.json. */
export function writeResult(name: string, result: object): void {
  const folder = path.join(ROOT, 'bench/results');
  mkdirSync(folder, { recursive: true });
  writeFileSync(path.join(folder, `${name}.json`), `${JSON.stringify({ machine: machine(), ...result }, null, 2)}\n`);
}

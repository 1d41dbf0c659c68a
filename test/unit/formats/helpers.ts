// Small things the format tests share.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { expect, onTestFinished } from 'vitest';
import { GyreError, type ErrorCode } from '../../../src/core/errors.js';

/** A folder of its own, removed when the test ends. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(path.join(tmpdir(), 'gyre-test-'));
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Expects a GyreError with this code, whose message (and remedy, where given) match. */
export async function expectError(
  run: () => unknown,
  code: ErrorCode,
  message: RegExp,
  remedy?: RegExp,
): Promise<void> {
  let error: unknown;
  try {
    await run();
  } catch (thrown) {
    error = thrown;
  }
  expect(error).toBeInstanceOf(GyreError);
  const found = error as GyreError;
  expect(`${found.code}: ${found.message}`).toMatch(new RegExp(`^${code}: `));
  expect(found.message).toMatch(message);
  if (remedy) expect(found.remedy).toMatch(remedy);
}

/** A safetensors file of a header (text or object) and data. */
export function rawSafetensors(header: unknown, data: Uint8Array = new Uint8Array(0), claimed?: bigint): Uint8Array {
  const json = new TextEncoder().encode(typeof header === 'string' ? header : JSON.stringify(header));
  const bytes = new Uint8Array(8 + json.length + data.length);
  new DataView(bytes.buffer).setBigUint64(0, claimed ?? BigInt(json.length), true);
  bytes.set(json, 8);
  bytes.set(data, 8 + json.length);
  return bytes;
}

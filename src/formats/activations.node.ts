// Residual streams on disk, one file per stream with records of a fixed size, for calibration sets larger than memory.
import { mkdir, open, rm, type FileHandle } from 'node:fs/promises';
import path from 'node:path';

/** Arrays of `elements` f32 by stream name and index; see ActivationStore in quant. */
export class ActivationFiles {
  readonly #folder: string;
  readonly #elements: number;
  readonly #files = new Map<string, Promise<FileHandle>>();

  /** `folder` is made, and removed by {@link ActivationFiles.remove}. */
  constructor(folder: string, elements: number) {
    this.#folder = folder;
    this.#elements = elements;
  }

  async write(stream: string, index: number, values: Float32Array): Promise<void> {
    if (values.length !== this.#elements)
      throw new Error(`a record of ${values.length} elements in a store of ${this.#elements}`);
    const file = await this.#file(stream);
    const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
    await file.write(bytes, 0, bytes.length, index * bytes.length);
  }

  async read(stream: string, index: number): Promise<Float32Array> {
    const file = await this.#file(stream);
    const values = new Float32Array(this.#elements);
    const bytes = new Uint8Array(values.buffer);
    const { bytesRead } = await file.read(bytes, 0, bytes.length, index * bytes.length);
    if (bytesRead !== bytes.length) throw new Error(`the ${stream} stream of sequence ${index} was never written`);
    return values;
  }

  /** Closes and deletes everything. */
  async remove(): Promise<void> {
    for (const file of this.#files.values()) await (await file).close();
    this.#files.clear();
    await rm(this.#folder, { recursive: true, force: true });
  }

  #file(stream: string): Promise<FileHandle> {
    let file = this.#files.get(stream);
    if (!file) {
      file = mkdir(this.#folder, { recursive: true }).then(() => open(path.join(this.#folder, `${stream}.f32`), 'w+'));
      this.#files.set(stream, file);
    }
    return file;
  }
}

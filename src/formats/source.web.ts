// Files of a web page: picked by the user (Blob) or fetched by HTTP range requests.
import { GyreError, ensure } from '../core/errors.js';
import { checkFileName, checkRange, modelFiles, truncated, type FileSource, type ModelFiles } from './source.js';

/** A Blob or File as a source. Nothing is loaded before it is read. */
export function blobSource(name: string, blob: Blob): FileSource {
  return {
    name,
    size: () => Promise.resolve(blob.size),
    read: async (offset, length) => {
      checkRange(name, blob.size, offset, length);
      return new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer());
    },
    close: () => Promise.resolve(),
  };
}

/** Files that a user picked, as a model. */
export function blobFiles(name: string, files: Readonly<Record<string, Blob>>): ModelFiles {
  const entries = new Map(Object.entries(files));
  return modelFiles(
    name,
    () => Promise.resolve([...entries.keys()].sort()),
    (file) => Promise.resolve(blobSource(file, entries.get(file) ?? new Blob())),
  );
}

/** Options of the HTTP sources. */
export interface HttpOptions {
  /** Sent with every request, e.g. an Authorization header. Default: none. */
  headers?: Readonly<Record<string, string>>;
  /** Default: the platform's fetch. */
  fetch?: typeof globalThis.fetch;
}

/**
 * A file behind a URL whose server answers range requests (a server that ignores them is read whole, once).
 * @throws `network` when the server can't be reached or refuses, `not-found` on 404.
 */
export async function httpSource(url: string, options: HttpOptions = {}): Promise<FileSource> {
  const request = async (range: string): Promise<Response> => {
    let response: Response;
    try {
      response = await (options.fetch ?? globalThis.fetch)(url, { headers: { ...options.headers, Range: range } });
    } catch (cause) {
      throw new GyreError('network', `can't reach ${url}`, {
        remedy: 'Check the connection, the address, and that the server allows this page to read it (CORS).',
        cause,
      });
    }
    if (response.ok || response.status === 416) return response;
    throw new GyreError(
      response.status === 404 ? 'not-found' : 'network',
      `${url}: the server answered ${response.status}`,
      {
        remedy: response.status === 404 ? 'Check the address.' : 'Check that you may read it, or try again later.',
      },
    );
  };
  const first = await request('bytes=0-0');
  let whole: Uint8Array | undefined;
  let size: number;
  if (first.status === 206) {
    await first.body?.cancel();
    size = Number(/\/(\d+)$/.exec(first.headers.get('Content-Range') ?? '')?.[1] ?? NaN);
    ensure(
      Number.isSafeInteger(size),
      'network',
      `${url}: a partial answer without a Content-Range that tells the size`,
      'Serve the file from a server that implements range requests.',
    );
  } else if (first.status === 416) {
    size = 0;
  } else {
    whole = new Uint8Array(await first.arrayBuffer());
    size = whole.byteLength;
  }
  return {
    name: url,
    size: () => Promise.resolve(size),
    read: async (offset, length) => {
      checkRange(url, size, offset, length);
      if (whole) return whole.slice(offset, offset + length);
      if (length === 0) return new Uint8Array(0);
      const response = await request(`bytes=${offset}-${offset + length - 1}`);
      const bytes = new Uint8Array(await response.arrayBuffer());
      if (response.status !== 206 || bytes.byteLength !== length)
        throw truncated(url, offset + bytes.byteLength, offset, length);
      return bytes;
    },
    close: () => Promise.resolve(),
  };
}

/** A model behind a base URL, whose file names are known beforehand (HTTP can't list a folder). */
export function urlFiles(baseUrl: string, names: readonly string[], options: HttpOptions = {}): ModelFiles {
  names.forEach(checkFileName);
  const base = baseUrl.endsWith('/') ? baseUrl : `${baseUrl}/`;
  const sorted = [...names].sort();
  return modelFiles(
    baseUrl,
    () => Promise.resolve(sorted),
    (file) => httpSource(base + encodeURIComponent(file), options),
  );
}

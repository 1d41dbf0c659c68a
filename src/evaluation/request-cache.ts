// Results of single requests by the hash of what was asked, so that a killed run resumes where it stopped.

/** What was found before. Values are plain JSON. */
export interface RequestCache {
  /** What is known of a request. */
  get(key: string): unknown;
  /** Adds results; they are kept when the promise resolves. */
  add(entries: readonly (readonly [key: string, value: unknown])[]): Promise<void>;
}

/** Forgets everything: for callers that keep no results. */
export const noCache: RequestCache = { get: () => undefined, add: () => Promise.resolve() };

/** Key of a request: SHA-256 over its parts, 32 hexadecimal digits. */
export async function requestKey(
  ...parts: readonly (string | number | boolean | null | ArrayLike<number>)[]
): Promise<string> {
  const text = JSON.stringify(
    parts.map((part) => (typeof part === 'object' && part !== null ? Array.from(part) : part)),
  );
  return hexDigest(text, 16);
}

/** The first `bytes` bytes of a text's SHA-256 in hexadecimal. */
export async function hexDigest(text: string, bytes: number): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', new TextEncoder().encode(text)));
  return [...digest.subarray(0, bytes)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

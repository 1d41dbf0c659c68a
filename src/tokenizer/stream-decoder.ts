// Text of tokens that come one by one: what was given out never changes, half a character is held back.

const REPLACEMENT = '\uFFFD';

/**
 * Turns a stream of token ids into a stream of text. All pieces and `flush` together are what decoding all ids at once
 * gives. Each push decodes a short window, not the whole text.
 */
export class StreamDecoder {
  readonly #decode: (ids: readonly number[]) => string;
  /** The window: ids kept as left context, then those whose text isn't all out yet. */
  #ids: number[] = [];
  /** Ids of the window whose text is out. */
  #settled = 0;
  /** Characters of the window's text that are out. */
  #emitted = 0;

  /** @param decode ids → text, of any run of ids. */
  constructor(decode: (ids: readonly number[]) => string) {
    this.#decode = decode;
  }

  /** The text that a token adds; empty while a character is incomplete. */
  push(id: number): string {
    this.#ids.push(id);
    const text = this.#decode(this.#ids);
    // A character cut off at the end of the bytes decodes to exactly one replacement character.
    const stable = text.endsWith(REPLACEMENT) ? text.length - 1 : text.length;
    const piece = stable > this.#emitted ? text.slice(this.#emitted, stable) : '';
    this.#emitted = Math.max(this.#emitted, stable);
    if (stable === text.length && piece !== '') {
      // All is out: keep only the newest ids as context (a decoder may treat the very first token differently, so the
      // context must not be empty text).
      const context = this.#ids.slice(this.#settled);
      const contextText = this.#decode(context);
      if (contextText !== '' && text.endsWith(contextText)) {
        this.#ids = context;
        this.#emitted = contextText.length;
      }
      this.#settled = this.#ids.length;
    }
    return piece;
  }

  /** What is still held back (an incomplete character shows as U+FFFD); the decoder is then as new. */
  flush(): string {
    const rest = this.#ids.length > 0 ? this.#decode(this.#ids).slice(this.#emitted) : '';
    this.#ids = [];
    this.#settled = 0;
    this.#emitted = 0;
    return rest;
  }
}

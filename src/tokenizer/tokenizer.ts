// Text to token ids and back, by @huggingface/tokenizers; chat templates are beside it in chat.ts.
import { z } from 'zod';
import { GyreError, ensure } from '../core/errors.js';
import { parseJson, readOptionalJson, validate } from '../formats/huggingface-config.js';
import type { ModelFiles } from '../formats/source.js';
import { loadChatTemplate, type ChatMessage, type ChatTemplate, type ChatTemplateOptions } from './chat.js';
import { createLibraryTokenizer, type LibraryTokenizer } from './library.js';
import { safeSplit, splitsNothing } from './safe-split.js';
import { StreamDecoder } from './stream-decoder.js';

/** Largest tokenizer.json, bytes. */
export const MAX_TOKENIZER_BYTES = 256 * 1024 * 1024;
/** Longest text encoded at once, UTF-16 code units. */
export const MAX_TEXT_LENGTH = 256 * 1024 * 1024;

/** Options of {@link Tokenizer.encode}. */
export interface EncodeOptions {
  /** Add what the model expects around a text (e.g. a leading BOS). Default: true. */
  addSpecialTokens?: boolean;
}

/** Options of {@link Tokenizer.decode} and {@link Tokenizer.createStreamDecoder}. */
export interface DecodeOptions {
  /** Leave out special tokens. Default: true. */
  skipSpecialTokens?: boolean;
}

const addedToken = z.looseObject({
  id: z.number().int().nonnegative(),
  content: z.string(),
  special: z.boolean().optional(),
});
const tokenizerSchema = z.looseObject({
  model: z.looseObject({}),
  added_tokens: z.array(addedToken).nullish(),
});
const tokenName = z.union([z.string(), z.looseObject({ content: z.string() })]).nullish();
const configSchema = z.looseObject({ bos_token: tokenName, eos_token: tokenName });
const idsSchema = z.looseObject({
  eos_token_id: z.union([z.number().int().nonnegative(), z.array(z.number().int().nonnegative())]).nullish(),
});

/** A model's tokenizer. */
export class Tokenizer {
  /** Ids in the vocabulary, added tokens included. */
  readonly vocabSize: number;
  /** Undefined when the tokenizer names none. */
  readonly bosTokenId: number | undefined;
  /** Ids that end a text: the generation config's (or else the config's) and the tokenizer's own. */
  readonly eosTokenIds: readonly number[];
  readonly #library: LibraryTokenizer;
  readonly #special: ReadonlySet<number>;
  readonly #chat: ChatTemplate | undefined;

  /** Use {@link loadTokenizer}. */
  constructor(parts: {
    library: LibraryTokenizer;
    special: ReadonlySet<number>;
    bosTokenId: number | undefined;
    eosTokenIds: readonly number[];
    chat: ChatTemplate | undefined;
  }) {
    this.#library = parts.library;
    this.#special = parts.special;
    this.#chat = parts.chat;
    this.bosTokenId = parts.bosTokenId;
    this.eosTokenIds = parts.eosTokenIds;
    this.vocabSize = parts.library.model?.vocab.length ?? 0;
  }

  /** Whether the model comes with a chat template. */
  get hasChatTemplate(): boolean {
    return this.#chat !== undefined;
  }

  /**
   * Token ids of a text. Special tokens written in the text become their ids. Time grows linearly with the text,
   * about a second per MB.
   * @throws `limit-exceeded` above {@link MAX_TEXT_LENGTH}; `config-invalid` when the vocabulary lacks a character.
   */
  encode(text: string, options: EncodeOptions = {}): Int32Array {
    ensure(
      text.length <= MAX_TEXT_LENGTH,
      'limit-exceeded',
      () => `a text of ${text.length} characters is over the limit of ${MAX_TEXT_LENGTH}`,
      'Encode it in parts.',
    );
    if (text === '' && options.addSpecialTokens === false) return new Int32Array(0);
    const { ids, tokens } = this.#library.encode(text, { add_special_tokens: options.addSpecialTokens ?? true });
    const out = new Int32Array(ids.length);
    for (let i = 0; i < ids.length; i++) {
      const id = ids[i];
      if (id === undefined) {
        throw new GyreError('config-invalid', `the vocabulary has no token for ${JSON.stringify(tokens[i])}`, {
          remedy: 'Check that tokenizer.json belongs to the model.',
        });
      }
      out[i] = id;
    }
    return out;
  }

  /**
   * Text of token ids; ids outside the vocabulary (padding of the embedding table) are left out. Spaces before
   * punctuation stay as the tokens have them, so that decoding undoes encoding.
   */
  decode(ids: ArrayLike<number>, options: DecodeOptions = {}): string {
    const skip = options.skipSpecialTokens ?? true;
    const known: number[] = [];
    for (let i = 0; i < ids.length; i++) {
      const id = ids[i];
      if (this.#library.id_to_token(id) === undefined || (skip && this.#special.has(id))) continue;
      known.push(id);
    }
    if (known.length === 0) return '';
    return this.#library.decode(known, { skip_special_tokens: false, clean_up_tokenization_spaces: false });
  }

  /** A decoder for tokens that come one by one. */
  createStreamDecoder(options: DecodeOptions = {}): StreamDecoder {
    return new StreamDecoder((ids) => this.decode(ids, options));
  }

  /** The id of a token written as in the vocabulary, e.g. `<|im_end|>`. */
  tokenId(token: string): number | undefined {
    return this.#library.token_to_id(token);
  }

  /** The token of an id as in the vocabulary. */
  token(id: number): string | undefined {
    return this.#library.id_to_token(id);
  }

  /** Whether an id is a special token. */
  isSpecial(id: number): boolean {
    return this.#special.has(id);
  }

  /**
   * Messages as the text the model was trained on. Encode it with `addSpecialTokens: false`: the template writes them.
   * @throws `unsupported` when the model has no chat template; `usage` when the template refuses the messages.
   */
  applyChatTemplate(messages: readonly ChatMessage[], options: ChatTemplateOptions = {}): string {
    if (this.#chat) return this.#chat.render(messages, options);
    throw new GyreError('unsupported', 'this model has no chat template', {
      remedy: 'It is a base model: give it plain text, or use the instruction-tuned version.',
    });
  }
}

/**
 * Loads a model's tokenizer: `tokenizer.json`, and `tokenizer_config.json`, `generation_config.json`, `config.json`
 * and chat templates where they are.
 * @throws `file-missing` without tokenizer.json; `file-corrupt`, `config-invalid`, `unsupported` when it can't be used.
 */
export async function loadTokenizer(files: ModelFiles): Promise<Tokenizer> {
  const present = await files.list();
  if (!present.includes('tokenizer.json')) {
    const old = present.filter((name) => /^(tokenizer\.model|vocab\.(json|txt)|merges\.txt|.*\.tiktoken)$/.test(name));
    throw new GyreError(
      'file-missing',
      `${files.name} has no tokenizer.json${old.length > 0 ? ` (found the older ${old.join(', ')})` : ''}`,
      {
        remedy:
          'Fetch tokenizer.json from the hub; where a model lacks it, Transformers writes it: AutoTokenizer.from_pretrained(…).save_pretrained(…).',
      },
    );
  }
  const name = `tokenizer.json of ${files.name}`;
  const json = validate(
    tokenizerSchema,
    parseJson(await files.readText('tokenizer.json', MAX_TOKENIZER_BYTES), name),
    name,
  );
  const rawConfig = (await readOptionalJson(files, 'tokenizer_config.json')) ?? {};
  const config = validate(configSchema, rawConfig, `tokenizer_config.json of ${files.name}`);
  let library: LibraryTokenizer;
  try {
    library = createLibraryTokenizer(
      {
        normalizer: null,
        pre_tokenizer: null,
        post_processor: null,
        decoder: null,
        ...json,
        added_tokens: json.added_tokens ?? [],
      },
      config,
    );
  } catch (cause) {
    throw new GyreError('unsupported', `${name} can't be used: ${cause instanceof Error ? cause.message : ''}`, {
      remedy: 'Check that the file is whole; if it is, its kind of tokenizer is not supported.',
      cause,
    });
  }
  if (splitsNothing(json.pre_tokenizer)) {
    const split = safeSplit(json.model, library.pre_tokenizer);
    if (split) library.pre_tokenizer = split;
  }

  const special = new Set((json.added_tokens ?? []).filter((token) => token.special).map((token) => token.id));
  const idOf = (token: z.output<typeof tokenName>): number | undefined =>
    token === null || token === undefined
      ? undefined
      : library.token_to_id(typeof token === 'string' ? token : token.content);
  const eosTokenIds = new Set<number>();
  // The generation config says where to stop; the model's config only stands in for it.
  for (const file of ['generation_config.json', 'config.json']) {
    const raw = await readOptionalJson(files, file);
    if (raw === undefined) continue;
    const eos = validate(idsSchema, raw, `${file} of ${files.name}`).eos_token_id;
    if (eos === null || eos === undefined) continue;
    for (const id of typeof eos === 'number' ? [eos] : eos) eosTokenIds.add(id);
    break;
  }
  const ownEos = idOf(config.eos_token);
  if (ownEos !== undefined) eosTokenIds.add(ownEos);
  return new Tokenizer({
    library,
    special,
    bosTokenId: idOf(config.bos_token),
    eosTokenIds: [...eosTokenIds],
    chat: await loadChatTemplate(files, rawConfig),
  });
}

// The part of @huggingface/tokenizers that gyre uses, with types of our own: the package's declarations import each
// other without file extensions, which TypeScript does not resolve for ES modules.
import * as library from '@huggingface/tokenizers';

/** Cuts a normalized text into the words that the model's merges work on. */
export type PreTokenize = (text: string, options?: { section_index?: number }) => string[];

/** A tokenizer of the library. */
export interface LibraryTokenizer {
  pre_tokenizer: PreTokenize | null;
  readonly model: { readonly vocab: readonly string[] } | null;
  /** An id is undefined where the vocabulary has no token and no unknown token. */
  encode(text: string, options: { add_special_tokens: boolean }): { ids: (number | undefined)[]; tokens: string[] };
  decode(ids: number[], options: { skip_special_tokens: boolean; clean_up_tokenization_spaces: boolean }): string;
  token_to_id(token: string): number | undefined;
  id_to_token(id: number): string | undefined;
}

const { Tokenizer } = library as unknown as {
  Tokenizer: new (tokenizer: object, config: object) => LibraryTokenizer;
};

/** Makes a tokenizer of a parsed tokenizer.json and tokenizer_config.json. Throws plain errors of the library. */
export function createLibraryTokenizer(tokenizer: object, config: object): LibraryTokenizer {
  return new Tokenizer(tokenizer, config);
}

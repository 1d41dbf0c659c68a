// Chat templates: Jinja text that comes with a model, rendered by @huggingface/jinja.
import { Template } from '@huggingface/jinja';
import { z } from 'zod';
import { GyreError } from '../core/errors.js';
import { readOptionalJson, validate } from '../formats/huggingface-config.js';
import type { ModelFiles } from '../formats/source.js';

/** Largest chat template, bytes. */
export const MAX_TEMPLATE_BYTES = 1024 * 1024;

/** One message of a conversation. Templates may read more fields (tool calls, reasoning). */
export interface ChatMessage {
  readonly role: string;
  readonly content: string;
  readonly [field: string]: unknown;
}

/** Options of a rendering. Everything else is passed on to the template (e.g. `enable_thinking`). */
export interface ChatTemplateOptions {
  /** End with the start of the assistant's turn. Default: true. */
  addGenerationPrompt?: boolean;
  /** Tools offered to the model, as JSON schemas. Default: none. */
  tools?: readonly unknown[];
  /** Further variables for the template. */
  variables?: Readonly<Record<string, unknown>>;
}

const special = z.union([z.string(), z.looseObject({ content: z.string() })]).nullish();
const configSchema = z.looseObject({
  chat_template: z.union([z.string(), z.array(z.looseObject({ name: z.string(), template: z.string() }))]).nullish(),
  bos_token: special,
  eos_token: special,
  unk_token: special,
  pad_token: special,
});

/** A compiled template with the model's special tokens. */
export class ChatTemplate {
  readonly #template: Template;
  readonly #tokens: Readonly<Record<string, string>>;

  /** @throws `config-invalid` when the template is not valid Jinja. */
  constructor(source: string, tokens: Readonly<Record<string, string>>) {
    try {
      this.#template = new Template(source);
    } catch (cause) {
      throw new GyreError('config-invalid', `the model's chat template can't be parsed: ${messageOf(cause)}`, {
        remedy: 'Compare the template with the original on the hub.',
        cause,
      });
    }
    this.#tokens = tokens;
  }

  /** @throws `usage` when the template refuses the messages, with its own words. */
  render(messages: readonly ChatMessage[], options: ChatTemplateOptions = {}): string {
    try {
      return this.#template.render({
        ...this.#tokens,
        ...options.variables,
        messages,
        add_generation_prompt: options.addGenerationPrompt ?? true,
        ...(options.tools ? { tools: options.tools } : {}),
      });
    } catch (cause) {
      throw new GyreError('usage', `the model's chat template refuses these messages: ${messageOf(cause)}`, {
        remedy: 'Check roles and their order: most templates want user and assistant in turns, starting with user.',
        cause,
      });
    }
  }
}

/**
 * The model's template, from where Transformers looks for it: chat_template.jinja, chat_template.json,
 * tokenizer_config.json (the one named `default`, or the first, of several). Undefined when there is none.
 */
export async function loadChatTemplate(files: ModelFiles, tokenizerConfig: unknown): Promise<ChatTemplate | undefined> {
  const config = validate(configSchema, tokenizerConfig, `tokenizer_config.json of ${files.name}`);
  let source: string | undefined;
  if ((await files.list()).includes('chat_template.jinja')) {
    source = await files.readText('chat_template.jinja', MAX_TEMPLATE_BYTES);
  } else {
    const file = await readOptionalJson(files, 'chat_template.json');
    if (file !== undefined) {
      source = validate(
        z.looseObject({ chat_template: z.string() }),
        file,
        `chat_template.json of ${files.name}`,
      ).chat_template;
    }
  }
  source ??= textOf(config.chat_template);
  if (source === undefined) return undefined;
  const tokens: Record<string, string> = {};
  for (const key of ['bos_token', 'eos_token', 'unk_token', 'pad_token'] as const) {
    const token = config[key];
    if (typeof token === 'string') tokens[key] = token;
    else if (token) tokens[key] = token.content;
  }
  return new ChatTemplate(source, tokens);
}

function textOf(template: z.output<typeof configSchema>['chat_template']): string | undefined {
  if (template === null || template === undefined || typeof template === 'string') return template ?? undefined;
  return (template.find((entry) => entry.name === 'default') ?? template[0])?.template;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

// gyre generate: a prompt continued on stdout, as it comes.
import { Command } from 'commander';
import { z } from 'zod';
import { GyreError } from '../../core/errors.js';
import { generate, type GenerationSummary } from '../../generate/index.js';
import { loadTokenizer, type Tokenizer } from '../../tokenizer/index.js';
import { VERSION } from '../../version.js';
import { withBackend, withDecoder, withModel, type CommandContext } from '../context.js';
import {
  decimalNumber,
  jsonOption,
  modelOptions,
  modelSchema,
  parseOptions,
  runtimeOptions,
  runtimeSchema,
  wholeNumber,
} from '../options.js';
import { EXIT } from '../ui/errors.js';
import { formatDuration } from '../ui/table.js';

const schema = z.object({
  ...modelSchema,
  ...runtimeSchema,
  prompt: z.string(),
  maxTokens: wholeNumber(1, 10_000_000),
  temperature: decimalNumber({ min: 0 }),
  topP: decimalNumber({ above: 0, max: 1 }),
  topK: wholeNumber(0),
  seed: wholeNumber(0),
  chat: z.boolean().default(false),
  system: z.string().optional(),
});

type GenerateCommandOptions = z.output<typeof schema>;

/** The command. */
export function generateCommand(context: CommandContext): Command {
  const command = new Command('generate')
    .description('continue a prompt, or answer it with --chat; the text streams to stdout, statistics go to stderr')
    .argument('<model>', 'folder or hub id')
    .requiredOption('--prompt <text>', 'what to continue or answer')
    .option('--max-tokens <n>', 'tokens at most', '256')
    .option('--temperature <t>', '0 takes the most likely token always', '0.7')
    .option('--top-p <p>', 'keep the likeliest tokens that make up p of the probability', '0.95')
    .option('--top-k <k>', 'keep the k likeliest tokens; 0 keeps all', '0')
    .option('--seed <n>', 'of the random stream', '0')
    .option('--chat', "put the prompt into the model's chat template")
    .option('--system <text>', 'system message (with --chat)');
  for (const option of [...runtimeOptions(), ...modelOptions(), jsonOption()]) command.addOption(option);
  return command
    .addHelpText(
      'after',
      `
Examples:
  $ gyre generate qwen3-w4 --prompt "Once upon a time"
  $ gyre generate qwen3-w4 --chat --prompt "Why is the sky blue?" --temperature 0.6 --top-p 0.95
  $ gyre generate models/gyre-14m --chat --prompt "Compute 413 + 436." --temperature 0
  $ gyre generate qwen3-w4 --prompt "Dear diary," --seed 7 --json`,
    )
    .action(async (model: string, raw: unknown) => {
      const options = parseOptions(schema, raw);
      if (options.system !== undefined && !options.chat) {
        throw new GyreError('usage', '--system needs --chat', { remedy: 'add --chat' });
      }
      await withModel(context, model, options, (source) =>
        withBackend(context, source, options, async (backend) => {
          const tokenizer = await loadTokenizer(source.files);
          const prompt = encodePrompt(tokenizer, options);
          await withDecoder(
            context,
            backend,
            source,
            async (decoder) => {
              context.progress.clear();
              const decoding = tokenizer.createStreamDecoder({ skipSpecialTokens: !options.chat });
              const pieces: string[] = [];
              const put = (piece: string): void => {
                pieces.push(piece);
                if (!context.json) context.write(piece);
              };
              const stopIds = [...new Set([...decoder.config.eosTokenIds, ...tokenizer.eosTokenIds])];
              const generation = generate(decoder, prompt, { ...options, stopIds, signal: context.signal });
              let next = await generation.next();
              for (; !next.done; next = await generation.next()) put(decoding.push(next.value.id));
              put(decoding.flush());
              const summary = next.value;
              if (!pieces.join('').endsWith('\n')) context.print();
              context.result({ text: pieces.join(''), ...summary, model, backend: backend.info, version: VERSION });
              context.progress.note(statistics(summary));
              if (summary.reason !== 'interrupted') return;
              if (context.json) {
                process.exitCode = EXIT.interrupted; // the result says so: one object, not two
              } else {
                throw new GyreError('interrupted', `generation was stopped after ${summary.tokens} tokens`, {
                  remedy: 'the text so far is above',
                });
              }
            },
            options,
          );
        }),
      );
    });
}

function encodePrompt(tokenizer: Tokenizer, options: GenerateCommandOptions): Int32Array {
  if (!options.chat) return tokenizer.encode(options.prompt, { addSpecialTokens: true });
  const messages = [{ role: 'user', content: options.prompt }];
  if (options.system !== undefined) messages.unshift({ role: 'system', content: options.system });
  return tokenizer.encode(tokenizer.applyChatTemplate(messages, { addGenerationPrompt: true }), {
    addSpecialTokens: false,
  });
}

function statistics(summary: GenerationSummary): string {
  const { promptTokens, prefillSeconds, prefillTokensPerSecond, tokens, decodeTokensPerSecond, reason } = summary;
  return [
    `prompt ${promptTokens} tokens in ${formatDuration(prefillSeconds)} (${prefillTokensPerSecond.toFixed(1)} tokens/s)`,
    `${tokens} tokens at ${decodeTokensPerSecond.toFixed(1)} tokens/s`,
    reason === 'eos' ? 'ended by the model' : reason === 'length' ? 'ended by its length' : 'interrupted',
  ].join(' · ');
}

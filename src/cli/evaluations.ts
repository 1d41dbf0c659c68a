// What `gyre eval` does for one text or one task: data in, evaluation out.
import { createHash } from 'node:crypto';
import { mkdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { ensure, GyreError, unreachable } from '../core/errors.js';
import { evaluateChoices } from '../evaluation/choices.js';
import { loadRows, loadTask, type LoadedRows } from '../evaluation/data.node.js';
import type { TaskDefinition, TextTask } from '../evaluation/definition.js';
import { evaluateText, parseTextFile, tokenizeTexts } from '../evaluation/index.js';
import {
  choiceItems,
  completionItems,
  drawnWindows,
  fewShotCount,
  generationItems,
  taskTexts,
  type ItemOptions,
} from '../evaluation/items.js';
import { evaluateReasoning, type Transcript } from '../evaluation/reasoning.js';
import { openRequestCache, type OpenRequestCache } from '../evaluation/request-cache.node.js';
import { hexDigest } from '../evaluation/request-cache.js';
import type { Evaluation } from '../evaluation/results.js';
import { textResult, type ScoredDocument } from '../evaluation/text-result.js';
import type { ProtocolOptions } from '../evaluation/windows.js';
import { writeFileAtomic } from '../formats/atomic.node.js';
import { contextLength } from '../generate/index.js';
import type { Decoder } from '../models/decoder.js';
import type { Tokenizer } from '../tokenizer/index.js';
import type { EvalOptions } from './eval-options.js';
import type { CommandContext } from './context.js';

/** What every evaluation of a run shares. */
export interface EvaluationContext {
  readonly context: CommandContext;
  readonly decoder: Decoder;
  readonly tokenizer: Tokenizer;
  readonly options: EvalOptions;
  /** Names the model and how it runs, for the cache of requests. */
  readonly scope: string;
  readonly reference: Decoder | undefined;
}

/** Texts named on the command line. */
export interface NamedTexts {
  readonly documents: readonly ScoredDocument[];
  readonly files: readonly { readonly name: string; readonly sha256: string }[];
}

/** A task with its data, checked before a model is loaded. */
export interface PreparedTask {
  readonly task: TaskDefinition;
  readonly data: LoadedRows;
  readonly examples: LoadedRows | undefined;
}

/** Reads the files of --text. @throws GyreError `file-missing`, `file-corrupt`; as `parseTextFile`. */
export async function readTexts(files: readonly string[]): Promise<NamedTexts> {
  const documents: ScoredDocument[] = [];
  const read: { name: string; sha256: string }[] = [];
  for (const file of files) {
    const { text, sha256 } = await readInput(file);
    const parts = parseTextFile(file, text);
    const name = path.basename(file);
    documents.push(...parts.map((part, i) => ({ name: parts.length > 1 ? `${name}:${i + 1}` : name, text: part })));
    read.push({ name, sha256 });
  }
  return { documents, files: read };
}

/** A UTF-8 file named on the command line. */
async function readInput(file: string): Promise<{ text: string; sha256: string }> {
  let bytes: Buffer;
  try {
    bytes = await readFile(file);
  } catch (cause) {
    throw new GyreError('file-missing', `can't read ${file}: ${cause instanceof Error ? cause.message : ''}`, {
      remedy: 'check the path and that you may read it',
      cause,
    });
  }
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
    return { text, sha256: createHash('sha256').update(bytes).digest('hex') };
  } catch (cause) {
    throw new GyreError('file-corrupt', `${file} is not UTF-8 text`, { remedy: 'convert it to UTF-8', cause });
  }
}

/** A task by name or file with its rows; chains may be named by their .jsonl file alone. */
export async function prepareTask(context: CommandContext, name: string, options: EvalOptions): Promise<PreparedTask> {
  const chains = /\.jsonl$/i.test(name);
  const task = await loadTask(chains ? 'chains' : name);
  const where = {
    data: options.data,
    token: options.token,
    onProgress: context.progress.listener,
  };
  const own = chains
    ? { ...task, source: { ...task.source, localNames: { [task.split]: [path.basename(name)] } } }
    : task;
  if (chains) await readInput(name);
  const data = await loadRows(own, task.split, chains ? { ...where, data: path.dirname(path.resolve(name)) } : where);
  const shots = task.type === 'choices' ? fewShotCount(task, options.fewShot) : 0;
  const split = task.type === 'choices' ? task.fewShot?.split : undefined;
  const examples = shots > 0 && split !== undefined ? await loadRows(task, split, where) : undefined;
  const prepared = { task, data, examples };
  // Builds the questions once already: what is wrong with the data shows before a model is loaded.
  buildItems(prepared, options);
  return prepared;
}

function buildItems({ task, data, examples }: PreparedTask, options: EvalOptions): void {
  const choose: ItemOptions = itemOptions(examples, options);
  switch (task.type) {
    case 'text':
      taskTexts(task, data.rows);
      break;
    case 'choices':
      choiceItems(task, data.rows, choose);
      break;
    case 'completion':
      completionItems(task, data.rows, choose);
      break;
    case 'generation':
      generationItems(task, data.rows, choose);
      break;
  }
}

function itemOptions(examples: LoadedRows | undefined, options: EvalOptions): ItemOptions {
  return { limit: options.limit, fewShot: options.fewShot, seed: options.seed, examples: examples?.rows };
}

/** Perplexity of the texts of --text. */
export async function evaluateTexts(run: EvaluationContext, texts: NamedTexts): Promise<Evaluation> {
  const { tokenizer, options } = run;
  const { protocol = 'windows', startToken = 'each' } = options;
  const apart = options.perDocument === true || protocol === 'rolling';
  const documents = apart ? texts.documents : [{ name: 'text', text: joined(texts.documents.map(({ text }) => text)) }];
  const tokens = apart
    ? documents.map(({ text }) => tokenizer.encode(text, { addSpecialTokens: false }))
    : [
        tokenizeTexts(
          tokenizer,
          texts.documents.map(({ text }) => text),
        ),
      ];
  const settings = { protocol, stride: options.stride, samples: options.samples, startToken, seqLen: options.seqLen };
  return scoreText(run, { name: 'text', version: 1 }, documents, tokens, settings, {
    dataset: null,
    revision: null,
    split: null,
    files: [...texts.files],
  });
}

const joined = (texts: readonly string[]): string => texts.map((text) => text.trim()).join('\n\n');

/** Scores tokenized documents, with the reference where there is one. */
async function scoreText(
  run: EvaluationContext,
  { name, version }: Pick<Evaluation, 'name' | 'version'>,
  documents: readonly ScoredDocument[],
  tokens: readonly Int32Array[],
  settings: ProtocolOptions & { readonly seqLen?: number },
  source: Evaluation['source'],
): Promise<Evaluation> {
  const { context, decoder, tokenizer, reference } = run;
  const { protocol = 'windows' } = settings;
  const bosTokenId = tokenizer.bosTokenId ?? (protocol === 'rolling' ? tokenizer.eosTokenIds[0] : undefined);
  const found = await evaluateText(decoder, tokens.length === 1 ? tokens[0] : tokens, {
    ...settings,
    bosTokenId,
    reference,
    onProgress: context.progress.listener,
    signal: context.signal,
  });
  return {
    type: 'text',
    name,
    version,
    source,
    settings: {
      protocol,
      seqLen: found.seqLen,
      stride: protocol === 'strided' ? (settings.stride ?? null) : null,
      samples: settings.samples ?? null,
      startToken: bosTokenId === undefined || protocol === 'rolling' ? null : (settings.startToken ?? 'each'),
    },
    ...(await textResult(found, documents, protocol === 'rolling')),
  };
}

/** One task, from its rows to its evaluation. */
export async function evaluateTask(run: EvaluationContext, prepared: PreparedTask): Promise<Evaluation> {
  const { task, data, examples } = prepared;
  const { context, decoder, tokenizer, options, scope } = run;
  const source = {
    dataset: data.revision === null ? null : task.source.dataset,
    revision: data.revision,
    split: task.split,
    files: [...data.files, ...(examples?.files ?? [])],
  };
  if (task.type === 'text') return textTask(run, task, data, source);
  const choose = itemOptions(examples, options);
  const cache = await openCache(run, task.name);
  const shared = { cache, cacheScope: scope, onProgress: context.progress.listener, signal: context.signal };
  const head = { name: task.name, version: task.version, source };
  const limits = { limit: options.limit ?? null, seed: options.seed };
  try {
    switch (task.type) {
      case 'choices':
      case 'completion': {
        const items =
          task.type === 'choices' ? choiceItems(task, data.rows, choose) : completionItems(task, data.rows, choose);
        const startToken =
          options.startToken === undefined || options.startToken === 'none' ? undefined : tokenizer.bosTokenId;
        const { logLikelihoods: _, ...found } = await evaluateChoices(decoder, tokenizer, task, items, {
          ...shared,
          startToken,
        });
        const fewShot = fewShotCount(task, options.fewShot);
        return {
          type: 'choices',
          ...head,
          settings: { ...limits, fewShot, startToken: startToken !== undefined },
          ...found,
        };
      }
      case 'generation': {
        const items = generationItems(task, data.rows, choose);
        const transcripts: Transcript[] = [];
        const sampling = {
          temperature: options.temperature ?? task.sampling.temperature,
          topP: options.topP ?? task.sampling.topP,
          topK: options.topK ?? task.sampling.topK,
          maxTokens: Math.min(options.maxTokens ?? task.sampling.maxTokens, contextLength(decoder.config)),
          thinking: options.thinking,
        };
        const found = await evaluateReasoning(decoder, tokenizer, task, items, {
          ...shared,
          ...sampling,
          seed: options.seed,
          samples: options.nSamples,
          slots: options.batchSize,
          onTranscript: (transcript) => void transcripts.push(transcript),
        });
        return {
          type: 'generation',
          ...head,
          settings: { ...limits, ...sampling },
          ...found,
          transcripts: await keepTranscripts(options.out, task.name, transcripts),
        };
      }
      default:
        return unreachable(task);
    }
  } finally {
    await cache?.close();
  }
}

async function textTask(
  run: EvaluationContext,
  task: TextTask,
  data: LoadedRows,
  source: Evaluation['source'],
): Promise<Evaluation> {
  const { decoder, reference, tokenizer, options } = run;
  const { protocol = 'windows', startToken = 'once' } = options;
  const texts = taskTexts(task, data.rows);
  const context = Math.min(...[decoder, reference].flatMap((d) => (d ? [contextLength(d.config)] : [])));
  const seqLen = options.seqLen ?? Math.min(task.seqLen, context);
  const encode = (text: string): Int32Array => tokenizer.encode(text, { addSpecialTokens: false });
  const settings = { protocol, stride: options.stride, startToken, seqLen };
  if (task.draw) {
    ensure(
      protocol === 'windows',
      'usage',
      () => `task ${task.name} draws its windows: --protocol ${protocol} has no text to go through`,
      'Leave --protocol away for it, or measure c4_new.',
    );
    const { bosTokenId } = tokenizer;
    // Where the tokenizer's own start token belongs, each row has it; a window seldom begins there.
    const opened = (text: string): Int32Array =>
      bosTokenId === undefined || startToken !== 'once' ? encode(text) : Int32Array.from([bosTokenId, ...encode(text)]);
    const length = seqLen - (bosTokenId !== undefined && startToken === 'each' ? 1 : 0);
    const windows = Math.min(task.draw.windows, options.limit ?? Infinity);
    const tokens = drawnWindows(texts, { ...task.draw, windows }, length, opened);
    const name = { name: task.name, text: '' };
    const placed = startToken === 'once' ? 'none' : startToken;
    const found = await scoreText(run, task, [name], [tokens], { ...settings, startToken: placed }, source);
    return { ...found, settings: { ...found.settings, startToken: bosTokenId === undefined ? null : startToken } };
  }
  const text = texts.join(task.join);
  // Windows follow one another in the papers' order; --limit cuts them.
  const windows = Math.min(task.windows ?? Infinity, options.limit ?? Infinity);
  return scoreText(
    run,
    task,
    [{ name: task.name, text }],
    [encode(text)],
    { ...settings, windows: Number.isFinite(windows) ? windows : undefined },
    source,
  );
}

/** The cache of a task's requests, or undefined when none is wanted. */
async function openCache({ options, scope }: EvaluationContext, task: string): Promise<OpenRequestCache | undefined> {
  if (options.cache === false) return undefined;
  return openRequestCache(path.join(options.cache, await hexDigest(scope, 8), `${task}.jsonl`));
}

/** Writes what the model wrote beside the result; its path relative to the result. */
async function keepTranscripts(
  out: string | undefined,
  task: string,
  transcripts: readonly Transcript[],
): Promise<string | null> {
  if (out === undefined) return null;
  const file = path.resolve(out);
  const folder = `${path.basename(file).replace(/\.json$/i, '')}-transcripts`;
  await mkdir(path.join(path.dirname(file), folder), { recursive: true });
  const lines = transcripts.map((transcript) => `${JSON.stringify(transcript)}\n`).join('');
  await writeFileAtomic(path.join(path.dirname(file), folder, `${task}.jsonl`), lines);
  return `${folder}/${task}.jsonl`;
}

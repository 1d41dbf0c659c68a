// From a row of a data set to what a model is asked: prompts and choices rendered by a task's templates, examples before them.
import { Template } from '@huggingface/jinja';
import { GyreError, ensure } from '../core/errors.js';
import { createPythonRandom, type PythonRandom } from '../core/python-random.js';
import { createRng } from '../core/rng.js';
import {
  TASK_LIMITS,
  type ChoicesTask,
  type CompletionTask,
  type GenerationTask,
  type TaskDefinition,
  type TextTask,
} from './definition.js';
import type { Row } from './rows.js';

/** What every question has. */
interface Item {
  /** Stable within the task. */
  readonly id: string;
  /** Subject, where the task has subjects. */
  readonly group: string | null;
}

/** A question with choices: the likelihood of `continuations[i]` after `contexts[i]` is compared. */
export interface ChoiceItem extends Item {
  /** One per choice; equal ones are computed once. */
  readonly contexts: readonly string[];
  /** With the delimiter before them. */
  readonly continuations: readonly string[];
  /** UTF-8 bytes of each choice without the delimiter, which acc_norm divides by. */
  readonly bytes: readonly number[];
  /** Index of the right choice. */
  readonly answer: number;
}

/** A question that the model answers in its own words. */
export interface GenerationItem extends Item {
  readonly system: string | null;
  readonly prompt: string;
  /** The right answer, as the judge expects it. */
  readonly answer: string;
  /** Letters of the choices; empty where there are none. */
  readonly letters: string;
}

const LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ';

/** What benchmarks do to their texts before use. */
const CLEANERS: Readonly<Record<TaskDefinition['clean'], (text: string) => string>> = {
  none: (text) => text,
  // WikiHow leaves markers in brackets; the order of the steps is HellaSwag's.
  'wikihow-brackets': (text) =>
    text
      .trim()
      .replaceAll(' [title]', '. ')
      .replaceAll(/\[[^\]\n]*\]/g, '')
      .replaceAll('  ', ' '),
};

/** Renders a task's templates over rows; templates are compiled once. */
class Renderer {
  readonly #task: TaskDefinition;
  readonly #compiled = new Map<string, Template>();

  constructor(task: TaskDefinition) {
    this.#task = task;
  }

  /** Variables of a row. @throws GyreError `config-invalid` when the row lacks a column. */
  variables(row: Row, where: string): Record<string, unknown> {
    for (const column of this.#task.columns) {
      ensure(
        valueAt(row, column) !== undefined,
        'config-invalid',
        () => `${where}: no column '${column}'; found ${Object.keys(row).join(', ') || 'none'}`,
        `The data must have the schema that ${this.#task.source.dataset ?? 'the task'} is published with.`,
      );
    }
    const variables: Record<string, unknown> = { ...row, letters: LETTERS };
    for (const [key, source] of Object.entries(this.#task.variables))
      variables[key] = this.render(source, variables, where);
    return variables;
  }

  render(source: string, variables: Record<string, unknown>, where: string): string {
    let text: string;
    try {
      let template = this.#compiled.get(source);
      if (!template) {
        // As in lm-evaluation-harness a line end at the end of a template is meant; Jinja takes one away.
        template = new Template(source.endsWith('\n') ? `${source}\n` : source);
        this.#compiled.set(source, template);
      }
      text = CLEANERS[this.#task.clean](template.render(variables));
    } catch (cause) {
      throw new GyreError(
        'config-invalid',
        `${where}: a template of task ${this.#task.name} fails: ${cause instanceof Error ? cause.message : ''}`,
        { remedy: 'Check the template against the columns of the data.', cause },
      );
    }
    ensure(
      text.length <= TASK_LIMITS.textLength,
      'limit-exceeded',
      () => `${where}: a text of ${text.length} characters is over the limit of ${TASK_LIMITS.textLength}`,
    );
    return text;
  }

  choices(
    spec: NonNullable<ChoicesTask['choices']>,
    row: Row,
    variables: Record<string, unknown>,
    where: string,
  ): string[] {
    if (Array.isArray(spec)) {
      return spec.map((choice) =>
        typeof choice === 'string'
          ? this.render(choice, variables, where)
          : CLEANERS[this.#task.clean](String(valueAt(row, choice.column)).trim()),
      );
    }
    const list = valueAt(row, spec.column);
    ensure(
      Array.isArray(list) &&
        list.length > 0 &&
        list.length <= TASK_LIMITS.choices &&
        list.every((c) => typeof c === 'string'),
      'config-invalid',
      () => `${where}: '${spec.column}' is no list of 1 to ${TASK_LIMITS.choices} texts`,
    );
    return list.map((text) => CLEANERS[this.#task.clean](text));
  }
}

/** The value of a column, or of a field inside one. */
function valueAt(row: Row, column: string): unknown {
  let value: unknown = row;
  for (const part of column.split('.')) {
    if (typeof value !== 'object' || value === null || !Object.hasOwn(value, part)) return undefined;
    value = (value as Row)[part];
  }
  return value ?? undefined;
}

/** Index of the right choice. */
function answerIndex(spec: ChoicesTask['answer'], row: Row, count: number, where: string): number {
  let index: number;
  if (typeof spec === 'number') index = spec;
  else {
    const value = String(valueAt(row, spec.column)).trim();
    const labels = typeof spec.labels === 'string' ? valueAt(row, spec.labels) : spec.labels;
    index = Array.isArray(labels) ? labels.map(String).indexOf(value) : /^\d+$/.test(value) ? Number(value) : -1;
  }
  ensure(
    index >= 0 && index < count,
    'config-invalid',
    () =>
      `${where}: the answer ${typeof spec === 'number' ? spec : JSON.stringify(valueAt(row, spec.column))} names none of ${count} choices`,
    'Splits published without answers (test splits often are) cannot be measured.',
  );
  return index;
}

interface Rendered {
  readonly row: Row;
  readonly where: string;
  readonly variables: Record<string, unknown>;
  readonly id: string;
  readonly group: string | null;
}

/** Rows that the task wants, with their variables. */
function prepare(task: TaskDefinition, renderer: Renderer, rows: readonly Row[], limit: number): Rendered[] {
  const prepared: Rendered[] = [];
  const { where: filter } = task;
  const groupBy = 'groupBy' in task ? task.groupBy : undefined;
  for (const [i, row] of rows.entries()) {
    if (prepared.length >= limit) break;
    const where = `${task.name}, row ${i + 1}`;
    const variables = renderer.variables(row, where);
    if (filter && valueAt(row, filter.column) !== filter.equals) continue;
    const id = task.id === undefined ? undefined : valueAt(row, task.id);
    const named = typeof id === 'string' || typeof id === 'number';
    const group = groupBy === undefined ? null : String(valueAt(row, groupBy));
    prepared.push({ row, where, variables, id: named ? String(id) : String(i), group });
  }
  ensure(
    prepared.length > 0,
    'config-invalid',
    () => `task ${task.name} has no questions: ${rows.length} rows were read`,
    'Check that the data file is whole and belongs to the task.',
  );
  return prepared;
}

/** Choice of rows and examples. */
export interface ItemOptions {
  /** Questions, from the first; default all. */
  readonly limit?: number;
  /** Examples before each question; default what the task says. */
  readonly fewShot?: number;
  /** Of drawn examples and shuffled choices; default 0, with which examples are those of the harness. */
  readonly seed?: number;
  /** Rows of the split that examples come from; needed when there are any. */
  readonly examples?: readonly Row[];
}

/** Examples before each question: what is asked for, or what the task says. @throws GyreError `usage` when it has none to give. */
export function fewShotCount(task: TaskDefinition, wanted: number | undefined): number {
  if (task.type !== 'choices') {
    ensure(!wanted, 'usage', () => `task ${task.name} takes no examples`, 'Leave --few-shot away for it.');
    return 0;
  }
  ensure(
    !wanted || task.fewShot,
    'usage',
    () => `task ${task.name} says no split to take examples from`,
    'Leave --few-shot away for it.',
  );
  return wanted ?? task.fewShot?.count ?? 0;
}

/** Questions of a multiple-choice task. @throws GyreError `config-invalid` naming the row that does not fit. */
export function choiceItems(task: ChoicesTask, rows: readonly Row[], options: ItemOptions = {}): ChoiceItem[] {
  const renderer = new Renderer(task);
  const shots = fewShotCount(task, options.fewShot);
  const pool = shots > 0 ? prepare(task, renderer, options.examples ?? [], Infinity) : [];
  const draw = exampleSampler(task, pool, shots, options.seed ?? 0);
  const question = ({ row, where, variables }: Rendered) => {
    if (task.prompt !== undefined && task.choices !== undefined) {
      const choices = renderer.choices(task.choices, row, variables, where);
      const prompt = renderer.render(task.prompt, variables, where);
      const answer = answerIndex(task.answer, row, choices.length, where);
      return { contexts: choices.map(() => prompt), choices, answer };
    }
    const contexts = (task.contexts ?? []).map((source) => renderer.render(source, variables, where));
    const ending = renderer.render(task.continuation ?? '', variables, where);
    return {
      contexts,
      choices: contexts.map(() => ending),
      answer: answerIndex(task.answer, row, contexts.length, where),
    };
  };
  const encoder = new TextEncoder();
  const { separator = '' } = task.fewShot ?? {};
  return prepare(task, renderer, rows, options.limit ?? Infinity).map((rendered) => {
    const { contexts, choices, answer } = question(rendered);
    let before = task.description === '' ? '' : renderer.render(task.description, rendered.variables, rendered.where);
    for (const other of draw(rendered)) {
      const example = question(other);
      before += example.contexts[example.answer] + task.delimiter + example.choices[example.answer] + separator;
    }
    return {
      id: rendered.id,
      group: rendered.group,
      contexts: contexts.map((context) => before + context),
      continuations: choices.map((choice) => task.delimiter + choice),
      bytes: choices.map((choice) => encoder.encode(choice).length),
      answer,
    };
  });
}

/** Seed that lm-evaluation-harness draws examples with unless told otherwise. */
const HARNESS_SEED = 1234;

/**
 * The examples of each question, asked for in the order of the questions. Drawn ones are the harness's: one stream of
 * Python's generator runs through the questions of a task (of a subject); where examples come from the split that is
 * measured, one more is drawn and the question itself is left out.
 * @param seed 0 stands for the harness's own.
 */
function exampleSampler(
  task: ChoicesTask,
  pool: readonly Rendered[],
  shots: number,
  seed: number,
): (question: Rendered) => readonly Rendered[] {
  const { fewShot } = task;
  if (shots === 0 || !fewShot) return () => [];
  const byGroup = new Map<string | null, Rendered[]>();
  for (const example of pool) {
    const own = byGroup.get(example.group);
    if (own) own.push(example);
    else byGroup.set(example.group, [example]);
  }
  const sameSplit = fewShot.split === task.split;
  const isOther = (a: Row, b: Row): boolean => a !== b && !(sameSplit && JSON.stringify(a) === JSON.stringify(b));
  const streams = new Map<string | null, PythonRandom>();
  const wanted = shots + (sameSplit ? 1 : 0);
  return ({ group, row, where }) => {
    const own = byGroup.get(group) ?? [];
    ensure(
      own.length >= wanted,
      'usage',
      () => `${where}: ${shots} examples were asked for, the split has ${own.length}`,
      'Ask for fewer with --few-shot.',
    );
    if (fewShot.sampler === 'first') return own.filter((example) => isOther(example.row, row)).slice(0, shots);
    const stream = streams.get(group) ?? createPythonRandom(seed === 0 ? HARNESS_SEED : seed);
    streams.set(group, stream);
    return stream
      .sampleIndices(own.length, wanted)
      .map((i) => own[i])
      .filter((example) => isOther(example.row, row))
      .slice(0, shots);
  };
}

/** Questions of a completion task: one choice each. */
export function completionItems(task: CompletionTask, rows: readonly Row[], options: ItemOptions = {}): ChoiceItem[] {
  const renderer = new Renderer(task);
  return prepare(task, renderer, rows, options.limit ?? Infinity).map(({ variables, where, id, group }) => {
    const target = renderer.render(task.target, variables, where);
    return {
      id,
      group,
      contexts: [renderer.render(task.prompt, variables, where)],
      continuations: [target],
      bytes: [new TextEncoder().encode(target.trim()).length],
      answer: 0,
    };
  });
}

/** Questions of a generation task. */
export function generationItems(
  task: GenerationTask,
  rows: readonly Row[],
  options: ItemOptions = {},
): GenerationItem[] {
  const renderer = new Renderer(task);
  const rng = createRng(options.seed ?? 0).fork(task.name);
  return prepare(task, renderer, rows, options.limit ?? Infinity).map((rendered, i) => {
    const { row, where, variables, id, group } = rendered;
    const given = task.choices === undefined ? [] : renderer.choices(task.choices, row, variables, where);
    const order = given.map((_, at) => at);
    if (task.shuffle) rng.fork(i).shuffle(order);
    const choices = order.map((at) => given[at]);
    const seen = { ...variables, choices };
    const answer =
      typeof task.answer === 'string'
        ? renderer.render(task.answer, seen, where).trim()
        : LETTERS[order.indexOf(answerIndex(task.answer, row, given.length, where))];
    ensure(answer !== '', 'config-invalid', () => `${where}: the right answer is empty`);
    return {
      id,
      group,
      system: task.system === undefined ? null : renderer.render(task.system, seen, where),
      prompt: renderer.render(task.prompt, seen, where),
      answer,
      letters: LETTERS.slice(0, choices.length),
    };
  });
}

/** The texts of a text task, one per row. */
export function taskTexts(task: TextTask, rows: readonly Row[]): string[] {
  const renderer = new Renderer(task);
  return prepare(task, renderer, rows, task.rows ?? Infinity).map(({ variables, where }) =>
    renderer.render(task.text, variables, where),
  );
}

/**
 * The windows of a text task that draws them, joined: each begins at a drawn token of a drawn row that has more than
 * `seqLen` tokens. The draws are those of GPTQ's evaluation, on which ParoQuant's rests.
 * @param encode a row as the tokenizer gives it, start token included where it puts one.
 * @throws GyreError `config-invalid` when no row is long enough.
 */
export function drawnWindows(
  texts: readonly string[],
  { windows, seed }: NonNullable<TextTask['draw']>,
  seqLen: number,
  encode: (text: string) => Int32Array,
): Int32Array {
  const encoder = new TextEncoder();
  const encoded = new Map<number, Int32Array>();
  const tokensOf = (row: number): Int32Array => {
    let tokens = encoded.get(row);
    if (!tokens) {
      // A token stands for a byte at least, but for a start token and a space that tokenizers put in front.
      const long = encoder.encode(texts[row]).length + 2 >= seqLen;
      tokens = long ? encode(texts[row]) : new Int32Array(0);
      encoded.set(row, tokens);
    }
    return tokens;
  };
  const random = createPythonRandom(seed);
  const out = new Int32Array(windows * seqLen);
  for (let window = 0; window < windows;) {
    const tokens = tokensOf(random.randint(0, texts.length - 1));
    // One of exactly seqLen tokens has no place to draw either: the original stops there with an error.
    if (tokens.length <= seqLen) {
      ensure(
        encoded.size < texts.length || [...encoded.values()].some(({ length }) => length > seqLen),
        'config-invalid',
        () => `none of ${texts.length} rows has more than ${seqLen} tokens to draw windows from`,
        'Choose shorter windows with --seq-len.',
      );
      continue;
    }
    const begin = random.randint(0, tokens.length - seqLen - 1);
    out.set(tokens.subarray(begin, begin + seqLen), window * seqLen);
    window++;
  }
  return out;
}

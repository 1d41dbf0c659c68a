// The tokenizer adapter: against what Python's libraries make of the same texts, and the parts that are ours.
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { z } from 'zod';
import { createRng } from '../../src/core/rng.js';
import { memoryFiles } from '../../src/formats/source.js';
import { folderFiles } from '../../src/formats/source.node.js';
import { createLibraryTokenizer } from '../../src/tokenizer/library.js';
import { safeSplit } from '../../src/tokenizer/safe-split.js';
import { loadTokenizer, type Tokenizer } from '../../src/tokenizer/tokenizer.js';
import { expectError } from './formats/helpers.js';

const root = path.resolve(import.meta.dirname, '../..');
const model = path.join(root, 'models/gyre-14m');
const expectedFile = path.join(root, 'test/fixtures/tokenizer/expected.json');
const expectedSchema = z.object({
  texts: z.array(
    z.object({
      text: z.string(),
      ids: z.array(z.number()),
      idsWithSpecialTokens: z.array(z.number()),
      decoded: z.string(),
      decodedWithoutSpecialTokens: z.string(),
    }),
  ),
  chats: z.array(
    z.object({
      messages: z.array(z.object({ role: z.string(), content: z.string() })),
      add_generation_prompt: z.boolean(),
      rendered: z.string(),
      ids: z.array(z.number()),
    }),
  ),
});

/** GPT-2's printable stand-ins for bytes. */
const byteSymbols = (() => {
  const printable = [...Array(256).keys()].filter((b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174);
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable.includes(b) ? b : next++));
})();

function vocabOf(symbols: readonly string[], merges: readonly [string, string][]): Record<string, number> {
  const vocab: Record<string, number> = {};
  for (const token of [...symbols, ...merges.map((pair) => pair.join(''))]) vocab[token] ??= Object.keys(vocab).length;
  return vocab;
}

/** A byte-level tokenizer as GPT-2, Llama 3 and Qwen have them. */
function byteLevelJson(): Record<string, unknown> {
  const merges: [string, string][] = [
    ['t', 'h'],
    ['th', 'e'],
    ['Ġ', 'the'],
    ['i', 'n'],
    ['Ġ', 'a'],
    ['ð', 'Ł'],
    ['e', 'r'],
  ];
  const vocab = vocabOf(byteSymbols, merges);
  const size = Object.keys(vocab).length;
  return {
    added_tokens: [
      { id: size, content: '<s>', special: true, single_word: false, lstrip: false, rstrip: false, normalized: false },
      {
        id: size + 1,
        content: '</s>',
        special: true,
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
      },
      {
        id: size + 2,
        content: '<think>',
        special: false,
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
      },
    ],
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: true },
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [],
      special_tokens: { '<s>': { id: '<s>', ids: [size], tokens: ['<s>'] } },
    },
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab, merges, unk_token: null, ignore_merges: false },
  };
}

/** A SentencePiece-style tokenizer with byte fallback, as Llama 2 and Mistral have them. */
function sentencePieceJson(): Record<string, unknown> {
  const letters = [...'▁etaoinshrdlucmfwygpbvkABCT.,\n'];
  const merges: [string, string][] = [
    ['t', 'h'],
    ['▁', 'th'],
    ['▁th', 'e'],
    ['a', 'n'],
    ['▁', 'a'],
    ['i', 'n'],
    ['e', 'r'],
    ['▁', '▁'],
    ['▁▁', '▁▁'],
    ['o', 'n'],
    ['\n', '\n'],
    ['▁', 's'],
    ['h', 'e'],
  ];
  const bytes = Array.from({ length: 256 }, (_, b) => `<0x${b.toString(16).toUpperCase().padStart(2, '0')}>`);
  return {
    added_tokens: [
      { id: 0, content: '<unk>', special: true },
      { id: 1, content: '<s>', special: true },
      { id: 2, content: '</s>', special: true },
    ],
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'Prepend', prepend: '▁' },
        { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
      ],
    },
    pre_tokenizer: null,
    post_processor: null,
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: {
      type: 'BPE',
      vocab: vocabOf(['<unk>', '<s>', '</s>', ...bytes, ...letters], merges),
      merges,
      unk_token: '<unk>',
      fuse_unk: true,
      byte_fallback: true,
    },
  };
}

const files = (json: unknown, extra: Record<string, string> = {}): ReturnType<typeof memoryFiles> =>
  memoryFiles('m', { 'tokenizer.json': JSON.stringify(json), ...extra });
const load = (json: unknown, extra: Record<string, string> = {}): Promise<Tokenizer> =>
  loadTokenizer(files(json, extra));

describe.skipIf(!existsSync(path.join(model, 'tokenizer.json')) || !existsSync(expectedFile))(
  'as Python has it',
  () => {
    const expected = (): z.output<typeof expectedSchema> =>
      expectedSchema.parse(JSON.parse(readFileSync(expectedFile, 'utf8')));

    it('encodes and decodes', async () => {
      const tokenizer = await loadTokenizer(await folderFiles(model));
      for (const { text, ids, idsWithSpecialTokens, decoded, decodedWithoutSpecialTokens } of expected().texts) {
        expect([...tokenizer.encode(text, { addSpecialTokens: false })], text).toEqual(ids);
        expect([...tokenizer.encode(text)], text).toEqual(idsWithSpecialTokens);
        expect(tokenizer.decode(ids, { skipSpecialTokens: false })).toBe(decoded);
        expect(tokenizer.decode(ids)).toBe(decodedWithoutSpecialTokens);
      }
    });

    it('renders chats', async () => {
      const tokenizer = await loadTokenizer(await folderFiles(model));
      expect(tokenizer.hasChatTemplate).toBe(true);
      for (const { messages, add_generation_prompt, rendered, ids } of expected().chats) {
        const text = tokenizer.applyChatTemplate(messages, { addGenerationPrompt: add_generation_prompt });
        expect(text).toBe(rendered);
        expect([...tokenizer.encode(text, { addSpecialTokens: false })]).toEqual(ids);
      }
    });

    it('streams every text as it decodes it', async () => {
      const tokenizer = await loadTokenizer(await folderFiles(model));
      for (const skipSpecialTokens of [true, false]) {
        for (const { ids } of expected().texts) {
          const stream = tokenizer.createStreamDecoder({ skipSpecialTokens });
          expect(ids.map((id) => stream.push(id)).join('') + stream.flush()).toBe(
            tokenizer.decode(ids, { skipSpecialTokens }),
          );
        }
      }
    });
  },
);

describe('byte-level', () => {
  it('adds special tokens unless told not to, finds those in the text', async () => {
    const tokenizer = await load(byteLevelJson(), {
      'tokenizer_config.json': '{"bos_token":"<s>","eos_token":{"content":"</s>"}}',
    });
    const bos = tokenizer.tokenId('<s>') ?? -1;
    expect(tokenizer.bosTokenId).toBe(bos);
    expect(tokenizer.eosTokenIds).toEqual([tokenizer.tokenId('</s>')]);
    const plain = tokenizer.encode('the <think>', { addSpecialTokens: false });
    expect([...tokenizer.encode('the <think>')]).toEqual([bos, ...plain]);
    expect(plain.at(-1)).toBe(tokenizer.tokenId('<think>'));
    expect(tokenizer.decode(tokenizer.encode('the <think></s>'))).toBe('the <think>');
    expect(tokenizer.decode(tokenizer.encode('the </s>'), { skipSpecialTokens: false })).toBe('<s>the </s>');
    expect(tokenizer.isSpecial(bos)).toBe(true);
    expect(tokenizer.encode('', { addSpecialTokens: false })).toEqual(new Int32Array(0));
    expect(tokenizer.decode([])).toBe('');
    expect(tokenizer.decode([tokenizer.vocabSize + 5, ...plain])).toBe('the <think>');
  });

  it('decoding undoes encoding, spaces before punctuation and all', async () => {
    const tokenizer = await load(byteLevelJson());
    for (const text of [" a . b , c n't  \n x", 'naïve 🙂👩‍👧 漢字', '\uFEFFbom', 'a\u0000b']) {
      expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
    }
  });

  it('streams without ever taking text back, holding half characters', async () => {
    const tokenizer = await load(byteLevelJson());
    const stream = tokenizer.createStreamDecoder();
    const pieces = [...tokenizer.encode('é🙂x', { addSpecialTokens: false })].map((id) => stream.push(id));
    expect(pieces.filter((piece) => piece !== '')).toEqual(['é', '🙂', 'x']);
    expect(stream.flush()).toBe('');
    const cut = [...tokenizer.encode('ok🙂', { addSpecialTokens: false })].slice(0, -1);
    expect(cut.map((id) => stream.push(id)).join('')).toBe('ok');
    expect(stream.flush()).toBe('\uFFFD');
  });

  it('streams random tokens, broken characters included, exactly', async () => {
    for (const json of [byteLevelJson(), sentencePieceJson()]) {
      const tokenizer = await load(json);
      const rng = createRng(3);
      for (let round = 0; round < 200; round++) {
        const ids = Array.from({ length: rng.int(1, 30) }, () => rng.int(0, tokenizer.vocabSize));
        for (const skipSpecialTokens of [true, false]) {
          const stream = tokenizer.createStreamDecoder({ skipSpecialTokens });
          const streamed = ids.map((id) => stream.push(id)).join('') + stream.flush();
          expect(streamed).toBe(tokenizer.decode(ids, { skipSpecialTokens }));
        }
      }
    }
  });
});

describe('SentencePiece-style', () => {
  const words = [
    'the',
    'then',
    'a',
    'an',
    'inner',
    'son',
    'Then',
    'zebra',
    'häuser',
    '漢字',
    '🙂',
    'A.B',
    'on,',
    '\n\n',
    '  ',
    '<s>',
  ];
  function text(length: number, seed: number): string {
    const rng = createRng(seed);
    let out = '';
    while (out.length < length) out += (rng.uniform() < 0.85 ? ' ' : '') + rng.pick(words);
    return out;
  }

  it('cutting changes no token', async () => {
    const json = sentencePieceJson();
    const tokenizer = await load(json);
    const whole = createLibraryTokenizer(json, {}); // without our cuts
    for (let seed = 0; seed < 20; seed++) {
      const sample = text(2000, seed);
      expect([...tokenizer.encode(sample)]).toEqual(whole.encode(sample, { add_special_tokens: true }).ids);
    }
  });

  it('cuts only where that is certain', () => {
    const json = sentencePieceJson();
    expect(safeSplit(json.model, null)).toBeDefined();
    for (const change of [
      { ignore_merges: true },
      { dropout: 0.1 },
      { end_of_word_suffix: '</w>' },
      { type: 'Unigram' },
    ]) {
      expect(safeSplit({ ...(json.model as object), ...change }, null)).toBeUndefined();
    }
    const long = `▁${'the▁'.repeat(200)}`;
    expect(safeSplit(json.model, null)?.(long).slice(0, 3)).toEqual(['▁the', '▁the', '▁the']);
  });

  it('round trips, byte fallback included', async () => {
    const tokenizer = await load(sentencePieceJson());
    for (const sample of ['the son', ' leading', 'häuser 🙂 zebra', 'a\n\nb   c'])
      expect(tokenizer.decode(tokenizer.encode(sample))).toBe(sample);
  });
});

it('encodes long texts in linear time', async () => {
  for (const json of [byteLevelJson(), sentencePieceJson()]) {
    const tokenizer = await load(json);
    const paragraph = 'The inner son and then the others, in the end. 42 zebras!\n\n';
    const time = (n: number): number => {
      const sample = paragraph.repeat(Math.ceil(n / paragraph.length));
      const start = performance.now();
      tokenizer.encode(sample);
      return performance.now() - start;
    };
    time(50_000);
    const [short, long] = [time(125_000), time(1_000_000)];
    expect(long).toBeLessThan(20 * short + 500); // 8 × the text; 64 × the time would be quadratic
    expect(long).toBeLessThan(15_000);
  }
});

describe('end of text', () => {
  it('is what the generation config says, the config in its stead, and the tokenizer', async () => {
    const extra = { 'tokenizer_config.json': '{"eos_token":"</s>"}', 'config.json': '{"eos_token_id":7}' };
    const own = (await load(byteLevelJson())).tokenId('</s>');
    expect((await load(byteLevelJson(), extra)).eosTokenIds).toEqual([7, own]);
    expect(
      (await load(byteLevelJson(), { ...extra, 'generation_config.json': '{"eos_token_id":[8,9]}' })).eosTokenIds,
    ).toEqual([8, 9, own]);
  });
});

describe('chat templates', () => {
  const template =
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{% if think %}<think>{% endif %}";
  const messages = [{ role: 'user', content: 'hi' }];
  const config = (chat_template: unknown): string => JSON.stringify({ bos_token: '<s>', chat_template });

  it('from each place, in order of precedence', async () => {
    const inConfig = await load(byteLevelJson(), { 'tokenizer_config.json': config(template) });
    expect(inConfig.applyChatTemplate(messages)).toBe('<s>[user]hi[assistant]');
    expect(inConfig.applyChatTemplate(messages, { addGenerationPrompt: false, variables: { think: true } })).toBe(
      '<s>[user]hi<think>',
    );
    const several = config([
      { name: 'tool_use', template: 'T' },
      { name: 'default', template: 'D' },
    ]);
    expect((await load(byteLevelJson(), { 'tokenizer_config.json': several })).applyChatTemplate(messages)).toBe('D');
    const json = { 'tokenizer_config.json': several, 'chat_template.json': '{"chat_template":"J"}' };
    expect((await load(byteLevelJson(), json)).applyChatTemplate(messages)).toBe('J');
    expect((await load(byteLevelJson(), { ...json, 'chat_template.jinja': 'F' })).applyChatTemplate(messages)).toBe(
      'F',
    );
  });

  it('that refuse, are broken or absent', async () => {
    const tokenizer = await load(byteLevelJson(), { 'tokenizer_config.json': config(template) });
    await expectError(() => tokenizer.applyChatTemplate([{ role: 'tool', content: '' }]), 'usage', /no tools here/);
    await expectError(
      () => load(byteLevelJson(), { 'chat_template.jinja': '{% for %}' }),
      'config-invalid',
      /chat template/,
    );
    const base = await load(byteLevelJson());
    expect(base.hasChatTemplate).toBe(false);
    await expectError(() => base.applyChatTemplate(messages), 'unsupported', /no chat template/, /instruction-tuned/);
  });
});

describe('tokenizers that cannot be used', () => {
  it('missing, broken, unknown', async () => {
    await expectError(
      () => loadTokenizer(memoryFiles('m', { 'tokenizer.model': 'x' })),
      'file-missing',
      /no tokenizer\.json \(found the older tokenizer\.model\)/,
      /save_pretrained/,
    );
    await expectError(
      () => loadTokenizer(memoryFiles('m', { 'tokenizer.json': '{' })),
      'file-corrupt',
      /not valid JSON/,
    );
    await expectError(() => loadTokenizer(memoryFiles('m', { 'tokenizer.json': '{}' })), 'config-invalid', /model/);
    await expectError(() => load({ ...byteLevelJson(), decoder: { type: 'Surprise' } }), 'unsupported', /Surprise/);
  });
});

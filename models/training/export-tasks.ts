// Writes training tasks, one document a line. Run: npx tsx models/training/export-tasks.ts --count N --out FILE

import { createWriteStream } from 'node:fs';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { parseArgs } from 'node:util';
import { trainingDocuments } from './task-sets.js';

const { values } = parseArgs({ options: { out: { type: 'string' }, count: { type: 'string', default: '400000' } } });
if (values.out === undefined) throw new Error('usage: export-tasks.ts --out FILE [--count N]');

function* lines(count: number): Generator<string> {
  const documents = trainingDocuments();
  for (let i = 0; i < count; i += 1000) {
    const batch = Array.from({ length: Math.min(1000, count - i) }, () => `${documents.next().value}\n`);
    yield batch.join('');
  }
}

await pipeline(Readable.from(lines(Number(values.count))), createWriteStream(values.out));

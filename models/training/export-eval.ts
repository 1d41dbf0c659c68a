// Writes the bundled evaluation tasks as JSON lines. Run: npx tsx models/training/export-eval.ts --out FILE

import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { evaluationTasks } from './task-sets.js';

const { values } = parseArgs({ options: { out: { type: 'string' } } });
if (values.out === undefined) throw new Error('usage: export-eval.ts --out FILE');
writeFileSync(values.out, evaluationTasks());

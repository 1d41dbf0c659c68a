// The CPU backend against the oracle, on one thread and on two.
import { runConformance } from './suite.js';

for (const threads of [1, 2]) {
  const open = async () => (await import('../../src/backends/registry.js')).openBackend('cpu', { threads });
  // Its products of up to 4 rows with integer weights round activations to int16 per group.
  runConformance(`cpu, ${threads} thread${threads > 1 ? 's' : ''}`, open, { int16Rows: 8 });
}

// Who may import whom (docs/architecture.md): arrows point down only, never in a circle, and node: stays where a browser never looks.
const rooms = [
  'core',
  'formats',
  'tokenizer',
  'ops',
  'backends',
  'models',
  'transforms',
  'autograd',
  'quant',
  'generate',
  'evaluation',
  'report',
  'quantize',
  'serve',
  'cli',
];
/** For each room, the rooms it may import (itself always). */
const allowed = {
  core: [],
  formats: ['core'],
  tokenizer: ['core', 'formats'],
  ops: ['core'],
  backends: ['core', 'ops'],
  models: ['core', 'formats', 'ops', 'tokenizer', 'transforms'],
  transforms: ['core', 'ops'],
  autograd: ['core', 'ops'],
  quant: ['core', 'formats', 'tokenizer', 'ops', 'models', 'transforms', 'autograd'],
  generate: ['core', 'formats', 'tokenizer', 'ops', 'models'],
  evaluation: ['core', 'formats', 'tokenizer', 'ops', 'models', 'generate'],
  report: ['core'],
};
module.exports = {
  forbidden: [
    { name: 'no-circular', severity: 'error', from: {}, to: { circular: true, dependencyTypesNot: ['type-only'] } },
    {
      name: 'no-orphan-arrows',
      severity: 'error',
      comment: 'inference never imports quant or autograd',
      from: { path: '^src/(generate|evaluation|models|backends)/' },
      to: { path: '^src/(quant|autograd)/' },
    },
    {
      name: 'only-registry-knows-backends',
      severity: 'error',
      from: { path: '^src/', pathNot: '^src/(backends/|node\\.ts|index\\.ts)' },
      to: { path: '^src/backends/(?!registry)[^/]+/' },
    },
    {
      name: 'node-builtins',
      severity: 'error',
      comment: 'node: only in cli, serve and *.node.ts',
      from: { path: '^src/', pathNot: '^src/(cli|serve)/|\\.node\\.ts$' },
      to: { dependencyTypes: ['core'] },
    },
    {
      name: 'result-schemas-stand-alone',
      severity: 'error',
      comment: 'results.ts of a room is the schema of a result file: it imports zod alone, so that report may read it',
      from: { path: '^src/[^/]+/results\\.ts$' },
      to: { path: '^src/' },
    },
    ...Object.entries(allowed).map(([room, targets]) => ({
      name: `arrows-${room}`,
      severity: 'error',
      from: { path: `^src/${room}/` },
      to: {
        path: `^src/(${rooms.filter((r) => r !== room && !targets.includes(r)).join('|')})/`,
        ...(room === 'report' && { pathNot: '^src/[^/]+/results\\.ts$' }),
      },
    })),
  ],
  options: {
    doNotFollow: { path: 'node_modules' },
    exclude: { path: 'assembly/|generated' },
    tsConfig: { fileName: 'tsconfig.json' },
    tsPreCompilationDeps: true,
    enhancedResolveOptions: { extensions: ['.ts', '.js'] },
  },
};

// Pictures of benchmark results as SVG, by Vega-Lite.
import { mkdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { parse, View } from 'vega';
import { compile, type TopLevelSpec } from 'vega-lite';

/** Bars of KL by recipe, one panel per text, one row per bit width: docs/images/<name>.svg. */
export async function plotRecipes(
  rows: readonly { bits: number; method: string; seed: number; text: string; kl: number }[],
  name: string,
): Promise<void> {
  const spec: TopLevelSpec = {
    $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
    background: 'white',
    title: 'KL(original ‖ quantized), nats per token — lower is better',
    data: { values: rows.map((row) => ({ ...row, width: `${row.bits} bits` })) },
    facet: {
      row: { field: 'width', type: 'ordinal', title: null, sort: 'descending' },
      column: { field: 'text', type: 'nominal', title: null, sort: null },
    },
    resolve: { scale: { y: 'independent' } },
    spec: {
      width: 180,
      height: 160,
      mark: 'bar',
      encoding: {
        x: { field: 'method', type: 'nominal', sort: null, title: null, axis: { labelAngle: 0 } },
        y: { field: 'kl', type: 'quantitative', aggregate: 'mean', title: null },
        color: {
          field: 'method',
          type: 'nominal',
          legend: null,
          scale: { domain: ['rtn', 'awq', 'gptq', 'paroquant'], range: ['#b8b8b8', '#8aa4c8', '#5b7fb5', '#d1495b'] },
        },
      },
    },
  };
  const svg = await new View(parse(compile(spec).spec), { renderer: 'none' }).toSVG();
  const folder = path.join(import.meta.dirname, '../../docs/images');
  mkdirSync(folder, { recursive: true });
  writeFileSync(path.join(folder, `${name}.svg`), svg);
}

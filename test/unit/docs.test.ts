// What the pages claim about the repository and can be checked: links, dependencies, recipes.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { RECIPES } from '../../src/quant/recipes/index.js';

const root = path.join(import.meta.dirname, '../..');
const read = (name: string): string => readFileSync(path.join(root, name), 'utf8');
const pages = ['.', 'docs', 'docs/recipes', 'models/gyre-14m', 'models/training'].flatMap((folder) =>
  readdirSync(path.join(root, folder)).flatMap((name) => (name.endsWith('.md') ? [path.posix.join(folder, name)] : [])),
);

describe('pages', () => {
  it.each(pages)('%s links to what is there', (page) => {
    const text = read(page).replaceAll(/```[\s\S]*?```/g, '');
    const targets = [...text.matchAll(/\]\(([^)\s]+)\)/g)].map(([, target]) => target.split('#')[0]);
    const files = targets.filter((target) => target !== '' && !/^[a-z]+:/.test(target));
    const lost = files.filter((target) => !existsSync(path.join(root, path.dirname(page), target)));
    expect(lost).toEqual([]);
  });

  it('explain every dependency', () => {
    const manifest = JSON.parse(read('package.json')) as Record<
      'dependencies' | 'devDependencies',
      Record<string, string>
    >;
    const names = Object.keys({ ...manifest.dependencies, ...manifest.devDependencies });
    const explained = [...read('docs/dependencies.md').matchAll(/^\| `([^`]+)` \|/gm)].map(([, name]) => name);
    expect(explained.sort()).toEqual(names.sort());
  });

  it.each(RECIPES.map((recipe) => recipe.name))('explain the recipe %s', (name) => {
    expect(existsSync(path.join(root, `docs/recipes/${name}.md`))).toBe(true);
    expect(read('docs/recipes/README.md')).toContain(`[${name}](${name}.md)`);
  });
});

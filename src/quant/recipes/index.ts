// The table of recipes. Adding one: a file beside this, a line here, its page in docs/recipes, a row in the tests' table.
import { GyreError } from '../../core/errors.js';
import type { Recipe } from '../types.js';
import { awq } from './awq.js';
import { gptq } from './gptq.js';
import { lowbit } from './lowbit.js';
import { paroquant } from './paroquant.js';
import { paroquantBlock } from './paroquant-block.js';
import { paroquantTuned } from './paroquant-tuned.js';
import { quarot } from './quarot.js';
import { rtn } from './rtn.js';
import { smoothquant } from './smoothquant.js';
import { smoothrot } from './smoothrot.js';

/** Every recipe by name. */
export const RECIPES: readonly Recipe[] = [
  rtn,
  awq,
  gptq,
  paroquant,
  paroquantBlock,
  paroquantTuned,
  smoothquant,
  quarot,
  smoothrot,
  lowbit,
];

/** @throws GyreError `usage` naming the recipes there are. */
export function findRecipe(name: string): Recipe {
  const recipe = RECIPES.find((r) => r.name === name);
  if (!recipe)
    throw new GyreError('usage', `unknown method '${name}'`, {
      remedy: `choose one of: ${RECIPES.map((r) => r.name).join(', ')}`,
    });
  return recipe;
}

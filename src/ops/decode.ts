// The decode section of the op contract: a whole decoder handed to a backend at once, and the program that it makes of a token's
// step. A backend offers it as `backend.prepareDecode`, or not at all; generate/ asks first and otherwise runs op by op.
import type { AttentionShape, KvCacheHandle, LinearHandle, RopeHandle, Tensor, TransformHandle } from './backend.js';

/** One product of a linear group and the transform of its input. */
export interface DecodeProduct {
  readonly weight: LinearHandle;
  readonly transform?: TransformHandle;
}

/** A decoder block as Backend.prepareDecode sees it; products in the order of their output columns. */
export interface DecodeBlockSpec {
  readonly inputNorm: Tensor;
  readonly postAttentionNorm: Tensor;
  readonly qNorm?: Tensor;
  readonly kNorm?: Tensor;
  readonly qkv: readonly DecodeProduct[];
  readonly o: readonly DecodeProduct[];
  readonly gateUp: readonly DecodeProduct[];
  readonly down: readonly DecodeProduct[];
  readonly cache: KvCacheHandle;
  /** Keys a token sees; all when undefined. */
  readonly window?: number;
  /** Of the heads of q and k after RoPE; see SplitHeadsOptions. */
  readonly headTransform?: TransformHandle;
}

/** A whole decoder, resident on a backend. */
export interface DecodeSpec extends AttentionShape {
  readonly hidden: number;
  readonly intermediate: number;
  readonly vocab: number;
  readonly eps: number;
  readonly embedding: LinearHandle;
  readonly head: LinearHandle;
  readonly finalNorm: Tensor;
  /** Covers every position of the caches. */
  readonly rope: RopeHandle;
  readonly blocks: readonly DecodeBlockSpec[];
}

/** How a sequence's tokens are chosen: as SamplingOptions of the sampler, filters in the same order. */
export interface TokenChoice {
  /** 0: the most likely token. */
  readonly temperature: number;
  /** 0: all. */
  readonly topK: number;
  /** 1: all. */
  readonly topP: number;
  readonly seed: number;
}

/** Where a sequence of a {@link DecodeProgram} goes on. */
export interface DecodePlace {
  /** The next input token. */
  readonly token: number;
  /** Tokens its caches hold. */
  readonly position: number;
  /**
   * Tokens its caches may come to, less than their capacity. A sequence that is there stands still: steps give tokens that mean
   * nothing, and its caches' next entry is overwritten.
   */
  readonly end: number;
  readonly choice: TokenChoice;
}

/** A decoder's step prepared as a whole: tokens are chosen on the backend, which never waits for the host. */
export interface DecodeProgram {
  /** Each sequence's next input token, the tokens its caches hold, and how to choose what follows. */
  begin(tokens: Uint32Array, positions: Uint32Array, choices: readonly TokenChoice[]): void;
  /** Sets one sequence from the next step submitted on, or empties its place; the others go on as they were. */
  place(sequence: number, place: DecodePlace | undefined): void;
  /**
   * Submits `count` steps: input tokens are appended to the caches, the next chosen, which become the input of the next step.
   * Resolves to the chosen tokens [count, batch]; more steps may be submitted before it does. A sequence's tokens depend on its
   * own input, position and choice alone, not on its place or on what is decoded beside it.
   */
  steps(count: number): Promise<Uint32Array>;
  release(): void;
}

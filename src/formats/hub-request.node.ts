// Talking to the Hugging Face hub: its address, cache folder and access token by environment, and its errors in words
// (Node.js).
import { HubApiError } from '@huggingface/hub';
import { readFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import path from 'node:path';
import { GyreError } from '../core/errors.js';
import { silent, type ProgressListener } from '../core/progress.js';

/** Default address of the hub. */
export const HUB_URL = 'https://huggingface.co';

/** Where the hub is and how it is asked. */
export interface HubOptions {
  /** Address of the hub. Default: HF_ENDPOINT, else {@link HUB_URL}. */
  hubUrl?: string;
  /** Cache folder. Default: HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub, ~/.cache/huggingface/hub. */
  cacheDir?: string;
  /** Access token. Default: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, else the file `token` in HF_HOME (~/.cache/huggingface). */
  token?: string;
  /** Use what is in the cache, without any request. Default: whether HF_HUB_OFFLINE is set to 1. */
  offline?: boolean;
  /** Stage `download`, in bytes. */
  onProgress?: ProgressListener;
  /** Milliseconds before a broken transfer is taken up again, doubled each time. Default: 500. */
  retryDelay?: number;
}

/** Cache folder of the hub by environment. */
export function hubCacheDir(env: NodeJS.ProcessEnv = process.env): string {
  return env.HF_HUB_CACHE ?? env.HUGGINGFACE_HUB_CACHE ?? path.join(hubHome(env), 'hub');
}

function hubHome(env: NodeJS.ProcessEnv): string {
  return env.HF_HOME ?? path.join(env.XDG_CACHE_HOME ?? path.join(homedir(), '.cache'), 'huggingface');
}

/** The user's access token, if any. */
async function hubToken(env: NodeJS.ProcessEnv = process.env): Promise<string | undefined> {
  const given = env.HF_TOKEN ?? env.HUGGING_FACE_HUB_TOKEN;
  if (given !== undefined) return given.trim() || undefined;
  const file = env.HF_TOKEN_PATH ?? path.join(hubHome(env), 'token');
  return (await readFile(file, 'utf8').catch(() => '')).trim() || undefined;
}

/** `name` or `owner/name` as the hub allows them. */
export const HUB_ID = /^(?:[A-Za-z0-9][\w.-]{0,95}\/)?[A-Za-z0-9][\w.-]{0,95}$/;
export const REVISION = /^[\w.-]+(?:\/[\w.-]+)*$/;
export const COMMIT = /^[0-9a-f]{40}$/;

/** A repository on a hub, as the functions of these modules pass it around. */
export interface Hub {
  readonly kind: 'model' | 'dataset';
  /** `owner/name`. */
  readonly name: string;
  readonly revision: string;
  /** Where it was looked for on this machine first, for messages. */
  readonly folder: string;
  readonly hubUrl: string;
  readonly storage: string;
  readonly token: string | undefined;
  readonly onProgress: ProgressListener;
  readonly retryDelay: number;
}

/** A repository with what the options and the environment say. */
export async function hubOf(
  where: Pick<Hub, 'kind' | 'name' | 'revision' | 'folder'>,
  options: HubOptions,
): Promise<Hub> {
  return {
    ...where,
    hubUrl: (options.hubUrl ?? process.env.HF_ENDPOINT ?? HUB_URL).replace(/\/+$/, ''),
    storage: hubStorage(where.kind, where.name, options),
    token: options.token ?? (await hubToken()),
    onProgress: options.onProgress ?? silent,
    retryDelay: options.retryDelay ?? 500,
  };
}

/** The folder of a repository in the cache. */
export function hubStorage(kind: Hub['kind'], name: string, options: HubOptions): string {
  return path.join(options.cacheDir ?? hubCacheDir(), `${kind}s--${name.replace('/', '--')}`);
}

/** Whether the hub must not be asked. */
export function isOffline(options: HubOptions): boolean {
  return options.offline ?? process.env.HF_HUB_OFFLINE === '1';
}

/** What every request of the hub's client takes. */
export function clientOptions({ hubUrl, token }: Hub): { hubUrl: string; accessToken?: string } {
  return token === undefined ? { hubUrl } : { hubUrl, accessToken: token };
}

/** The page of a repository, for people. */
function pageOf({ hubUrl, kind, name }: Hub): string {
  return `${hubUrl}/${kind === 'dataset' ? 'datasets/' : ''}${name}`;
}

/** Whether the hub itself said no, as opposed to not being reached. */
export function isRefusal(cause: unknown): boolean {
  return cause instanceof HubApiError && cause.statusCode < 500 && ![408, 429].includes(cause.statusCode);
}

/** Explains an error of the hub or the network. */
export function asHubError(error: unknown, hub: Hub): unknown {
  if (error instanceof GyreError) return error;
  const what = `${hub.name} (${hub.revision}) on ${hub.hubUrl}`;
  const withToken = hub.token === undefined ? 'no token was sent' : 'a token was sent';
  if (error instanceof HubApiError) {
    // The client appends the URL, whose query holds telling words of its own.
    const said = error.message.split(' URL: ')[0];
    if (error.statusCode === 404 || (error.statusCode === 401 && !/gated|restricted/i.test(said))) {
      return new GyreError(
        'not-found',
        `looked for a folder ${hub.folder} and for ${what}: neither exists${error.statusCode === 401 ? `, or the repository is private (${withToken})` : ''}`,
        {
          remedy: 'Check the spelling and the revision; for a private model set HF_TOKEN to a token that may read it.',
          cause: error,
        },
      );
    }
    if (error.statusCode === 401 || error.statusCode === 403) {
      return new GyreError('network', `${what} is gated or closed to you (${withToken}): ${said}`, {
        remedy: `Ask for access at ${pageOf(hub)}, then set HF_TOKEN to your token.`,
        cause: error,
      });
    }
    return new GyreError('network', `the hub answered ${error.statusCode} for ${what}`, {
      remedy: error.statusCode === 429 ? 'Too many requests: wait a little.' : 'Try again later.',
      cause: error,
    });
  }
  if (error instanceof TypeError && error.message.includes("must start with 'hf_'")) {
    return new GyreError('usage', 'the access token does not start with hf_', {
      remedy: 'Check HF_TOKEN and the token file; unset them for public models.',
      cause: error,
    });
  }
  if (error instanceof TypeError || error instanceof SyntaxError) {
    return new GyreError('network', `can't reach ${what} (and there is no folder ${hub.folder}): ${causeOf(error)}`, {
      remedy: 'Check the connection and HF_ENDPOINT, or name a folder.',
      cause: error,
    });
  }
  return error;
}

function causeOf(error: Error): string {
  return error.cause instanceof Error ? error.cause.message || error.message : error.message;
}

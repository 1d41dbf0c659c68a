// Where the main thread's time goes, by function: V8's own profiler, in this process.
import { Session, type Profiler, type Runtime } from 'node:inspector';
import path from 'node:path';

/** A function and its own time. */
export interface FunctionTime {
  /** Name and file; what is native has no file. */
  readonly where: string;
  readonly milliseconds: number;
}

/** Own time of functions while `work` runs, the longest first; waiting is left out. */
export async function profileHost(work: () => Promise<unknown>): Promise<FunctionTime[]> {
  const session = new Session();
  session.connect();
  const post = (method: string, params?: object): Promise<unknown> =>
    new Promise((resolve, reject) => {
      session.post(method, params, (error, result) => {
        if (error) reject(error);
        else resolve(result);
      });
    });
  try {
    await post('Profiler.enable');
    await post('Profiler.setSamplingInterval', { interval: 100 });
    await post('Profiler.start');
    await work();
    const { profile } = (await post('Profiler.stop')) as Profiler.StopReturnType;
    const nodes = new Map(profile.nodes.map((node) => [node.id, node]));
    const callers = new Map(
      profile.nodes.flatMap((node) => (node.children ?? []).map((child) => [child, node] as const)),
    );
    const times = new Map<string, number>();
    for (const [i, id] of (profile.samples ?? []).entries()) {
      const frame = nodes.get(id)?.callFrame;
      if (!frame || frame.functionName === '(idle)') continue;
      // What is native has no file, and mostly no name: it goes by its caller's.
      const caller = frame.url === '' && callers.get(id)?.callFrame;
      const where = `${nameOf(frame)}${caller ? ` of ${nameOf(caller)}` : ''}`;
      times.set(where, (times.get(where) ?? 0) + (profile.timeDeltas?.[i] ?? 0) / 1000);
    }
    return [...times]
      .map(([where, milliseconds]) => ({ where, milliseconds }))
      .sort((a, b) => b.milliseconds - a.milliseconds);
  } finally {
    session.disconnect();
  }
}

function nameOf({ functionName, url, lineNumber }: Runtime.CallFrame): string {
  return `${functionName || '(anonymous)'}${url && ` ${path.basename(url)}:${lineNumber + 1}`}`;
}

// What the command line shows: progress and time left, tables, numbers, errors, and the checking of options.
import { CommanderError } from 'commander';
import { describe, expect, it } from 'vitest';
import { z } from 'zod';
import { layerFilter } from '../../src/cli/commands/inspect.js';
import { decimalNumber, flagName, oneOf, parseOptions, wholeNumber } from '../../src/cli/options.js';
import { colorsFor, createColors, plain } from '../../src/cli/ui/colors.js';
import { describeError, errorJson, formatError, stacks } from '../../src/cli/ui/errors.js';
import { createProgress, EtaEstimator, formatBar, plainLine, progressLine } from '../../src/cli/ui/progress.js';
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatFields,
  formatMeasure,
  formatTable,
} from '../../src/cli/ui/table.js';
import { GyreError } from '../../src/core/errors.js';

const event = (done: number, stage = 'quantize', message?: string) => ({
  stage,
  done,
  total: 28,
  unit: 'blocks',
  message,
});

describe('numbers', () => {
  it.each([
    [0.004, '0.00 s'],
    [0.42, '0.42 s'],
    [0.999, '1.0 s'],
    [9.94, '9.9 s'],
    [9.96, '10 s'],
    [59.4, '59 s'],
    [59.6, '1 min 00 s'],
    [185, '3 min 05 s'],
    [3599.7, '1 h 00 min'],
    [7620, '2 h 07 min'],
  ])('%d seconds are %s', (seconds, text) => {
    expect(formatDuration(seconds)).toBe(text);
  });

  it('counts bytes and parameters in units', () => {
    expect(formatBytes(999)).toBe('999 bytes');
    expect(formatBytes(28_326_656)).toBe('28.3 MB');
    expect(formatBytes(999_960)).toBe('1.0 MB');
    expect(formatCount(14_163_328)).toBe('14.2 M');
    expect(formatCount(384)).toBe('384');
  });

  it('gives errors where there are any', () => {
    expect(formatMeasure(26.3321, 0.04, 2)).toBe('26.33 ± 0.04');
    expect(formatMeasure(26.3321, null, 1)).toBe('26.3');
  });
});

describe('formatTable', () => {
  it('aligns columns and does not count colours', () => {
    const { bold } = createColors(true);
    const text = formatTable(
      [{ title: 'method' }, { title: 'KL', align: 'right' }],
      [
        [bold('rtn'), '0.03448'],
        ['paroquant', '0.017'],
      ],
    );
    expect(plain(text).split('\n')).toEqual([
      'method          KL',
      '─────────  ───────',
      'rtn        0.03448',
      'paroquant    0.017',
    ]);
  });

  it('puts names and values in columns', () => {
    expect(
      formatFields([
        ['a', '1'],
        ['longer', '2'],
      ]),
    ).toBe('a       1\nlonger  2');
  });
});

describe('time left', () => {
  it('comes from the rate so far, and only when something is known', () => {
    const eta = new EtaEstimator();
    expect(eta.update(event(0), 0)).toBeUndefined();
    expect(eta.update(event(1), 0.5)).toBeUndefined();
    expect(eta.update(event(4), 8)).toBeCloseTo(48);
    expect(eta.update(event(28), 56)).toBe(0);
  });

  it('runs down between steps, and is unknown when a step takes too long', () => {
    const eta = new EtaEstimator();
    eta.update(event(0), 0);
    expect(eta.update(event(27), 27)).toBeCloseTo(1);
    expect(eta.update(event(27), 27.75)).toBeCloseTo(0.25);
    expect(eta.update(event(27), 29)).toBeUndefined();
    expect(eta.update(event(28), 30)).toBe(0);
  });

  it('does not count what an earlier run did, and starts again with each stage', () => {
    const eta = new EtaEstimator();
    eta.update(event(20), 100);
    expect(eta.update(event(22), 110)).toBeCloseTo(30);
    expect(eta.update(event(22, 'evaluate'), 111)).toBeUndefined();
  });
});

describe('progress', () => {
  it('draws bars to an eighth of a character', () => {
    expect(formatBar(0, 4)).toBe('    ');
    expect(formatBar(0.5, 4)).toBe('██  ');
    expect(formatBar(0.53, 4)).toBe('██▏ ');
    expect(formatBar(1.5, 4)).toBe('████');
  });

  it('cuts its line to the terminal', () => {
    const line = progressLine(
      event(7, 'quantize', 'block 7/28 mlp.down_proj: loss 0.0123'),
      65,
      70,
      createColors(false),
    );
    expect(line.length).toBeLessThanOrEqual(70);
    expect(line).toContain('7/28 blocks  1 min 05 s left');
    expect(line.endsWith('…')).toBe(true);
  });

  it('says the same in a log', () => {
    expect(plainLine(event(7, 'quantize', 'x'), 65)).toBe('quantize: 7/28 blocks, 1 min 05 s left; x');
    expect(plainLine({ stage: 'download', done: 1e6, total: 5e6, unit: 'bytes' }, undefined)).toBe('download: 1/5 MB');
  });

  const screen = (isTTY: boolean) => {
    let time = 0;
    const written: string[] = [];
    const stream = { isTTY, columns: 80, write: (text: string) => written.push(text) };
    const view = createProgress({ stream, now: () => time });
    return { written, view, at: (ms: number) => (time = ms) };
  };

  it('updates one line on a terminal and leaves nothing behind', () => {
    const { written, view, at } = screen(true);
    view.listener(event(1));
    at(10);
    view.listener(event(2)); // too soon
    at(100);
    view.listener(event(3));
    view.note('a note');
    view.clear();
    expect(written.length).toBe(4);
    expect(written.every((text) => !text.slice(0, -1).includes('\n'))).toBe(true);
    expect(written.slice(2)).toEqual(['\r\x1b[K', 'a note\n']);
  });

  it('writes a line now and then elsewhere, none for what is quick', () => {
    const { written, view, at } = screen(false);
    for (let i = 0; i <= 28; i++) {
      at(i * 10);
      view.listener(event(i, 'load'));
    }
    expect(written).toEqual([]);
    for (let i = 0; i <= 28; i++) {
      at(1000 + i * 1000);
      view.listener(event(i));
    }
    expect(written.length).toBe(6);
    expect(written.at(-1)).toBe('quantize: 28/28 blocks\n');
    expect(written.join('')).not.toContain('\x1b');
  });

  it('is silent when told to be', () => {
    const written: string[] = [];
    const view = createProgress({ stream: { isTTY: true, write: (text: string) => written.push(text) }, quiet: true });
    view.listener(event(1));
    view.note('x');
    view.clear();
    expect(written).toEqual([]);
  });
});

describe('colours', () => {
  it('are for terminals whose owner wants them', () => {
    expect(colorsFor({ isTTY: true }, {}).red('x')).toBe('\x1b[31mx\x1b[39m');
    expect(colorsFor({ isTTY: true }, { NO_COLOR: '1' }).red('x')).toBe('x');
    expect(colorsFor({}, {}).red('x')).toBe('x');
  });
});

describe('errors', () => {
  it('are three lines: what, detail, remedy', () => {
    const shown = describeError(new GyreError('disk-full', 'no space left for block 3', { remedy: 'free 2 GB' }));
    expect(formatError(shown, createColors(false))).toBe(
      'error: The disk is full\n  no space left for block 3\n  → Free 2 GB',
    );
    expect(shown.exitCode).toBe(1);
    expect(errorJson(shown)).toBe(
      '{"error":{"code":"disk-full","message":"no space left for block 3","remedy":"free 2 GB"}}',
    );
  });

  it('have exit codes of their own for usage and Ctrl-C', () => {
    expect(describeError(new GyreError('usage', 'x'), 'gyre eval')).toMatchObject({
      exitCode: 2,
      remedy: 'see `gyre eval --help`',
    });
    expect(describeError(new GyreError('interrupted', 'x')).exitCode).toBe(130);
  });

  it('pass on what commander suggests', () => {
    const error = new CommanderError(
      1,
      'commander.unknownOption',
      "error: unknown option '--bit'\n(Did you mean --bits?)",
    );
    expect(describeError(error, 'gyre quantize')).toMatchObject({
      exitCode: 2,
      message: "unknown option '--bit'",
      remedy: 'did you mean --bits? Or see `gyre quantize --help`',
    });
  });

  it('explain what the system says', () => {
    const full = Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' });
    expect(describeError(full)).toMatchObject({ code: 'disk-full', exitCode: 1 });
    expect(describeError('odd')).toMatchObject({ code: 'internal', message: 'odd', exitCode: 1 });
  });

  it('keep their stacks and causes for debugging', () => {
    const text = stacks(new GyreError('network', 'outer', { cause: new Error('inner') }));
    expect(text).toMatch(/outer[\s\S]*caused by Error: inner/);
  });
});

describe('options', () => {
  const schema = z.object({
    bits: oneOf([2, 3, 4, 8]),
    groupSize: oneOf([32, 64, 128, -1]),
    steps: wholeNumber(0, 1000),
    topP: decimalNumber({ above: 0, max: 1 }),
  });
  const good = { bits: '4', groupSize: '-1', steps: '100', topP: '0.95' };

  it('become numbers', () => {
    expect(parseOptions(schema, good)).toEqual({ bits: 4, groupSize: -1, steps: 100, topP: 0.95 });
  });

  it.each([
    [{ bits: '5' }, "--bits: expected one of 2, 3, 4, 8, found '5'"],
    [{ groupSize: '17' }, '--group-size: expected one of 32, 64, 128, -1'],
    [{ steps: '1.5' }, '--steps: expected a whole number from 0 to 1000'],
    [{ steps: '' }, '--steps:'],
    [{ steps: '0x10' }, '--steps:'],
    [{ topP: '0' }, '--top-p: expected a number above 0 and at most 1'],
    [{ topP: 'NaN' }, '--top-p:'],
    [{ topP: ' ' }, '--top-p:'],
  ])('refuse %o and name the flag', (wrong, message) => {
    expect(() => parseOptions(schema, { ...good, ...wrong })).toThrow(message);
  });

  it('are named as typed', () => {
    expect(flagName('calibSamples')).toBe('--calib-samples');
  });

  it('choose layers by number, range or name', () => {
    const module = (layer: number, name = 'mlp.down_proj'): string => `model.layers.${layer}.${name}`;
    const chosen = (filter: string): number[] =>
      [0, 1, 2, 3, 11].filter((layer) => layerFilter(filter, 12)(module(layer)));
    expect(chosen('1')).toEqual([1]);
    expect(chosen('0,2-3')).toEqual([0, 2, 3]);
    expect(layerFilter('down', 12)(module(3))).toBe(true);
    expect(layerFilter('q_proj', 12)(module(3))).toBe(false);
    expect(() => layerFilter('3-12', 12)).toThrow(/no blocks '3-12'/);
    expect(() => layerFilter('3-1', 12)).toThrow(GyreError);
  });
});

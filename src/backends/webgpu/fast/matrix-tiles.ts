// What tiled products on matrix units have in common, whatever their numbers: a workgroup makes a tile of the output from tiles of
// both factors in workgroup memory, loads of the next step are on their way while this one is multiplied, and sums leave
// through the memory of the first tile, since a fragment can't be written to rows that end within it.

/** How a workgroup's tile is cut. */
export interface MatrixTile {
  /** Rows of the output per workgroup, a multiple of 16·warpsM. */
  readonly tileM: number;
  /** Columns of the output per workgroup, a multiple of 32·warpsN. */
  readonly tileN: number;
  /** Channels per step. */
  readonly tileK: number;
  /** Subgroups along the rows. */
  readonly warpsM: number;
  /** Subgroups along the columns. */
  readonly warpsN: number;
}

/** Units of 16 bytes per subgroup that sums leave through: strips of 16 × 32, 8 a row and one against conflicts. */
export const STRIP = 16 * 9;

/** Workgroups: tiles of columns, tiles of rows. */
export const tileGroups = (v: Pick<MatrixTile, 'tileM' | 'tileN'>, m: number, n: number): readonly [number, number] => [
  Math.ceil(n / v.tileN),
  Math.ceil(m / v.tileM),
];

/** Lines of WGSL for each of so many. */
export const each = (n: number, f: (i: number) => string): string =>
  Array.from({ length: n }, (_, i) => f(i)).join('\n');

/** The entry point's head: which subgroup this is, and which of the tile's loads this thread makes (`line`, `column`). */
export const tileEntry = ({ warpsM, warpsN }: MatrixTile, perRow: number): string => /* wgsl */ `
@compute @workgroup_size(${warpsM * warpsN * 32})
fn main(
  @builtin(workgroup_id) wg: vec3<u32>,
  @builtin(local_invocation_index) local: u32,
  @builtin(subgroup_id) warp: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let warpM = warp / ${warpsN}u;
  let warpN = warp % ${warpsN}u;
  let line = local / ${perRow}u;
  let column = local % ${perRow}u;`;

/** All steps: `load` brings channels from `k` into registers, `put` stores them in the tiles, `multiply` adds to the sums. */
export const tileLoop = (tileK: number, { load, put, multiply }: Record<'load' | 'put' | 'multiply', string>): string =>
  `
  { let k = 0u;
${load} }
  for (var next = ${tileK}u; next <= params.k; next += ${tileK}u) {
${put}
    workgroupBarrier();
    if (next < params.k) { let k = next;
${load} }
${multiply}
    workgroupBarrier();
  }`.slice(1);

/** Writes the sums c{i}_{j}: `store` has row `m`, columns `n` (in fours, of `columns`) and the sums' place `begin + r * 9u + at` in tileX. */
export const tileStore = ({ tileM, tileN, warpsM, warpsN }: MatrixTile, store: string): string => {
  const [subM, subN] = [tileM / warpsM / 16, tileN / warpsN / 16];
  return `  let columns = params.n / 4u;
  let begin = warp * ${STRIP}u;
  let at = lane % 8u;
${each(subM, (i) =>
  each(
    subN / 2,
    (j) => `  {
    subgroupMatrixStore<row_major>(&tileX, begin, c${i}_${2 * j}, 9u);
    subgroupMatrixStore<row_major>(&tileX, begin + 4u, c${i}_${2 * j + 1}, 9u);
    workgroupBarrier();
    let n = (wg.x * ${tileN}u + warpN * ${tileN / warpsN}u + ${j * 32}u) / 4u + at;
    for (var r = lane / 8u; r < 16u; r += 4u) {
      let m = wg.y * ${tileM}u + warpM * ${tileM / warpsM}u + ${i * 16}u + r;
      if (m < params.m && n < columns) {
${store}
      }
    }
    workgroupBarrier();
  }`,
  ),
)}`;
};

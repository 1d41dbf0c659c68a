// Sums over a workgroup, as WGSL that other kernels embed.

/** See {@link sumOverWorkgroup}. */
export interface WorkgroupSum {
  /** Module scope. */
  readonly declarations: string;
  /** Entry-point arguments, to be appended to others. */
  readonly builtins: string;
  /** Statements, in uniform control flow, after which `total(i)` is the sum of value i on every thread. */
  readonly statements: string;
}

/**
 * Sums `values` (names of f32 variables) over `threads` threads. With subgroups: one subgroupAdd per value, one barrier.
 * Without: a tree in workgroup memory (values × threads × 4 bytes).
 * Expects `local_invocation_index` in a variable `lid`.
 */
export function sumOverWorkgroup(values: readonly string[], threads: number, subgroups: boolean): WorkgroupSum {
  if (subgroups) {
    // At least four lanes per subgroup.
    const slots = Math.max(1, threads / 4);
    return {
      declarations: /* wgsl */ `
var<workgroup> partials: array<f32, ${values.length * slots}>;
var<private> partialCount: u32;
fn total(i: u32) -> f32 {
  var sum = 0.0;
  for (var j = 0u; j < partialCount; j++) { sum += partials[i * ${slots}u + j]; }
  return sum;
}`,
      builtins: '@builtin(subgroup_invocation_id) subgroupLane: u32, @builtin(subgroup_size) subgroupSize: u32',
      statements: `
  partialCount = max(1u, ${threads}u / subgroupSize);
${values.map((v, i) => `  let sum${i} = subgroupAdd(${v});`).join('\n')}
  if (subgroupLane == 0u) {
    let slot = lid / subgroupSize;
${values.map((_, i) => `    partials[${i * slots}u + slot] = sum${i};`).join('\n')}
  }
  workgroupBarrier();`,
    };
  }
  return {
    declarations: /* wgsl */ `
var<workgroup> partials: array<f32, ${values.length * threads}>;
fn total(i: u32) -> f32 { return partials[i * ${threads}u]; }`,
    builtins: '',
    statements: `
${values.map((v, i) => `  partials[${i * threads}u + lid] = ${v};`).join('\n')}
  workgroupBarrier();
  for (var reach = ${threads / 2}u; reach > 0u; reach >>= 1u) {
    if (lid < reach) {
      for (var i = 0u; i < ${values.length}u; i++) {
        partials[i * ${threads}u + lid] += partials[i * ${threads}u + lid + reach];
      }
    }
    workgroupBarrier();
  }`,
  };
}

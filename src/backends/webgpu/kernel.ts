// What a kernel is: its buffers, parameters and WGSL. Declarations are generated, so that names are written once and
// the compiler checks every dispatch against them.

/** WGSL scalar types of parameters. */
export type ParamType = 'u32' | 'i32' | 'f32';

/** A storage buffer of a kernel: how it is used, and its WGSL type. */
export interface BufferSpec {
  readonly access: 'read' | 'read_write';
  readonly type: string;
}

/** Optional WebGPU features a kernel's code uses. */
export type KernelFeature = 'f16' | 'subgroups' | 'subgroup-matrix';

/** See {@link defineKernel}. */
export interface Kernel<B extends string = string, P extends string = string> {
  /** For errors, profiles and labels, e.g. `rmsNorm`. Variants add theirs: `gemv.f16.g128`. */
  readonly name: string;
  readonly buffers: Readonly<Record<B, BufferSpec>>;
  readonly params: Readonly<Record<P, ParamType>>;
  /** Whole WGSL module; the entry point is `main`. */
  readonly code: string;
}

/** What {@link defineKernel} takes. */
export interface KernelDefinition<B extends string, P extends string> {
  readonly name: string;
  readonly features?: readonly KernelFeature[];
  /** In binding order. `x: read('f32')` becomes `var<storage, read> x: array<f32>`. */
  readonly buffers: Readonly<Record<B, BufferSpec>>;
  /** Uniforms, read in WGSL as `params.name`. */
  readonly params?: Readonly<Record<P, ParamType>>;
  /** Module-scope WGSL: constants, functions and the entry point `main` with its attributes. */
  readonly body: string;
}

/** A buffer the kernel only reads: array<type>. */
export const read = (type: string): BufferSpec => ({ access: 'read', type: `array<${type}>` });
/** A buffer the kernel writes (and may read): array<type>. */
export const write = (type: string): BufferSpec => ({ access: 'read_write', type: `array<${type}>` });

const ENABLE: Readonly<Record<KernelFeature, string>> = {
  f16: 'enable f16;',
  subgroups: 'enable subgroups;',
  'subgroup-matrix':
    'enable chromium_experimental_subgroup_matrix;\ndiagnostic(off, chromium.subgroup_matrix_uniformity);',
};

/** Makes a kernel: params are binding 0 (when there are any), then the buffers in order. */
export function defineKernel<const B extends string, const P extends string = never>(
  definition: KernelDefinition<B, P>,
): Kernel<B, P> {
  const params = definition.params ?? ({} as Record<P, ParamType>);
  const declared = Object.keys(params).length > 0;
  const { name, buffers } = definition;
  const code = moduleCode(
    definition,
    declared ? [`@group(0) @binding(0) var<uniform> params: Params;`] : [],
    declared ? 1 : 0,
  );
  const kernel = { name, buffers, params, code };
  definitions.set(kernel, definition);
  return kernel;
}

const definitions = new WeakMap<Kernel, KernelDefinition<string, string>>();

/**
 * `kernel` with its parameters as constants in the code, for dispatches that run again and again with the same ones: a uniform that
 * is read once per step comes from memory, and no address is known before. Each set of values is a pipeline of its own, and loops
 * whose bounds become constants may be unrolled.
 */
export function withConstants<B extends string, P extends string>(
  kernel: Kernel<B, P>,
  values: Readonly<Record<NoInfer<P>, number>>,
): Kernel<B> {
  const definition = definitions.get(kernel);
  const types = Object.entries<ParamType>(kernel.params);
  if (!definition || types.length === 0) return kernel;
  const literals = types.map(([name, type]) => {
    const value = values[name as P];
    return type === 'f32' ? `f32(${value})` : `${value}${type === 'u32' ? 'u' : 'i'}`;
  });
  const made: Kernel<B> = {
    name: kernel.name,
    buffers: kernel.buffers,
    params: {},
    code: moduleCode(definition, [`const params = Params(${literals.join(', ')});`], 0),
  };
  return made;
}

/** The module: features, parameters with what declares `params`, buffers from binding `first` on, the body. */
function moduleCode(
  { features = [], buffers, params = {}, body }: KernelDefinition<string, string>,
  declaration: readonly string[],
  first: number,
): string {
  const fields = Object.entries<ParamType>(params).map(([name, type]) => `  ${name}: ${type},`);
  const lines = features.map((f) => ENABLE[f]);
  if (fields.length > 0) lines.push(`struct Params {\n${fields.join('\n')}\n}`, ...declaration);
  let binding = first;
  for (const [name, spec] of Object.entries<BufferSpec>(buffers))
    lines.push(`@group(0) @binding(${binding++}) var<storage, ${spec.access}> ${name}: ${spec.type};`);
  return `${lines.join('\n')}\n${body}`;
}

/** What a kernel is chosen by: values, and plain objects of them. */
type Choice = string | number | boolean | undefined | { readonly [name: string]: Choice };

/** Tells choices apart; JSON would take as long as recording the dispatch. */
function choiceKey(choice: Choice): string {
  if (typeof choice !== 'object') return typeof choice === 'string' ? `'${choice}'` : String(choice);
  let key = '{';
  for (const name in choice) key += `${name}:${choiceKey(choice[name])},`;
  return `${key}}`;
}

/** Remembers the kernels that `make` returns, by the values of its arguments. */
export function variants<A extends readonly unknown[], K extends Kernel>(make: (...args: A) => K): (...args: A) => K {
  const made = new Map<string, K>();
  return (...args) => {
    let key = '';
    for (const arg of args) key += `${choiceKey(arg as Choice)};`;
    let kernel = made.get(key);
    if (!kernel) {
      kernel = make(...args);
      made.set(key, kernel);
    }
    return kernel;
  };
}

/** A uniform of a kernel. */
export type Param = readonly [name: string, type: ParamType];

/** A kernel's parameters in the order of its uniform block. */
export const paramsOf = (kernel: Kernel): Param[] => Object.entries(kernel.params);

/** Bytes of a uniform block of so many parameters (a multiple of 16), 0 without any. */
export const paramBytes = (params: readonly Param[]): number => Math.ceil((params.length * 4) / 16) * 16;

/** Writes parameters in their order at `offset` of `view`. */
export function packParams(
  params: readonly Param[],
  values: Readonly<Record<string, number>>,
  view: DataView,
  offset = 0,
): void {
  for (const [name, type] of params) {
    const value = values[name];
    if (type === 'f32') view.setFloat32(offset, value, true);
    else if (type === 'i32') view.setInt32(offset, value, true);
    else view.setUint32(offset, value, true);
    offset += 4;
  }
}

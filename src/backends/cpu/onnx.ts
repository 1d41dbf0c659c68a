// Builds ONNX models of one or a few nodes in memory, so that ONNX Runtime serves as a library of kernels.
// Field numbers are those of onnx.proto3 (ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, ValueInfoProto).
import { PbfWriter } from 'pbf';

/** Element types by their number in TensorProto.DataType. */
export const ONNX_TYPE = { f32: 1, u8: 2, i32: 6, i64: 7, f64: 11 } as const;
export type OnnxType = keyof typeof ONNX_TYPE;

/** A graph input or output; a string names a dimension that varies from call to call. */
export interface OnnxValue {
  readonly name: string;
  readonly type: OnnxType;
  readonly dims: readonly (number | string)[];
}

/** One operator. Attributes: integers as numbers, floats as `{ float }`. */
export interface OnnxNode {
  readonly op: string;
  readonly domain?: 'com.microsoft';
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes?: Readonly<Record<string, number | { readonly float: number }>>;
}

/** A constant tensor of the graph. */
export interface OnnxInitializer {
  readonly name: string;
  readonly type: OnnxType;
  readonly dims: readonly number[];
  readonly bytes: Uint8Array;
}

const OPSET = 21;
const IR_VERSION = 10;
const ATTRIBUTE_FLOAT = 1;
const ATTRIBUTE_INT = 2;

function writeNode(node: OnnxNode, w: PbfWriter): void {
  for (const input of node.inputs) w.writeStringField(1, input);
  for (const output of node.outputs) w.writeStringField(2, output);
  w.writeStringField(4, node.op);
  for (const attribute of Object.entries(node.attributes ?? {})) w.writeMessage(5, writeAttribute, attribute);
  if (node.domain) w.writeStringField(7, node.domain);
}

function writeAttribute([name, value]: [string, number | { readonly float: number }], w: PbfWriter): void {
  w.writeStringField(1, name);
  if (typeof value === 'number') {
    w.writeVarintField(3, value);
    w.writeVarintField(20, ATTRIBUTE_INT);
  } else {
    w.writeFloatField(2, value.float);
    w.writeVarintField(20, ATTRIBUTE_FLOAT);
  }
}

function writeInitializer(tensor: OnnxInitializer, w: PbfWriter): void {
  for (const dim of tensor.dims) w.writeVarintField(1, dim);
  w.writeVarintField(2, ONNX_TYPE[tensor.type]);
  w.writeStringField(8, tensor.name);
  w.writeBytesField(9, tensor.bytes);
}

function writeDimension(dim: number | string, w: PbfWriter): void {
  if (typeof dim === 'string') w.writeStringField(2, dim);
  else w.writeVarintField(1, dim);
}

function writeShape(dims: readonly (number | string)[], w: PbfWriter): void {
  for (const dim of dims) w.writeMessage(1, writeDimension, dim);
}

function writeTensorType(value: OnnxValue, w: PbfWriter): void {
  w.writeVarintField(1, ONNX_TYPE[value.type]);
  w.writeMessage(2, writeShape, value.dims);
}

function writeType(value: OnnxValue, w: PbfWriter): void {
  w.writeMessage(1, writeTensorType, value);
}

function writeValue(value: OnnxValue, w: PbfWriter): void {
  w.writeStringField(1, value.name);
  w.writeMessage(2, writeType, value);
}

interface Graph {
  readonly nodes: readonly OnnxNode[];
  readonly inputs: readonly OnnxValue[];
  readonly outputs: readonly OnnxValue[];
  readonly initializers?: readonly OnnxInitializer[];
}

function writeGraph(graph: Graph, w: PbfWriter): void {
  for (const node of graph.nodes) w.writeMessage(1, writeNode, node);
  w.writeStringField(2, 'gyre');
  for (const tensor of graph.initializers ?? []) w.writeMessage(5, writeInitializer, tensor);
  for (const value of graph.inputs) w.writeMessage(11, writeValue, value);
  for (const value of graph.outputs) w.writeMessage(12, writeValue, value);
}

function writeOpset([domain, version]: readonly [string, number], w: PbfWriter): void {
  w.writeStringField(1, domain);
  w.writeVarintField(2, version);
}

/** Serialises a ModelProto. */
export function buildOnnxModel(graph: Graph): Uint8Array {
  const w = new PbfWriter();
  w.writeVarintField(1, IR_VERSION);
  w.writeMessage(7, writeGraph, graph);
  w.writeMessage(8, writeOpset, ['', OPSET] as const);
  w.writeMessage(8, writeOpset, ['com.microsoft', 1] as const);
  return w.finish();
}

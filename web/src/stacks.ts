import { FormatError } from "./errors.js";
import { sizeOf, type Tensor } from "./safetensors.js";

/** An input of the graph: a number for each axis that is fixed, else what it counts. */
export interface GraphInput {
  name: string;
  type: string;
  shape: readonly (number | string)[];
}

/** The tensors of one delta, by the names of the inputs. */
export type DeltaTensors = ReadonlyMap<string, Tensor>;

/** Tables that hold numbers of stack rows; `head.form` has two in its first columns. */
const NUMBERS = /\.(ranks|bias|units|rows)$/;
const HEAD_FORM = "head.form";
const HEAD_STACKS = ["head.dense", "head.out"];

/**
 * Makes the graph's inputs of any set of deltas.
 *
 * Stacks (`[L, height, width]`, of heads `[height, ...]`) get their rows behind one another, below a row of zeros;
 * tables (`[deltas, width]`, int64) a line for each delta, with their numbers counted from where its rows now stand.
 * What a delta does not change is not in its tensors: its lines are zero, and a table that nobody has gets no columns,
 * so that the graph computes nothing there.
 */
export class Stacks {
  private readonly heights = new Map<string, GraphInput>();

  constructor(private readonly inputs: readonly GraphInput[]) {
    for (const input of inputs) {
      const height = input.shape[stackAxis(input)];
      if (height !== undefined && !this.heights.has(placeOf(height))) this.heights.set(placeOf(height), input);
    }
  }

  /** Throws FormatError where tensors are not of this graph, or name rows that they do not have. */
  check(delta: DeltaTensors, name: string): void {
    for (const [own, { dtype, shape, data }] of delta) {
      const input = this.inputs.find((one) => one.name === own);
      const fits = input?.shape.every(
        (size, axis) => shape[axis] === size || (size === "deltas" ? shape[axis] === 1 : typeof size === "string"),
      );
      if (!input || dtype !== input.type || shape.length !== input.shape.length || !fits) {
        const expected = input ? `${input.type} [${input.shape}]` : "none";
        throw new FormatError(`delta ${name}: ${own} is ${dtype} [${shape}], the graph has ${expected}; export again`);
      }
      const axis = stackAxis(input);
      const rows = axis < 0 ? 0 : this.height(delta, placeOf(input.shape[axis]));
      if (axis >= 0 && shape[axis] !== rows) {
        throw new FormatError(`delta ${name}: ${own} has ${shape[axis]} rows, its neighbours ${rows}; export again`);
      }
      for (const [column, number] of dtype === "int64" ? data.entries() : []) {
        const place = stackOf(own, column);
        if (place !== null && (number < 0n || number > this.height(delta, place))) {
          throw new FormatError(`delta ${name}: ${own} names row ${number} of ${place}, which it lacks; export again`);
        }
      }
    }
  }

  /** All inputs but the text's, for deltas that were checked; each is number 0, 1, ... in `delta`. */
  join(deltas: readonly DeltaTensors[]): Map<string, Tensor> {
    return new Map(this.inputs.map((input) => [input.name, this.joined(input, deltas)]));
  }

  private joined(input: GraphInput, deltas: readonly DeltaTensors[]): Tensor {
    const own = deltas.map((delta) => delta.get(input.name));
    const growing = Math.max(stackAxis(input), 0);
    const stacked = input.type === "float32";
    const shape = input.shape.map((size, axis) => {
      const found = own.map((tensor) => tensor?.shape[axis] ?? 0);
      if (axis === growing) return stacked ? found.reduce((sum, rows) => sum + rows, 1) : deltas.length;
      return typeof size === "number" ? size : Math.max(stacked ? 1 : 0, ...found);
    });
    if (stacked) {
      const data = new Float32Array(sizeOf(shape));
      let at = 1;
      for (const tensor of own) {
        if (tensor?.dtype === "float32") copy(tensor, data, shape, growing, at);
        at += tensor?.shape[growing] ?? 0;
      }
      return { dtype: "float32", shape, data };
    }
    const data = new BigInt64Array(sizeOf(shape));
    for (const [line, tensor] of own.entries()) {
      for (const [column, number] of (tensor?.data ?? []).entries()) {
        const place = stackOf(input.name, column);
        const above = place && number ? deltas.slice(0, line).map((delta) => this.height(delta, place)) : [];
        data[line * shape[1]! + column] = BigInt(number) + BigInt(above.reduce((sum, height) => sum + height, 0));
      }
    }
    return { dtype: "int64", shape, data };
  }

  /** How many rows a delta has in the stacks of a place. */
  private height(delta: DeltaTensors, place: string): number {
    const input = this.heights.get(place);
    return input ? (delta.get(input.name)?.shape[stackAxis(input)] ?? 0) : 0;
  }
}

/** The stack whose rows a column of a table numbers; null where it holds something else. */
function stackOf(table: string, column: number): string | null {
  if (table === HEAD_FORM) return HEAD_STACKS[column] ?? null;
  return NUMBERS.test(table) ? table.replace(NUMBERS, "") : null;
}

/** The axis along which rows of deltas stand in a stack; -1 for tables. */
function stackAxis(input: GraphInput): number {
  return input.shape.findIndex((size) => String(size).endsWith(".height"));
}

function placeOf(height: number | string | undefined): string {
  return String(height).replace(/\.height$/, "");
}

/** Writes a tensor into one that is as large or larger on every axis, `at` further on along `axis`. */
function copy(
  from: { shape: number[]; data: Float32Array },
  to: Float32Array,
  shape: number[],
  axis: number,
  at: number,
): void {
  const width = from.shape.at(-1) ?? 1;
  for (let line = 0; line * width < from.data.length; line++) {
    let rest = line;
    let place = 0;
    let step = shape.at(-1) ?? 1;
    for (let dim = shape.length - 2; dim >= 0; dim--) {
      const own = from.shape[dim]!;
      place += ((rest % own) + (dim === axis ? at : 0)) * step;
      rest = Math.floor(rest / own);
      step *= shape[dim]!;
    }
    to.set(from.data.subarray(line * width, (line + 1) * width), place);
  }
}

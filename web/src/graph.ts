import * as ort from "onnxruntime-web/wasm";

import { FormatError } from "./errors.js";
import type { Tensor } from "./safetensors.js";
import { type GraphInput } from "./stacks.js";
import type { Encoding } from "./windows.js";

const TEXTS = ["input_ids", "attention_mask", "token_type_ids"];
const INDEX = "delta";

/** A sequence, the number of its delta among those of the batch, and where its answer stands. */
export interface Sequence {
  encoding: Encoding;
  delta: number;
  output: string;
  columns: number;
}

/** The encoder in WebAssembly. `inputs` are those that deltas fill. */
export class Graph {
  readonly inputs: readonly GraphInput[];
  private readonly texts: readonly string[];

  private constructor(private readonly session: ort.InferenceSession) {
    const found = session.inputMetadata.flatMap((one) => (one.isTensor ? [one] : []));
    this.texts = TEXTS.filter((name) => found.some((one) => one.name === name));
    this.inputs = found.filter(({ name }) => !TEXTS.includes(name) && name !== INDEX);
    if (this.texts.length < 2 || this.inputs.length + this.texts.length === found.length) {
      throw new FormatError("the graph is none for many deltas; expected one of `export --multi --layout web`");
    }
  }

  /** Throws FormatError for what ONNX Runtime cannot load. */
  static async open(bytes: Uint8Array): Promise<Graph> {
    if (!globalThis.crossOriginIsolated) ort.env.wasm.numThreads = 1; // others need memory that is shared
    try {
      return new Graph(await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }));
    } catch (problem) {
      throw problem instanceof FormatError
        ? problem
        : new FormatError(`ONNX Runtime cannot load the graph: ${problem}`);
    }
  }

  /** One pass: for each sequence the columns of its answer, [C] or [H], of token logits [rows, C]. */
  async run(sequences: readonly Sequence[], stacks: ReadonlyMap<string, Tensor>): Promise<Float32Array[]> {
    const length = Math.max(...sequences.map(({ encoding }) => encoding.rows.length));
    const texts = new Map(this.texts.map((name) => [name, new BigInt64Array(sequences.length * length)]));
    for (const [line, { encoding }] of sequences.entries()) {
      for (const [column, { id, type }] of encoding.rows.entries()) {
        for (const [place, value] of [id, 1, type].entries()) {
          texts.get(TEXTS[place]!)?.fill(BigInt(value), line * length + column, line * length + column + 1);
        }
      }
    }
    const feeds: Record<string, ort.Tensor> = {
      [INDEX]: new ort.Tensor(
        "int64",
        BigInt64Array.from(sequences, ({ delta }) => BigInt(delta)),
        [sequences.length],
      ),
    };
    for (const [name, data] of texts) feeds[name] = new ort.Tensor("int64", data, [sequences.length, length]);
    for (const [name, { dtype, data, shape }] of stacks) feeds[name] = new ort.Tensor(dtype, data, shape);
    const outputs = await this.session.run(feeds, [...new Set(sequences.map(({ output }) => output))]);
    return sequences.map(({ encoding, output, columns }, line) => {
      const { data, dims } = outputs[output]!;
      const width = dims.at(-1)!;
      const rows = dims.length === 3 ? encoding.rows.length : 1;
      const start = line * (dims.length === 3 ? length : 1) * width;
      const found = new Float32Array(rows * columns);
      for (let row = 0; row < rows; row++) {
        const from = start + row * width;
        found.set((data as Float32Array).subarray(from, from + columns), row * columns);
      }
      return found;
    });
  }

  /** Gives the graph's memory back. */
  close(): Promise<void> {
    return this.session.release();
  }
}

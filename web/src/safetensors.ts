import { among, count, fields, list, mapping } from "./checks.js";
import { FormatError } from "./errors.js";

/** A tensor of a safetensors file, or of the graph's inputs. */
export type Tensor =
  { dtype: "float32"; shape: number[]; data: Float32Array } | { dtype: "int64"; shape: number[]; data: BigInt64Array };

const HEADER = 8;
const WIDTH = { F32: 4, I64: 8 };
const header = mapping(fields({ dtype: among("F32", "I64"), shape: list(count), data_offsets: list(count) }));

/** How many numbers a shape has. */
export function sizeOf(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

/** The tensors of a file, copied, by name. Throws FormatError for a header that lies about what follows it. */
export function parse(bytes: Uint8Array, path: string): Map<string, Tensor> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const size = bytes.byteLength < HEADER ? Infinity : Number(view.getBigUint64(0, true));
  const start = HEADER + size;
  if (start > bytes.byteLength) throw new FormatError(`${path} ends within its header; copy the export anew`);
  let described: unknown;
  try {
    described = JSON.parse(new TextDecoder().decode(bytes.subarray(HEADER, start)));
  } catch {
    throw new FormatError(`${path} is no safetensors file; copy the export anew`);
  }
  const found = new Map<string, Tensor>();
  for (const [name, { dtype, shape, data_offsets }] of header(described, path)) {
    const [from = -1, to = -1] = data_offsets;
    if (from > to || start + to > bytes.byteLength || to - from !== sizeOf(shape) * WIDTH[dtype]) {
      throw new FormatError(
        `${path}: ${name} is ${dtype} [${shape}] at bytes ${from} to ${to}, which cannot be; copy it anew`,
      );
    }
    const own = bytes.slice(start + from, start + to).buffer;
    found.set(
      name,
      dtype === "F32"
        ? { dtype: "float32", shape, data: new Float32Array(own) }
        : { dtype: "int64", shape, data: new BigInt64Array(own) },
    );
  }
  return found;
}

import { among, count, fields, flag, list, mapping, number, text } from "./checks.js";
import { FormatError } from "./errors.js";
import type { Folder } from "./folder.js";

const pair = list(text);

/** What one delta answers, as `delta.json` has it: how texts are cut, and how outputs are read. */
export type TaskSpec = ReturnType<typeof taskSpec>;
const taskSpec = fields({
  kind: text,
  labels: list(text),
  stride: count,
  max_answer_length: count,
  normalize: flag,
  token_types: flag,
  pairs: flag,
  thresholds: list(number),
  abstain: number,
  long: among("cut", "windows"),
  aggregate: among("mean", "max"),
  label_texts: list(text),
  template: text,
  scale: number,
  bias: number,
  prompts: list(pair),
});

/** A delta: its answer is in the first `columns` of the graph's `output`; `files` hold its tensors. */
export type Card = ReturnType<typeof card>;
const card = fields({
  name: text,
  version: text,
  task: taskSpec,
  output: among("logits", "token_logits", "embedding"),
  columns: count,
  max_length: count,
  kinds: list(text),
  files: list(text),
});

/** `files` say of the graph and of all deltas, by their paths, what their content is. */
export type Manifest = ReturnType<typeof manifest>;
const manifest = fields({
  format: text,
  files: mapping(fields({ bytes: count, sha256: text })),
  deltas: list(card),
});

export const GRAPH = "onnx/model.onnx";
const FILE = "manifest.json";
const FORMAT = "bertology-serve-web/1";

/** The manifest of an export. Throws FormatError for another version's, and for one that makes no sense. */
export async function readManifest(folder: Folder): Promise<Manifest> {
  const found = manifest(await folder.json(FILE), FILE);
  if (found.format !== FORMAT) {
    throw new FormatError(
      `${FILE} has format ${found.format}; expected ${FORMAT}: export again, or upgrade this package`,
    );
  }
  for (const { name, task, columns, files } of found.deltas) {
    const lost = [GRAPH, ...files].find((path) => !found.files.has(path));
    if (lost !== undefined)
      throw new FormatError(`${FILE}: ${name} reads ${lost}, of which it says nothing; export again`);
    if (task.labels.length > columns && task.kind !== "zero-shot" && task.kind !== "question-answering") {
      throw new FormatError(`${FILE}: ${name} has ${task.labels.length} labels and ${columns} columns; export again`);
    }
  }
  return found;
}

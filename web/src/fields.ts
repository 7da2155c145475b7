import { DataError, shown, Unsupported } from "./errors.js";

/** The fields of one request, as the server's native route takes them. */
export type Fields = Readonly<Record<string, unknown>>;

/** What the server answers and this package does not. */
const SERVERS = [
  "redact",
  "patterns",
  "normalize",
  "encoding_format",
  "embedding_types",
  "pooling",
  "chunks",
  "chunk_tokens",
  "negatives",
];

/** Throws Unsupported for a field that only the server knows. */
export function checkFields(fields: Fields): void {
  const alien = SERVERS.find((name) => fields[name] != null);
  if (alien) throw new Unsupported(`field '${alien}' is answered by the server alone; leave it out`);
}

function checked(value: unknown, name: string): string {
  if (typeof value !== "string" || !value.trim()) {
    throw new DataError(`field '${name}' is ${shown(value)}; expected a text that is not empty`);
  }
  return value;
}

/** A text under one of its names; null where it is absent. */
export function optionalText(fields: Fields, ...names: string[]): string | null {
  const found = names.filter((name) => fields[name] != null);
  if (found.length > 1) throw new DataError(`fields '${found[0]}' and '${found[1]}' mean the same; give one of them`);
  return found[0] === undefined ? null : checked(fields[found[0]], found[0]);
}

/** The same; throws DataError where it is absent. */
export function readText(fields: Fields, ...names: string[]): string {
  return optionalText(fields, ...names) ?? checked(undefined, names[0] ?? "");
}

/** A list of `least` texts or more. */
export function readTexts(fields: Fields, name: string, least: number): string[] {
  const value = fields[name];
  if (!Array.isArray(value) || value.length < least) {
    throw new DataError(`field '${name}' is ${shown(value)}; expected a list of ${least} texts or more`);
  }
  return value.map((item, index) => checked(item, `${name}[${index}]`));
}

/** An integer from 1 to `most`; `otherwise` where it is absent. */
export function readCount(fields: Fields, name: string, most: number, otherwise: number): number {
  const value = fields[name] ?? otherwise;
  if (typeof value !== "number" || !Number.isInteger(value) || value < 1 || value > most) {
    throw new DataError(`field '${name}' is ${shown(value)}; expected an integer from 1 to ${most}`);
  }
  return value;
}

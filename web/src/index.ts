export type { Answer, Entity, TaskAnswer, TextSpan } from "./answers.js";
export { DataError, FormatError, NotFound, Unsupported, WebError } from "./errors.js";
export type { Fields } from "./fields.js";
export type { Read } from "./folder.js";
export type { Card, TaskSpec } from "./manifest.js";
export { Pipeline, type Request } from "./pipeline.js";

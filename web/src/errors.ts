/** What goes wrong. A message says what was got, what was expected and what to do next. */
export class WebError extends Error {
  constructor(message: string) {
    super(message);
    this.name = new.target.name;
  }
}

/** A file of the export that is damaged, or that another version wrote. */
export class FormatError extends WebError {}

/** A request whose fields are wrong. */
export class DataError extends WebError {}

/** A delta or a file that is not there. */
export class NotFound extends WebError {}

/** What the server can do and this package cannot. */
export class Unsupported extends WebError {}

/** A value for a message: what it is and, cut short, what it says. */
export function shown(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 40 ? `${text.slice(0, 37)}...` : text;
}

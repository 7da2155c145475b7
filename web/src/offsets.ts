import type { Tokenizer } from "@huggingface/tokenizers";

import { Unsupported } from "./errors.js";
import type { Span } from "./words.js";

interface Parts {
  pre_tokenizer?: { type?: string; pretokenizers?: { type?: string }[] } | null;
  model?: { type?: string; continuing_subword_prefix?: string | null };
}

/**
 * Where each token of a text stands, in UTF-16 units: the tokenizer does not say so itself.
 *
 * The text is normalised character by character to know what each became; the pieces that the tokenizer cuts it into
 * are found in that in turn, and within a piece tokens follow one another. Throws Unsupported for tokenizers that are
 * neither WordPiece nor byte-level, and for texts that hold special tokens.
 */
export function located(tokenizer: Tokenizer, text: string): Span[] {
  const { pre_tokenizer, model } = (tokenizer as unknown as { tokenizer: Parts }).tokenizer;
  const bytes = [pre_tokenizer, ...(pre_tokenizer?.pretokenizers ?? [])].some((one) => one?.type === "ByteLevel");
  if (!bytes && model?.type !== "WordPiece") {
    throw new Unsupported(`answers in texts need WordPiece or bytes, this tokenizer is ${model?.type}; ask the server`);
  }
  const { normal, origin } = normalised(tokenizer, text);
  const pieces = tokenizer.pre_tokenizer?.(normal) ?? [normal];
  const units = bytes ? inBytes(normal, origin) : origin;
  const prefix = model?.continuing_subword_prefix ?? "";
  const spans: Span[] = [];
  const tokens: string[] = [];
  let at = bytes ? Math.min(0, units.length - pieces.join("").length) : 0; // below 0: a space was put before the text
  for (const piece of pieces) {
    if (!bytes) at = normal.indexOf(piece, at);
    const own: string[] = tokenizer.model?.([piece]) ?? [];
    const known = own.length > 1 || own[0] === piece;
    let place = at;
    for (const token of own) {
      const start = place;
      place += !known ? piece.length : token.length - (start > at && token.startsWith(prefix) ? prefix.length : 0);
      spans.push([units[Math.max(start, 0)]?.[0] ?? 0, units[Math.max(place, 1) - 1]?.[1] ?? 0]);
      tokens.push(token);
    }
    at += piece.length;
  }
  if (tokens.join("\n") !== tokenizer.tokenize(text).join("\n")) {
    throw new Unsupported("the context holds a special token such as [SEP]; take it out, or ask the server");
  }
  return spans;
}

/** The normalised text, and for each of its units the span of the character that it came from. */
function normalised(tokenizer: Tokenizer, text: string): { normal: string; origin: Span[] } {
  const change = (part: string) => tokenizer.normalizer?.(part) ?? part;
  const normal = change(text);
  const together = () => Array.from(new Intl.Segmenter().segment(text), ({ segment }) => segment);
  for (const parts of [[...text], together()]) {
    let start = 0;
    const origin = parts.flatMap((part) => {
      const from = [...part].map((character): Span => [start, (start += character.length)]);
      return [...change(part)].flatMap((found, place) =>
        Array.from(found.split(""), () => from[Math.min(place, from.length - 1)]!),
      );
    });
    if (origin.length === normal.length) return { normal, origin };
  }
  throw new Unsupported("the tokenizer changes this text as a whole, so that places in it are lost; ask the server");
}

/** The same for each byte of the text in UTF-8. */
function inBytes(normal: string, origin: readonly Span[]): Span[] {
  let at = 0;
  return [...normal].flatMap((character) => {
    const span = origin[at] ?? [0, 0];
    at += character.length;
    return Array.from(new TextEncoder().encode(character), () => span);
  });
}

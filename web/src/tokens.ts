import { Tokenizer } from "@huggingface/tokenizers";

import { FormatError } from "./errors.js";
import { located } from "./offsets.js";
import type { Span } from "./words.js";

/**
 * One token: `part` says which text it is of (0 first, 1 pair, -1 special token), `span` where it stands there, `word`
 * which word it belongs to; -1 for none, and for a word that another window answers for.
 */
export interface Row {
  id: number;
  type: number;
  part: number;
  span: Span;
  word: number;
}

type TokenizerFile = ConstructorParameters<typeof Tokenizer>[0];
const NOWHERE: Span = [0, 0];
const FIRST = "\u0000first";
const SECOND = "\u0000second";

/** The export's tokenizer: texts, pairs and words as sequences with their special tokens, not cut. */
export class Tokens {
  private readonly whole: Tokenizer;
  private readonly apart: Tokenizer;
  private readonly sigma: string;
  private readonly templates: Record<"single" | "pair", Row[]>;

  /** `file` and `config` are the objects of tokenizer.json and tokenizer_config.json. */
  constructor(file: TokenizerFile, config: object) {
    try {
      this.whole = new Tokenizer(file, config);
      const bare = JSON.stringify(file).includes('"add_prefix_space":false');
      this.apart = bare ? new Tokenizer(prefixed(file) as TokenizerFile, config) : this.whole;
    } catch (problem) {
      throw new FormatError(`tokenizer.json cannot be read (${problem}); export again`);
    }
    this.sigma = this.whole.normalizer?.("Σ") ?? "Σ";
    this.templates = { single: this.template(null), pair: this.template([SECOND]) };
  }

  /** A text, or a text and its pair. */
  text(text: string, pair: string | null): Row[] {
    return this.filled([text, ...(pair === null ? [] : [pair])].map((one) => this.rows(this.cut(one))));
  }

  /** A question and its context, whose tokens know where they stand. */
  question(question: string, context: string): Row[] {
    const spans = located(this.whole, this.lowered(context));
    const rows = this.rows(this.cut(context)).map((row, index) => ({ ...row, span: spans[index] ?? NOWHERE }));
    return this.filled([this.rows(this.cut(question)), rows]);
  }

  /** Words that are apart. Byte-level tokenizers see each with a space before it. */
  words(words: readonly string[]): Row[] {
    return this.filled([words.flatMap((word, number) => this.rows(this.cut(word, this.apart), number))]);
  }

  private cut(text: string, tokenizer = this.whole): string[] {
    return tokenizer.tokenize(this.lowered(text));
  }

  /** JavaScript writes a last sigma as ς where it makes small letters; the server's tokenizer writes σ everywhere. */
  private lowered(text: string): string {
    return text.replaceAll("Σ", this.sigma);
  }

  private rows(tokens: readonly string[], word = -1): Row[] {
    return tokens.map((token) => ({ id: this.id(token), type: 0, part: 0, span: NOWHERE, word }));
  }

  private id(token: string): number {
    const found = this.whole.token_to_id(token) ?? this.whole.token_to_id(this.whole.model?.unk_token ?? "");
    if (found === undefined) throw new FormatError(`the tokenizer has no number for ${token}; export again`);
    return found;
  }

  /** The special tokens around one text or two, each of which is one row. */
  private template(pair: string[] | null): Row[] {
    const { tokens, token_type_ids } = this.whole.post_processor?.([FIRST], pair, true) ?? {
      tokens: [FIRST, ...(pair ?? [])],
    };
    return tokens.map((token, row) => {
      const part = [FIRST, SECOND].indexOf(token);
      return { id: part < 0 ? this.id(token) : -1, type: token_type_ids?.[row] ?? 0, part, span: NOWHERE, word: -1 };
    });
  }

  private filled(texts: readonly Row[][]): Row[] {
    return this.templates[texts.length > 1 ? "pair" : "single"].flatMap((row) =>
      row.part < 0 ? [row] : (texts[row.part] ?? []).map((own) => ({ ...own, type: row.type, part: row.part })),
    );
  }
}

/** A tokenizer.json in which byte-level parts put a space before each word. */
function prefixed(node: unknown): unknown {
  if (Array.isArray(node)) return typeof node[0] === "object" ? node.map(prefixed) : node;
  if (typeof node !== "object" || node === null) return node;
  const found: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(node)) found[key] = key === "vocab" ? value : prefixed(value);
  if (["ByteLevel", "RobertaProcessing"].includes(String(found["type"])) && "add_prefix_space" in found) {
    found["add_prefix_space"] = true;
  }
  return found;
}

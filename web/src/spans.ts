import type { Entity, TextSpan } from "./answers.js";
import { DataError, shown } from "./errors.js";
import { type Fields, readCount, readText, readTexts } from "./fields.js";
import { best, softmax } from "./numbers.js";
import type { Prepare } from "./tasks.js";
import { MOST_WINDOWS, windows, wordWindows, type Encoding } from "./windows.js";
import { characters, joinWords, type Span, splitWords } from "./words.js";

const OFFSETS = ["characters", "utf16"];
const CANDIDATES = 20;
const NO_ANSWER = "no-answer";
/** Prefixes of tags, and what BMES and BILOU call them. */
const PREFIXES: Record<string, string> = { B: "B", I: "I", E: "E", S: "S", M: "I", L: "E", U: "S" };

/** Entities `[{label, start, end, text, score}]` of `text`, or of `tokens` joined by a space, with their `tags`. */
export const tokenClassification: Prepare = ({ task, max_length }, fields, tokens) => {
  const apart = fields["tokens"] != null;
  const { text, spans } = apart ? joinWords(readTexts(fields, "tokens", 1)) : words(readText(fields, "text", "text_a"));
  const cut = places(fields, text);
  const rows = tokens.words(spans.map(([start, end]) => text.slice(start, end)));
  const encodings = wordWindows(rows, max_length, task.stride, task.long === "windows" ? MOST_WINDOWS : 1);
  return {
    encodings,
    decode(outputs) {
      const tags = spans.map(() => "O");
      const scores = spans.map(() => 1);
      const done = new Set<number>();
      for (const [number, output] of outputs.entries()) {
        for (const [row, { word }] of encodings[number]!.rows.entries()) {
          if (word < 0 || done.has(word)) continue;
          const shares = softmax(output.subarray(row * task.labels.length, (row + 1) * task.labels.length));
          const label = best(shares);
          [tags[word], scores[word]] = [task.labels[label]!, shares[label]!];
          done.add(word);
        }
      }
      const entities = spansOf(tags).map(([label, first, last]): Entity => {
        const score = scores.slice(first, last).reduce((sum, one) => sum + one, 0) / (last - first);
        return { label, ...cut([spans[first]![0], spans[last - 1]![1]], score) };
      });
      return apart ? { entities, tags } : { entities };
    },
  };
};

/** `answer {text, start, end, score}` to a `question` in a `context`, and the best `top_k` of them as `answers`. */
export const questionAnswering: Prepare = ({ task, max_length }, fields, tokens) => {
  const context = readText(fields, "context");
  const rows = tokens.question(readText(fields, "question"), context);
  const typed = task.token_types ? rows : rows.map((row) => ({ ...row, type: 0 }));
  const most = readCount(fields, "top_k", CANDIDATES, 1);
  const cut = places(fields, context);
  const encodings = windows(typed, max_length, task.stride, 1);
  return {
    encodings,
    decode(outputs) {
      const { ranked, none } = bestSpans(context, encodings, outputs, task.max_answer_length);
      if (task.labels.includes(NO_ANSWER) || !ranked.length) {
        ranked.unshift({ span: [0, 0], score: none });
        ranked.sort((one, other) => other.score - one.score);
      }
      const shares = softmax(ranked.map(({ score }) => score));
      const answers = ranked.map(({ span }, place) => cut(span, shares[place]!));
      return most > 1 ? { answer: answers[0]!, answers: answers.slice(0, most) } : { answer: answers[0]! };
    },
  };
};

function words(text: string): { text: string; spans: Span[] } {
  return { text, spans: splitWords(text) };
}

/** Writes spans in UTF-16 units as answers have them. */
function places(fields: Fields, text: string): (span: Span, score: number) => TextSpan {
  const wanted = fields["offsets"] ?? OFFSETS[0];
  if (!OFFSETS.includes(String(wanted))) {
    throw new DataError(`field 'offsets' is ${shown(wanted)}; expected one of ${OFFSETS.join(", ")}`);
  }
  const count = characters(text);
  return ([start, end], score) => ({
    start: count(start),
    end: count(end),
    text: text.slice(start, end),
    score,
    ...(wanted === "utf16" ? { start_utf16: start, end_utf16: end } : {}),
  });
}

/** (label, first word, word after the last) of each span in IOB, IOBES, BILOU or BMES; bare tags count as I-. */
export function spansOf(tags: readonly string[]): [string, number, number][] {
  const spans: [string, number, number][] = [];
  let [previous, label, start] = ["O", "", 0];
  for (const [index, tag] of [...tags, "O"].entries()) {
    const [prefix, kind] = splitTag(tag);
    const begins = prefix !== "O" && ("BS".includes(prefix) || "OES".includes(previous) || kind !== label);
    if (previous !== "O" && (begins || prefix === "O")) spans.push([label, start, index]);
    if (begins) start = index;
    [previous, label] = [prefix, kind];
  }
  return spans;
}

function splitTag(tag: string): [string, string] {
  if (tag === "O" || tag === "0") return ["O", ""];
  const prefix = tag.length > 2 && tag[1] === "-" ? PREFIXES[tag[0]!] : undefined;
  return prefix ? [prefix, tag.slice(2)] : ["I", tag];
}

interface Scored {
  span: Span;
  score: number;
}

/** The best 20 spans of a context over all windows, and the score of none: the least that [CLS] has in a window. */
function bestSpans(context: string, encodings: readonly Encoding[], outputs: readonly Float32Array[], longest: number) {
  const scores = new Map<string, Scored>();
  let none = Infinity;
  for (const [number, { rows }] of encodings.entries()) {
    const logits = outputs[number]!;
    none = Math.min(none, logits[0]! + logits[1]!);
    for (const { first, last, score } of candidates(
      rows.map(({ part }) => part === 1),
      logits,
      longest,
    )) {
      const span = trimmed(context, rows[first]!.span[0], rows[last]!.span[1]);
      const known = scores.get(String(span));
      if (span[0] < span[1] && !(known && known.score >= score)) scores.set(String(span), { span, score });
    }
  }
  const order = (one: Scored, other: Scored) =>
    other.score - one.score || one.span[0] - other.span[0] || one.span[1] - other.span[1];
  return { ranked: [...scores.values()].sort(order).slice(0, CANDIDATES), none };
}

/** The best spans of at most `longest` rows of the context in one window; logits are [rows, 2], start and end. */
function candidates(inside: readonly boolean[], logits: Float32Array, longest: number) {
  const rows = inside.flatMap((own, row) => (own ? [row] : []));
  const found = rows.flatMap((first, place) =>
    rows
      .slice(place, place + longest)
      .map((last) => ({ first, last, score: logits[2 * first]! + logits[2 * last + 1]! })),
  );
  return found.sort((one, other) => other.score - one.score).slice(0, CANDIDATES);
}

function trimmed(context: string, start: number, end: number): Span {
  const text = context.slice(start, end);
  const from = start + text.length - text.trimStart().length;
  return [from, from + text.trim().length];
}

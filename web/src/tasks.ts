import type { TaskAnswer } from "./answers.js";
import { DataError, shown, Unsupported } from "./errors.js";
import { type Fields, optionalText, readCount, readText, readTexts } from "./fields.js";
import type { Card, TaskSpec } from "./manifest.js";
import { best, dot, named, sigmoid, softmax, unit } from "./numbers.js";
import { questionAnswering, tokenClassification } from "./spans.js";
import type { Tokens } from "./tokens.js";
import { cut, type Encoding, MOST_WINDOWS, windows } from "./windows.js";

/**
 * A request that was read: its sequences, and what makes an answer of their outputs: [C] or [H] for each text (its
 * windows put together), [rows, C] for each sequence of tasks that answer for tokens.
 */
export interface Prepared {
  encodings: Encoding[];
  /** How many of them are the request's own, where others, such as labels, stand behind. */
  own?: number;
  decode(outputs: readonly Float32Array[]): TaskAnswer;
}

/** Reads a request's fields. Throws DataError for what is wrong, Unsupported for what only the server does. */
export type Prepare = (card: Card, fields: Fields, tokens: Tokens) => Prepared;

const EVEN = 0.5;
const CAUSES: Record<string, string> = { cause: "What was the cause of this?", effect: "What happened as a result?" };
const DOCUMENT = ["document", "passage", "corpus"];
/** What callers say that a text is, and the names under which deltas keep its prompt. */
const ROLES: Record<string, string[]> = {
  query: ["query"],
  search_query: ["query"],
  "retrieval.query": ["query"],
  document: DOCUMENT,
  search_document: DOCUMENT,
  "retrieval.passage": DOCUMENT,
  passage: DOCUMENT,
  corpus: DOCUMENT,
  classification: ["classification"],
  clustering: ["clustering"],
  separation: ["separation"],
  "text-matching": ["text-matching"],
};

const classification: Prepare = (card, fields, tokens) => ({
  encodings: textOrPair(card, fields, tokens),
  decode([logits]) {
    const { labels, abstain } = card.task;
    const shares = softmax(logits!);
    const [label, score] = [labels[best(shares)]!, Math.max(...shares)];
    return { label: score >= abstain ? label : null, score, scores: named(labels, shares) };
  },
});

const multiLabel: Prepare = (card, fields, tokens) => ({
  encodings: textOrPair(card, fields, tokens),
  decode([logits]) {
    const { labels, thresholds } = card.task;
    const shares = Array.from(logits!, sigmoid);
    return {
      labels: labels.filter((_, place) => shares[place]! >= (thresholds[place] ?? EVEN)),
      scores: named(labels, shares),
    };
  },
});

const regression: Prepare = (card, fields, tokens) => ({
  encodings: textOrPair(card, fields, tokens),
  decode: ([value]) => ({ value: value![0]! }),
});

const multipleChoice: Prepare = (card, fields, tokens) => {
  const premise = optionalText(fields, "premise");
  const asked = premise === null ? readText(fields, "question") : optionalText(fields, "question");
  const question = premise !== null && asked !== null ? (CAUSES[asked] ?? asked) : asked;
  const prompt = [premise, question].filter((part) => part !== null).join(" ");
  const choices = readTexts(fields, "choices", 2);
  return {
    encodings: choices.flatMap((choice) => long(card, tokens, prompt, choice)),
    decode(outputs) {
      const scores = softmax(outputs.map((output) => output[0]!));
      return { choice: best(scores), score: Math.max(...scores), scores };
    },
  };
};

const embedding: Prepare = (card, fields, tokens) => {
  const texts = [readText(fields, "text", "text_a", "anchor"), optionalText(fields, "text_pair", "text_b", "positive")];
  const prompts = promptsFor(card.task, fields, texts[1] !== null);
  const width = readCount(fields, "dimensions", card.columns, card.columns);
  const read = texts.flatMap((text, place) => (text === null ? [] : [prompts[place] + text]));
  return {
    encodings: read.flatMap((text) => long(card, tokens, text, null)),
    decode(outputs) {
      const cutOff = outputs.map((output) => output.slice(0, width));
      const vectors = card.task.normalize ? cutOff.map(unit) : cutOff;
      const [first, second] = vectors.map((vector) => Array.from(vector));
      if (!second) return { embedding: first! };
      return { embedding: first!, embedding_pair: second, similarity: cosine(vectors[0]!, vectors[1]!) };
    },
  };
};

const zeroShot: Prepare = (card, fields, tokens) => {
  const { task } = card;
  const names = fields["labels"] == null ? task.labels : readTexts(fields, "labels", 1).map((name) => name.trim());
  if (!names.length) throw new DataError("field 'labels' is missing; expected the labels to choose from");
  if (new Set(names).size < names.length) throw new DataError("field 'labels' has a label twice; expected each once");
  const template = optionalText(fields, "template") ?? task.template;
  if (!template.includes("{}"))
    throw new DataError(`field 'template' is ${shown(template)}; expected {} where a label goes`);
  const several = fields["multi_label"] === true || names.length === 1;
  const beside = names.map((name) => {
    const known = task.label_texts[task.labels.indexOf(name)];
    const encoding = cut(tokens.text(template.replaceAll("{}", known || readable(name)), null), card.max_length);
    if (encoding.cut)
      throw new DataError(`the label ${shown(name)} has ${encoding.cut} tokens too many; expected a shorter one`);
    return encoding;
  });
  const own = textOrPair(card, fields, tokens);
  return {
    encodings: [...own, ...beside],
    own: own.length,
    decode([text, ...rows]) {
      const logits = rows.map((row) => task.scale * cosine(text!, row));
      const numbers = several ? logits.map((logit) => sigmoid(logit + task.bias)) : softmax(logits);
      const ranked = names
        .map((name, place) => [name, numbers[place]!] as const)
        .sort((one, other) => other[1] - one[1]);
      const scores = Object.fromEntries(ranked);
      if (several) return { labels: ranked.filter(([, score]) => score >= EVEN).map(([name]) => name), scores };
      return { label: ranked[0]![0], score: ranked[0]![1], scores };
    },
  };
};

const TASKS: Record<string, Prepare> = {
  classification,
  "multi-label": multiLabel,
  regression,
  "token-classification": tokenClassification,
  "question-answering": questionAnswering,
  "multiple-choice": multipleChoice,
  embedding,
  "zero-shot": zeroShot,
};

/** How a delta's task reads requests. Throws Unsupported for a task that is not known here. */
export function taskOf(card: Card): Prepare {
  const found = TASKS[card.task.kind];
  if (found) return found;
  throw new Unsupported(
    `delta ${card.name} does ${card.task.kind}; expected ${Object.keys(TASKS).join(", ")}: ask the server`,
  );
}

/** What a text's windows [C] or [H] come to, a text a row: the mean by tokens of their own, or the largest of each. */
export function aggregated(
  task: TaskSpec,
  encodings: readonly Encoding[],
  outputs: readonly Float32Array[],
): Float32Array[] {
  const groups: number[][] = [];
  for (const [place, { continues }] of encodings.entries())
    (continues ? groups.at(-1)! : groups[groups.push([]) - 1]!).push(place);
  return groups.map((group) => {
    if (group.length === 1) return outputs[group[0]!]!;
    const total = group.reduce((sum, place) => sum + encodings[place]!.own, 0);
    return outputs[group[0]!]!.map((_, column) => {
      const values = group.map((place) => outputs[place]![column]!);
      if (task.aggregate === "max") return Math.max(...values);
      return values.reduce((sum, value, place) => sum + (value * encodings[group[place]!]!.own) / total, 0);
    });
  });
}

function textOrPair(card: Card, fields: Fields, tokens: Tokens): Encoding[] {
  const pair = optionalText(fields, "text_pair", "text_b");
  if (card.task.pairs && pair === null) {
    throw new DataError("field 'text_pair' is missing; this delta was trained on pairs of texts");
  }
  return long(card, tokens, readText(fields, "text", "text_a"), pair);
}

/** One text or a pair, cut or in windows as the task says. */
function long({ task, max_length }: Card, tokens: Tokens, text: string, pair: string | null): Encoding[] {
  const rows = tokens.text(text, pair);
  return task.long === "windows"
    ? windows(rows, max_length, task.stride, undefined, MOST_WINDOWS)
    : [cut(rows, max_length)];
}

/** What is read before a text, and before its pair. */
function promptsFor({ prompts }: TaskSpec, fields: Fields, paired: boolean): [string, string] {
  const known = new Map(prompts.map(([name = "", prompt = ""]) => [name, prompt]));
  const [name, role] = [optionalText(fields, "prompt_name"), optionalText(fields, "input_type")];
  const of = (own: string): string => {
    const names = known.has(own) ? [own] : (ROLES[own] ?? []);
    return known.get(names.find((one) => known.has(one)) ?? "") ?? "";
  };
  const chosen = name ?? role;
  if (chosen === null) return paired ? [of("query"), of("document")] : [known.get("") ?? "", ""];
  if (!known.has(chosen) && (name !== null || !ROLES[chosen])) {
    throw new DataError(
      `there is no prompt ${shown(chosen)}; this delta has ${[...known.keys()].join(", ") || "none"}`,
    );
  }
  return name === null ? [of(chosen), of(chosen)] : [known.get(name)!, known.get(name)!];
}

function cosine(one: Float32Array, other: Float32Array): number {
  return dot(one, other) / Math.max(Math.sqrt(dot(one, one) * dot(other, other)), 1e-12);
}

/** A label's name as words: `card_arrival` is `card arrival`, `PlayMusic` is `Play Music`. */
function readable(name: string): string {
  const spaced = /^([A-Z][a-z]+){2,}$/.test(name) ? name.replace(/(?<=[a-z])(?=[A-Z])/g, " ") : name;
  return spaced.replaceAll("_", " ").trim().replace(/\s+/g, " ") || name;
}

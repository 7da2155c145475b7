import type { Row } from "./tokens.js";

/**
 * One sequence as the encoder reads it. `cut` is how many tokens were left out; a window of a text that is no first one
 * `continues` the sequence before it; `own` tokens belong to it.
 */
export interface Encoding {
  rows: readonly Row[];
  cut: number;
  continues: boolean;
  own: number;
}

export const MOST_WINDOWS = 64;

/** A sequence cut to `most` tokens: the longer of two texts first, from its end. */
export function cut(rows: readonly Row[], most: number): Encoding {
  if (rows.length <= most) return { rows, cut: 0, continues: false, own: rows.length };
  const [first, second] = [count(rows, 0), count(rows, 1)];
  const kept = keep(rows, longestFirst(first, second, Math.max(most - (rows.length - first - second), 0)));
  return { rows: kept, cut: rows.length - kept.length, continues: false, own: kept.length };
}

/**
 * A text, or each window of one of two (`of`; by default the longer) beside the other, which may take half of the room.
 * Windows overlap by `stride` tokens; a token in two belongs to that in which it has more context.
 */
export function windows(rows: readonly Row[], most: number, stride: number, of?: number, limit = Infinity): Encoding[] {
  const longer = of ?? (count(rows, 1) > count(rows, 0) ? 1 : 0);
  const [total, other] = [count(rows, longer), count(rows, 1 - longer)];
  if (rows.length <= most) return [{ rows, cut: 0, continues: false, own: total }];
  const start = Math.max(
    rows.findIndex((row) => row.part === longer),
    0,
  );
  const room = Math.max(most - (rows.length - total - other), 0);
  const kept = Math.min(other, total ? Math.floor(room / 2) : room);
  const size = room - kept;
  const step = Math.max(size - Math.min(stride, Math.floor(size / 2)), 1);
  const number = Math.min(Math.ceil(Math.max(total - size, 0) / step) + 1, limit);
  const lefts = Array.from({ length: number }, (_, window) => start + window * step);
  const right = (window: number) => Math.min(lefts[window]! + size, start + total);
  const border = (window: number) =>
    window === 0
      ? start
      : window === number
        ? right(number - 1)
        : Math.floor((lefts[window]! + right(window - 1) + 1) / 2);
  const end = start + total;
  const before = keep(rows.slice(0, start), { 0: kept, 1: kept });
  const after = keep(rows.slice(end), { 0: kept, 1: kept });
  return lefts.map((left, window) => ({
    rows: [...before, ...rows.slice(left, right(window)), ...after],
    cut: window ? 0 : end - right(number - 1) + other - kept,
    continues: window > 0,
    own: border(window + 1) - border(window),
  }));
}

/** The same for words: each is its first token's window's to answer, and has word -1 in the others. */
export function wordWindows(rows: readonly Row[], most: number, stride: number, limit: number): Encoding[] {
  const found = windows(rows, most, stride, 0, limit);
  if (found.length < 2) return found;
  const lead = rows.findIndex((row) => row.part === 0);
  let from = lead;
  return found.map((window) => {
    const owned = rows.slice(from, from + window.own).filter((row, index) => row.word !== rows[from + index - 1]?.word);
    from += window.own;
    const words = new Set(owned.map((row) => row.word));
    return { ...window, rows: window.rows.map((row) => (words.has(row.word) ? row : { ...row, word: -1 })) };
  });
}

function count(rows: readonly Row[], part: number): number {
  return rows.filter((row) => row.part === part).length;
}

/** Special tokens, and so many of each text from its start. */
function keep(rows: readonly Row[], most: Record<number, number>): Row[] {
  const left = { ...most };
  return rows.filter(({ part }) => part < 0 || (left[part] = (left[part] ?? 0) - 1) >= 0);
}

/** How many tokens of each text stay, as the tokenizers library's `longest_first` decides. */
function longestFirst(first: number, second: number, room: number): Record<number, number> {
  let [short, long] = first <= second ? [first, second] : [second, first];
  long = short > room ? short : Math.max(short, room - short);
  if (short + long > room) [short, long] = [Math.floor(room / 2), Math.floor(room / 2) + (room % 2)];
  return first <= second ? { 0: short, 1: long } : { 0: long, 1: short };
}

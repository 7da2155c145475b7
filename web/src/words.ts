/** From one character to before another, in UTF-16 units. */
export type Span = readonly [start: number, end: number];

// The server's expression, with Python's \w, \d, \s and \b written out.
const W = "[\\p{L}\\p{N}_]";
const SPACE = "\\t-\\r\\x1c- \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const IDEOGRAPHS = "[\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff\\u{20000}-\\u{3134f}]";
const MARKS = "[\\p{M}&&[\\u0300-\\u30ff]]";
const EDGE = `(?:(?<=${W})(?!${W})|(?<!${W})(?=${W}))`;
const RUN = `(?:(?!${IDEOGRAPHS})[\\p{L}\\p{N}_${MARKS}\\u200c\\u200d])+`;
const CLITIC = `['\\u2019](?:s|m|d|re|ve|ll)${EDGE}`;
const WORD = new RegExp(
  [
    `(?:https?:\\/\\/|www\\.)[^${SPACE}]*[^${SPACE}.,;:!?\\)\\]\\}>"'\\u2019]`,
    `(?<!${W})[@#]${RUN}`,
    `(?<!${W})(?:[[\\p{L}\\p{N}]--\\p{Nd}]\\.){2,}`,
    `(?<!${W})\\p{Nd}+(?:[.,:]\\p{Nd}+)+(?!${W})`,
    `(?<=${W})${CLITIC}`,
    `${RUN}(?:(?!${CLITIC})[\\-'\\u2019]${RUN})*`,
    `[^${SPACE}]`,
  ].join("|"),
  "giv",
);

/** The words of a text, in order. */
export function splitWords(text: string): Span[] {
  return [...text.matchAll(WORD)].map(({ index, 0: word }) => [index, index + word.length]);
}

/** Words joined by one space, and where each stands. */
export function joinWords(words: readonly string[]): { text: string; spans: Span[] } {
  let start = 0;
  const spans = words.map((word): Span => {
    const span: Span = [start, start + word.length];
    start = span[1] + 1;
    return span;
  });
  return { text: words.join(" "), spans };
}

/** Gives for a place in UTF-16 units how many characters (code points) stand before it: what the server counts. */
export function characters(text: string): (place: number) => number {
  const pairs = [...text.matchAll(/[\u{10000}-\u{10ffff}]/gu)].map(({ index }) => index);
  return (place) => place - pairs.filter((start) => start < place).length;
}

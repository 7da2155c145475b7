// node tokens.mjs DIST TOKENIZER TEXTS: for each text of a JSON file its words, its tokens alone, after another text,
// and as words that are apart, and where its tokens stand; as JSON.
import { readFile } from "node:fs/promises";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [dist, tokenizer, texts] = process.argv
  .slice(2)
  .map((file) => path.resolve(file));
const { Tokens } = await import(pathToFileURL(path.join(dist, "tokens.js")));
const { characters, splitWords } = await import(
  pathToFileURL(path.join(dist, "words.js"))
);
const json = async (...file) =>
  JSON.parse(await readFile(path.join(...file), "utf-8"));

const tokens = new Tokens(
  await json(tokenizer, "tokenizer.json"),
  await json(tokenizer, "tokenizer_config.json"),
);
const ids = (rows) => rows.map((row) => row.id);
function places(text) {
  const count = characters(text);
  try {
    return tokens
      .question("one", text)
      .filter((row) => row.part === 1)
      .map(({ span }) => span.map(count));
  } catch (problem) {
    return `${problem.name}: ${problem.message}`;
  }
}
const found = (await json(texts)).map((text) => {
  const words = splitWords(text);
  const apart = words.map(([start, end]) => text.slice(start, end));
  return {
    words: words.map((span) => span.map(characters(text))),
    ids: ids(tokens.text(text, null)),
    pair: ids(tokens.text("one two", text)),
    apart: ids(tokens.words(apart)),
    places: places(text),
  };
});
process.stdout.write(JSON.stringify(found));

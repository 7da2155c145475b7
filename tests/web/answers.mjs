// node answers.mjs INDEX REQUESTS EXPORT...: what the package answers, for each export, to each list of requests of a
// JSON file, as JSON: the answers, or the error that it was refused with; and the files that were read until then.
import { readFile } from "node:fs/promises";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [index, requests, ...exports] = process.argv
  .slice(2)
  .map((file) => path.resolve(file));
const { Pipeline } = await import(pathToFileURL(index));
const batches = JSON.parse(await readFile(requests, "utf-8"));
const told = (problem) => `${problem.name}: ${problem.message}`;

async function answers(directory) {
  const files = [];
  const read = async (url) => {
    files.push(url.pathname.slice(directory.length + 1));
    return new Uint8Array(await readFile(url));
  };
  const found = [];
  const pipeline = await Pipeline.open(pathToFileURL(directory), read).catch(
    told,
  );
  for (const batch of batches) {
    found.push([
      typeof pipeline === "string"
        ? pipeline
        : await pipeline.answer(batch).catch(told),
      [...files],
    ]);
  }
  return found;
}

const found = [];
for (const directory of exports) found.push(await answers(directory));
process.stdout.write(JSON.stringify(found));

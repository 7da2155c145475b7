// node answers.mjs INDEX EXPORT REQUESTS: what the package answers to each list of requests of a JSON file, as JSON; of a
// list that it refuses, the error.
import { readFile } from "node:fs/promises";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [index, directory, requests] = process.argv.slice(2).map((file) => path.resolve(file));
const { Pipeline } = await import(pathToFileURL(index));
const pipeline = await Pipeline.open(pathToFileURL(directory), async (url) => new Uint8Array(await readFile(url)));
const answers = [];
for (const batch of JSON.parse(await readFile(requests, "utf-8"))) {
  answers.push(await pipeline.answer(batch).catch((problem) => `${problem.name}: ${problem.message}`));
}
process.stdout.write(JSON.stringify(answers));

// node in_transformers_js.mjs MODULES DIR TASK INPUTS: what a pipeline of @huggingface/transformers answers, as JSON.
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [modules, directory, task, inputs] = process.argv.slice(2);
const found = createRequire(path.join(modules, "x.js")).resolve("@huggingface/transformers");
const { env, pipeline } = await import(pathToFileURL(found));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(directory) + "/";
const run = await pipeline(task, path.basename(directory), { dtype: "fp32", device: "cpu" });
const answer = await run(...JSON.parse(inputs));
console.log(JSON.stringify(answer.tolist ? answer.tolist() : answer));

import type { Answer } from "./answers.js";
import { DataError, FormatError, NotFound, Unsupported, WebError } from "./errors.js";
import { checkFields, type Fields } from "./fields.js";
import { Folder, type Read } from "./folder.js";
import { Graph, type Sequence } from "./graph.js";
import { type Card, GRAPH, type Manifest, readManifest } from "./manifest.js";
import { parse } from "./safetensors.js";
import { type DeltaTensors, Stacks } from "./stacks.js";
import { aggregated, type Prepared, taskOf } from "./tasks.js";
import { Tokens } from "./tokens.js";

/** One item for one delta, as the server's native route takes it: the delta's name and the fields of its task. */
export type Request = Fields & { delta: string };

/** The most sequences of one pass of the graph. */
const MOST_SEQUENCES = 64;

/** One encoder with all deltas of an export; a delta's tensors are fetched when it is first asked. */
export class Pipeline {
  private readonly loaded = new Map<string, Promise<DeltaTensors>>();
  private readonly stacks: Stacks;
  private last: Promise<unknown> = Promise.resolve();

  private constructor(
    private readonly folder: Folder,
    private readonly manifest: Manifest,
    private readonly tokens: Tokens,
    private readonly graph: Graph,
  ) {
    this.stacks = new Stacks(graph.inputs);
  }

  /** Opens the folder that `export --multi --layout web` wrote. `read` fetches a file; `fetch` unless it is given. */
  static async open(address: string | URL, read?: Read): Promise<Pipeline> {
    const folder = new Folder(address, read);
    const manifest = await readManifest(folder);
    const [file, config, graph] = await Promise.all([
      folder.json("tokenizer.json"),
      folder.json("tokenizer_config.json"),
      folder.bytes(GRAPH, manifest.files.get(GRAPH)),
    ]);
    return new Pipeline(folder, manifest, new Tokens(file as object, config as object), await Graph.open(graph));
  }

  /** The deltas that can be asked. */
  get deltas(): readonly Card[] {
    return this.manifest.deltas;
  }

  /** Fetches deltas before they are asked. */
  async load(...names: string[]): Promise<void> {
    await Promise.all(names.map((name) => this.tensors(this.card(name))));
  }

  /** Forgets a delta's tensors; asked again, they are fetched again. */
  unload(name: string): void {
    this.loaded.delete(name);
  }

  /**
   * The answers to requests, in order, of any deltas in one batch. Throws DataError naming the first request whose
   * fields are wrong, NotFound for an unknown delta, Unsupported for what only the server does.
   */
  async answer(requests: readonly Request[]): Promise<Answer[]> {
    const jobs = requests.map((request, place) => this.prepared(request, place));
    const cards = [...new Set(jobs.map(({ card }) => card))];
    const stacks = this.stacks.join(await Promise.all(cards.map((card) => this.tensors(card))));
    const all = jobs.flatMap(({ card, task: { encodings } }) =>
      encodings.map((encoding): Sequence => ({ ...card, encoding, delta: cards.indexOf(card) })),
    );
    const order = [...all.keys()].sort((one, other) => all[one]!.delta - all[other]!.delta);
    const outputs: Float32Array[] = [];
    for (let start = 0; start < order.length; start += MOST_SEQUENCES) {
      const chosen = order.slice(start, start + MOST_SEQUENCES);
      const found = await this.alone(() =>
        this.graph.run(
          chosen.map((place) => all[place]!),
          stacks,
        ),
      );
      for (const [number, place] of chosen.entries()) outputs[place] = found[number]!;
    }
    return jobs.map(({ card, task }) => answered(card, task, outputs.splice(0, task.encodings.length)));
  }

  /** Gives the graph's memory back; nothing can be asked afterwards. */
  async close(): Promise<void> {
    this.loaded.clear();
    await this.alone(() => this.graph.close());
  }

  private card(name: string): Card {
    const found = this.deltas.find((card) => card.name === name);
    if (found) return found;
    throw new NotFound(
      `there is no delta '${name}'; expected one of ${this.deltas.map((card) => card.name).join(", ")}`,
    );
  }

  private prepared(request: Request, place: number): { card: Card; task: Prepared } {
    const card = this.card(request.delta);
    try {
      checkFields(request);
      return { card, task: taskOf(card)(card, request, this.tokens) };
    } catch (problem) {
      if (!(problem instanceof WebError)) throw problem;
      const kind = problem instanceof Unsupported ? Unsupported : DataError;
      throw new kind(`requests[${place}] for ${card.name}: ${problem.message}`);
    }
  }

  private tensors(card: Card): Promise<DeltaTensors> {
    const known = this.loaded.get(card.name);
    if (known) return known;
    const found = this.fetched(card);
    this.loaded.set(card.name, found);
    found.catch(() => this.loaded.delete(card.name)); // the next call tries again
    return found;
  }

  private async fetched(card: Card): Promise<DeltaTensors> {
    const files = card.files.map(async (path) =>
      parse(await this.folder.bytes(path, this.manifest.files.get(path)), path),
    );
    const tensors = new Map((await Promise.all(files)).flatMap((file) => [...file]));
    this.stacks.check(tensors, card.name);
    const labels = tensors.get("head.out_bias")?.shape[1] ?? 0;
    if (card.output !== "embedding" && labels !== card.columns) {
      throw new FormatError(
        `delta ${card.name} has a head of ${labels} columns, the manifest says ${card.columns}; export again`,
      );
    }
    return tensors;
  }

  /** Runs a pass once those before it are done: a session runs one at a time. */
  private alone<T>(run: () => Promise<T>): Promise<T> {
    const next = this.last.then(run);
    this.last = next.catch(() => undefined);
    return next;
  }
}

function answered(card: Card, { encodings, own, decode }: Prepared, outputs: readonly Float32Array[]): Answer {
  const whole = card.output === "token_logits" ? outputs : aggregated(card.task, encodings, outputs);
  const answer: Answer = { delta: card.name, version: card.version, task: card.task.kind, ...decode(whole) };
  const asked = encodings.slice(0, own);
  const read = asked.reduce((sum, { rows }) => sum + rows.length, 0);
  const given = asked.reduce((sum, { cut }) => sum + cut, read);
  if (given > read) Object.assign(answer, { truncated: true, tokens_read: read, tokens_given: given });
  return asked.some(({ continues }) => continues) ? { ...answer, windows: asked.length } : answer;
}

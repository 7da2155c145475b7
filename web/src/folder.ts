import { FormatError, NotFound, shown } from "./errors.js";

/** Reads a file whole. */
export type Read = (url: URL) => Promise<Uint8Array>;

const PATH = /^[\w-][\w.-]*(\/[\w-][\w.-]*)*$/;

/** By `fetch`, as browsers do. */
export async function fetched(url: URL): Promise<Uint8Array> {
  const response = await fetch(url);
  if (!response.ok) throw new NotFound(`${url} answers ${response.status}; give the address of an export's folder`);
  return new Uint8Array(await response.arrayBuffer());
}

/** An export's folder. Nothing outside of it is ever read, whatever its files say. */
export class Folder {
  private readonly root: URL;

  /** `address` may be relative to the page. */
  constructor(
    address: string | URL,
    private readonly read: Read = fetched,
  ) {
    const base = typeof document === "undefined" ? undefined : document.baseURI;
    this.root = new URL(String(address).replace(/\/?$/, "/"), base);
  }

  /** The bytes of a file, `size` of them where that is known. Throws FormatError for a path that leads elsewhere. */
  async bytes(path: string, size?: number): Promise<Uint8Array> {
    if (!PATH.test(path)) throw new FormatError(`the path ${shown(path)} is none within the export; export again`);
    const found = await this.read(new URL(path, this.root));
    if (size !== undefined && found.byteLength !== size) {
      throw new FormatError(`${path} has ${found.byteLength} bytes, the manifest says ${size}; copy the export anew`);
    }
    return found;
  }

  /** A JSON file. Throws FormatError for what is none. */
  async json(path: string): Promise<unknown> {
    const text = new TextDecoder().decode(await this.bytes(path));
    try {
      return JSON.parse(text);
    } catch (problem) {
      throw new FormatError(`${path} is no JSON (${problem}); expected a folder of \`export --multi --layout web\``);
    }
  }
}

import { FormatError, NotFound, shown } from "./errors.js";

/** Reads a file whole. */
export type Read = (url: URL) => Promise<Uint8Array>;

/** What a file holds. */
export interface Content {
  bytes: number;
  sha256: string;
}

const PATH = /^[\w-][\w.-]*(\/[\w-][\w.-]*)*$/;

/** By `fetch`, as browsers do. */
export async function fetched(url: URL): Promise<Uint8Array> {
  const response = await fetch(url);
  if (!response.ok) throw new NotFound(`${url} answers ${response.status}; give the address of an export's folder`);
  return new Uint8Array(await response.arrayBuffer());
}

/** In hexadecimal; of pages that may not compute it (those of plain http) as it is told. */
async function sha256(bytes: Uint8Array, told: string): Promise<string> {
  if (!globalThis.crypto?.subtle) return told;
  const digest = await crypto.subtle.digest("SHA-256", bytes as BufferSource);
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
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

  /**
   * The bytes of a file, and of that content where it is told. Other content has another address, so that no cache hands
   * out what was there before. Throws FormatError for a path that leads elsewhere, and for other content.
   */
  async bytes(path: string, content?: Content): Promise<Uint8Array> {
    if (!PATH.test(path)) throw new FormatError(`the path ${shown(path)} is none within the export; export again`);
    const url = new URL(path, this.root);
    if (content) url.search = content.sha256.slice(0, 16);
    const found = await this.read(url);
    if (content && found.byteLength !== content.bytes) {
      throw new FormatError(`${path} has ${found.byteLength} bytes, the manifest says ${content.bytes}; copy it anew`);
    }
    if (content && (await sha256(found, content.sha256)) !== content.sha256) {
      throw new FormatError(`${path} has other bytes than the manifest says; copy it anew`);
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

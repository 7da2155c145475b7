/** A part of a text; offsets are characters (code points), `utf16` ones where a request has `"offsets": "utf16"`. */
export interface TextSpan {
  start: number;
  end: number;
  text: string;
  score: number;
  start_utf16?: number;
  end_utf16?: number;
}

/** An entity of token classification. */
export interface Entity extends TextSpan {
  label: string;
}

/** The fields of an answer that are its task's own, named as the server names them. */
export interface TaskAnswer {
  label?: string | null;
  labels?: string[];
  score?: number;
  scores?: Record<string, number> | number[];
  value?: number;
  entities?: Entity[];
  tags?: string[];
  answer?: TextSpan;
  answers?: TextSpan[];
  choice?: number;
  embedding?: number[];
  embedding_pair?: number[];
  similarity?: number;
}

/** One answer, with the delta that gave it, and what was cut or read in windows. */
export interface Answer extends TaskAnswer {
  delta: string;
  version: string;
  task: string;
  truncated?: true;
  tokens_read?: number;
  tokens_given?: number;
  windows?: number;
}

"""``bertology-serve mine-negatives``: from pairs to pairs with hard negatives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bertology_serve.cli.common import load_library, note, note_next, progress
from bertology_serve.cli.options import options
from bertology_serve.cli.train import read_columns
from bertology_serve.errors import DataError, InputError, SpecError
from bertology_serve.training.negatives import Mining, mine

if TYPE_CHECKING:
    from bertology_serve.training.negatives import Vectors


@options(Mining)
def mine_negatives(
    input: Annotated[str, typer.Option(help="Pairs (text and positive, or text_pair), as train takes them.")],
    output: Annotated[Path, typer.Option(help="JSON lines: each pair with its negatives, for train.")],
    backbone: Annotated[str | None, typer.Option(help="Encoder. Default: the one that the delta names.")] = None,
    delta: Annotated[Path | None, typer.Option(help="A delta of embeddings to search by, instead.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Records whose text is searched too.")] = None,
    columns: Annotated[str | None, typer.Option(help="Where fields stand: text=query,text_pair=answer.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens a batch.", min=1)] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    *,
    config: Mining,
) -> None:
    """Find hard negatives: texts near to one of a pair that belong to others.

    A pair for which none is found is left out. What stands at --output is not written over.
    """
    if output.exists():
        raise InputError(f"{output} exists; choose another --output")
    if (backbone is None) == (delta is None):
        raise SpecError("give --backbone, to search by an encoder, or --delta, whose encoder is the one that it names")
    load_library(deltas=[delta], data=[input, corpus], backbone=backbone, device=device)

    import numpy as np

    from bertology_serve.data.records import read_records
    from bertology_serve.encoder.encoder import Encoder
    from bertology_serve.encoder.loading import find_device
    from bertology_serve.encoder.opening import open_delta
    from bertology_serve.encoder.pipeline import BASE, Pipeline, Request
    from bertology_serve.files import check_outputs
    from bertology_serve.serving.offline import writing
    from bertology_serve.tasks.base import read_pair
    from bertology_serve.tasks.spec import EMBEDDING

    check_outputs([output], [input, corpus])
    where = find_device(device)
    loaded, encoder = open_delta(delta, None, where) if delta else (None, Encoder.load(str(backbone), device=where))
    if loaded and loaded.task.kind != EMBEDDING:
        raise SpecError(f"{delta} answers {loaded.task.kind}; expected a delta of embeddings")
    pipeline = Pipeline(encoder, [loaded] if loaded else [])
    examples = [
        pipeline.base.task.example(*record, labelled=True) for record in read_records(input, read_columns(columns))
    ]
    lone = next((one for one in examples if one.text_pair is None), None)
    if lone is not None:
        raise DataError(f"{lone.where}: field 'text_pair' (or 'positive') is missing; expected pairs")
    others = [read_pair(*record)[0] for record in read_records(corpus)] if corpus else []

    with progress() as bar:

        def embed(texts: Sequence[str], role: str) -> Vectors:
            row = bar.add_task("embed", total=len(texts))
            found = []
            for answer in pipeline.stream(
                (Request(loaded.name if loaded else BASE, {"text": text, "input_type": role}) for text in texts),
                max_tokens,
            ):
                found.append(np.array(answer.answer["embedding"], dtype=np.float32))
                bar.advance(row)
            table = np.stack(found)
            unit: Vectors = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
            return unit

        kept = mined = 0
        with writing(str(output)) as file:
            for one, negatives in mine(examples, others, config, embed):
                if negatives:
                    fields = {"text": one.text, "positive": one.text_pair, "negatives": negatives}
                    file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")
                    kept, mined = kept + 1, mined + len(negatives)
    note(f"{mined:,} negatives for {kept:,} of {len(examples):,} pairs")
    note_next(["train", "--backbone", encoder.name, "--task", EMBEDDING, "--train", output, "--out", "deltas/NAME"])

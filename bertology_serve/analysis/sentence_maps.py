"""The attention maps of single sentences, head by head."""

from __future__ import annotations

from typing import Any

import torch

from bertology_serve.analysis.figures import Figure, HeatMap
from bertology_serve.analysis.subject import Subject
from bertology_serve.analysis.word_maps import TextMaps
from bertology_serve.tasks.encoding import encode_text

LONGEST = 48


@torch.inference_mode()
def sentence_maps(subject: Subject, text: str, number: int) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """A figure a layer with a map a head, and the rows of a table; a text is cut to 48 tokens."""
    tokenizer = subject.encoder.tokenizer
    encoding = encode_text(tokenizer, text, None, min(LONGEST, subject.encoder.max_tokens - subject.virtual))
    batch = subject.pack([encoding])
    watch = TextMaps(batch)
    subject.run(batch, watch)
    names = tokenizer.convert_ids_to_tokens(list(encoding.ids))
    figures, rows = {}, []
    for layer, maps in enumerate(watch.maps[0]):
        panels = [
            HeatMap(f"layer {layer}, head {head}", own, "from", "to", "attention", (0.0, 1.0), names, names)
            for head, own in enumerate(maps.double().tolist())
        ]
        figures[f"text{number}-layer{layer}"] = Figure(f"“{text[:80]}”, layer {layer}: {subject.name}", panels, 3)
        rows += [
            {"text": number, "layer": layer, "head": head, "from": names[i], "row": i,
             **{f"{j} {name}": value for j, (name, value) in enumerate(zip(names, line, strict=True))}}
            for head, own in enumerate(maps.tolist()) for i, line in enumerate(own)
        ]  # fmt: skip
    return figures, rows

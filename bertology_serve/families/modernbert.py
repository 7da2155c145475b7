"""ModernBERT: rotary positions, local attention in most layers, and one prediction head for every task.

It goes through transformers' attention interface, which hands its window on.
"""

from __future__ import annotations

from bertology_serve.families.family import Dense, Family, HeadShape


def _head(shape: HeadShape) -> tuple[Dense, ...]:
    """The same for rows and for sequences."""
    options = shape.options
    head = Dense(
        "head.dense",
        shape.hidden,
        shape.hidden,
        options.get("classifier_activation", "gelu"),
        norm="head.norm",
        bias=bool(options.get("classifier_bias", False)),
        base_name="head.dense",
        base_norm="head.norm",
        norm_eps=float(options.get("norm_eps", 1e-5)),
        norm_bias=bool(options.get("norm_bias", False)),
    )
    return head, Dense("classifier", shape.hidden, shape.outputs, dropout=True)


def _words(shape: HeadShape) -> tuple[Dense, ...]:
    """The same, and a score a word."""
    return _head(shape)[0], Dense("decoder", shape.hidden, shape.outputs, base_name="decoder", tied=True)


MODERNBERT = Family(
    "modernbert",
    _head,
    _head,
    _head,
    _head,
    _words,
    reads="classifier_pooling",
    choice_reads="classifier_pooling",
    positions="rotary",
    emitted=True,
)

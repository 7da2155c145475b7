"""What is known of each family, and what is not: unknown ones are run as they are."""

from __future__ import annotations

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.errors import Unsupported
from bertology_serve.families import FAMILIES, compat, family_named
from bertology_serve.families.family import Family
from tests import tiny


def test_each_family_stands_under_its_own_name():
    assert all(name == family.name for name, family in FAMILIES.items())
    assert family_named("roberta") is FAMILIES["roberta"]


def test_an_unknown_family_has_no_head_and_no_attention_of_our_own():
    assert family_named("luke") == Family("luke")
    own = family_named("luke")
    assert (own.sequence, own.choice, own.tokens, own.answers, own.connect, own.emitted) == (None,) * 5 + (False,)


def test_a_transformers_without_what_is_replaced_is_named():
    """Where the method had another name, ours would never be called, and rows would attend across sequences."""
    with pytest.raises(Unsupported, match=r"transformers 5\.\S+ has no Linear\.get_rel_pos, which is replaced here"):
        compat.patch(torch.nn.Linear(1, 1), "get_rel_pos", compat.nothing)


def test_an_attention_of_our_own_takes_packed_rows_only(tmp_path, monkeypatch):
    """A family whose packed rows differ, and whose attention is ours, is refused: padded ones would not be its own."""
    tiny.save("mpnet", tmp_path)
    monkeypatch.setattr("bertology_serve.families.mpnet._bias", lambda *_: torch.zeros(()).expand(1, 1, 1, 1))
    with pytest.raises(Unsupported, match=r"neither packed nor padded rows.*padded rows end in RuntimeError"):
        Encoder.load(str(tmp_path))


def test_registering_again_changes_nothing(tmp_path):
    encoder = tiny.encoder("bert", tmp_path)
    assert compat.attention_of(encoder.config) == compat.register(compat.NAME, compat.attend_packed)
    compat.disconnect(encoder.model)
    assert compat.attention_of(encoder.config) == "sdpa"

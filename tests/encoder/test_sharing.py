from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertology_serve.deltas.delta import Delta
from bertology_serve.encoder.bank import BARE, BankEntry, DeltaBank
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.encoder.sharing import SharedRows, share
from bertology_serve.kinds.adapter import Adapter
from bertology_serve.kinds.bitfit import Bitfit
from bertology_serve.kinds.ia3 import Ia3
from bertology_serve.kinds.lora import Lora
from bertology_serve.kinds.norms import Norms
from bertology_serve.kinds.prefix import Prefix
from bertology_serve.kinds.prompt import Prompt
from bertology_serve.tasks.spec import CLASSIFICATION, EMBEDDING, TOKEN_CLASSIFICATION, Encoding, TaskSpec
from tests import tiny

DEPTH = 3
MOOD = TaskSpec(CLASSIFICATION, ("bad", "good"), 32, pooling="mean", head="linear")
TAGS = TaskSpec(TOKEN_CLASSIFICATION, ("O", "B-X"), 32, head="linear")
VECTOR = TaskSpec(EMBEDDING, (), 32, pooling="mean", head="none")
TEXTS = "the river bank was very cold", "Ada met a good dog"
# by name: the kinds, the task, and the lowest layer that changes
ZOO: dict[str, tuple[tuple[Any, ...], TaskSpec, int]] = {
    "probe": ((), MOOD, DEPTH),
    "other probe": ((), TAGS, DEPTH),
    "top": ((Lora(layers=(2,), rank=2),), MOOD, 2),
    "other top": ((Lora(layers=(2,), rank=2, targets=("up", "key")),), TAGS, 2),
    "middle": ((Lora(layers=(1,), rank=2),), VECTOR, 1),
    "adapter": ((Adapter(width=4, layers=(1, 2)),), MOOD, 1),
    "biases": ((Bitfit(layers=(2,)),), MOOD, 2),
    "factors": ((Ia3(layers=(1, 2)),), MOOD, 1),
    "norms": ((Norms(layers=(2,)),), MOOD, 2),
    "all": ((Lora(rank=2),), MOOD, 0),
    "all biases": ((Bitfit(),), TAGS, 0),
    "prompt": ((Prompt(length=3),), MOOD, 0),
    "prefix": ((Prefix(length=2),), MOOD, 0),
}


def zoo(encoder: Encoder, names: tuple[str, ...] = tuple(ZOO)) -> list[Delta]:
    return [tiny.delta(encoder, name, *ZOO[name][:2], seed) for seed, name in enumerate(names)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    encoder = tiny.encoder("bert", tmp_path_factory.mktemp("bert"))
    return Pipeline(encoder, zoo(encoder))


def numbers(pipeline: Pipeline, asked: list[tuple[str, str]], together: bool) -> list[torch.Tensor]:
    """The head's outputs, all of one batch or each of its own."""
    jobs = [pipeline.prepare(Request(name, {"text": text})) for name, text in asked]
    batches = [jobs] if together else [[job] for job in jobs]
    with torch.inference_mode():
        return [out for batch in batches for out in pipeline._forward(batch)]


def agree(pipeline: Pipeline, asked: list[tuple[str, str]]) -> None:
    for ours, alone in zip(numbers(pipeline, asked, True), numbers(pipeline, asked, False), strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_where_deltas_leave_the_bare_encoder(pipeline, name):
    entry = pipeline.loaded(name).entry
    assert min(entry.lowest, DEPTH) == ZOO[name][2]


def test_one_batch_of_everything_answers_as_each_alone(pipeline):
    asked = [(name, text) for text in TEXTS for name in ZOO]
    agree(pipeline, asked)
    agree(pipeline, asked[::-1] + asked[::3])


@given(st.lists(st.tuples(st.sampled_from(list(ZOO)), st.sampled_from(TEXTS)), min_size=1, max_size=8))
def test_any_company_changes_no_answer(pipeline, asked):
    agree(pipeline, asked)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.OTHERS])
def test_every_family_answers_as_alone(family, tmp_path: Path):
    encoder = tiny.encoder(family, tmp_path)
    # names of kinds that every family has
    names = tuple(name for name in ZOO if name not in ("prefix", "factors", "norms", "middle", "adapter", "biases"))
    if encoder.anatomy.layers == 1:  # ALBERT: one layer, run again and again
        names = ("probe", "all", "all biases", "prompt")
    if "query" not in encoder.anatomy.slots or encoder.anatomy.slot("query").part:
        names = tuple(name for name in names if name != "other top")
    agree(Pipeline(encoder, zoo(encoder, names)), [(name, text) for text in TEXTS for name in names])


def test_families_that_can_fork_do(tmp_path: Path):
    found = {family: tiny.encoder(family, tmp_path / family).forks for family in (*tiny.FAMILIES, "albert")}
    assert found == dict.fromkeys(tiny.FAMILIES, True) | {"albert": False}


def test_a_text_is_run_once_for_probes_and_forks_for_deltas_of_upper_layers(pipeline):
    encoder, text = pipeline.encoder, TEXTS[0]
    jobs = [pipeline.prepare(Request(name, {"text": text})) for name in ("probe", "other probe", "top", "other top")]
    batch, seats = share(
        [job.encodings[0] for job in jobs], [job.ready.entry for job in jobs], encoder.depth, encoder.pack
    )
    assert batch.sequences == 1
    assert [(fork.layer, fork.batch.sequences) for fork in batch.forks] == [(2, 3)]
    assert seats[0] == seats[1]
    assert len(set(seats)) == 3
    assert batch.last.entries[seats[0]] is BARE


def test_what_is_alone_does_not_fork(pipeline):
    encoder = pipeline.encoder
    jobs = [pipeline.prepare(Request("top", {"text": text})) for text in TEXTS]
    jobs.append(pipeline.prepare(Request("all", {"text": TEXTS[0]})))
    batch, _ = share([job.encodings[0] for job in jobs], [job.ready.entry for job in jobs], encoder.depth, encoder.pack)
    assert (batch.forks, batch.sequences) == ((), 3)


def test_windows_of_a_long_text_are_shared(pipeline):
    encoder = pipeline.encoder
    text = " ".join(itertools.islice(itertools.cycle(TEXTS[0].split()), 40))
    long = TaskSpec(
        CLASSIFICATION, ("bad", "good"), pooling="mean", head="linear", max_length=16, stride=4, long="windows"
    )
    own = Pipeline(
        encoder,
        [
            tiny.delta(encoder, name, specs, long, seed)
            for seed, (name, specs) in enumerate(
                {"a": (), "b": (Lora(layers=(2,), rank=2),), "c": (Lora(rank=2),)}.items()
            )
        ],
    )
    agree(own, [(name, text) for name in "abc"])
    assert own.ask_many(["a", "b", "c"], text)["b"].windows > 2


def test_the_last_batch_alone_gives_the_same(pipeline):
    """What an engine runs that cannot fork."""
    encoder = pipeline.encoder
    jobs = [pipeline.prepare(Request(name, {"text": text})) for text in TEXTS for name in ("top", "middle", "probe")]
    batch, _ = share([job.encodings[0] for job in jobs], [job.ready.entry for job in jobs], encoder.depth, encoder.pack)
    with torch.inference_mode():
        forked, whole = encoder.run(batch, pipeline.bank), encoder.run(batch.last, pipeline.bank)
    assert len(batch.forks) == 2
    torch.testing.assert_close(forked, whole, atol=1e-6, rtol=1e-6)


def test_a_context_that_ends_badly_leaves_no_hook_behind(pipeline):
    encoder = pipeline.encoder
    jobs = [pipeline.prepare(Request(name, {"text": TEXTS[0]})) for name in ("top", "probe")]
    batch, _ = share([job.encodings[0] for job in jobs], [job.ready.entry for job in jobs], encoder.depth, encoder.pack)
    layer = encoder.model.get_submodule(encoder.anatomy.layer_paths[2])
    with pytest.raises(KeyError, match=r"query"):
        encoder.run(batch, DeltaBank(encoder.anatomy, encoder.dtype, encoder.device))
    assert not layer._forward_pre_hooks
    assert encoder._current.value is None


# Accounting: against a count of the sequences that each layer really runs

LOWEST = st.integers(0, 4)


def asked(text: int, key: str, lowest: int) -> Any:
    ids = (2, 10 + text, *range(11, 16), 3)
    return SimpleNamespace(
        encodings=[Encoding(ids, (0,) * 8)], ready=SimpleNamespace(entry=BankEntry(key, lowest=lowest))
    )


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abc")), min_size=1, max_size=8), st.data())
def test_spared_rows_are_those_that_no_layer_runs(pipeline, items, data):
    lowest = {key: data.draw(LOWEST) for key in "abc"}
    known, spared = SharedRows(4), 0
    jobs = [asked(text, key, lowest[key]) for text, key in items]
    for job in jobs:
        rows, _ = known.spared(job)
        spared += rows + (rows == 7)  # one row is always left
        known.add(job)

    batch, _ = share([job.encodings[0] for job in jobs], [job.ready.entry for job in jobs], 4, pipeline.encoder.pack)
    stages = [(0, batch), *((fork.layer, fork.batch) for fork in batch.forks)]
    ends = [layer for layer, _ in stages[1:]] + [4]
    run = sum(stage.sequences * (end - first) for (first, stage), end in zip(stages, ends, strict=True))
    assert 8 * len(jobs) - 2 * run == spared

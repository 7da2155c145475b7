from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForMaskedLM

from bertology_serve.data.records import Record
from bertology_serve.deltas import store
from bertology_serve.deltas.catalog import newest
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.linear import available
from bertology_serve.encoder.loading import find_device
from bertology_serve.encoder.opening import open_delta
from bertology_serve.encoder.pipeline import Pipeline, Request
from bertology_serve.errors import DataError, FormatError, InputError, SpecError
from bertology_serve.kinds.kinds import parameter_count
from bertology_serve.tasks.spec import WHOLE_BATCH, TaskSpec
from bertology_serve.training.batches import Data, Source
from bertology_serve.training.evaluation import evaluate
from bertology_serve.training.frozen_rows import pooled
from bertology_serve.training.method_options import AUTO, LEARNING_RATES, METHODS
from bertology_serve.training.methods import count_parameters, make_live, specs_for
from bertology_serve.training.publish import describe
from bertology_serve.training.run_directory import Destination
from bertology_serve.training.train import Outcome, choices, for_encoder, for_rows, prepare, train, usable
from bertology_serve.training.train_config import CONTRASTIVE_ROWS, FEW_ROWS, FEW_ROWS_RATES, TrainConfig
from bertology_serve.training.trainer import NoCallback
from tests import tiny
from tests.bits import same_bits
from tests.training import sets


def run(encoder: Encoder, out: Path, task: str = "classification", **values: Any) -> Outcome:
    place = {name: values.pop(name) for name in ("name", "version", "resume", "overwrite") if name in values}
    watcher, prepack = values.pop("watcher", None), values.pop("prepack", None)
    dev = None if values.pop("without_dev", False) else sets.source(task, "dev.jsonl")
    config = TrainConfig.of(task, **{"max_length": sets.LENGTHS.get(task), "epochs": 2, **values})
    return train(
        config, encoder, sets.source(task), dev, place=Destination(out, **place), watcher=watcher, prepack=prepack
    )


@pytest.mark.parametrize("task", sets.SETS)
def test_a_delta_is_trained_published_and_measured(tmp_path: Path, bert: Encoder, task: str):
    outcome = run(bert, tmp_path / "mine", task)
    delta, encoder = open_delta(tmp_path / "mine", None)
    assert delta.version == outcome.delta.version
    found = evaluate(delta, sets.source(task).records, encoder).metrics
    assert {name: value for name, value in delta.metrics.items() if name != "loss"} == pytest.approx(found, abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "the run directory is gone"
    lines = [json.loads(line) for line in (tmp_path / "mine" / "log.jsonl").read_text().splitlines()]
    started = task in (*WHOLE_BATCH, "classification")  # which is measured before the first step too
    assert len([line for line in lines if line.get("stage") != 1]) == outcome.state.step + 2 + started
    assert outcome.difference < 1e-5 * max(1.0, 1.0 / delta.provenance.get("calibration", {}).get("temperature", 1.0))


LONG = [
    {
        "text": " ".join(["the river is cold ."] * i + [f"the film was {word}"] + ["Ada went to bank ."] * (4 - i)),
        "label": label,
    }
    for i in range(5)
    for word, label in (("good", "up"), ("bad", "down"))
]


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("method", ["lora", "probe"])
def test_long_texts_are_learned_in_windows(tmp_path: Path, bert: Encoder, method: str, aggregate: str):
    """What training measures is what the saved delta answers; the probe is the mean's, which max does not begin at."""
    source = Source.read(LONG)
    config = TrainConfig.of("classification", (method,), max_length=10, epochs=2, long="windows", aggregate=aggregate)
    outcome = train(config, bert, source, source, place=Destination(tmp_path / "mine"))
    delta, encoder = open_delta(tmp_path / "mine", None)
    assert (delta.task.long, delta.task.aggregate, delta.task.stride) == ("windows", aggregate, 2)
    begun_at_probe = "probe" in outcome.baselines or outcome.unimproved
    assert begun_at_probe == (method == "lora" and aggregate == "mean")
    found = evaluate(delta, source.records, encoder)
    assert {name: value for name, value in delta.metrics.items() if name != "loss"} == pytest.approx(found.metrics)
    assert found.truncated == 0
    assert {answer["windows"] for answer in found.answers} == {4}


def test_the_probe_of_long_texts_reads_the_mean_of_their_windows(tmp_path: Path, bert: Encoder):
    config = TrainConfig.of("classification", recipe="lp", max_length=10, pooling="mean", long="windows", stride=0)
    ready = prepare(config, bert, Source.read(LONG))
    found = pooled(ready.live, ready.items, (3,), 64)[3]
    for item, row in zip(ready.items, found, strict=True):
        own = torch.cat([bert_rows(bert, encoding.ids) for encoding in item.encodings])
        sizes = torch.tensor([float(encoding.own) for encoding in item.encodings])
        assert sum(sizes) == len(LONG[0]["text"].split())
        assert torch.allclose(row, sizes @ own / sizes.sum(), atol=1e-5)


def bert_rows(encoder: Encoder, ids: tuple[int, ...]) -> torch.Tensor:
    """The mean row [1, H] of a sequence, by transformers."""
    model = AutoModel.from_pretrained(encoder.name).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state.mean(1)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("lora", AUTO)] + ["lora,bitfit"])
def test_every_method_becomes_a_delta(tmp_path: Path, bert: Encoder, method: str):
    outcome = run(bert, tmp_path / "mine", method=method, without_dev=True)
    delta, _ = open_delta(tmp_path / "mine", None)
    assert ",".join(delta.kinds) == ("full" if outcome.delta.weights else method)
    assert outcome.state.metrics == {}
    assert outcome.delta.metrics == {}


def test_the_probe_is_where_training_begins_and_what_stays_if_nothing_is_better(tmp_path: Path, bert: Encoder):
    """The head of the first stage is the optimum; a delta that does not move is worth nothing beside it."""
    still = run(bert, tmp_path / "still", learning_rate=1e-9, head_learning_rate=1e-9, epochs=1)
    probe = run(bert, tmp_path / "probe", recipe="lp", pooling="cls")
    assert still.unimproved
    assert (still.delta.kinds, still.state.best_step) == (("probe",), 0)
    for name, tensor in probe.delta.head.items():
        assert torch.allclose(still.delta.head[name], tensor, atol=1e-4)
    assert open_delta(tmp_path / "still", None)[0].metrics == still.delta.metrics
    assert still.delta.metrics == pytest.approx(probe.delta.metrics, abs=1e-5)
    whole = run(bert, tmp_path / "whole", method="full", learning_rate=1e-2, epochs=1)
    assert whole.unimproved
    assert whole.delta.metrics == pytest.approx(probe.delta.metrics, abs=1e-5), "on the encoder as it was before"
    bert = bert.fresh()
    weak = {"lp_path": 1}  # C = 1e-7: nearly the constant answer
    moved = run(bert, tmp_path / "moved", learning_rate=2e-2, epochs=8, **weak)
    assert not moved.unimproved
    assert moved.delta.kinds == ("lora",)
    known = store.load(moved.path).provenance["baselines"]
    assert known["probe"]["accuracy"] < moved.delta.metrics["accuracy"]
    assert known["constant"]["accuracy"] == 0.5
    gain = moved.delta.provenance["gain"]
    assert gain["value"] == pytest.approx(moved.delta.metrics["accuracy"] - known["probe"]["accuracy"])
    assert gain["low"] < gain["value"] < gain["high"]
    assert "gain" not in still.delta.provenance


def test_scored_pairs_are_measured_beside_the_encoder_s_own_cosine(tmp_path: Path, bert: Encoder):
    for task in ("regression", "embedding"):
        known = run(bert, tmp_path / task, task).baselines["cosine"]
        vectors = [
            [
                found.answer["embedding"]
                for found in Pipeline(bert).answer(Request("base", {"text": text}) for text in pair)
            ]
            for pair in [(r.fields["text"], r.fields["text_pair"]) for r in sets.source(task).records]
        ]
        cosines = [float(torch.tensor(a) @ torch.tensor(b)) for a, b in vectors]
        gold = [r.fields["score"] for r in sets.source(task).records]
        assert known["spearman"] == pytest.approx(spearmanr(gold, cosines).statistic, abs=1e-6)


def test_an_embedding_keeps_its_prompts_and_the_ranges_of_its_dimensions(tmp_path: Path, bert: Encoder):
    """Those of the dev texts behind their prompts, as they are answered; of the training texts without a dev set."""
    prompts = {"prompt_query": "who ? ", "prompt_document": "the "}
    for name, more in (("dev", {}), ("alone", {"without_dev": True})):
        outcome = run(bert, tmp_path / name, "embedding", **prompts, **more)
        delta = store.load(outcome.path)
        assert delta.task.prompts == (("query", "who ? "), ("document", "the "))
        pipeline = Pipeline(bert.fresh(), [delta])
        records = sets.source("embedding", *(["dev.jsonl"] if name == "dev" else [])).records
        found = pipeline.answer(Request(delta.name, dict(record.fields)) for record in records)
        vectors = torch.tensor([one.answer[field] for one in found for field in ("embedding", "embedding_pair")])
        torch.testing.assert_close(torch.tensor(delta.task.ranges[0]), vectors.amin(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(delta.task.ranges[1]), vectors.amax(0), atol=1e-5, rtol=0)
        codes = pipeline({"text": "the cat", "encoding_format": "uint8"}, delta=delta.name).answer["embedding"]
        assert 0 <= min(codes) < max(codes) <= 255


def test_the_encoder_says_which_row_is_read(bert: Encoder):
    plain = TrainConfig.of("classification")
    assert (for_encoder(plain, bert).form.pooling, for_encoder(plain, bert).form.head) == ("cls", "linear"), (
        "it has a pooler"
    )
    bert.base_head = {}
    assert for_encoder(plain, bert).form.pooling == "mean"
    bert.sentence = TaskSpec("embedding", pooling="max", head="none")
    for task in ("classification", "regression", "multiple-choice"):
        found = for_encoder(TrainConfig.of(task), bert)
        assert (found.form.pooling, found.form.head) == ("max", "linear")
    assert for_encoder(TrainConfig.of("embedding"), bert).form.pooling == "max"
    bert.sentence = replace(bert.sentence, prompts=(("query", "q: "), ("passage", "p: "), ("sts", "s: ")))
    assert for_encoder(TrainConfig.of("embedding"), bert).task_spec(()).prompts == (
        ("query", "q: "),
        ("document", "p: "),
    )
    told = for_encoder(TrainConfig.of("embedding", prompt_query="ask: ", prompt_document=""), bert)
    assert told.task_spec(()).prompts == (("query", "ask: "),)
    asked = TrainConfig.of("regression", pooling="cls", head="hf")
    assert for_encoder(asked, bert) == asked
    tokens = TrainConfig.of("token-classification")
    assert for_encoder(tokens, bert) == tokens


def test_provenance_tells_how_it_came_to_be(tmp_path: Path, bert: Encoder):
    outcome = run(bert, tmp_path / "mine", seed=3, start="random")
    facts = store.load(outcome.path).provenance
    asked = TrainConfig.of("classification", epochs=2, seed=3, start="random")
    assert TrainConfig.of(**facts["training"]) == asked.replaced(pooling="cls", head="hf")
    assert facts["train"]["rows"] == 16
    assert facts["train"]["sha256"] == sets.source("classification").sha256
    assert facts["kept"].endswith(f"of {outcome.state.step}")
    assert str(tmp_path) not in json.dumps(facts), "a path of this machine"


def test_versions_lie_below_the_name(tmp_path: Path, bert: Encoder):
    first = run(bert, tmp_path / "mine", version="1")
    second = run(bert, tmp_path / "mine", version="2", seed=1)
    assert [outcome.delta.version for outcome in (first, second)] == ["1", "2"]
    assert newest(tmp_path / "mine") == tmp_path / "mine" / "2"
    assert open_delta(tmp_path, None)[0].version == "2"
    assert [one.path for one in store.discover(tmp_path)["mine"]] == [first.path, second.path]
    with pytest.raises(FormatError, match=r"holds deltas, which one written there would hide; .*--version"):
        run(bert, tmp_path / "mine")
    with pytest.raises(FormatError, match=r"holds versions of delta 'mine'; .* --version 3"):
        run(bert, tmp_path / "mine" / "3")


def test_no_version_is_written_where_nobody_would_see_it(tmp_path: Path, bert: Encoder):
    run(bert, tmp_path / "mine")
    with pytest.raises(FormatError, match=r"mine is a delta itself, so .* would not be seen"):
        run(bert, tmp_path / "mine", version="2")
    (one,) = store.discover(tmp_path)["mine"]
    assert one.path == tmp_path / "mine"


@same_bits
def test_same_seed_same_delta_other_seed_another(tmp_path: Path, bert_path: Path):
    seeds = enumerate((0, 0, 1))
    deltas = [
        run(Encoder.load(str(bert_path)), tmp_path / f"d{i}", seed=seed, start="random").delta for i, seed in seeds
    ]
    same, other = ([torch.equal(deltas[0].tensors[n], d.tensors[n]) for n in d.tensors] for d in deltas[1:])
    assert all(same)
    assert not any(other)


def test_what_stands_there_is_replaced_only_when_asked(tmp_path: Path, bert: Encoder):
    run(bert, tmp_path / "mine")
    before = store.load(tmp_path / "mine").version
    with pytest.raises(InputError, match="exists; choose another --out, or replace it with --overwrite"):
        run(bert, tmp_path / "mine", seed=1)
    assert store.load(tmp_path / "mine").version == before
    run(bert, tmp_path / "mine", seed=1, overwrite=True)
    assert store.load(tmp_path / "mine").version != before


class Killed(Exception):
    pass


class Killer(NoCallback):
    def stepped(self, line: Any) -> None:
        if line["step"] == 2:
            raise Killed


def test_a_killed_run_is_continued_only_as_itself(tmp_path: Path, bert: Encoder):
    values = {"batch_size": 4, "save_every": 1}
    with pytest.raises(Killed):
        run(bert, tmp_path / "mine", watcher=Killer(), **values)
    assert not (tmp_path / "mine").exists()
    with pytest.raises(InputError, match=r"an unfinished run .* continue it with --resume"):
        run(bert, tmp_path / "mine", **values)
    with pytest.raises(InputError, match="seed was 0 and is now 1"):
        run(bert, tmp_path / "mine", resume=True, seed=1, **values)
    with pytest.raises(InputError, match=r"eval was '16 rows, sha256 .*' and is now None"):
        run(bert, tmp_path / "mine", resume=True, without_dev=True, **values)
    resumed = run(bert, tmp_path / "mine", resume=True, **{**values, "save_every": 7})
    straight = run(bert, tmp_path / "straight", resume=True, **values)
    assert all(torch.equal(resumed.delta.tensors[name], t) for name, t in straight.delta.tensors.items())


def test_continuation_runs_the_linears_as_the_run_did(tmp_path: Path, bert: Encoder, monkeypatch: pytest.MonkeyPatch):
    """Prepacked linears differ in the last bits, and whether they pay is timed: a run must not change over."""
    values = {"batch_size": 4, "save_every": 1}
    with pytest.raises(Killed):
        run(bert, tmp_path / "mine", watcher=Killer(), **values)
    asked: list[bool | None] = []
    path = tmp_path / ".mine.run" / "run.json"
    stored = json.loads(path.read_text())["machine"]["prepacked"]
    monkeypatch.setattr(bert, "prepack", lambda wanted=None: asked.append(wanted) or not stored)
    monkeypatch.setattr(bert, "unpack_weights", lambda: asked.append(False))
    run(bert, tmp_path / "mine", resume=True, **values)
    assert asked == [None, stored]


@pytest.mark.parametrize("laid_out", [True, False])
def test_in_bf16_the_saved_delta_is_compared_in_float32(laid_out: bool, tmp_path: Path):
    if laid_out and not available(torch.bfloat16):
        pytest.skip("this processor's oneDNN has no bfloat16")
    encoder = Encoder.load("minilm")
    outcome = run(encoder, tmp_path / "mine", prepack=laid_out, precision="bf16", epochs=1, max_steps=1)
    assert outcome.state.step == 1
    assert outcome.difference < 1e-5


def test_an_unseen_label_names_file_and_row(tmp_path: Path, bert: Encoder):
    dev = Source("dev.jsonl", [Record({"text": "good", "label": "sideways"}, "dev.jsonl:1")])
    config = TrainConfig.of("classification")
    with pytest.raises(DataError, match=r"dev\.jsonl:1: field 'label' has the unknown label 'sideways'"):
        train(config, bert, sets.source("classification"), dev, place=Destination(tmp_path / "mine"))
    assert list(tmp_path.iterdir()) == []


def test_another_domain_is_measured_and_chooses_nothing(tmp_path: Path, bert: Encoder, bert_path: Path):
    rows = [Record({"text": f"the {thing} was {word}", "label": "up"}, "ood.jsonl:1") for thing in ("dog", "cat")
            for word in ("good", "bad")]  # fmt: skip
    config = TrainConfig.of("classification", "full", max_length=32, epochs=2, learning_rate=1e-3, start="random")
    data = sets.source("classification"), sets.source("classification", "dev.jsonl")
    ood = Source("ood.jsonl", rows)
    delta = train(config, bert, *data, ood=ood, place=Destination(tmp_path / "mine")).delta
    plain = train(config, Encoder.load(str(bert_path)), *data, place=Destination(tmp_path / "plain")).delta
    assert delta.weights
    assert all(torch.allclose(plain.weights[name], tensor, atol=1e-3) for name, tensor in delta.weights.items())
    mine, encoder = open_delta(tmp_path / "mine", None)
    found = evaluate(mine, rows, encoder).metrics
    assert {name.removeprefix("ood_"): v for name, v in delta.metrics.items() if name.startswith("ood_")} == (
        pytest.approx(found | {"loss": delta.metrics["ood_loss"]}, abs=1e-5)
    )
    own = {name: v for name, v in delta.metrics.items() if not name.startswith("ood_")}
    assert own == pytest.approx(plain.metrics, abs=1e-3)
    assert delta.provenance["ood"]["rows"] == 4
    strange = Source("ood.jsonl", [Record({"text": "good", "label": "sideways"}, "ood.jsonl:7")])
    with pytest.raises(DataError, match=r"ood\.jsonl:7: field 'label' has the unknown label 'sideways'"):
        train(config, bert, *data, ood=strange, place=Destination(tmp_path / "other"))


def test_labels_may_be_given_in_order(tmp_path: Path, bert: Encoder):
    outcome = run(bert, tmp_path / "mine", labels=("up", "down", "never"))
    assert outcome.delta.task.labels == ("up", "down", "never")


def test_counts_are_the_formulas(bert: Encoder):
    config = TrainConfig.of("classification", "lora,prompt", labels=("a", "b"), max_length=32)
    live = make_live(bert, config, config.task_spec(config.form.labels))
    count = count_parameters(live)
    assert count.delta == parameter_count(specs_for(config, bert.anatomy), bert.anatomy) == 3 * 2 * 8 * 64 + 20 * 32
    assert count.head == 32 * 2 + 2
    assert count.share == pytest.approx(count.trained / (count.encoder + count.head))


def test_full_trains_the_encoder_and_the_pooler(bert: Encoder):
    config = TrainConfig.of("classification", "full", labels=("a", "b"), max_length=32, start="random")
    count = count_parameters(make_live(bert, config, config.task_spec(config.form.labels)))
    assert count.delta == count.encoder
    assert count.head == 32 * 32 + 32 + 32 * 2 + 2


def test_several_deltas_are_no_delta(tmp_path: Path, bert: Encoder):
    for name in ("a", "b"):
        run(bert, tmp_path / name, method="probe", epochs=1)
    with pytest.raises(InputError, match="holds 2 deltas; give one of them: a, b"):
        open_delta(tmp_path, None)


def test_description_is_plain_json(tmp_path: Path, bert: Encoder):
    outcome = run(bert, tmp_path / "mine", method="lora,bitfit", epochs=1, start="random")
    facts = json.loads(json.dumps(describe(outcome.path, outcome.delta)))
    assert facts["kinds"] == ["lora", "bitfit"]
    assert facts["specs"]["lora"]["rank"] == 8
    assert facts["task"]["labels"] == ["down", "up"]
    assert facts["peft"] is False
    assert facts["files"]["log.jsonl"] > 0


def test_devices_are_checked():
    assert find_device("cpu") == "cpu"
    assert find_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(SpecError, match="unknown device 'gpu'"):
        find_device("gpu")
    with pytest.raises(SpecError, match=r"torch sees .* CUDA GPUs"):
        find_device("cuda:99")


def test_a_delta_knows_that_it_was_trained_on_pairs(tmp_path: Path, bert: Encoder):
    pairs = Source(
        "pairs",
        [Record({**fields, "text_pair": "x"}, where) for fields, where in sets.source("classification").records],
    )
    mixed = Source("mixed", [*pairs.records, sets.source("classification").records[0]])
    for source, known in ((pairs, True), (mixed, False)):
        out = tmp_path / source.name
        train(TrainConfig.of("classification", max_length=32, epochs=1), bert, source, place=Destination(out))
        assert store.load(out).task.pairs is known


def test_bad_records_are_skipped_and_named(tmp_path: Path, bert: Encoder):
    source = sets.source("classification")
    bad = [Record({"label": "up"}, "x:1"), Record({"text": "a", "label": 1.5}, "x:2")]
    strange = Record({"text": "the house was great", "label": "sideways"}, "dev:9")
    config = TrainConfig.of("classification", skip_bad=True, max_length=32, max_steps=2)
    whole = Data(Source("x", [*bad, *source.records]), Source("dev", [strange, *source.records]))
    data = usable(config, whole)
    assert data.train.records == data.dev.records == list(source.records)  # type: ignore[union-attr]
    assert [line.partition(" ")[0] for line in data.skipped] == ["x:1:", "x:2:", "dev:9:"]
    assert usable(config.replaced(skip_bad=False), whole) is whole
    outcome = train(config, bert, data.train, data.dev, place=Destination(tmp_path / "mine"))
    assert (tmp_path / "mine" / "skipped.txt").read_text().splitlines() == data.skipped
    facts = outcome.delta.provenance
    assert (facts["train"]["skipped"], facts["eval"]["skipped"]) == (2, 1)
    with pytest.raises(DataError, match="x: none of its 2 records can be read: x:1"):
        usable(config, Data(Source("x", bad)))


def rows_of(count: int, labels: int = 2) -> Source:
    return Source("few", [Record({"text": "good", "label": str(i % labels)}, f"few:{i}") for i in range(count)])


def test_few_rows_have_a_rate_of_their_own(bert: Encoder):
    few = for_rows(TrainConfig.of("classification"), rows_of(100))
    assert few.rate("lora") == FEW_ROWS_RATES["lora"]
    assert for_rows(TrainConfig.of("classification"), rows_of(FEW_ROWS)).rate("lora") == LEARNING_RATES["lora"]
    for own in ({"start": "random"}, {"method": "full"}, {"method": "auto"}, {"recipe": "lp-ft"}):
        config = TrainConfig.of("classification", **own)
        assert for_rows(config, rows_of(100)) == config, "as given, as its papers have it, or not tried"
    given = for_rows(TrainConfig.of("classification", learning_rate=5e-4), rows_of(100))
    assert (given.rate("lora"), given.plan.start) == (5e-4, "contrastive")
    for method in ("adapter", "prompt", "lora,bitfit"):
        own = for_rows(TrainConfig.of("classification", method), rows_of(100))
        name = method.partition(",")[0]
        assert (own.rate(name), own.plan.start) == (LEARNING_RATES[name], "contrastive")
    assert for_rows(TrainConfig.of("classification", start="probe"), rows_of(100)).plan.start == "probe"
    assert for_rows(TrainConfig.of("regression"), rows_of(100)).plan.start is None
    assert for_rows(TrainConfig.of("classification"), rows_of(CONTRASTIVE_ROWS)).plan.start is None
    assert for_rows(TrainConfig.of("classification"), rows_of(100, labels=60)).plan.start is None, "hardly a pair"
    said = "contrastive start; lora at 0.003; 20 epochs (for 100 rows)"
    assert choices(TrainConfig.of("classification"), bert, rows_of(100)).endswith(said)
    assert "no epochs without --eval (for" in choices(
        TrainConfig.of("classification"), bert, rows_of(100), judged=False
    )
    given = TrainConfig.of("classification", learning_rate=1e-4, epochs=2)
    assert choices(given, bert, rows_of(100)).endswith("0.0001; 2 epochs")


def test_a_sparse_head_begins_at_the_words_of_a_text_and_sparse(minilm_path: str):
    """Before a step: few words of the vocabulary count, and those of the text are among the first."""
    encoder = Encoder(minilm_path)
    texts = ["ferry to the harbour", "lawyers read the contract", "rain fell in the valley", "she tuned the piano"]
    source = Source.read([{"anchor": text, "positive": f"about {text}"} for text in texts])
    ready = prepare(TrainConfig.of("sparse", max_length=16), encoder, source)
    pipeline = Pipeline(encoder, [ready.live.freeze("words")])
    for text in texts:
        found = pipeline(text, "words").answer["sparse"]
        assert len(found) < 0.1 * ready.live.task.width
        assert {text.split()[-1], text.split()[0]} & {entry["token"] for entry in found[:20]}
    assert ready.live.freeze("words").bytes == 716_520 + 4 * sum(
        tensor.numel() for tensor in ready.live.named_tensors().values()
    )


def test_a_sparse_head_of_the_checkpoint_stays_as_it_is(tmp_path: Path):
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(tiny.CONFIGS["bert"]()).save_pretrained(tmp_path)
    tiny.tokenizer("bert").save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    live = prepare(TrainConfig.of("sparse", max_length=16), encoder, sets.source("sparse")).live
    assert not live.head.own_tensors()
    assert all(tensor.equal(encoder.base_head[str(base)]) for _, base, tensor in live.head.named())
    with pytest.raises(SpecError, match="method probe trains nothing for sparse"):
        prepare(TrainConfig.of("sparse", "probe", max_length=16), encoder, sets.source("sparse"))

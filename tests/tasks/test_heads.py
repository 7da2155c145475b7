"""Heads give what HuggingFace's task models give, for every family and task, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from bertology_serve.errors import FormatError, SpecError, Unsupported
from bertology_serve.families import FAMILIES
from bertology_serve.tasks.heads import Head, head_form, pool
from bertology_serve.tasks.spec import TaskSpec

H = 24
SIZE = {"vocab_size": 40, "hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OPTIONS = {
    **{family: {} for family in FAMILIES},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "jina_embeddings_v3": {"position_embedding_type": "absolute"},
    "rembert": {"input_embedding_size": 16},
    "albert": {"embedding_size": 16},
    "big_bird": {"attention_type": "original_full"},
    "roformer": {"hidden_act": "relu"},
    "longformer": {"attention_window": 4},
    "eurobert": {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": H, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "deberta": {"pooler_hidden_act": "tanh"},
    "modernbert": {"pad_token_id": 0, "classifier_activation": "silu", "norm_eps": 1e-3},
}
LABELS = ("B-x", "I-x", "O")
TASKS = {
    "classification": (AutoModelForSequenceClassification, TaskSpec("classification", LABELS)),
    "regression": (AutoModelForSequenceClassification, TaskSpec("regression")),
    "token-classification": (AutoModelForTokenClassification, TaskSpec("token-classification", LABELS)),
    "question-answering": (AutoModelForQuestionAnswering, TaskSpec("question-answering")),
    "multiple-choice": (AutoModelForMultipleChoice, TaskSpec("multiple-choice")),
}
FORMS = {"token-classification": "tokens", "question-answering": "answers", "multiple-choice": "choice"}
PAIRS = [
    (family, task)
    for family, own in FAMILIES.items()
    for task in TASKS
    if family in CONFIG_MAPPING and getattr(own, FORMS.get(task, "sequence")) is not None
]
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 11, 3], [2, 4, 10, 12, 3]])


def task_model(family, task, **options):
    """A random HuggingFace task model, every parameter away from its trivial start."""
    auto, spec = TASKS[task]
    size = {} if family == "distilbert" else SIZE
    config = AutoConfig.for_model(family, **{**size, **OPTIONS[family], **options})
    config.num_labels = max(spec.outputs, 1)
    torch.manual_seed(0)
    model = auto.from_config(config).double().eval()
    if spec.kind == "multiple-choice" and getattr(model.base_model, "pooler", model) is None:
        pytest.skip("this transformers leaves out the pooler that its own head reads")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, spec


def form_of(model, spec):
    return head_form(model.config.model_type, model.base_model_prefix, spec, H, model.config.to_dict())


def ours_and_theirs(model, spec):
    """Our head's output on the model's own hidden rows, and the model's logits, both [n, C]."""
    head = Head.build(form_of(model, spec), {}).double().eval()
    state = model.state_dict()
    head.load({name: state[name] for name, _, _ in head.named()})
    ids = IDS.clamp(max=model.config.vocab_size - 1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        hidden = model.base_model(ids, attention_mask=mask)[0]
        rows = hidden.flatten(0, 1) if spec.per_token else hidden[:, 0]
        if spec.kind == "multiple-choice":
            return head(rows), model(ids[None], attention_mask=mask[None]).logits.T
        theirs = model(ids, attention_mask=mask)
    if spec.kind == "question-answering":
        return head(rows), torch.stack([theirs.start_logits, theirs.end_logits], -1).flatten(0, 1)
    return head(rows), theirs.logits.flatten(0, -2)


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_logits_equal_those_of_the_task_model(family, task):
    ours, theirs = ours_and_theirs(*task_model(family, task))
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_a_family_is_proven_above_or_refused_by_name():
    assert set(OPTIONS) == set(FAMILIES)
    assert len({family for family, _ in PAIRS}) >= (23 if "eurobert" in CONFIG_MAPPING else 22)
    for family, kind in (
        ("longformer", "classification"),
        ("luke", "token-classification"),
        ("gte", "multiple-choice"),
    ):
        spec = TaskSpec(kind, LABELS if kind != "multiple-choice" else ())
        with pytest.raises(Unsupported, match=rf"transformers' head of {family} for {kind} is not known here.*linear"):
            head_form(family, family, spec, H, {})
        assert head_form(family, family, replace(spec, head="linear"), H, {})


@pytest.mark.parametrize(("family", "task"), PAIRS)
def test_every_parameter_outside_the_encoder_has_its_name_in_the_head(family, task):
    model, spec = task_model(family, task)
    names = {name for name, _ in model.named_parameters()}
    outside = {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}
    ours = {name for name, _, _ in Head(form_of(model, spec)).named()}
    assert outside <= ours <= names


@pytest.mark.parametrize(("bias", "norm_bias"), [(True, True), (False, False)])
def test_modernbert_switches_its_biases(bias, norm_bias):
    model, spec = task_model("modernbert", "classification", classifier_bias=bias, norm_bias=norm_bias)
    assert ("head.dense.bias" in model.state_dict()) is bias
    ours, theirs = ours_and_theirs(model, spec)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_what_the_base_brings_is_frozen_and_not_the_deltas():
    form = head_form("bert", "bert", TaskSpec("classification", LABELS), H, {})
    base = {"pooler.dense.weight": torch.randn(H, H), "pooler.dense.bias": torch.randn(H)}
    head = Head.build(form, base, torch.Generator().manual_seed(0))
    assert sorted(head.own_tensors()) == ["classifier.bias", "classifier.weight"]
    assert {parameter.shape for parameter in head.parameters() if parameter.requires_grad} == {(3, H), (3,)}
    torch.testing.assert_close(head.layers[0].linear.weight.detach(), base["pooler.dense.weight"], atol=0, rtol=0)


def test_heads_that_are_not_trained_share_what_the_base_brings():
    form = head_form("bert", "bert", TaskSpec("classification", LABELS), H, {})
    base = {"pooler.dense.weight": torch.randn(H, H), "pooler.dense.bias": torch.randn(H)}
    before = {name: tensor.clone() for name, tensor in base.items()}
    head, other = (Head.build(form, base, torch.Generator().manual_seed(0)) for _ in range(2))
    other.load(other.own_tensors() | {"bert.pooler.dense.weight": torch.ones(H, H)})
    for one in (head, other):
        one.share(base)
    pooler = head.layers[0].linear
    assert pooler.weight.data_ptr() == base["pooler.dense.weight"].data_ptr()
    assert torch.equal(other.layers[0].linear.weight, torch.ones(H, H)), "the delta's own"
    assert all(torch.equal(base[name], before[name]) for name in base)
    rows = torch.randn(2, H)
    expected = torch.tanh(rows @ before["pooler.dense.weight"].T + before["pooler.dense.bias"])
    torch.testing.assert_close(head.layers[0](rows), expected)


def test_full_fine_tuning_adopts_what_the_base_brings():
    form = head_form("modernbert", "model", TaskSpec("classification", LABELS), H, {})
    base = {"head.dense.weight": torch.randn(H, H), "head.norm.weight": torch.randn(H)}
    head = Head.build(form, base, torch.Generator().manual_seed(0), adopt=True)
    assert all(parameter.requires_grad for parameter in head.parameters())
    own = head.own_tensors()
    assert sorted(own) == ["classifier.bias", "classifier.weight", "head.dense.weight", "head.norm.weight"]
    served = Head.build(form, {name: torch.zeros_like(tensor) for name, tensor in base.items()})
    served.load(own)
    rows = torch.randn(2, H)
    torch.testing.assert_close(served(rows), head(rows), atol=0, rtol=0)


def test_fresh_weights_are_seeded_and_small_and_leave_the_global_generator_alone():
    form = head_form("roberta", "roberta", TaskSpec("classification", LABELS), 200, {})
    before = torch.random.get_rng_state()
    one, two = (Head.build(form, {}, torch.Generator().manual_seed(3)).own_tensors() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["classifier.dense.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not one["classifier.dense.bias"].any()


def test_dropout_only_in_training():
    form = head_form("bert", "bert", TaskSpec("classification", LABELS), H, {})
    head = Head.build(form, {}, torch.Generator().manual_seed(0), dropout=0.5)
    rows = torch.randn(4, H)
    assert not torch.equal(head(rows), head(rows))
    head.eval()
    assert torch.equal(head(rows), head(rows))


def test_linear_head_is_one_layer_and_embeddings_have_none():
    spec = TaskSpec("classification", LABELS, head="linear")
    assert [dense.path for dense in head_form("bert", "bert", spec, H, {})] == ["classifier"]
    rows = torch.randn(2, H)
    embedding = Head.build(head_form("bert", "bert", TaskSpec("embedding", head="none"), H, {}), {})
    assert torch.equal(embedding(rows), rows)


def test_load_refuses_what_does_not_fit():
    form = head_form("bert", "bert", TaskSpec("classification", LABELS), H, {})
    head = Head.build(form, {})
    good = head.own_tensors()
    with pytest.raises(FormatError, match=r"lacks bert\.pooler\.dense\.bias"):
        head.load({name: tensor for name, tensor in good.items() if name != "bert.pooler.dense.bias"})
    with pytest.raises(FormatError, match=r"no tensor 'clasifier\.bias'; did you mean 'classifier\.bias'"):
        head.load({**good, "clasifier.bias": torch.zeros(3)})
    with pytest.raises(FormatError, match=r"shape \[2\]; expected \[3\]"):
        head.load({**good, "classifier.bias": torch.zeros(2)})


def test_adopt_takes_what_another_head_has_and_keeps_the_rest():
    form = head_form("bert", "bert", TaskSpec("classification", LABELS), H, {})
    pooler = {"pooler.dense.weight": torch.randn(H, H), "pooler.dense.bias": torch.randn(H)}
    before = Head.build(form, pooler, torch.Generator().manual_seed(0))
    head = Head.build(form, pooler, torch.Generator().manual_seed(1), adopt=True)
    head.adopt(before.own_tensors())
    rows = torch.randn(2, H)
    torch.testing.assert_close(head(rows), before(rows), atol=0, rtol=0)
    assert all(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(FormatError, match=r"shape \[2\]; expected \[3\]"):
        head.adopt({"classifier.bias": torch.zeros(2)})


def test_unknown_activation_is_refused():
    form = head_form("deberta-v2", "deberta", TaskSpec("regression"), H, {"pooler_hidden_act": "gelo"})
    with pytest.raises(SpecError, match="did you mean 'gelu'"):
        Head(form)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_pool_equals_a_loop_and_is_differentiable(pooling):
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    rows, lengths = torch.tensor([1, 2, 4, 5, 6, 8]), torch.tensor([2, 3, 1])
    texts = hidden[rows].split([2, 3, 1])
    expected = {
        "cls": [text[0] for text in texts],
        "mean": [text.mean(0) for text in texts],
        "max": [text.amax(0) for text in texts],
    }[pooling]
    found = pool(hidden, rows, lengths, pooling)
    torch.testing.assert_close(found, torch.stack(expected))
    assert torch.autograd.gradcheck(lambda x: pool(x, rows, lengths, pooling), hidden)


def test_pool_refuses_an_unknown_pooling():
    with pytest.raises(SpecError, match="did you mean 'mean'"):
        pool(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1]), "maen")


def test_the_mlp_is_eh_ft_s():
    """H -> 2048 -> C with a ReLU between, drawn from N(0, 0.005²), the same for every family."""
    spec = TaskSpec("classification", LABELS, head="mlp")
    head = Head.build(head_form("bert", "bert", spec, H, {}), {}, torch.Generator().manual_seed(0), dropout=0.5)
    weights = head.own_tensors()
    first, last = weights["classifier.dense.weight"], weights["classifier.out_proj.weight"]
    assert (first.shape, last.shape) == ((2048, H), (3, 2048))
    assert first.std().item() == pytest.approx(0.005, rel=0.02)
    assert last.std().item() == pytest.approx(0.005, rel=0.05)
    rows = torch.randn(4, H, generator=torch.Generator().manual_seed(1))
    expected = torch.relu(rows @ first.T) @ last.T
    torch.testing.assert_close(head(rows), expected, rtol=1e-5, atol=1e-7)
    assert head_form("roberta", "roberta", spec, H, {}) == head_form("modernbert", "model", spec, H, {})

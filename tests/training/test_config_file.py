from __future__ import annotations

import tomllib

import pytest

from bertology_serve.errors import SpecError
from bertology_serve.training.config_file import read_settings, settings_of, settings_text
from bertology_serve.training.train_config import TrainConfig


def test_flags_by_name_are_the_configuration():
    flags = {"task": "classification", "method": "lora,bitfit", "rank": 4, "targets": "query, key", "layers": "0,2"}
    config = read_settings({**flags, "batch-size": 8, "labels": ["no", "yes"]})
    options = {"lora": {"rank": 4, "targets": ("query", "key")}}
    assert config == TrainConfig.of(
        "classification", "lora,bitfit", batch_size=8, labels=("no", "yes"), options=options, layers="0,2"
    )


@pytest.mark.parametrize(
    ("given", "labels"),
    [("0,1", ("0", "1")), ([0, 1], ("0", "1")), ([True, False], ("true", "false")), ('"a, b",c', ("a, b", "c"))],
)
def test_labels_are_texts_as_the_data_s_are(given, labels):
    assert read_settings({"task": "classification", "labels": given}).form.labels == labels


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig.of("regression"),
        TrainConfig.of("classification", "mixout", labels=("a", "b"), options={"mixout": {"p": 0.9}}),
        TrainConfig.of("regression", "lora,bitfit", layers="1-2"),
        TrainConfig.of("regression", "vera", layers="top:2", options={"vera": {"layers": (1,)}}),
        TrainConfig.of("classification", recipe="eh-ft", method="lora", first_epochs=1, trunk_dropout=False,
                    options={"lora": {"targets": ("query",), "rank": 2}}),
    ],
)  # fmt: skip
def test_a_configuration_survives(config: TrainConfig):
    assert read_settings(settings_of(config)) == config


def test_layers_of_all_kinds_have_one_flag():
    options = {"bitfit": {"biases": "all", "layers": (1, 2)}, "ia3": {"layers": (1, 2)}}
    assert settings_of(TrainConfig.of("regression", "bitfit,ia3", options=options))["layers"] == ["1", "2"]
    with pytest.raises(SpecError, match="field 'layers' of ia3 has no flag"):
        settings_of(TrainConfig.of("regression", "bitfit,ia3", options={"ia3": {"layers": (1, 2)}}))


def test_what_has_no_flag_is_said():
    with pytest.raises(SpecError, match="train has no flag 'rnk'; did you mean 'rank'"):
        read_settings({"task": "classification", "rnk": 4})
    with pytest.raises(SpecError, match="field 'x' of lora has no flag"):
        settings_of(TrainConfig.of("regression", options={"lora": {"x": 1}}))


def test_text_is_toml_that_gives_the_same_configuration():
    options = {"lora": {"rank": 2, "targets": ("query",)}}
    config = TrainConfig.of("classification", "lora", labels=('a "b"\x7f', "ü"), learning_rate=1e-5, options=options)
    text = settings_text(config, {"backbone": "minilm", "train": "C:\\data"}, True)
    values = tomllib.loads(text)
    assert (values.pop("backbone"), values.pop("train"), values.pop("prepack")) == ("minilm", "C:\\data", True)
    assert read_settings(values) == config
    assert "# not a whole run: field 'x' of lora" in settings_text(
        TrainConfig.of("regression", options={"lora": {"x": 1}}), {}, False
    )

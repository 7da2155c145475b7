from __future__ import annotations

import json
from io import StringIO

import pytest

from bertology_serve.cli.ask import asked, record_of, shown
from bertology_serve.cli.main import main
from bertology_serve.errors import InputError
from tests.serving.conftest import DELTAS, deltas, encoder, pipeline, registry, server  # noqa: F401 - fixtures
from tests.serving.http.test_gate import PLAIN, keyring
from tests.serving.running import running

QUESTIONS = {
    "mood": ["the cat was good"],
    "topics": ["a good film"],
    "grade": ["the dog"],
    "names": ["Ada went to Paris"],
    "finder": ["where was the dog ?", "Ada met the dog in London ."],
    "chooser": ["the river was cold", "the house", "a very cold river bank"],
    "sense": ["money was not very good"],
    "labels": ["the river was very cold"],
    "raw": ["a great film"],
    "words": ["the great film"],
    "late": ["a film , not great"],
}


def test_the_questions_ask_every_task():
    assert QUESTIONS.keys() == DELTAS.keys()


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_delta_on_disk_and_a_server_answer_alike(name, encoder, deltas, server, capsys):  # noqa: F811
    local = ["ask", str(deltas / name), *QUESTIONS[name], "--backbone", encoder.name]
    remote = ["ask", name, *QUESTIONS[name], "--url", server.url]
    assert main(local) == 0
    said = capsys.readouterr().out
    assert said.strip()
    assert main(remote) == 0
    assert capsys.readouterr().out == said
    found = []
    for command in (local, remote):
        assert main([*command, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert (found[0]["delta"], found[0]["task"]) == (name, DELTAS[name][1].kind)
    assert {key for key in found[0] if found[0][key] not in ([], False)} <= found[1].keys()


def test_several_texts_are_answered_one_a_line_with_what_was_asked(encoder, deltas, capsys):  # noqa: F811
    assert main(["ask", str(deltas / "mood"), "a cat", "the dog", "--backbone", encoder.name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("    ")[1] for line in lines] == ["a cat", "the dog"]


def test_texts_and_pairs_come_from_stdin(server, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("sys.stdin", StringIO("who met Ada ?\tAda met the dog .\n\nwho went ?\tthe cat went .\n"))
    assert main(["ask", "finder", "--url", server.url, "--json"]) == 0
    assert [json.loads(line)["delta"] for line in capsys.readouterr().out.splitlines()] == ["finder"] * 2


def test_labels_of_a_call(server, capsys):  # noqa: F811
    assert main(["ask", "labels", "a red house", "--labels", "house,money", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"].keys() == {"house", "money"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["moood", "x"], "no delta 'moood' at http://.*did you mean 'mood'"),
        (["finder", "who ?"], "1 texts were given to a delta of pairs; expected them two by two"),
        (["chooser", "alone"], "multiple-choice was given 1 texts; expected a premise and its choices"),
        (["mood", "x", "--labels", "a,b"], "--labels are what zero-shot chooses from, and mood does classification"),
    ],
)
def test_what_cannot_be_asked(given, message, server, capsys):  # noqa: F811
    import re

    assert main(["ask", *given, "--url", server.url]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_key_goes_along_and_its_lack_is_told(pipeline, capsys, monkeypatch):  # noqa: F811
    with running(pipeline, keyring=keyring()) as guarded:
        assert main(["ask", "mood", "a cat", "--url", guarded.url]) == 2
        assert "no valid API key" in capsys.readouterr().err
        monkeypatch.setenv("BERTOLOGY_KEY", PLAIN["all"])
        assert main(["ask", "mood", "a cat", "--url", guarded.url]) == 0


def test_no_server_is_one_line(capsys):
    assert main(["ask", "mood", "a cat", "--url", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.startswith("error: no answer from http://127.0.0.1:9")


def test_answers_for_a_person():
    text = {"text": "Ada 😀 met Bob."}
    people = [{"label": "PER", "start": 10, "end": 13}, {"label": "PER", "start": 0, "end": 3}]
    assert shown({"entities": people}, text) == "[Ada PER] 😀 met [Bob PER]."
    assert shown({"entities": [], "redacted": "X met Y."}, text) == "X met Y."
    scores = {"bad": 0.07, "good": 0.93}
    assert shown({"label": "good", "score": 0.93, "scores": scores}, text) == "good 93 % (bad 7 %)"
    assert shown({"label": None, "score": 0.4}, text) == "no label 40 %"
    assert shown({"labels": [], "scores": scores}, text) == "no label"
    assert shown({"labels": ["good"], "scores": scores}, text) == "good 93 %"
    assert shown({"answer": {"text": "Bob", "score": 0.5}}, {}) == "Bob 50 %"
    assert shown({"choice": 1, "score": 0.8}, {"choices": ["a", "b"]}) == "b 80 %"
    assert shown({"value": 2.0}, text) == "2.000"
    assert shown({"similarity": 0.5, "embedding": [1.0]}, text) == "similarity 0.500"
    assert asked({"delta": "x", "premise": "It rained.", "choices": ["a", "b"]}) == "It rained. / a or b"


def test_too_many_texts_for_one_question():
    with pytest.raises(InputError, match="classification was given 3 texts; expected a text, or two of a pair"):
        record_of("classification", ["a", "b", "c"])

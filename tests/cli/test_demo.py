from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from bertology_serve.cli import demo
from bertology_serve.errors import VerificationError
from bertology_serve.examples import path

ANSWERS = [
    {"task": "classification", "label": "positive", "score": 0.9},
    {"task": "classification", "label": "negative", "score": 0.9},
    {"task": "classification", "label": "check_balance", "score": 0.9},
    {"task": "classification", "label": "set_alarm", "score": 0.9},
    {
        "task": "token-classification",
        "entities": [
            {"label": label, "start": start, "end": end}
            for label, start, end in (("PER", 0, 12), ("LOC", 24, 30), ("LOC", 34, 39), ("ORG", 52, 56))
        ],
    },
    {"task": "regression", "value": 3.9},
    {"task": "question-answering", "answer": {"text": "Anna", "score": 0.9}},
    {"task": "multiple-choice", "choice": 0, "score": 0.7},
    {"task": "embedding", "embedding": [0.0] * 384},
]


@contextmanager
def answering(answers):
    """A server that gives these answers, whatever it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body = json.dumps([{**one, "delta": q["delta"]} for one, q in zip(answers, asked, strict=True)]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_right_answers_end_well_and_a_wrong_one_fails_the_demo(monkeypatch, capsys):
    monkeypatch.setattr(demo, "serving", lambda deltas: answering(ANSWERS))
    demo._serve(None)
    assert "[Ada Lovelace PER] moved from" in capsys.readouterr().out
    for index, bad in ((0, {"label": "negative"}), (5, {"value": 2.9}), (7, {"choice": 1}), (4, {"entities": []})):
        wrong = [{**one, **(bad if i == index else {})} for i, one in enumerate(ANSWERS)]
        monkeypatch.setattr(demo, "serving", lambda deltas, wrong=wrong: answering(wrong))
        with pytest.raises(VerificationError, match=f"wrong answers: {demo.RIGHT[index][0]['delta']}: "):
            demo._serve(None)


def test_every_lesson_is_asked_and_no_question_is_among_its_examples():
    assert {lesson.name for lesson in demo.LESSONS} | {"base"} == {question["delta"] for question, _ in demo.RIGHT}
    read = {lesson.name: path(lesson.examples, "train").read_text(encoding="utf-8") for lesson in demo.LESSONS}
    for question, _ in demo.RIGHT:
        for text in (
            value for name, value in question.items() if name not in ("delta", "question") and isinstance(value, str)
        ):
            assert text not in read.get(question["delta"], "")

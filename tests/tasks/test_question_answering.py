from __future__ import annotations

import pytest
import torch

from bertology_serve.errors import DataError, SpecError
from bertology_serve.tasks.question_answering import NO_ANSWER, QuestionAnswering, best_spans
from bertology_serve.tasks.spec import TaskSpec

CONTEXT = "Ada Lovelace wrote the first program in 1843 . " * 3 + "Grace Hopper wrote the first linker in 1952 ."
RECORD = {"question": "Who wrote the linker ?", "context": CONTEXT, "answers": ["Grace Hopper"]}
TASK = QuestionAnswering(TaskSpec("question-answering", max_length=24, stride=6))
WITH_NULL = QuestionAnswering(TaskSpec("question-answering", (NO_ANSWER,), max_length=24, stride=6))


def rows_for(encodings, targets, height=9.0):
    """Outputs [len, 2] a window that point at the target rows."""
    outputs = []
    for encoding, (start, end) in zip(encodings, targets, strict=True):
        output = torch.zeros(len(encoding), 2)
        output[start, 0] = output[end, 1] = height
        outputs.append(output)
    return outputs


def test_windows_that_lack_the_answer_point_at_cls(minilm):
    example = TASK.example(RECORD, "x:1", True)
    encodings = TASK.encode(example, minilm)
    targets = TASK.target(example, encodings)
    assert len(encodings) > 3
    for encoding, (start, end) in zip(encodings, targets, strict=True):
        tokens = minilm.convert_ids_to_tokens(list(encoding.ids))
        if "grace" in tokens and "hopper" in tokens:
            assert tokens[start : end + 1] == ["grace", "hopper"]
        else:
            assert (start, end) == (0, 0)
    assert targets[0] == (0, 0) != targets[-1]
    assert TASK.weight([targets, targets]) == 2 * len(encodings)


def test_loss_is_the_mean_of_both_ends(minilm):
    example = TASK.example(RECORD, "x:1", True)
    encodings = TASK.encode(example, minilm)
    targets, lengths = TASK.target(example, encodings), [len(encoding) for encoding in encodings]
    torch.manual_seed(0)
    outputs = [torch.randn(length, 2) for length in lengths]
    expected = sum(
        -(output[:, 0].log_softmax(0)[start] + output[:, 1].log_softmax(0)[end]) / 2
        for output, (start, end) in zip(outputs, targets, strict=True)
    )
    torch.testing.assert_close(TASK.loss(torch.cat(outputs), lengths, [targets]), expected)


def test_answer_has_characters_of_the_context(minilm):
    example = TASK.example(RECORD, "x:1", True)
    encodings = TASK.encode(example, minilm)
    answer = TASK.decode(example, encodings, rows_for(encodings, TASK.target(example, encodings)))["answer"]
    assert answer["text"] == "Grace Hopper" == CONTEXT[answer["start"] : answer["end"]]
    assert 0.9 < answer["score"] <= 1.0
    assert TASK.metrics([{"answer": answer}], [example]) == {"exact": 1.0, "f1": 1.0}


def test_every_span_equals_a_search_by_hand(minilm):
    example = TASK.example({**RECORD, "top_k": 5}, "x:1", False)
    encodings = TASK.encode(example, minilm)
    torch.manual_seed(1)
    outputs = [torch.randn(len(encoding), 2) for encoding in encodings]
    best: dict[tuple[int, int], float] = {}
    for encoding, output in zip(encodings, outputs, strict=True):
        rows = [row for row, part in enumerate(encoding.parts) if part == 1]
        for first in rows:
            for last in rows:
                if first <= last < first + TASK.spec.max_answer_length:
                    span = (encoding.offsets[first][0], encoding.offsets[last][1])
                    score = (output[first, 0] + output[last, 1]).item()
                    best[span] = max(score, best.get(span, score))
    answers = TASK.decode(example, encodings, outputs)["answers"]
    expected = sorted(best, key=best.__getitem__, reverse=True)[:5]
    assert [(answer["start"], answer["end"]) for answer in answers] == expected
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)


def test_answers_longer_than_the_limit_are_left_out(minilm):
    short = QuestionAnswering(TaskSpec("question-answering", max_length=64, max_answer_length=2))
    example = short.example({"question": "who ?", "context": "one two three four"}, "x:1", False)
    (encoding,) = short.encode(example, minilm)
    output = torch.zeros(len(encoding), 2)
    first = encoding.parts.index(1)
    output[first, 0], output[first + 3, 1], output[first + 1, 1] = 9.0, 9.0, 8.0
    assert short.decode(example, [encoding], [output])["answer"]["text"] == "one two"


def test_no_answer_wins_only_where_training_knew_it(minilm):
    example = TASK.example(RECORD, "x:1", False)
    encodings = TASK.encode(example, minilm)
    outputs = rows_for(encodings, [(0, 0)] * len(encodings))
    assert TASK.decode(example, encodings, outputs)["answer"]["text"] != ""
    answer = WITH_NULL.decode(example, encodings, outputs)["answer"]
    assert answer == {"text": "", "start": 0, "end": 0, "score": pytest.approx(1.0, abs=0.01)}


def test_one_window_that_sees_an_answer_is_enough(minilm):
    example = WITH_NULL.example(RECORD, "x:1", True)
    encodings = WITH_NULL.encode(example, minilm)
    answer = WITH_NULL.decode(example, encodings, rows_for(encodings, WITH_NULL.target(example, encodings)))["answer"]
    assert answer["text"] == "Grace Hopper"


def test_no_answer_scores_what_the_least_window_gives_it(minilm):
    example = WITH_NULL.example(RECORD, "x:1", True)
    encodings = WITH_NULL.encode(example, minilm)
    outputs = [torch.zeros(len(encoding), 2) for encoding in encodings]
    for row, output in enumerate(outputs):
        output[0] = 5.0 + row % 3
    outputs[1][0] = torch.tensor([-1.0, 0.5])
    assert best_spans(example.context, encodings, outputs, 30)[1] == -0.5


def test_labels_say_whether_questions_may_have_no_answer():
    assert QuestionAnswering.labels_in([(RECORD, "x:1")]) == ()
    assert QuestionAnswering.labels_in([(RECORD, "x:1"), ({**RECORD, "answers": []}, "x:2")]) == (NO_ANSWER,)


def test_no_gold_answer_is_cls_in_every_window_and_scores_the_empty_text(minilm):
    example = WITH_NULL.example({**RECORD, "answers": {"text": [], "answer_start": []}}, "x:1", True)
    encodings = WITH_NULL.encode(example, minilm)
    assert set(WITH_NULL.target(example, encodings)) == {(0, 0)}
    assert WITH_NULL.metrics([{"answer": {"text": ""}}], [example]) == {"exact": 1.0, "f1": 1.0}


PLACE = CONTEXT.index("Grace Hopper")


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Grace Hopper"], "answer_start": [PLACE]},
        {"text": "Grace Hopper", "answer_start": PLACE},
        {"text": [" Grace Hopper "], "answer_start": [PLACE - 1]},
        {"text": ["Grace Hopper"], "answer_start": [PLACE - 3]},
        {"text": ["Grace Hopper"], "answer_start": [9999]},
        {"text": ["Grace Hopper"]},
        [{"text": "Grace Hopper", "answer_start": PLACE}],
        [{"text": "Grace Hopper", "start": PLACE}, "Grace Hopper"],
        ["Grace Hopper"],
        "Grace Hopper",
    ],
)
def test_forms_of_gold_answers(answers):
    assert TASK.example({**RECORD, "answers": answers}, "x:1", True).answers == ((PLACE, PLACE + 12),)


def test_the_occurrence_nearest_to_the_start_counts():
    place = CONTEXT.index("first program", 60)
    example = TASK.example({**RECORD, "answers": {"text": ["first program"], "answer_start": [place + 4]}}, "x:1", True)
    assert example.answers == ((place, place + 13),)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        (None, r"field 'answers' is missing"),
        (5, r"field 'answers' is 5 \(int\); expected a list"),
        (["nobody"], r"field 'answers' holds 'nobody' \(str\), which the context does not contain"),
        ([""], r"field 'answers' holds '' \(str\); expected a text that is not empty"),
        ([{"answer": "Ada"}], r"field 'answers' holds null"),
        ({"text": ["Ada"], "answer_start": []}, r"field 'answers' has 1 texts and 0 starts"),
        ({"text": ["Ada"], "answer_start": ["0"]}, r"field 'answers' has the start '0' \(str\); expected an integer"),
        ({"start": [0]}, r"field 'answers\.text' is null; expected a list"),
    ],
)
def test_bad_gold_answers(answers, problem):
    with pytest.raises(DataError, match=rf"^x:6: {problem}"):
        TASK.example({**RECORD, "answers": answers}, "x:6", True)


@pytest.mark.parametrize("top_k", [0, 21, "many", True, 1.5])
def test_bad_top_k(top_k):
    with pytest.raises(DataError, match=r"^x:6: field 'top_k' is .*; expected an integer from 1 to 20"):
        TASK.example({**RECORD, "top_k": top_k}, "x:6", False)


def test_a_length_without_room_is_refused():
    with pytest.raises(SpecError, match="max_length is 7; windows need at least 8 tokens"):
        QuestionAnswering(TaskSpec("question-answering", max_length=7))


def test_real_questions_are_found_again_through_their_targets(real_data, minilm):
    task = QuestionAnswering(TaskSpec("question-answering", max_length=128, stride=32))
    examples = [task.example(fields, where, True) for fields, where in real_data("squad", "dev", 120)]
    answers = []
    for example in examples:
        encodings = task.encode(example, minilm)
        targets = task.target(example, encodings)
        assert any(start for start, _ in targets)
        outputs = rows_for(encodings, targets)
        answers.append(task.decode(example, encodings, outputs))
    assert task.metrics(answers, examples)["f1"] > 0.99


def test_byte_level_answers_lose_the_space_before_them(byte_level):
    task = QuestionAnswering(TaskSpec("question-answering", max_length=512))
    record = {"question": "Who ?", "context": "It was Ada Lovelace\n in Paris", "answers": ["Ada Lovelace"]}
    example = task.example(record, "x:1", True)
    encodings = task.encode(example, byte_level)
    answer = task.decode(example, encodings, rows_for(encodings, task.target(example, encodings)))["answer"]
    assert (answer["text"], answer["start"], answer["end"]) == ("Ada Lovelace", 7, 19)


def test_a_context_without_tokens_has_the_empty_answer(minilm):
    example = TASK.example({"question": "Who ?", "context": "\u200b"}, "x:1", False)
    encodings = TASK.encode(example, minilm)
    outputs = [torch.randn(len(encoding), 2) for encoding in encodings]
    assert TASK.decode(example, encodings, outputs)["answer"] == {"text": "", "start": 0, "end": 0, "score": 1.0}

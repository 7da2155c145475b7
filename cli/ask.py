"""``bertology-serve ask``: a question to a delta that lies on disk or answers on a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from bertology_serve.cli.common import load_library, note
from bertology_serve.cli.options import listed
from bertology_serve.errors import InputError
from bertology_serve.tasks.spec import MULTIPLE_CHOICE, QUESTION_ANSWERING, ZERO_SHOT

if TYPE_CHECKING:
    from bertology_serve.files import JsonMapping, JsonObject

T = TypeVar("T")
AT_ONCE = 64  # lines of stdin
KEY = "BERTOLOGY_KEY"
Answering = Callable[[Sequence["JsonObject"]], list["JsonObject"]]


def ask(
    delta: Annotated[str, typer.Argument(help="A delta's directory, or the name of one on the server of --url.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="What is asked. Default: the lines of stdin.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Ask the server at this address.")] = None,
    key: Annotated[str | None, typer.Option(envvar=KEY, help="API key of that server.")] = None,
    labels: Annotated[str | None, typer.Option(help="Labels to choose from, with commas: for zero-shot.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Encoder. Default: the one that the delta names.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON as the server gives it, a line an answer.")
    ] = False,
) -> None:
    """Ask a delta something, and read the answer.

    Each text is one question. Deltas of pairs take texts two by two, question answering a question and its context,
    multiple choice a premise and all its choices. On stdin a line is a question; tabs part its texts.
    """
    own = {"labels": list(chosen)} if (chosen := listed(labels)) else {}
    with _remote(delta, url, key) if url else _local(delta, backbone, device) as (task, pairs, answer):
        if own and task != ZERO_SHOT:
            raise InputError(f"--labels are what {ZERO_SHOT} chooses from, and {delta} does {task}; leave them out")
        for group in _groups(texts, 0 if task == MULTIPLE_CHOICE else 2 if pairs else 1):
            records = [{**record_of(task, parts), **own} for parts in group]
            for record, found in zip(records, answer(records), strict=True):
                line = json.dumps(found, ensure_ascii=False) if as_json else shown(found, record)
                named = (not texts or len(group) > 1) and not as_json and "entities" not in found
                print(f"{line}    {asked(record)}" if named else line, flush=True)


def record_of(task: str, parts: Sequence[str]) -> JsonObject:
    """The texts of one question under the names that the task reads. Raises InputError where there are too few."""
    wanted = 2 if task in (QUESTION_ANSWERING, MULTIPLE_CHOICE) else 1
    if len(parts) < wanted or (len(parts) > 2 and task != MULTIPLE_CHOICE):
        needs = {QUESTION_ANSWERING: "a question and its context", MULTIPLE_CHOICE: "a premise and its choices"}
        raise InputError(f"{task} was given {len(parts)} texts; expected {needs.get(task, 'a text, or two of a pair')}")
    if task == QUESTION_ANSWERING:
        return {"question": parts[0], "context": parts[1]}
    if task == MULTIPLE_CHOICE:
        return {"premise": parts[0], "choices": list(parts[1:])}
    return dict(zip(("text", "text_pair"), parts, strict=False))


def shown(answer: JsonMapping, record: JsonMapping) -> str:
    """An answer in a few words: ``good 93 %``, ``[Ada PER] lives in [London LOC].``, ``pier four 98 %``."""
    if "entities" in answer:
        return answer.get("redacted") or _inline(record, answer["entities"])
    if "answer" in answer:
        return f"{answer['answer']['text']} {_percent(answer['answer']['score'])}"
    if "choice" in answer:
        return f"{record['choices'][answer['choice']]} {_percent(answer['score'])}"
    if "labels" in answer:
        scores = answer["scores"]
        return ", ".join(f"{label} {_percent(scores[label])}" for label in answer["labels"]) or "no label"
    if "label" in answer:
        rest = sorted(answer.get("scores", {}).items(), key=lambda item: -item[1])
        others = ", ".join(f"{label} {_percent(score)}" for label, score in rest[:3] if label != answer["label"])
        first = f"{answer['label'] or 'no label'} {_percent(answer['score'])}"
        return f"{first} ({others})" if others else first
    if "value" in answer:
        return f"{answer['value']:.3f}"
    if "similarity" in answer:
        return f"similarity {answer['similarity']:.3f}"
    if "embedding" in answer:
        return f"[{', '.join(f'{value:.3f}' for value in answer['embedding'][:4])}, ...] of {len(answer['embedding'])}"
    if "sparse" in answer:
        heaviest = sorted(answer["sparse"], key=lambda one: -one["value"])[:8]
        return ", ".join(f"{one.get('token', one['index'])} {one['value']:.2f}" for one in heaviest)
    return f"{len(answer['vectors'])} vectors of {len(answer['vectors'][0])}" if "vectors" in answer else str(answer)


def _inline(record: JsonMapping, entities: Sequence[JsonMapping]) -> str:
    """The text with each entity in brackets."""
    text, found, last = str(record["text"]), "", 0
    for one in sorted(entities, key=lambda entity: entity["start"]):
        if one["start"] >= last:
            found += f"{text[last : one['start']]}[{text[one['start'] : one['end']]} {one['label']}]"
            last = one["end"]
    return found + text[last:]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def asked(record: JsonMapping) -> str:
    """The texts of a question in one line."""
    texts = {name: value for name, value in record.items() if name not in ("delta", "labels")}
    return " / ".join(value if isinstance(value, str) else " or ".join(value) for value in texts.values())


def _groups(texts: Sequence[str] | None, each: int) -> Iterator[list[list[str]]]:
    """The texts of each question, ``each`` of them (0: all), some questions at once; those of stdin line by line where
    a person types them. Raises InputError for a text that is left over."""
    if texts:
        if each and len(texts) % each:
            raise InputError(f"{len(texts)} texts were given to a delta of pairs; expected them two by two")
        yield list(_batched(texts, each or len(texts)))
        return
    typed = sys.stdin.isatty()
    if typed:
        note("type a text and Enter; Ctrl-D ends")
    lines = (line.rstrip("\r\n").split("\t") for line in sys.stdin if not line.isspace())
    yield from _batched(lines, 1 if typed else AT_ONCE)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    return iter(lambda: list(islice(rest, size)), [])


@contextmanager
def _remote(name: str, url: str, key: str | None) -> Iterator[tuple[str, bool, Answering]]:
    """Task, whether it reads texts two by two, and what answers: of a server's delta."""
    import msgspec

    from bertology_serve.client import Client
    from bertology_serve.errors import NotFound, nearest

    with Client(url, key) as client:
        known = {one.name: one for one in client.deltas()}
        if name not in known:
            raise NotFound(f"no delta {name!r} at {url}; {nearest(name, known)}")

        def answer(records: Sequence[JsonObject]) -> list[JsonObject]:
            found = client.answer([{**record, "delta": name} for record in records])
            return [msgspec.to_builtins(one) for one in found]

        yield known[name].task, known[name].pairs or known[name].task == QUESTION_ANSWERING, answer


@contextmanager
def _local(directory: str, backbone: str | None, device: str) -> Iterator[tuple[str, bool, Answering]]:
    """The same of a delta on disk."""
    load_library(deltas=[Path(directory)], backbone=backbone, device=device)
    from bertology_serve.encoder.loading import find_device
    from bertology_serve.encoder.opening import open_delta
    from bertology_serve.encoder.pipeline import Pipeline

    delta, encoder = open_delta(Path(directory), backbone, find_device(device))
    pipeline = Pipeline(encoder, [delta])

    def answer(records: Sequence[JsonObject]) -> list[JsonObject]:
        return [one.as_dict() for one in pipeline(list(records), delta=delta.name)]

    yield delta.task.kind, delta.task.pairs or delta.task.kind == QUESTION_ANSWERING, answer

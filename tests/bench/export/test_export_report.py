from __future__ import annotations

import pytest

from bertology_serve.bench.export.accuracy import Accuracy, Closeness
from bertology_serve.bench.export.export_batches import Batches
from bertology_serve.bench.export.export_contenders import DENSE, DENSE_ROW, EAGER, UNPADDED, UNPADDED_ROW
from bertology_serve.bench.export.export_report import Bar, judge
from bertology_serve.bench.export.export_run import Result
from bertology_serve.bench.export.timing import Timed
from tests.bench.export.fake import batch

AT = "8×128, full"
SPEED = {EAGER: 4.0, DENSE: 2.0, UNPADDED: 1.0, DENSE_ROW: 0.9, UNPADDED_ROW: 0.5, "optimum O0": 2.1, "Olive": 2.2}


def result(fill: float = 0.4, metric: float = 0.804, neighbours: float = 0.0, same: bool = True) -> Result:
    """Measured once a contender, in processor seconds."""
    times = [Timed(name, (9.0,), (seconds,)) for name, seconds in SPEED.items()]
    full, sparse = batch(AT, 1.0), batch("texts", fill)
    return Result(
        [full, sparse],
        {AT: times, "texts": times},
        dict.fromkeys(SPEED, 0),
        {EAGER: Accuracy({"accuracy": 0.8}, 1.0, 0.0), UNPADDED_ROW: Accuracy({"accuracy": metric}, 0.99, 0.1)},
        {DENSE_ROW: Closeness(0.9975, 0.99, 0.0), UNPADDED_ROW: Closeness(0.998, 0.99, neighbours)},
        {DENSE: 0.4, UNPADDED: 0.5},
        {DENSE: same},
        {},
    )


def verdicts(found: Result) -> dict[str, tuple[float | None, str]]:
    return {one.name: (one.measured and round(one.measured, 3), one.verdict) for one in judge(found)}


def test_every_bar_is_judged():
    found = verdicts(result())
    assert found == {
        f"dense against optimum O0, {AT}": (1.05, "holds"),
        f"dense against optimum O3, {AT}": (None, "not measured"),
        f"dense against Olive, {AT}": (1.1, "missed"),
        "unpadded against dense, texts (fill 0.40)": (2.0, "missed"),
        f"unpadded against dense, {AT}": (2.0, "holds"),
        f"dense int8-row against fp32, {AT}": (2.222, "holds"),
        "unpadded int8-row against fp32, texts (fill 0.40)": (2.0, "holds"),
        "int8-row, cosine of embeddings": (0.998, "holds"),
        "int8-row, change of a row by its neighbours": (0.0, "holds"),
        "int8-row, change of accuracy in points": (0.4, "holds"),
        "export without verification, seconds": (0.5, "holds"),
        "forms whose bytes differ between exports": (0.0, "holds"),
    }


def test_full_texts_are_not_what_unpadding_promises_for():
    assert not any("texts" in name for name in verdicts(result(fill=0.6)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"metric": 0.79}, "int8-row, change of accuracy in points"),
        ({"neighbours": 1e-9}, "int8-row, change of a row by its neighbours"),
        ({"same": False}, "forms whose bytes differ between exports"),
    ],
)
def test_what_is_missed_is_said(changes, name):
    assert verdicts(result(**changes))[name][1] == "missed"


def test_promises_read_as_they_are_judged():
    assert (Bar("x", 1.0, least=1.1).promise, Bar("x", 1.0, most=2).promise) == ("≥ 1.1", "≤ 2")
    assert isinstance(result().batches[0], Batches)

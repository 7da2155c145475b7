from __future__ import annotations

import numpy as np
import pytest

from bertology_serve.export.samples import Case, built_in, of_encodings
from bertology_serve.tasks.spec import Encoding
from tests import tiny


@pytest.mark.parametrize("longest", [3, 10, 64, 500])
def test_every_shape_from_the_shortest_to_the_longest(longest):
    cases = list(built_in(tiny.tokenizer(), longest))
    shapes = [case.shape for case in cases]
    assert len(set(shapes)) >= 16
    assert shapes[0] == "1×1 right"
    assert shapes[-2:] == [f"2×{longest} right", f"2×{longest} left"]
    for case in cases:
        assert max(map(len, case.encodings)) == case.length <= longest
        assert all(len(one.types) == len(one) >= 1 for one in case.encodings)
    assert any(1 in one.types for case in cases for one in case.encodings) == (longest > 8)


def test_arrays_are_padded_on_the_side_that_the_case_says():
    rows = (Encoding((5, 6), (0, 1)), Encoding((7, 8, 9), (0, 0, 0)))
    left = Case(rows, 4, left=True).arrays(pad=1)
    assert left["input_ids"].tolist() == [[1, 1, 5, 6], [1, 7, 8, 9]]
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert left["token_type_ids"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert {array.dtype for array in left.values()} == {np.dtype(np.int64)}
    assert Case(rows, 4, left=False).arrays(1)["input_ids"].tolist() == [[5, 6, 1, 1], [7, 8, 9, 1]]


def test_records_come_in_batches_of_eight_as_they_are():
    records = [[Encoding((5,) * n, (0,) * n)] * 2 for n in (2, 3, 4, 5, 6)]
    cases = list(of_encodings(records))
    assert [case.shape for case in cases] == ["8×5 right", "2×6 left"]
    assert list(of_encodings([])) == []

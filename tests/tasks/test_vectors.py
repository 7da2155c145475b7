from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bertology_serve.errors import DataError, SpecError, Unsupported
from bertology_serve.tasks.spec import TaskSpec
from bertology_serve.tasks.vectors import FORMATS, VectorForm, in_ranges

WIDTH = 20
DRAWN = np.random.default_rng(0).normal(size=(50, WIDTH)).astype(np.float32)
RANGES = tuple(tuple(map(float, side)) for side in (DRAWN[:40].min(0), DRAWN[:40].max(0)))
RAW = TaskSpec("embedding", head="none", normalize=False, ranges=RANGES)
UNIT = TaskSpec("embedding", head="none", ranges=RANGES)


def quantised(embeddings: np.ndarray, precision: str, ranges: np.ndarray) -> np.ndarray:
    """sentence-transformers 6.2.0: ``quantize_embeddings`` with given ranges."""
    if precision.endswith("int8"):
        ranges = ranges.astype(np.float32, copy=False)
        starts = ranges[0, :]
        steps = (ranges[1, :] - starts) / 255
        steps = np.where(steps == 0, 1, steps)
        q_vals = np.clip(np.floor((embeddings - starts) / steps), 0, 255)
        return q_vals.astype(np.uint8) if precision == "uint8" else (q_vals - 128).astype(np.int8)
    packed = np.packbits(embeddings > 0, axis=-1)
    return packed if precision == "ubinary" else (packed - 128).astype(np.int8)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_codes_are_those_of_sentence_transformers(precision):
    form = VectorForm.read({"encoding_format": precision}, "x:1", RAW)
    found = np.array([form.encoded(torch.from_numpy(row), RAW) for row in DRAWN])
    np.testing.assert_array_equal(found, quantised(DRAWN, precision, np.array(RANGES)))
    if precision.endswith("int8"):
        assert (found.min(), found.max()) == ((0, 255) if precision == "uint8" else (-128, 127))


def test_a_dimension_that_never_varies_has_a_code():
    codes = in_ranges(np.array([1.0, 0.5], np.float32), ((1.0, 0.0), (1.0, 1.0)))
    assert codes.tolist() == [0, 127]


def test_cut_vectors_are_scaled_anew_and_their_codes_are_the_first():
    form = VectorForm.read({"dimensions": 8, "embedding_types": list(FORMATS)}, "x:1", UNIT)
    whole = VectorForm.read({"embedding_types": list(FORMATS)}, "x:1", UNIT)
    row = F.normalize(torch.from_numpy(DRAWN[0]), dim=0)
    cut, full = form.encoded(form.cut(row), UNIT), whole.encoded(whole.cut(row), UNIT)
    assert cut.keys() == {*FORMATS}
    assert cut["float"] == pytest.approx(F.normalize(row[:8], dim=0).tolist(), abs=1e-6)
    assert cut["int8"] == full["int8"][:8]
    assert cut["ubinary"] == full["ubinary"][:1]
    packed = np.frombuffer(base64.b64decode(cut["base64"]), "<f4")
    assert packed == pytest.approx(np.array(cut["float"], np.float32), abs=0)
    raw = VectorForm.read({"dimensions": 8}, "x:1", RAW)
    assert raw.encoded(raw.cut(row), RAW) == row[:8].tolist(), "what had no unit length gets none"
    asked = VectorForm.read({"normalize": True}, "x:1", RAW)
    assert np.linalg.norm(asked.encoded(3 * row, RAW)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"dimensions": 0}, DataError, "field 'dimensions' is 0 .*; expected an integer from 1"),
        ({"dimensions": True}, DataError, "field 'dimensions' is True"),
        ({"normalize": "yes"}, DataError, "field 'normalize' is 'yes' .*; expected true or false"),
        ({"normalize": False}, Unsupported, "this delta gives normalised embeddings"),
        ({"encoding_format": "int4"}, DataError, "field 'encoding_format' has 'int4' .*; expected float, base64"),
        ({"embedding_types": []}, DataError, "field 'embedding_types' has null"),
        ({"embedding_types": "int8"}, DataError, "field 'embedding_types' is 'int8' .*; expected a list"),
        ({"embedding_types": [None]}, DataError, "field 'embedding_types' has null"),
    ],
)
def test_what_cannot_be_given_is_named(record, error, message):
    with pytest.raises(error, match=f"x:1: {message}"):
        VectorForm.read(record, "x:1", UNIT)


def test_bytes_need_ranges():
    form = VectorForm.read({"encoding_format": "uint8"}, "x:1", UNIT)
    form.check(WIDTH, UNIT, "x:1")
    with pytest.raises(DataError, match="x:1: this delta has ranges of 20 dimensions; expected 32"):
        form.check(32, UNIT, "x:1")
    with pytest.raises(Unsupported, match="no ranges for int8 and uint8, which training finds"):
        VectorForm.read({"encoding_format": "uint8"}, "x:1", TaskSpec("embedding", head="none"))


@pytest.mark.parametrize("ranges", [((0.0,), (1.0, 2.0)), ((1.0,), (0.0,)), ((), ()), ((0.0,),), ((0.0,),) * 3])
def test_ranges_that_are_none(ranges):
    with pytest.raises(SpecError, match="ranges do not fit embedding"):
        TaskSpec("embedding", head="none", ranges=ranges)
    with pytest.raises(SpecError, match="ranges do not fit regression"):
        TaskSpec("regression", ranges=((0.0,), (1.0,)))

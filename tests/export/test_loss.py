from __future__ import annotations

import pytest
import torch

from bertology_serve.export.verify import lost


def weights(size: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A weight and the same with a random change of that size beside it, relative to the weight."""
    generator = torch.Generator().manual_seed(1)
    weight, change = (torch.randn(200, 100, generator=generator) for _ in range(2))
    return {"w": weight, "ids": torch.arange(3)}, {"w": weight + size * change, "ids": torch.arange(3)}


@pytest.mark.parametrize("size", [1e-1, 3e-3, 1e-5])
def test_against_the_definition(size):
    base, merged = weights(size)
    delta = merged["w"].double() - base["w"].double()
    for name, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        kept = merged["w"].to(kind).double() - base["w"].to(kind).double()
        expected = float((kept - delta).norm() / delta.norm())
        found = lost(base, merged)
        assert found is not None
        assert found[name] == pytest.approx(expected, rel=1e-9)


def test_small_deltas_are_lost_and_large_ones_are_not():
    large, small = lost(*weights(1.0)), lost(*weights(1e-3))
    assert large["float16"] < 1e-3
    assert large["bfloat16"] < 0.01
    assert small["bfloat16"] > 0.5
    assert small["float16"] < 0.5 < 10 * small["float16"] < 5


def test_nothing_changed_and_what_the_base_lacks():
    base, _ = weights(0.1)
    assert lost(base, dict(base)) is None
    found = lost(base, base | {"b": torch.full((4,), 1 / 3)})
    assert 0 < found["float16"] < 2**-11

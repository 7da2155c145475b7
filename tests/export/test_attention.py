from __future__ import annotations

import torch

from bertology_serve.export.torch_exporter import PrefixRows, Scene, attend


def scene(*lengths: int) -> Scene:
    made = Scene()
    made.enter(torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])
    return made


def test_the_mask_hides_padding_and_what_is_outside_the_window():
    seen = scene(4, 2)
    assert (seen.mask(None) == 0).squeeze().long().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (seen.mask(1) == 0)[1, 0].long().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert torch.isfinite(seen.mask(1)).all()
    assert seen.mask(1) is seen.mask(1)
    seen.enter(torch.ones(1, 2, dtype=torch.bool))
    assert (seen.mask(None) == 0).all()


def test_a_prefix_is_seen_from_everywhere():
    """Rows that see nothing else take the prefix's values as they are."""
    query, key, value = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    prefix = PrefixRows(torch.zeros(1, 8), torch.arange(8.0)[None], heads=2)
    far = scene(1)
    far.enter(torch.tensor([[True, False, False, False, False, False]]))
    out = attend(query, key, value, far, prefix, scale=0.5, window=2)
    assert out.shape == (1, 6, 2, 4)
    assert torch.equal(out[0, 5].flatten(), torch.arange(8.0))
    assert not torch.allclose(out[0, 0].flatten(), torch.arange(8.0))

"""The kernels inside the encoder: a mixed batch of every kind, as it would run on a GPU."""

from __future__ import annotations

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from tests.encoder import checks_kernels
from tests.encoder.test_mixed import logits, pipeline, requests
from tests.kernels.interpreting import checks, interpreted


@pytest.mark.parametrize("name", checks(checks_kernels))
def test_interpreted(name):
    problem = interpreted(checks_kernels.__name__)[name]
    assert not problem, problem


@pytest.mark.gpu
def test_minilm_on_gpu():
    on_cpu, on_gpu = (pipeline(Encoder.load("minilm", device=device)) for device in ("cpu", "cuda"))
    torch.backends.cuda.matmul.allow_tf32 = False
    pairs = [made.run([made.prepare(request) for request in requests()]) for made in (on_cpu, on_gpu)]
    for one, other in zip(*pairs, strict=True):
        assert (logits(one.as_dict()) - logits(other.as_dict())).abs().max() <= 1e-4

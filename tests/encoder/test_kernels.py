"""The kernels inside the encoder: a mixed batch of every kind, as it would run on a GPU."""

from __future__ import annotations

import pytest
import torch

from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.trainable import TrainableDelta
from bertology_serve.kinds.lora import Lora
from bertology_serve.tasks.spec import Encoding
from tests import tiny
from tests.encoder import checks_kernels
from tests.encoder.test_mixed import DELTAS, logits, pipeline, requests
from tests.kernels.interpreting import checks, interpreted


@pytest.mark.parametrize("name", checks(checks_kernels))
def test_interpreted(name):
    problem = interpreted(checks_kernels.__name__)[name]
    assert not problem, problem


@pytest.mark.gpu
def test_answers_on_gpu(tmp_path):
    made = tiny.save("bert", tmp_path)
    on_cpu, on_gpu = (pipeline(Encoder.load(made, device=device)) for device in ("cpu", "cuda"))
    torch.backends.cuda.matmul.allow_tf32 = False
    pairs = [made.run([made.prepare(request) for request in requests()]) for made in (on_cpu, on_gpu)]
    for one, other in zip(*pairs, strict=True):
        assert (logits(one.as_dict()) - logits(other.as_dict())).abs().max() <= 1e-4


@pytest.mark.gpu
def test_training_under_autocast_on_gpu(tmp_path):
    made = tiny.save("bert", tmp_path)
    task = DELTAS["lora-1"][1]
    losses = []
    for device in ("cpu", "cuda"):
        live = TrainableDelta(Encoder.load(made, device=device), [Lora(rank=4, dropout=0.0)], task)
        encodings = [Encoding((2, 5 + i % 20, 3), (0, 0, 0)) for i in range(40)]
        optimizer = torch.optim.SGD(live.parameters(), 0.1)
        for _ in range(5):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                loss = live(encodings).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graphs_give_eager_answers_on_gpu(dtype, tmp_path):
    made = pipeline(Encoder.load(tiny.save("bert", tmp_path), device="cuda", dtype=dtype))
    jobs = [made.prepare(request) for request in requests()]
    batches = [jobs, jobs[::-1], jobs[:30], jobs[15:]]
    eager = [made.run(batch) for batch in batches]
    assert made.encoder.use_graphs()
    for _ in range(2):
        for batch, want in zip(batches, eager, strict=True):
            for one, other in zip(want, made.run(batch), strict=True):
                assert (logits(one.as_dict()) - logits(other.as_dict())).abs().max() <= 0.05
    assert made.encoder.graphs

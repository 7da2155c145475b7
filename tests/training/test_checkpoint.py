from __future__ import annotations

import pytest
import torch

from bertology_serve.errors import FormatError
from bertology_serve.files import hidden
from bertology_serve.training.run_directory import random_state, read_checkpoint, set_random_state, write_checkpoint


def test_tensors_and_state_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    base = torch.randn(4, 3)
    tensors = {"a": base, "view": base[1:], "step": torch.tensor(3.0)}
    write_checkpoint(path, tensors, {"step": 3, "best": 0.1 + 0.2, "metrics": {"f1": 1 / 3}})
    found, state = read_checkpoint(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert state == {"step": 3, "best": 0.1 + 0.2, "metrics": {"f1": 1 / 3}}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_a_kill_left_behind_is_not_read(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})
    hidden(path).write_bytes(b"half")
    assert read_checkpoint(path)[1] == {"step": 1}
    write_checkpoint(path, {"a": torch.zeros(2)}, {"step": 2})
    assert read_checkpoint(path)[1] == {"step": 2}


@pytest.mark.parametrize("keep", [0, 5, 60])
def test_truncated_file_is_one_line(tmp_path, keep):
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.ones(20)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match="is no checkpoint of a run") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_random_numbers_go_on_where_they_stopped():
    device = torch.device("cpu")
    states = random_state(device)
    first = torch.rand(3)
    set_random_state(device, states)
    assert torch.equal(torch.rand(3), first)

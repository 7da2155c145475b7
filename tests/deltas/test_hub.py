from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from bertology_serve.deltas import store
from bertology_serve.deltas.hub import pull, push
from bertology_serve.errors import FormatError, InputError
from tests.deltas import samples


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub of folders in place of the real one."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            assert exist_ok
            (root / repository).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], **more: Any) -> str:
            if repo_id == "gone/away":
                raise OSError("403 Client Error\nForbidden")
            copy(folder_path, root / repo_id, allow_patterns)
            return f"https://hub/{repo_id}/commit/1: {more['commit_message']}"

    def snapshot_download(repository: str, revision: str | None, local_dir: str, allow_patterns: list[str]) -> None:
        if not (root / repository).exists():
            raise OSError("404 Client Error")
        copy(root / repository, Path(local_dir), allow_patterns)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def copy(source: Path, target: Path, patterns: list[str]) -> None:
    for path in source.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
            shutil.copy(path, target)


def saved(directory: Path) -> Path:
    delta = samples.delta("bert", samples.SPECS["lora"])
    return store.save(delta, directory, samples.anatomy("bert"), samples.options("bert"))


def test_there_and_back_again(hub: Path, tmp_path: Path) -> None:
    directory = saved(tmp_path / "sample")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    assert push(directory, "ada/mood").endswith("commit/1: sample (lora, classification)")
    assert not (hub / "ada/mood/pytorch_model.bin").exists()
    pulled = pull("ada/mood", tmp_path / "pulled")
    assert sorted(path.name for path in pulled.iterdir()) == sorted(
        path.name for path in directory.iterdir() if path.suffix != ".bin"
    )
    assert store.load(pulled).tensors.keys() == store.load(directory).tensors.keys()
    with pytest.raises(InputError, match="pulled exists"):
        pull("ada/mood", pulled)


def test_a_damaged_delta_does_not_appear(hub: Path, tmp_path: Path) -> None:
    push(saved(tmp_path / "sample"), "ada/mood")
    weights = hub / "ada/mood/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(FormatError):
        pull("ada/mood", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    (hub / "ada/empty").mkdir()
    with pytest.raises(FormatError, match="ada/empty holds no delta"):
        pull("ada/empty", tmp_path / "pulled")


def test_what_peft_pushed_is_taken_as_it_is(hub: Path, tmp_path: Path) -> None:
    place = hub / "ada/peft"
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text("{}")
    assert [path.name for path in pull("ada/peft", tmp_path / "pulled").iterdir()] == ["adapter_config.json"]


def test_the_hubs_reasons_in_one_line(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the hub does not serve ada/none: 404 Client Error"):
        pull("ada/none", tmp_path / "pulled")
    with pytest.raises(InputError, match="gone/away: 403 Client Error Forbidden"):
        push(saved(tmp_path / "sample"), "gone/away")
    with pytest.raises(InputError, match=r"'\.\./evil/x' is no hub repository"):
        pull("../evil/x", tmp_path / "pulled")


def test_nothing_is_pulled_to_where_it_would_not_be_seen(hub: Path, tmp_path: Path) -> None:
    directory = saved(tmp_path / "sample")
    push(directory, "ada/mood")
    with pytest.raises(FormatError, match="sample is a delta itself"):
        pull("ada/mood", directory / "2")
    assert not (directory / "2").exists()

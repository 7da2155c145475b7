from __future__ import annotations

import pytest

from bertology_serve.deltas.names import check_name
from bertology_serve.errors import FormatError


@pytest.mark.parametrize("name", ["a", "sst2-lora", "1", "v1.2_3", "a" * 64])
def test_plain_names_pass(name: str) -> None:
    assert check_name(name, "delta name") == name


BAD = ["", ".", "..", ".hidden", "-flag", "A", "a/b", "../a", "a\\b", "a b", "a\n", "é", "a" * 65, "base", "a\0", 3]


@pytest.mark.parametrize("name", BAD)
def test_path_tricks_and_reserved_names_are_refused_in_one_line(name: object) -> None:
    with pytest.raises(FormatError, match="delta name") as caught:
        check_name(name, "delta name")
    assert "\n" not in str(caught.value)

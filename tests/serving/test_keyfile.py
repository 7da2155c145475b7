from __future__ import annotations

import hashlib
import json

import pytest

from bertology_serve.errors import NotFound, SpecError
from bertology_serve.serving.keys import LARGEST, read_keyring

ONE, OTHER = "one-very-long-key-1", "another-long-key-22"


def find(ring, plain):
    return ring.find([(b"x-api-key", plain.encode())])


def test_a_file_and_the_environment_together(tmp_path):
    path = tmp_path / "keys.json"
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    entries = [{"name": "ada", "key": ONE, "deltas": ["mood"]}, {"name": "bob", "sha256": digest, "admin": True}]
    path.write_text(json.dumps({"keys": entries}))
    ring = read_keyring(
        path, {"BERTOLOGY_API_KEYS": f"{ONE}-env, {OTHER}-env,", "BERTOLOGY_ADMIN_KEYS": f"{ONE}-admin"}
    )
    assert len(ring) == 5
    assert not find(ring, ONE).allows("grade")
    assert find(ring, OTHER).admin
    assert find(ring, f"{OTHER}-env").name == "BERTOLOGY_API_KEYS:2"
    assert [find(ring, f"{ONE}-{end}").admin for end in ("env", "admin")] == [False, True]


def test_no_keys_at_all():
    assert len(read_keyring(None, {})) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[]", 'has no list "keys"'),
        ('{"keys": []}', "holds no keys"),
        ('{"keys": [3]}', "key 0: expected an object"),
        ('{"keys": [{"name": "ada", "admn": true}]}', "unknown field 'admn'; did you mean 'admin'"),
        ('{"keys": [{"name": "ada"}]}', "either 'key' or 'sha256'"),
        ('{"keys": [{"name": "ada", "key": "secret-secret-secret", "sha256": "x"}]}', "either 'key' or 'sha256'"),
        ('{"keys": [{"name": "ada", "key": "secret"}]}', "at least 16 ASCII characters"),
        ('{"keys": [{"name": "ada", "key": 7}]}', "at least 16 ASCII characters"),
        ('{"keys": [{"key": "secret-secret-secret"}]}', "missing required field `name`"),
        ('{"keys": [{"name": "ada", "key": "secret-secret-secret", "deltas": "mood"}]}', "Expected `array"),
        (
            '{"keys": [{"name": "ada", "key": "secret-secret-secret", "calls_per_second": -1}]}',
            "calls_per_second is -1",
        ),
    ],
)
def test_bad_files_are_told_what_is_wrong_and_no_key(tmp_path, content, message):
    path = tmp_path / "keys.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(SpecError, match=message) as problem:
        read_keyring(path, {})
    assert "secret-secret" not in str(problem.value)


def test_files_that_are_not_there_or_far_too_large(tmp_path):
    with pytest.raises(NotFound, match="expected a JSON file of API keys"):
        read_keyring(tmp_path / "nowhere", {})
    path = tmp_path / "large"
    path.write_bytes(b" " * (LARGEST + 1))
    with pytest.raises(SpecError, match="is larger than"):
        read_keyring(path, {})

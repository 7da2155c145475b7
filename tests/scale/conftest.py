"""The fixtures of a server are those of a router."""

from tests.serving.conftest import deltas, encoder  # noqa: F401

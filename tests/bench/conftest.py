"""The fixtures of the server's tests."""

from tests.serving.conftest import *  # noqa: F403

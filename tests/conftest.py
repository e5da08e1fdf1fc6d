"""Tests marked `@pytest.mark.ranks(N)` run on N real ranks: see `tests/ranks.py`."""

from tests.ranks import pytest_configure  # noqa: F401  (a hook, found by its name)

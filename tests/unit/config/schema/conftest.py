"""The installed DeepSpeed, in the version that the schema is written for."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dstrain.config.schema.generated import DEEPSPEED_VERSION


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    module = pytest.importorskip("deepspeed")
    if module.__version__.split("+")[0] != DEEPSPEED_VERSION:
        pytest.fail(f"the schema is written for {DEEPSPEED_VERSION}, not {module.__version__}")
    return module

"""Sizes of the model that a command plans for; without torch if there is a formula."""

from __future__ import annotations

import json
import subprocess
import sys

from dstrain.config.memory.sizes import ModelSizes
from dstrain.core.errors import ModelError, Problem, raise_problems
from dstrain.core.files import expanded, told_refused
from dstrain.core.secrets import hidden_in_text

COUNT_SECONDS = 300


@told_refused(ModelError)
def local_folder(name: str) -> str:
    """Return ``model_name_or_path``, which must be a local folder: nothing is downloaded.

    Raises:
        ModelError: it is no folder with a config.json.
    """
    if not (expanded(name) / "config.json").is_file():
        raise ModelError(
            Problem(
                f"model_name_or_path={name!r}",
                "this command reads the config.json of a local folder, and there is none",
                "give a folder written by save_pretrained, or --model_config",
            )
        )
    return name


def count_in_child(spec: str) -> ModelSizes:
    """Count the sizes of a model without a closed form, in a child process that imports torch.

    Raises:
        ModelError: the child process found a problem, or did not end in time.
    """
    print(
        hidden_in_text(f"no formula for the parameters of {spec!r}: counting them with torch"),
        file=sys.stderr,
        flush=True,
    )
    command = [sys.executable, "-m", "dstrain.models.count", spec]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COUNT_SECONDS, check=False
        )
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise _uncounted(spec, f"not done in {COUNT_SECONDS} s") from error
    except (ValueError, IndexError) as error:
        raise _uncounted(spec, done.stderr.strip()[-2000:]) from error
    if "problems" in answer:
        raise_problems([Problem(*p) for p in answer["problems"]], error=ModelError)
    return ModelSizes.from_dict(answer)


def _uncounted(spec: str, why: str) -> ModelError:
    return ModelError(Problem(f"model_config={spec!r} cannot be counted", why))

"""A checkpoint of each of these runs goes on in each of those, as if it had never stopped there.

The runs are forks of one process (``forked.py``). All have a global batch of 6 samples, so the
losses of the resumed run are those of the run that wrote the checkpoint, to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forked import run_job

STEPS = 8
SAVED_AT = 4


@dataclass(frozen=True)
class Place:
    """Where a run trains; ``offload`` is "" (nothing), "optimizer" or "all"."""

    stage: int
    ranks: int
    offload: str = ""
    precision: str = "fp32"

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings for ``make_trainer``."""
        batch, accumulation = {1: (2, 3), 2: (3, 1), 3: (2, 1)}[self.ranks]
        scale = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}
        return {
            "stage": self.stage,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "bf16": self.precision == "bf16",
            "offload_optimizer": "cpu" if self.offload else "none",
            "offload_param": "cpu" if self.offload == "all" else "none",
            "deepspeed": {"fp16": scale} if self.precision == "fp16" else None,
        }


TABLE: dict[Place, list[Place]] = {
    Place(3, 3): [
        Place(0, 2), Place(1, 2), Place(2, 1), Place(3, 1, "all"), Place(2, 2, "", "bf16"),
    ],
    Place(0, 1, "", "bf16"): [
        Place(1, 3, "optimizer", "bf16"), Place(2, 2, "", "bf16"), Place(3, 2, "", "bf16"),
    ],
    Place(2, 2, "optimizer", "bf16"): [
        Place(0, 1, "", "bf16"), Place(1, 1, "", "bf16"), Place(3, 3, "all", "bf16"), Place(1, 2),
    ],
    Place(1, 2, "", "fp16"): [
        Place(0, 2, "", "fp16"), Place(2, 3, "optimizer", "fp16"), Place(3, 1, "", "fp16"),
    ],
    Place(3, 2, "all", "fp16"): [Place(0, 1, "", "fp16"), Place(2, 2, "", "fp16")],
}  # fmt: skip
# Measured: 1.4e-7, 3.4e-5 and 3.7e-6. Other samples would be off by about 5e-3.
TOLERANCES = {"fp32": 1e-6, "bf16": 1e-4, "fp16": 2e-5}


def resumed_name(saved: Place, resumed: Place) -> str:
    """Name the folder of a run that goes on from another's checkpoint."""
    return f"{list(TABLE).index(saved)}-{TABLE[saved].index(resumed)}"


@pytest.mark.slow
def test_a_checkpoint_of_any_place_goes_on_in_any_other(tmp_path: Path) -> None:
    """Stages, numbers of ranks, offload and precision, from each to others."""
    found = run_job("topologies", tmp_path, timeout=300)
    wrong = []
    for saved, places in TABLE.items():
        run = found[str(list(TABLE).index(saved))]
        whole = run["losses"]
        assert len(whole) == STEPS
        for place in places:
            again = found[resumed_name(saved, place)]
            resumed = again["losses"]
            assert again["rates"] == run["rates"]
            assert resumed[:SAVED_AT] == whole[:SAVED_AT]
            tolerance = max(TOLERANCES[p.precision] for p in (saved, place))
            if resumed != pytest.approx(whole, rel=tolerance):
                wrong.append((saved, place, whole, resumed))
    assert not wrong

"""Random state: one seed for what all ranks must share, one derived seed per rank for the rest."""

from __future__ import annotations

import random


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices) with ``seed``, the same on every rank."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(seed: int, *, step: int, rank: int) -> int:
    """A 63-bit seed that differs for every (seed, step, rank), with no visible pattern."""
    from numpy.random import SeedSequence

    words = SeedSequence([abs(seed), step, rank]).generate_state(2)
    return int(words[0]) << 31 ^ int(words[1])


def seed_rank(seed: int, *, step: int, rank: int) -> None:
    """Seed this rank's own stream (dropout and other noise) so that no two ranks share masks."""
    seed_everything(derived_seed(seed, step=step, rank=rank))

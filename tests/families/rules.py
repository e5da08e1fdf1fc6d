"""Which count of targets makes a model's mean loss additive: measured, not read.

For a batch cut into A and B, a count w is exact where

    loss(A + B) = (w(A) loss(A) + w(B) loss(B)) / (w(A) + w(B))

and where the same holds for the gradients. `python -m tests.families.rules` prints the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.family import Family, Sample

SPLITS = ((1, 7), (2, 6), (3, 5), (4, 4), (6, 2), (7, 1))
REL = 2e-6  # of fp32 sums in another order; the smallest true difference in the zoo is 1e-4


def loss_of(output: Any) -> Tensor:
    """Return the loss of a model's output, whatever form it has."""
    return output["loss"] if hasattr(output, "keys") else output[0]


def counts(family: Family, samples: Sequence[Sample]) -> dict[str, float]:
    """Return every count that could be the weight of a batch of ``samples``."""
    columns = [s[c] for s in samples for c in family.labels or ("labels",) if c in s]
    whole = [c for c in columns if not c.is_floating_point()]
    found: dict[str, float] = {"samples": len(samples)}
    if whole:
        found["targets"] = sum(int((c != family.ignored).sum()) for c in whole)
        if all(c.dim() for c in whole):
            found["shifted"] = sum(int((c[..., 1:] != family.ignored).sum()) for c in whole)
    if "attention_mask" in samples[0]:
        found["attended"] = sum(int(s["attention_mask"].sum()) for s in samples)
    if "bool_masked_pos" in samples[0]:
        found["hidden patches"] = sum(int(s["bool_masked_pos"].sum()) for s in samples)
    return found


def run(model: nn.Module, family: Family, samples: Sequence[Sample]) -> tuple[float, Tensor]:
    """Return the loss of a batch, and all gradients in one vector; NaN where it has no target."""
    model.zero_grad()
    loss = loss_of(model(**family.collate(samples)))
    loss.backward()
    parts = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
        for p in model.parameters()
        if p.requires_grad
    ]
    return loss.item(), torch.cat(parts).double()


def mean(pairs: Sequence[tuple[float, Any]]) -> Any:
    """Return the weighted mean; what has no weight is left out, whatever its value."""
    total = sum(weight for weight, _ in pairs)
    return sum((weight / total) * value for weight, value in pairs if weight)


def errors(family: Family, splits: Sequence[tuple[int, int]] = SPLITS) -> dict[str, float]:
    """Return, for each count, the largest relative error over ``splits``, of loss or gradient.

    "sum" is the rule loss(A + B) = loss(A) + loss(B).
    """
    model, worst = family.build().train(), {}
    every = family.samples(8)
    for seed, (size, _) in enumerate(splits):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
        parts = [[every[i] for i in part] for part in (order[:size], order[size:])]
        loss, gradient = run(model, family, parts[0] + parts[1])
        halves = [run(model, family, part) for part in parts]
        rules = {name: [counts(family, p)[name] for p in parts] for name in counts(family, every)}
        for name, (a, b) in rules.items():
            loss_error = _relative(mean([(a, halves[0][0]), (b, halves[1][0])]), loss)
            both = mean([(a, halves[0][1]), (b, halves[1][1])])
            error = max(loss_error, _distance(both, gradient))
            worst[name] = _larger(worst.get(name, 0.0), error)
        total, added = halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]
        error = max(_relative(total, loss), _distance(added, gradient))
        worst["sum"] = _larger(worst.get("sum", 0.0), error)
    return worst


def _relative(ours: float, theirs: float) -> float:
    error = abs(ours - theirs) / abs(theirs)
    return error if math.isfinite(error) else math.inf


def _distance(ours: Tensor, theirs: Tensor) -> float:
    error = float((ours - theirs).norm() / theirs.norm())
    return error if math.isfinite(error) else math.inf


def _larger(a: float, b: float) -> float:
    return max(a, b)


def main() -> None:
    """Print a line for each family: class, kind as noted, the exact counts, all errors."""
    from tests.families.zoo import FAMILIES

    print("| family | class | noted | exact | relative error of each count (largest of 6 splits) |")
    print("|---|---|---|---|---|")
    for name, family in FAMILIES.items():
        found = errors(family)
        exact = [k for k, error in found.items() if error < 1e-5]
        numbers = ", ".join(f"{k} {error:.1e}" for k, error in found.items())
        kind = family.kind + (f" (coupled: {family.coupled})" if family.coupled else "")
        class_name = type(family.build()).__name__
        print(f"| {name} | {class_name} | {kind} | {', '.join(exact) or '-'} | {numbers} |")


if __name__ == "__main__":
    main()

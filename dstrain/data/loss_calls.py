"""Reading off a forward pass what its loss is a mean over.

A class name says little about a loss: subclasses, wrappers and losses of the user's own have any
name, and several models of transformers do not do what theirs suggests. The loss functions of torch
that a forward pass calls do say it. So the first forward pass of a run is watched.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dstrain.data.loss_rule import IGNORED, SAMPLES, Denominator, LossRule
from dstrain.data.samples import batch_size

_CLASSES = (functional.cross_entropy, functional.nll_loss)
_ELEMENTWISE = (
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.huber_loss,
    functional.l1_loss,
    functional.mse_loss,
    functional.smooth_l1_loss,
    functional.kl_div,
)
_WATCHED = {*_CLASSES, *_ELEMENTWISE, functional.ctc_loss}
# How far the quotient of a sum and the loss may be from a whole number of targets.
_TOLERANCE = 1e-3
_AS_MANY = 2  # how loosely a rule fits that agrees in number alone
_AMBIGUOUS_SUM = 3  # of a sum over one target, which is its mean as well


@dataclass(frozen=True)
class LossCall:
    """Records one call of a loss function in a forward pass.

    Attributes:
        function: of ``torch.nn.functional``.
        target: what it compares with, in host memory.
        ignored: the label that it leaves out, if any.
        reduction: "mean", "sum", "none" or another of torch's.
        weighted: whether classes or elements have weights.
        values: what it returned, in host memory, in fp64.
        columns: the batch keys that the target was made from, by whatever functions of torch.
        returned: what it returned, detached.
    """

    function: Callable[..., Any]
    target: torch.Tensor
    ignored: int | None
    reduction: str
    weighted: bool
    values: torch.Tensor
    columns: frozenset[str] = frozenset()
    returned: torch.Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Targets that a mean of this call is divided by."""
        if self.function is functional.ctc_loss:
            return self.target.shape[0]
        if self.ignored is not None:
            return int((self.target != self.ignored).sum())
        if self.function in _CLASSES and self.target.dim() > 1:
            return self.target.numel() // self.target.shape[1]  # probabilities of classes
        return self.target.numel()

    def num_in_mean(self, loss: float, valid: torch.Tensor | None = None) -> float:
        """Targets that the loss is divided by, if the loss is made of this call alone.

        Args:
            loss: of the batch.
            valid: which elements of the call count, where others are left out after it.
        """
        if self.reduction == "mean":
            return float(self.num_targets)
        values = self.values
        if valid is not None and self.reduction == "none" and valid.numel() == values.numel():
            values = values.flatten()[valid.flatten()]
        return float(values.sum()) / loss if loss else float("nan")


class ToldCount(int):
    """A count that is passed to code of the user's, so that one can see whether that uses it."""


class LossCalls(TorchFunctionMode):
    """Records the calls of loss functions while it is entered; it changes none.

    Attributes:
        calls: of loss functions, in order.
        used_count: whether some function of torch was given a ``ToldCount``, such as a division.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor]) -> None:
        """Nothing seen yet.

        Args:
            columns: the tensors of the batch that the forward pass is given, by their keys.
        """
        super().__init__()
        self.calls: list[LossCall] = []
        self.used_count = False
        # Weak: without gradients (in an evaluation, inside a re-entrant checkpoint) everything that
        # the model computes passes here, and must be freed as soon as the model lets go of it.
        self._origins: Any = WeakTensorKeyDictionary()
        for name, tensor in columns.items():
            self._origins[tensor] = frozenset([name])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, note it where it is a loss function, and what its result is made from."""
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        tensors = list(_within((args, kwargs), self._heed))
        columns = frozenset().union(*(self._columns_of(tensor) for tensor in tensors))
        if func in _WATCHED and isinstance(returned, torch.Tensor):
            self.calls.append(_noted(func, args, kwargs, returned, self._columns_of))
        if columns:
            name = getattr(func, "__name__", "")
            in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
            # What has been through the model's parameters is no target.
            made = [t for t in _within(returned, None) if not t.requires_grad]
            for tensor in [*made, *tensors[:1]] if in_place else made:
                self._origins[tensor] = columns | self._columns_of(tensor)
        return returned

    def _heed(self, value: Any) -> None:
        self.used_count = self.used_count or isinstance(value, ToldCount)

    def _columns_of(self, value: Any) -> frozenset[str]:
        """Return the batch keys that a value was made from; none for what is no tensor."""
        known = isinstance(value, torch.Tensor)
        found: frozenset[str] = self._origins.get(value, frozenset()) if known else frozenset()
        return found


def _within(value: Any, heed: Callable[[Any], None] | None) -> Iterator[torch.Tensor]:
    """The tensors in the arguments or the result of a function; ``heed`` gets everything else."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _within(part, heed)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _within(part, heed)
    elif heed is not None:
        heed(value)


def _noted(
    function: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    returned: torch.Tensor,
    columns_of: Callable[[Any], frozenset[str]],
) -> LossCall:
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    is_ctc = function is functional.ctc_loss
    target = values["target_lengths" if is_ctc else "target"]
    ignores = "ignore_index" in values and not target.is_floating_point()
    return LossCall(
        function=function,
        target=torch.as_tensor(target).detach().cpu(),
        ignored=values["ignore_index"] if ignores else None,
        reduction=values["reduction"],
        weighted=values.get("weight") is not None,
        values=returned.detach().double().cpu(),
        columns=columns_of(target),
        returned=returned.detach(),
    )


@dataclass(frozen=True)
class Explanation:
    """How the loss of a batch can have come about.

    Attributes:
        rules: all that fit, the expected one first if it does, and how loosely each fits: 0 where
            the calls were given its labels at the same places, 1 where in the same order, 2 where
            as many. Empty where none fits.
        certain: the rule that is the right one, where the calls themselves took the mean over
            targets that are known; where a mean was taken afterwards, by a division, another one
            may only have the same number of targets in this batch.
        ratio: the loss by the mean, where one call made it. Another number than 1 is a factor or a
            sign of other terms; which of them, another batch tells.
    """

    rules: dict[LossRule, int]
    certain: LossRule | None = None
    ratio: float | None = None


NOTHING = Explanation({})


def explain(
    calls: Sequence[LossCall],
    loss: Any,
    inputs: Any,
    *,
    expected: LossRule,
    labels: Sequence[str],
    num_samples: int | None,
) -> Explanation | None:
    """Find the rules by which the loss of a batch can have come from the calls of its forward pass.

    Args:
        calls: of the forward pass.
        loss: what came of it, one element.
        inputs: the batch as the loader gave it: that is where targets will be counted.
        expected: the rule that is tried first.
        labels: the label columns.
        num_samples: samples of the batch, where they are known.

    Returns:
        an explanation; None where the batch cannot tell: a column without a single label may hold
        the targets of a part of the loss that is not seen now.
    """
    value = float(torch.as_tensor(loss).detach().double().mean())
    calls = _joined(_of_the_loss(calls, value))
    batch = {k: v.cpu() for k, v in tensors_of(inputs)}
    samples = batch_size(inputs) if num_samples is None else num_samples
    if any(bool((batch[name] == IGNORED).all()) for name in labels if name in batch):
        return None
    if not calls or any(call.weighted and call.reduction == "mean" for call in calls):
        return NOTHING
    if any(call.function is functional.ctc_loss for call in calls):
        # Its mean is over samples, of each sample's mean over its own labels.
        rule = LossRule(is_sum=calls[0].reduction == "sum")
        return Explanation({rule: 0}, certain=rule) if len(calls) == 1 else NOTHING
    fitting: dict[LossRule, int] = {}
    may_be_sum = len(calls) == 1 and _is_sum(calls[0], value)
    if may_be_sum and (calls[0].num_targets > 1 or _is_untouched(calls[0], loss)):
        return Explanation({LossRule(is_sum=True): 0}, certain=LossRule(is_sum=True))
    ignored = {c.ignored for c in calls} | {IGNORED, None}
    tried = dict.fromkeys([*expected.parts[:1], *_denominators(batch, ignored)])
    fits = [
        {d: how for d in tried if (how := _looseness(d, call, batch, samples, value)) is not None}
        for call in calls
    ]
    # A call whose labels are found is not about others that are as many.
    fits = [_found(ways) or ways for ways in fits]
    for denominator in tried:
        if all(denominator in ways for ways in fits):
            fitting[LossRule((denominator,))] = max(ways[denominator] for ways in fits)
    if all(_is_over_samples(call, samples, value) for call in calls):
        fitting.setdefault(LossRule(), _AS_MANY)
    if may_be_sum:  # the sum over a single target is its mean too; a later batch has more
        fitting[LossRule(is_sum=True)] = _AMBIGUOUS_SUM
    certain = [r for r, how in fitting.items() if not how and _is_certain(r.parts[0], calls)]
    ratio = _ratio(calls[0], value) if len(calls) == 1 else None
    return Explanation(fitting, certain=certain[0] if certain else None, ratio=ratio)


def _is_certain(denominator: Denominator, calls: Sequence[LossCall]) -> bool:
    """Return whether the calls themselves took their means over the targets of this denominator.

    That the labels are at the same places is not enough: a mask that was used as well, or a
    division that came afterwards, may leave others out in another batch.
    """
    columns = {denominator.column, denominator.mask} - {None}
    return all(
        call.reduction == "mean" and call.columns == columns and call.ignored == denominator.ignored
        for call in calls
    )


def _ratio(call: LossCall, loss: float) -> float | None:
    """The loss by the mean that a call took; None where the call took none."""
    mean = float(call.values.mean())
    return loss / mean if call.reduction == "mean" and mean else None


def _of_the_loss(calls: Sequence[LossCall], loss: float) -> list[LossCall]:
    """Leave out calls that only came beside the one that returned the loss.

    Some models return the loss of each head and optimise the first.
    """
    alone = [c for c in calls if c.reduction == "mean" and float(c.values) == loss]
    return alone[:1] if alone else list(calls)


def _joined(calls: list[LossCall]) -> list[LossCall]:
    """Make one call of those that each sum up a piece of the batch."""
    kinds = {(call.function, call.ignored, call.weighted) for call in calls}
    summed = all(c.reduction in ("sum", "none") and c.target.dim() < 2 for c in calls)
    if len(calls) < 2 or len(kinds) > 1 or not summed:
        return calls
    target = torch.cat([call.target.flatten() for call in calls])
    values = torch.stack([call.values.sum() for call in calls])
    return [replace(calls[0], target=target, reduction="sum", values=values)]


def tensors_of(inputs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The columns of a batch that are tensors, by name."""
    if isinstance(inputs, Mapping):
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                yield name, value


def _is_untouched(call: LossCall, loss: Any) -> bool:
    """Return whether the loss is what the call returned, and so no quotient by one target.

    At stage 3 it is another tensor in the same memory.
    """
    memory = None if call.returned is None else call.returned.data_ptr()
    return isinstance(loss, torch.Tensor) and memory == loss.data_ptr()


def _is_sum(call: LossCall, loss: float) -> bool:
    sums = call.reduction == "sum" or (call.reduction == "none" and call.num_targets > 1)
    return sums and abs(call.num_in_mean(loss) - 1) < _TOLERANCE


def _denominators(
    batch: Mapping[str, torch.Tensor], ignored: set[int | None]
) -> Iterator[Denominator]:
    """All that is tried: label columns first, whole ones before masked ones."""
    names = sorted(batch, key=lambda name: "label" not in name)
    masks = [None, *(name for name in batch if "mask" in name)]
    for mask in masks:
        for name in names:
            for shifted in (False, True):
                for value in sorted(ignored, key=lambda v: (v is None, v)):
                    if name != mask:
                        yield Denominator(name, shifted=shifted, ignored=value, mask=mask)


def _found(ways: dict[Denominator, int]) -> dict[Denominator, int]:
    """Keep the denominators whose labels a call was given."""
    return {denominator: how for denominator, how in ways.items() if how < _AS_MANY}


def _looseness(
    denominator: Denominator,
    call: LossCall,
    batch: Mapping[str, torch.Tensor],
    samples: int,
    loss: float,
) -> int | None:
    """Return how loosely a denominator explains a call, as in ``explain``; None: not at all."""
    for looseness, fits in enumerate((_is_at_the_same_places, _is_in_the_same_order, _agrees)):
        if fits(denominator, call, batch, samples, loss):
            return looseness
    return None


def _is_at_the_same_places(
    denominator: Denominator,
    call: LossCall,
    batch: Mapping[str, torch.Tensor],
    samples: int,
    loss: float,
) -> bool:
    """Compare the call with the labels of the denominator place by place, ignored ones too.

    This alone tells labels that the model shifts from others where the first one of each sequence
    is ignored. A model that shifts cuts the last place off, or puts an ignored label there.
    """
    found = denominator.targets(batch)
    if found is None or not _agrees(denominator, call, batch, samples, loss):
        return False
    labels = found[0].double().masked_fill(~found[1], math.inf)
    target = call.target.flatten().double()
    if call.ignored is not None:
        target = target.masked_fill(target == call.ignored, math.inf)
    ends = torch.nn.functional.pad(labels, (0, 1), value=math.inf)
    candidates = (labels, ends) if denominator.shifted else (labels,)
    return any(torch.equal(target, candidate.flatten()) for candidate in candidates)


def _is_in_the_same_order(
    denominator: Denominator,
    call: LossCall,
    batch: Mapping[str, torch.Tensor],
    samples: int,
    loss: float,
) -> bool:
    """Compare the targets of the call with those of the denominator, in order and in number.

    Each may come several times over: a model may predict a token from several places.
    """
    found = denominator.targets(batch)
    if found is None:
        return False
    wanted = found[0][found[1]].double()
    target = call.target.flatten()
    if call.ignored is not None:
        target = target[target != call.ignored]
    times = target.numel() // max(1, wanted.numel())
    if target.numel() != times * wanted.numel():
        return False
    num_in_mean = call.num_in_mean(loss) / max(1, times)
    agree = abs(num_in_mean - wanted.numel()) <= _TOLERANCE * wanted.numel()
    return agree and bool(torch.equal(target.double(), wanted.repeat(times)))


def _agrees(
    denominator: Denominator,
    call: LossCall,
    batch: Mapping[str, torch.Tensor],
    samples: int,
    loss: float,
) -> bool:
    """Return whether the call's mean is over as many targets as the denominator counts.

    Of targets that no column of the batch has gone into (a contrast numbers its own samples) the
    number tells nothing: each one may depend on all samples.
    """
    if not call.columns:
        return False
    found = denominator.targets(batch)
    count = samples if found is None else int(found[1].sum())
    valid = None if found is None else found[1]
    return abs(call.num_in_mean(loss, valid) - count) <= _TOLERANCE * count


def _is_over_samples(call: LossCall, samples: int, loss: float) -> bool:
    """Return whether the call's mean is over samples, of as many elements each."""
    if not call.columns:
        return False
    if call.reduction == "batchmean" or (samples == 1 and call.reduction in ("none", "sum")):
        return True
    if _agrees(SAMPLES, call, {}, samples, loss):
        return True
    whole = call.ignored is None or bool((call.target != call.ignored).all())
    rows = call.target.dim() > 0 and call.target.shape[0] == samples
    return call.reduction == "mean" and whole and rows

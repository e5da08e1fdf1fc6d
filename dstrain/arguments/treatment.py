"""Treatment of an argument's value: every field declares one, so that nothing is ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["implemented", "deepspeed", "alias", "stored", "no effect", "refused", "pending"]

NOT_YET = "not implemented yet in this version"


@dataclass(frozen=True)
class Treatment:
    """Treatment of the value of an argument.

    Attributes:
        kind: "implemented"; "deepspeed" (written to keys of its config); "alias" (an old name);
            "stored" (for scripts to read); "no effect" (accepted with a warning); "refused" (every
            value but the default is an error); "pending" (refused until it is implemented).
        note: the reason, or a remark for the page.
        remedy: what to use instead.
        targets: DeepSpeed keys, or the new name of an alias.
        accepts: values that are taken like the default.
        convert: of an alias: (arguments, old value) -> new value; a ``ValueError`` is a conflict.
        excluded: legal values that are refused, with the reason.
        own: whether the documents that dstrain follows do not have it: an argument of its own, or
            of a newer release of transformers.
    """

    kind: Kind
    note: str = ""
    remedy: str = ""
    targets: tuple[str, ...] = ()
    accepts: Callable[[Any], bool] | None = None
    convert: Callable[[Any, Any], Any] | None = None
    excluded: Mapping[Any, str] = field(default_factory=dict)
    own: bool = False

    def refuses(self, value: Any, default: Any) -> bool:
        """Tell whether this value of the argument is an error."""
        if self.kind not in ("refused", "pending") or value is None or value == default:
            return False
        return self.accepts is None or not self.accepts(value)

    @property
    def brief(self) -> str:
        """Return a few words for the help of a command; "" where the argument simply works."""
        return {
            "alias": "deprecated",
            "no effect": "no effect here",
            "refused": "refused here",
            "pending": "not implemented yet",
        }.get(self.kind, "")

    def __str__(self) -> str:
        """Return one line for the generated page."""
        keys = ", ".join(f"`{t}`" for t in self.targets)
        head = {
            "implemented": "implemented",
            "deepspeed": f"DeepSpeed key {keys}",
            "alias": f"deprecated name of {keys}: moved there with a warning",
            "stored": "stored, for scripts to read",
            "no effect": "accepted with a warning, without effect",
            "refused": "refused",
            "pending": "pending",
        }[self.kind]
        parts = [f"{head}: {self.note}" if self.note else head]
        parts += [self.remedy] if self.remedy else []
        parts += [f"`{value}` is refused: {why}" for value, why in self.excluded.items()]
        return "; ".join(parts)


def implemented(
    note: str = "", *, excluded: Mapping[Any, str] | None = None, own: bool = False
) -> Treatment:
    """Declare that the argument does what its documentation says."""
    return Treatment("implemented", note, excluded=excluded or {}, own=own)


def deepspeed_key(
    *keys: str, note: str = "", excluded: Mapping[Any, str] | None = None, own: bool = False
) -> Treatment:
    """Declare that the argument is the value of these keys of the DeepSpeed config."""
    return Treatment("deepspeed", note, targets=keys, excluded=excluded or {}, own=own)


def alias(
    new: str, *, convert: Callable[[Any, Any], Any] | None = None, note: str = ""
) -> Treatment:
    """Declare an old name: its value moves to ``new`` with a warning.

    Args:
        new: the name to use.
        convert: (arguments, old value) -> new value; may merge it with the present one, and
            raises ``ValueError`` where the two contradict each other. None takes it as it is.
        note: what the conversion does.
    """
    return Treatment("alias", note, targets=(new,), convert=convert)


def stored(note: str = "", *, own: bool = False) -> Treatment:
    """Declare that the argument is kept for scripts and callbacks; nothing of ours acts on it."""
    return Treatment("stored", note, own=own)


def no_effect(why: str, *, own: bool = False) -> Treatment:
    """Declare that another value than the default only gives a warning that says why."""
    return Treatment("no effect", why, own=own)


def refused(
    why: str,
    remedy: str,
    *,
    accepts: Callable[[Any], bool] | None = None,
    own: bool = False,
) -> Treatment:
    """Declare that a value other than the default is an error."""
    return Treatment("refused", why, remedy, accepts=accepts, own=own)


def pending(note: str) -> Treatment:
    """Declare that another value than the default is an error until the trainer implements it."""
    return Treatment("pending", note)

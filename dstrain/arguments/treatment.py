"""Treatments of arguments: each field declares one, so that no argument is ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["implemented", "deepspeed", "alias", "stored", "no effect", "refused", "pending"]

NOT_YET = "not implemented yet in this version"


@dataclass(frozen=True)
class Treatment:
    """Treatment of the values of an argument.

    Attributes:
        kind: "implemented"; "deepspeed" (written to keys of its config); "alias" (an old name);
            "stored" (for scripts to read); "no effect" (accepted with a warning); "refused" (every
            value but the default is an error); "pending" (refused until it is implemented).
        note: the reason, or a remark for the table.
        remedy: remedy of the error for a refused value.
        targets: DeepSpeed keys, or the new name of an alias.
        accepts: tells whether a value is accepted like the default.
        convert: (arguments, old value) -> new value, for an alias; a ``ValueError`` is a conflict.
        excluded: legal value that is refused -> reason.
        own: whether the argument is missing in the documents that dstrain follows: it is an
            argument of dstrain, or of a newer release of transformers.
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
        """Tell whether a value of the argument is refused."""
        if self.kind not in ("refused", "pending") or value is None or value == default:
            return False
        return self.accepts is None or not self.accepts(value)

    @property
    def brief(self) -> str:
        """Return a remark for the help of a command; "" if the argument works as documented."""
        return {
            "alias": "deprecated",
            "no effect": "no effect here",
            "refused": "refused here",
            "pending": "not implemented yet",
        }.get(self.kind, "")

    def __str__(self) -> str:
        """Return the treatment in words, for the generated table."""
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
    """Declare an old name, whose value is moved to ``new`` with a warning.

    Args:
        new: name to use.
        convert: (arguments, old value) -> new value; it may merge the old value with that of
            ``new``, and raises ``ValueError`` if they contradict each other. None moves the value
            unchanged.
        note: remark on the conversion, for the table.
    """
    return Treatment("alias", note, targets=(new,), convert=convert)


def stored(note: str = "", *, own: bool = False) -> Treatment:
    """Declare that the argument is kept for scripts and callbacks, and not used by dstrain."""
    return Treatment("stored", note, own=own)


def no_effect(why: str, *, own: bool = False) -> Treatment:
    """Declare that values other than the default have no effect but a warning with the reason."""
    return Treatment("no effect", why, own=own)


def refused(
    why: str,
    remedy: str,
    *,
    accepts: Callable[[Any], bool] | None = None,
    own: bool = False,
) -> Treatment:
    """Declare that values other than the default are an error."""
    return Treatment("refused", why, remedy, accepts=accepts, own=own)


def pending(note: str) -> Treatment:
    """Declare that values other than the default are an error until they are implemented."""
    return Treatment("pending", note)

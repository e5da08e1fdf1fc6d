"""Value that is one of a few names: a text with the attributes of transformers' enums."""

from __future__ import annotations

# Of members that are not called after their value, in transformers' SchedulerType and
# OptimizerNames: value -> name.
_OTHER_NAMES = {
    "reduce_lr_on_plateau": "REDUCE_ON_PLATEAU",
    "adamw_bnb_8bit": "ADAMW_BNB",
    "lion_32bit": "LION",
    "paged_adamw_32bit": "PAGED_ADAMW",
    "paged_ademamix_32bit": "PAGED_ADEMAMIX",
    "paged_lion_32bit": "PAGED_LION",
    "rmsprop_bnb_8bit": "RMSPROP_8BIT",
    "rmsprop_bnb_32bit": "RMSPROP_32BIT",
}


class Choice(str):
    """A text that can be read like a member of transformers' enums, such as ``IntervalStrategy``.

    It is equal to the plain text and to the member, and is written, pickled and sent to trackers as
    the text. The enums themselves would cost an import of transformers, and with it of torch.
    """

    __slots__ = ()

    @property
    def value(self) -> str:
        """Return the plain text."""
        return str(self)

    @property
    def name(self) -> str:
        """Return the name of the enum member that has this value."""
        return _OTHER_NAMES.get(self.value, self.value.upper())

    def __str__(self) -> str:
        """Return the plain text."""
        return str.__str__(self)

    def __reduce__(self) -> tuple[type[Choice], tuple[str]]:
        """Pickle it as a ``Choice`` of the plain text."""
        return Choice, (str(self),)

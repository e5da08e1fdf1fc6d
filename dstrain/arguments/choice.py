"""Value of an argument with choices: a text with the attributes of transformers' enums."""

from __future__ import annotations

# Value -> name of members of transformers' SchedulerType and OptimizerNames whose name is not the
# value in capitals.
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
    """A text with ``value`` and ``name``, like a member of an enum such as ``IntervalStrategy``.

    It equals the plain text and the member, and is written, pickled and sent to trackers as the
    text. The enums are not used because they would import transformers, and with it torch.
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

"""Generator of ``README.md`` beside this file: keys with rules, unread keys, optimizers.

Run ``python -m dstrain.config.table`` after a change of one of these; a test fails when the page is
stale.
"""

from __future__ import annotations

from pathlib import Path

from dstrain.config import optimizers
from dstrain.config.resolution.rules import RULES, Binding, Derivation
from dstrain.config.resolution.unread import as_rows

PAGE = Path(__file__).with_name("README.md")

_HEAD = """# Keys of the DeepSpeed config that are filled

Generated from the rules by `python -m dstrain.config.table`; do not edit.

A key that is missing or `"auto"` in the user's config is filled as listed here, in this order. A
value in the user's config wins over an argument left at its default, and conflicts with an argument
that was changed. All other keys of DeepSpeed are passed on unchanged; `"auto"` there is an error.
Keys that have no effect in a run are listed in the second table.

| filled | meaning |
|---|---|
| yes | whenever the rule has a value; DeepSpeed's own default would differ, or be hidden |
| if set | where an argument was changed or the config says `"auto"`, else DeepSpeed's default |
| if there | where the config says `"auto"`, or has the section of the key |

| key | rule | arguments it reads | filled |
|---|---|---|---|
"""


_UNREAD = """
# Keys that would not work as documented

DeepSpeed accepts these keys without a message. A refused value is an error; a key without effect
gives a warning.

| key | | why |
|---|---|---|
"""

_OPTIMIZERS = """
# Optimizers

Implementations that each value of `optim` runs. Bytes of state are per parameter of the rank's
share, without the 4 bytes of fp32 master weights. "Stage 0 only": on the flat slices of stages 1 to
3 the update would be another one, so that these stages are refused.

"""


def page() -> str:
    """Return the whole page."""
    keys = "".join(_row(rule) for rule in RULES)
    unread = "".join(f"| {' | '.join(row)} |\n" for row in as_rows())
    return _HEAD + keys + _UNREAD + unread + _OPTIMIZERS + optimizers.as_markdown()


def _row(rule: Binding | Derivation) -> str:
    if isinstance(rule, Binding):
        names = rule.arguments
        text = rule.rule or f"the value of {' and '.join(names)}"
        when = "if there" if rule.when_present else "if set" if rule.optional else "yes"
    else:
        names, text = rule.reads, rule.rule
        when = "if there" if rule.only_auto else "yes"
    listed = ", ".join(f"`{name}`" for name in names) or "none"
    return f"| `{rule.key}` | {text} | {listed} | {when} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())

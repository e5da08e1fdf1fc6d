"""The writer of ``README.md`` beside this file: keys that a rule fills, unread ones, optimizers.

Run ``python -m dstrain.config.table`` after a change of them; a test fails when the page is
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

A key that is missing or `"auto"` in the user's config is filled as below, in this order. A value of
the user's own wins over an argument left at its default and conflicts with one that was changed.
Every other key of DeepSpeed passes through as it is, and `"auto"` there is an error. Those that a
run would not honour come below.

| filled | meaning |
|---|---|
| yes | whenever the rule has a value; DeepSpeed's own default would differ, or be hidden |
| if set | where an argument was changed or the config says `"auto"`, else DeepSpeed's default |
| if there | where the config says `"auto"`, or has the section that it belongs to |

| key | rule | arguments it reads | filled |
|---|---|---|---|
"""


_UNREAD = """
# Keys that would not do what they say

DeepSpeed takes them without a word. What is refused is an error when it is set so; what has no
effect is a warning.

| key | | why |
|---|---|---|
"""

_OPTIMIZERS = """
# Optimizers

What each value of `optim` runs. Bytes of state are per parameter of the rank's share, without the 4
of the fp32 master weights. "Stage 0 only": on ZeRO's flat slices it would be another optimizer, so
it is refused there with stage and offload named.

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

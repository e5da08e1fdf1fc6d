"""Generator of ``README.md`` beside this file: arguments, their defaults and treatments.

Run ``python -m dstrain.arguments.table`` after a change of the arguments; a test fails when the
page is stale.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

from dstrain.arguments.enforce import declared
from dstrain.arguments.fields import default_of
from dstrain.arguments.sentence_transformer import SentenceTransformerTrainingArguments
from dstrain.arguments.seq2seq import Seq2SeqTrainingArguments
from dstrain.arguments.training_arguments import TrainingArguments
from dstrain.arguments.treatment import Kind

PAGE = Path(__file__).with_name("README.md")
CLASSES: tuple[type[Any], ...] = (
    TrainingArguments,
    Seq2SeqTrainingArguments,
    SentenceTransformerTrainingArguments,
)

_HEAD = """# Arguments

Generated from the code by `python -m dstrain.arguments.table`; do not edit.

Treatment of all arguments that transformers and sentence-transformers document, and of further ones
(marked `*`): those of dstrain, and of newer releases of transformers. Treatments are declared with
the fields, in the files of this folder.

| treatment | meaning | arguments |
|---|---|---|
"""
_MEANINGS: dict[Kind, str] = {
    "implemented": "does what its documentation says",
    "deepspeed": "is the value of a key of the DeepSpeed config",
    "alias": "old name: moves to the new one with a warning; both set and different is an error",
    "stored": "kept for scripts and callbacks to read, as documented",
    "no effect": "accepted; another value than the default gives a warning that says why",
    "refused": "another value than the default is an error with the reason and the replacement",
    "pending": "another value than the default is an error until the trainer implements it",
}


def page() -> str:
    """Return the whole page."""
    kinds = Counter(t.kind for cls in CLASSES for t in _own(cls).values())
    lines = [f"| {kind} | {text} | {kinds[kind]} |" for kind, text in _MEANINGS.items()]
    return _HEAD + "\n".join(lines) + "\n" + "".join(_class_section(cls) for cls in CLASSES)


def _class_section(cls: type[Any]) -> str:
    doc = inspect.getdoc(cls) or ""
    text = f"\n## {cls.__name__}\n\n{doc.split('.')[0]}.\n"
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name in _own(cls)}
    for base in reversed(cls.__mro__) if cls is TrainingArguments else [cls]:
        names = [n for n in inspect.get_annotations(base) if n in fields]
        if not names:
            continue
        if base is not cls:
            text += f"\n### {(inspect.getdoc(base) or base.__name__).splitlines()[0].rstrip('.')}\n"
        text += "\n| argument | default | meaning | what happens to it |\n|---|---|---|---|\n"
        text += "".join(_row(cls, fields.pop(name)) for name in names)
    return text


def _own(cls: type[Any]) -> dict[str, Any]:
    """Return treatments of the arguments that the class adds to ``TrainingArguments``."""
    base = {} if cls is TrainingArguments else declared(TrainingArguments)
    return {name: pair[0] for name, pair in declared(cls).items() if base.get(name) != pair}


def _row(cls: type[Any], field: dataclasses.Field[Any]) -> str:
    treatment, _ = declared(cls)[field.name]
    mark = " *" if treatment.own else ""
    default = _cell(repr(default_of(field)))
    meaning = _cell(str(field.metadata["help"]))
    return f"| `{field.name}`{mark} | `{default}` | {meaning} | {_cell(str(treatment))} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page())

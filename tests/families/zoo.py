"""The families of models that the loss, saved weights and parity are shown with, by name.

Left out, as they do not build in transformers 5.23 with what is installed here: LayoutLMv2
needs detectron2, DiNAT natten, Gemma3n and FastVLM timm. For those of the Auto mappings see
`tiny.DOES_NOT_BUILD`.
"""

from __future__ import annotations

from tests.families import senses, text, wrappers
from tests.families.family import Batch, Family, Kind, Sample, stack, table

__all__ = ["FAMILIES", "Batch", "Family", "Kind", "Sample", "stack"]

FAMILIES: dict[str, Family] = table(text.FAMILIES + senses.FAMILIES + wrappers.FAMILIES)

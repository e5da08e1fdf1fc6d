"""Saving tokenizer or processor with a model, and aligning their special tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dstrain.core.log import get_logger

logger = get_logger(__name__)

# A processor holds a tokenizer, so it comes first; the others write files of their own.
_OF_A_COLLATOR = ("processor", "tokenizer", "feature_extractor", "image_processor")
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")


def processor_writer(processing_class: object, collate: object) -> Callable[[Path], None] | None:
    """Return a function that writes tokenizer or processor into a folder; None if there is none.

    Without a ``processing_class`` it writes those of the data collator: the saved model could not
    be used otherwise.
    """
    found = [processing_class]
    if processing_class is None:
        found = [getattr(collate, name, None) for name in _OF_A_COLLATOR]
    writable = [part for part in found if hasattr(part, "save_pretrained")]
    if not writable:
        return None

    def write(folder: Path) -> None:
        for part in reversed(writable):  # what comes first has the last word
            try:
                part.save_pretrained(folder)
            except Exception as error:
                # tokenizers raises a plain Exception where the disk is full: no narrower class.
                if type(error) is Exception and "os error" in str(error):
                    raise OSError(str(error)) from error
                raise

    return write


def align_special_tokens(module: torch.nn.Module, processing_class: object) -> dict[str, int]:
    """Give a model's configs the end, start and pad tokens of its tokenizer, as transformers does.

    A tokenizer may end a turn with another token than the model it came with. Then generation must
    stop there. A token that the tokenizer does not have changes nothing, and where a config names
    several end tokens, or is one of generation, the others stay.

    Returns:
        what changed, by name.
    """
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    config = getattr(module, "config", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return {}
    if not isinstance(config, PreTrainedConfig):
        return {}
    try:
        text = config.get_text_config()
    except ValueError:  # several text parts (MusicGen): the tokenizer's tokens are not its outputs'
        return {}
    generation = getattr(module, "generation_config", None)
    changed = {}
    for name in _TOKENS:
        token = getattr(tokenizer, name)
        if token is None:
            continue
        several = name == "eos_token_id"
        set_in = [_set(text, name, token, adds=False)]
        if generation is not None:
            set_in.append(_set(generation, name, token, adds=several))
        if any(set_in):
            changed[name] = token
    return changed


def stop_at(module: object, token: int) -> bool:
    """Let generation stop at one more token; tell whether that is a change."""
    generation = getattr(module, "generation_config", None)
    return generation is not None and _set(generation, "eos_token_id", token, adds=True)


def _set(config: object, name: str, token: int, *, adds: bool) -> bool:
    """Make ``token`` the value, or the first of several; tell whether that is a change."""
    value = getattr(config, name, None)
    known = value if isinstance(value, (list, tuple)) else [value]
    if token in known:
        return False
    keeps = adds or (isinstance(value, (list, tuple)) and name == "eos_token_id")
    others = [other for other in known if other is not None]
    setattr(config, name, [token, *others] if keeps and others else token)
    return True

"""Samples from conversations: the chat template, and the tokens that are answers.

The tokens of answers are found by rendering alone, so that any template works. The template renders
the messages before an answer, with the text by which it asks for one (``add_generation_prompt``),
and then the messages up to and with the answer. Both texts must be beginnings of the whole
conversation. The text between their ends is the answer, together with the marks by which the
template ends it, which the model must learn to write as well.

The whole text is tokenised at once if the tokens of each beginning, which the model gets when it is
asked for an answer, are also the first tokens of the whole text. If a token of the whole text would
cross the edge of an answer, the text is cut at the edges of answers and each piece is tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dstrain.core.errors import DataError, Problem

IGNORED = -100
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Template for a tokenizer without one: a line with the role, the text, EOS after an answer."""


class ChatEncoder:
    """Encoder of messages as token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, answers: str = "all") -> None:
        """Keep the tokenizer, and which answers have labels.

        Args:
            tokenizer: a tokenizer with a chat template.
            answers: "all" for labels of every answer, "last" for those of the last answer.
        """
        self._tokenizer = tokenizer
        self._answers = answers

    def __call__(
        self, messages: list[dict[str, str]], place: str = "a conversation"
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of a conversation, and a label for each: -100 outside of answers.

        The first label is always -100: no token comes before it to predict it.

        Raises:
            DataError: the template refuses the conversation, or renders its beginning differently
                when more messages follow.
        """
        text, spans = self.answer_spans(messages, place)
        edges = sorted({edge for span in spans for edge in span})
        pieces = self._pieces(text, edges)
        ids: list[int] = []
        labels: list[int] = []
        starts = {start for start, _ in spans}
        for start, piece in zip([0, *edges], pieces, strict=True):
            ids += piece
            labels += piece if start in starts else [IGNORED] * len(piece)
        if labels:
            labels[0] = IGNORED
        return ids, labels

    def question(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation that ends where the model must answer."""
        return self._ids(self._render(messages, "the conversation", asks=True))

    def end_of_answer(self) -> int | None:
        """Return the special token by which the template ends an answer; None without one."""
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        _, labels = self(asked)
        special = set(self._tokenizer.all_special_ids) | {
            token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special
        }
        return next((token for token in reversed(labels) if token in special), None)

    def answer_spans(
        self, messages: list[dict[str, str]], place: str = "a conversation"
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and start and end of each answer in it, in characters.

        A greeting, a first message of the assistant, is not an answer.
        """
        text = self._render(messages, place)
        turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
        if self._answers == "last":
            turns = turns[-1:]
        spans = []
        for turn in turns:
            before = self._render(messages[:turn], place, asks=True)
            after = self._render(messages[: turn + 1], place)
            if not after.startswith(before):
                raise _no_prefix(turn, place, text, before, "what asks for it")
            if not text.startswith(after):
                raise _no_prefix(turn, place, text, after, "the conversation up to it")
            spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: list[dict[str, str]], place: str, *, asks: bool = False) -> str:
        """Render messages by the chat template; ``asks`` adds the text that asks for an answer."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=asks
                )
            )
        except Exception as error:  # a template can raise anything
            raise DataError(
                Problem(
                    f"the chat template cannot render {place}",
                    f"{type(error).__name__}: {error}",
                    "mend or leave out the row, or give another template with --chat_template",
                )
            ) from error

    def _pieces(self, text: str, edges: Sequence[int]) -> list[list[int]]:
        """Return the tokens between edges, cut from the tokens of the whole text if possible."""
        whole = self._ids(text)
        cuts = [0]
        for edge in edges:
            head = self._ids(text[:edge])
            if whole[: len(head)] != head:
                bounds = [0, *edges, len(text)]
                return [self._ids(text[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
            cuts.append(len(head))
        return [whole[a:b] for a, b in zip(cuts, [*cuts[1:], len(whole)], strict=True)]

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        # The template writes the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _no_prefix(turn: int, place: str, text: str, part: str, name: str) -> DataError:
    """Return the error for a template that does not render an answer inside its conversation."""
    same = next((i for i, (a, b) in enumerate(zip(text, part, strict=False)) if a != b), len(text))
    return DataError(
        Problem(
            f"the chat template does not render message {turn + 1} of {place} in its place",
            f"{name} ends with {part[max(0, same - 20) : same + 20]!r}, where the whole "
            f"conversation has {text[max(0, same - 20) : same + 20]!r}, so the tokens of the "
            "answer cannot be told",
            "set --train_on_answers last if only earlier turns change, or give another template "
            "with --chat_template",
        )
    )


def shorten(ids: list[int], labels: list[int], length: int) -> tuple[list[int], list[int]] | None:
    """Return the first ``length`` token ids and labels; None without a label of an answer."""
    ids, labels = ids[:length], labels[:length]
    return (ids, labels) if any(label != IGNORED for label in labels) else None


def pack(
    conversations: Sequence[tuple[list[int], list[int]]], block_size: int
) -> list[list[tuple[list[int], list[int]]]]:
    """Put each conversation, whole, into the first block with room for its tokens."""
    blocks: list[list[tuple[list[int], list[int]]]] = []
    room: list[int] = []
    for conversation in conversations:
        size = len(conversation[0])
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            place = len(blocks)
            blocks.append([])
            room.append(block_size)
        blocks[place].append(conversation)
        room[place] -= size
    return blocks


def joined(block: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    """Join the conversations of a block into one sample; positions of each begin at 0."""
    return {
        "input_ids": [token for ids, _ in block for token in ids],
        "labels": [label for _, labels in block for label in labels],
        "position_ids": [place for ids, _ in block for place in range(len(ids))],
    }


def collate_conversations(
    samples: Sequence[dict[str, Any]], *, pad_token_id: int = 0
) -> dict[str, torch.Tensor]:
    """Make a batch of samples, padded on the right to the longest of them.

    Returns:
        ``input_ids`` and ``labels``, int64 of shape (batch, length), labels -100 on padding.
        Packed samples also have ``position_ids`` of that shape, which begin again at 0 with each
        conversation and with the padding. By these transformers keeps conversations from attending
        to each other, but only without an ``attention_mask`` and without a cache, which the trainer
        turns off. Samples that are not packed have an ``attention_mask`` if any of them is padded.
    """
    length = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, value: int) -> torch.Tensor:
        rows = np.full((len(samples), length), value, dtype=np.int64)
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample[name])] = sample[name]
        return torch.from_numpy(rows)

    batch = {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORED),
    }
    lengths = np.array([len(sample["input_ids"]) for sample in samples])[:, None]
    places = np.arange(length)[None, :]
    if "position_ids" in samples[0]:
        positions = padded("position_ids", 0)
        beyond = torch.from_numpy(np.maximum(places - lengths, 0))  # 0, 1, ... in the padding
        return batch | {"position_ids": positions + beyond}
    if (lengths < length).any():
        batch["attention_mask"] = torch.from_numpy((places < lengths).astype(np.int64))
    return batch

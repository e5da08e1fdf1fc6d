"""Samples with ragged targets: equal shapes, unequal numbers of labels that count.

Every function returns the same samples at every call. The first labels of every second row are
ignored, as those of a prompt are, and the rows are of different lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.families.family import Sample

LENGTH, TARGETS, NUM_LABELS = 16, 10, 3
IGNORED, PAD = -100, 0
OUTSIDE = LENGTH + 3  # a position behind the text
FIRST_ID, LAST_ID = 7, 60  # no special token is among these


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _lengths(n: int, longest: int, shortest: int, draw: torch.Generator) -> list[int]:
    """Return random lengths of which no two neighbours agree."""
    lengths = torch.randint(shortest, longest + 1, (n,), generator=draw).tolist()
    for i in range(1, n):
        if lengths[i] == lengths[i - 1]:
            lengths[i] = shortest + (lengths[i] + 1 - shortest) % (longest + 1 - shortest)
    return lengths


def tokens(
    n: int, length: int = LENGTH, *, seed: int = 1, shortest: int = 4, last_id: int = LAST_ID
) -> list[Sample]:
    """Return token ids padded on the right, with their attention mask: each [length]."""
    draw, rows = _draw(seed), []
    for size in _lengths(n, length, shortest, draw):
        ids = torch.full((length,), PAD)
        ids[:size] = torch.randint(FIRST_ID, last_id, (size,), generator=draw)
        rows.append({"input_ids": ids, "attention_mask": (torch.arange(length) < size).long()})
    return rows


def prompted(row: Sample, index: int) -> Tensor:
    """Return labels of a row of tokens: its ids but padding and, every second time, a prompt."""
    size = int(row["attention_mask"].sum())
    labels = row["input_ids"].masked_fill(row["attention_mask"] == 0, IGNORED)
    labels[: size // 2 if index % 2 else 0] = IGNORED
    return labels


def causal(n: int) -> list[Sample]:
    """Return tokens, and labels for the prediction of the next token."""
    return [row | {"labels": prompted(row, i)} for i, row in enumerate(tokens(n))]


def causal_unmasked(n: int) -> list[Sample]:
    """Return tokens as `causal` does, for models that read no attention mask."""
    return [{k: row[k] for k in ("input_ids", "labels")} for row in causal(n)]


def with_labels_of_zeros(n: int) -> list[Sample]:
    """Return tokens as `causal` does, with the pad id as an ordinary label in some rows."""
    rows = causal(n)
    for row in rows[::3]:
        row["labels"][2] = PAD
    return rows


def masked(n: int) -> list[Sample]:
    """Return tokens of which some are to be guessed: one or more in a row, of varying number."""
    draw, rows = _draw(2), []
    for index, row in enumerate(tokens(n)):
        size = int(row["attention_mask"].sum())
        chosen = torch.randperm(size, generator=draw)[: 1 + index % min(size, 5)]
        labels = torch.full_like(row["input_ids"], IGNORED)
        labels[chosen] = row["input_ids"][chosen]
        ids = row["input_ids"].clone()
        ids[chosen] = 6
        rows.append(row | {"input_ids": ids, "labels": labels})
    return rows


def pretraining(n: int, second: str = "next_sentence_label") -> list[Sample]:
    """Return masked tokens, and one label for the row."""
    return [row | {second: torch.tensor(i % 2)} for i, row in enumerate(masked(n))]


def replaced(n: int) -> list[Sample]:
    """Return tokens with a label 0 or 1 at each, for ELECTRA's discriminator."""
    draw = _draw(3)
    return [row | {"labels": torch.randint(0, 2, (LENGTH,), generator=draw)} for row in tokens(n)]


def classes(n: int, name: str = "labels") -> list[Sample]:
    """Return tokens, and one of three classes."""
    return [row | {name: torch.tensor(i % NUM_LABELS)} for i, row in enumerate(tokens(n))]


def classes_with_gaps(n: int) -> list[Sample]:
    """Return rows as `classes` does, but every fourth one has no label."""
    rows = classes(n)
    for row in rows[1::4]:
        row["labels"] = torch.tensor(IGNORED)
    return rows


def several_classes(n: int) -> list[Sample]:
    """Return tokens, and a float 0 or 1 for each of three classes."""
    draw = _draw(4)
    return [
        row | {"labels": torch.randint(0, 2, (NUM_LABELS,), generator=draw).float()}
        for row in tokens(n)
    ]


def scores(n: int) -> list[Sample]:
    """Return tokens, and a float to be predicted."""
    draw = _draw(5)
    return [row | {"labels": torch.randn((), generator=draw)} for row in tokens(n)]


def token_classes(n: int) -> list[Sample]:
    """Return tokens, and a class for each of them, but not for padding and prompts."""
    rows = causal(n)
    for row in rows:
        counts = row["labels"] != IGNORED
        row["labels"] = torch.where(counts, row["input_ids"] % NUM_LABELS, IGNORED)
    return rows


def spans(n: int) -> list[Sample]:
    """Return tokens with an answer's first and last position; of every fourth row it is outside."""
    rows = tokens(n)
    for i, row in enumerate(rows):
        start, end = (OUTSIDE, OUTSIDE) if i % 4 == 2 else (i % 3, i % 3 + 1)
        row |= {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
    return rows


def cut_spans(n: int) -> list[Sample]:
    """Return rows as `spans` does, but of some only the last position is outside."""
    rows = spans(n)
    for row in rows[::4]:
        row["end_positions"] = torch.tensor(OUTSIDE)
    return rows


def choices(n: int) -> list[Sample]:
    """Return two texts each, and which is right: input_ids [2, length]."""
    first, second = tokens(n, seed=6), tokens(n, seed=7)
    return [
        {name: torch.stack([a[name], b[name]]) for name in a} | {"labels": torch.tensor(i % 2)}
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]


def double_heads(n: int, second: str = "mc_labels") -> list[Sample]:
    """Return two texts each with their labels, the right one, and the token that classifies.

    There is no attention mask: OpenAI-GPT takes none for several texts in a row.
    """
    rows = []
    for i, row in enumerate(choices(n)):
        texts = [{k: row[k][c] for k in ("input_ids", "attention_mask")} for c in range(2)]
        last = torch.stack([t["attention_mask"].sum() - 1 for t in texts])
        labels = torch.stack([prompted(t, i + c) for c, t in enumerate(texts)])
        rows.append(
            {"input_ids": row["input_ids"]}
            | {"mc_token_ids": last, "labels": labels, second: torch.tensor(i % 2)}
        )
    return rows


def targets(n: int, *, eos: int = 2) -> list[Tensor]:
    """Return labels of a decoder, of different lengths: each [TARGETS]."""
    draw, rows = _draw(8), []
    for size in _lengths(n, TARGETS, 2, draw):
        labels = torch.full((TARGETS,), IGNORED)
        labels[:size] = torch.randint(FIRST_ID, LAST_ID, (size,), generator=draw)
        labels[size - 1] = eos
        rows.append(labels)
    return rows


def translations(n: int) -> list[Sample]:
    """Return tokens for an encoder, labels for a decoder."""
    return [row | {"labels": t} for row, t in zip(tokens(n), targets(n), strict=True)]


def images(n: int, size: int = 32) -> list[Sample]:
    """Return pixels: [3, size, size]."""
    draw = _draw(9)
    return [{"pixel_values": torch.randn(3, size, size, generator=draw)} for _ in range(n)]


def image_classes(n: int, size: int = 32) -> list[Sample]:
    """Return pixels, and one of three classes."""
    return [row | {"labels": torch.tensor(i % NUM_LABELS)} for i, row in enumerate(images(n, size))]


def segments(n: int, void: int = 255) -> list[Sample]:
    """Return pixels, and a class for each of them; some are void, and in one image all."""
    draw, rows = _draw(10), images(n)
    for i, row in enumerate(rows):
        labels = torch.randint(0, NUM_LABELS, (32, 32), generator=draw)
        labels[i % 3 : i % 3 + 4 * (i % 5), 3 * (i % 4) :] = void
        row["labels"] = torch.full_like(labels, void) if i % 8 == 5 else labels
    return rows


def masked_images(n: int, patches: int = 16) -> list[Sample]:
    """Return pixels, and which patches are hidden: not the same number in each."""
    draw, rows = _draw(11), images(n)
    for i, row in enumerate(rows):
        hidden = torch.zeros(patches, dtype=torch.bool)
        hidden[torch.randperm(patches, generator=draw)[: 3 + 2 * (i % 4)]] = True
        row["bool_masked_pos"] = hidden
    return rows


def noisy_images(n: int, patches: int = 16) -> list[Sample]:
    """Return pixels, and the noise that chooses which patches ViT-MAE hides."""
    draw = _draw(12)
    return [row | {"noise": torch.rand(patches, generator=draw)} for row in images(n)]


def sounds(n: int, length: int = 800) -> list[Sample]:
    """Return waves of different lengths, with their attention mask: each [length]."""
    draw, rows = _draw(13), []
    for size in _lengths(n, length, length // 2, draw):
        mask = (torch.arange(length) < size).long()
        rows.append(
            {"input_values": torch.randn(length, generator=draw) * mask, "attention_mask": mask}
        )
    return rows


def transcripts(n: int) -> list[Sample]:
    """Return waves and the ids said in them: fewer than frames, no two neighbours alike."""
    draw, rows = _draw(14), sounds(n)
    for i, row in enumerate(rows):
        labels = torch.full((6,), IGNORED)
        size = 1 + i % 6
        labels[:size] = torch.randperm(20, generator=draw)[:size] + FIRST_ID
        row["labels"] = labels
    return rows


def sound_classes(n: int) -> list[Sample]:
    """Return waves, and one of three classes."""
    return [row | {"labels": torch.tensor(i % NUM_LABELS)} for i, row in enumerate(sounds(n))]


def frame_classes(n: int, frames: int) -> list[Sample]:
    """Return waves, and one class for each frame as a one-hot vector: [frames, classes]."""
    draw, eye = _draw(15), torch.eye(NUM_LABELS)
    return [
        row | {"labels": eye[torch.randint(0, NUM_LABELS, (frames,), generator=draw)]}
        for row in sounds(n)
    ]


def spectrograms(n: int, bins: int = 8, frames: int = 64, *, time_first: bool) -> list[Sample]:
    """Return spectrograms, and the labels of a decoder: [frames, bins], or [bins, frames]."""
    draw, shape = _draw(16), (frames, bins) if time_first else (bins, frames)
    return [{"input_features": torch.randn(shape, generator=draw), "labels": t} for t in targets(n)]


def numbers(n: int, width: int = 8) -> list[Sample]:
    """Return float features [width], and a float label."""
    draw = _draw(17)
    return [
        {"x": torch.randn(width, generator=draw), "labels": torch.randn((), generator=draw)}
        for _ in range(n)
    ]


def either_head(n: int, width: int = 8) -> list[Sample]:
    """Return float features, and a class for one of two heads: the second in every fourth row."""
    rows = []
    for i, row in enumerate(numbers(n, width)):
        label, none, second = torch.tensor(i % NUM_LABELS), torch.tensor(IGNORED), i % 4 == 3
        heads = {"labels_a": none if second else label, "labels_b": label if second else none}
        rows.append({"x": row["x"]} | heads)
    return rows


def pictured(
    n: int, image_token: int, num_tokens: int, *, before: int = 1, after: tuple[int, ...] = ()
) -> list[Sample]:
    """Return a text after an image, whose tokens begin the input_ids and have no label.

    The first token of all is a label, which counts only where the model does not shift.
    """
    rows = []
    for row in causal(n):
        head = [1] * before + [image_token] * num_tokens + list(after)
        size = len(head)
        ones, none = torch.ones(size, dtype=torch.long), torch.full((size,), IGNORED)
        none[0] = head[0]
        rows.append(
            {
                "input_ids": torch.cat([torch.tensor(head), row["input_ids"]]),
                "attention_mask": torch.cat([ones, row["attention_mask"]]),
                "labels": torch.cat([none, row["labels"]]),
            }
        )
    return [row | image for row, image in zip(rows, images(n), strict=True)]

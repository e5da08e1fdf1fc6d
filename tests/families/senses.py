"""Families that see or hear: images, sound, and both with text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from tests.families import batches
from tests.families.family import Batch, Family, Kind, Sample, stack
from tests.families.tiny import build

Samples = Callable[[int], list[Sample]]
CONTRASTIVE = "each row is told from the others of its batch"
BATCH_NORM = "batch normalisation in training mode"


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with fixed statistics, as users freeze it for small batches."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)


def frozen(model: nn.Module) -> nn.Module:
    """Fix the statistics of every batch normalisation of ``model``."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = FrozenBatchNorm2d
            module.eval()
    return model


def _of(
    name: str, class_name: str, samples: Samples, kind: Kind, *, coupled: str = "", **overrides: Any
) -> Family:
    return Family(
        name,
        lambda: build(getattr(transformers, class_name), **overrides),
        samples,
        kind,
        coupled=coupled,
    )


def _segmenting(name: str, class_name: str, kind: Kind = "targets", **overrides: Any) -> Family:
    return Family(
        name,
        lambda: frozen(build(getattr(transformers, class_name), num_labels=3, **overrides)),
        batches.segments,
        kind,
        ignored=255,
    )


IMAGES = [
    _of("vit", "ViTForImageClassification", batches.image_classes, "samples", num_labels=3),
    _of("swin", "SwinForImageClassification", batches.image_classes, "samples", num_labels=3),
    _of(
        "convnext", "ConvNextForImageClassification", batches.image_classes, "samples", num_labels=3
    ),
    _of("beit", "BeitForImageClassification", batches.image_classes, "samples", num_labels=3),
    _of(
        "resnet",
        "ResNetForImageClassification",
        lambda n: batches.image_classes(n, 64),  # a last map of 1 x 1 would need two rows
        "samples",
        coupled=BATCH_NORM,
        num_labels=3,
    ),
    Family(
        "resnet_frozen",
        lambda: frozen(build(transformers.ResNetForImageClassification, num_labels=3)),
        batches.image_classes,
        "samples",
    ),
    Family(
        "segformer",
        lambda: build(transformers.SegformerForSemanticSegmentation, num_labels=3),
        batches.segments,
        "targets",
        coupled=BATCH_NORM,
        ignored=255,
    ),
    _segmenting("segformer_frozen", "SegformerForSemanticSegmentation"),
    _segmenting("upernet_frozen", "UperNetForSemanticSegmentation"),
    _segmenting("dpt_frozen", "DPTForSemanticSegmentation"),
    _of("vit_mae", "ViTMAEForPreTraining", batches.noisy_images, "samples"),
    _of(
        "vit_masked",
        "ViTForMaskedImageModeling",
        batches.masked_images,
        "unknown",
        encoder_stride=8,
    ),
]

HEARING = [
    _of(
        "wav2vec2_ctc_mean",
        "Wav2Vec2ForCTC",
        batches.transcripts,
        "samples",
        ctc_loss_reduction="mean",
    ),
    _of("wav2vec2_ctc_sum", "Wav2Vec2ForCTC", batches.transcripts, "sum", ctc_loss_reduction="sum"),
    _of(
        "hubert_ctc_mean", "HubertForCTC", batches.transcripts, "samples", ctc_loss_reduction="mean"
    ),
    _of("hubert_ctc_sum", "HubertForCTC", batches.transcripts, "sum", ctc_loss_reduction="sum"),
    _of(
        "wav2vec2_classes",
        "Wav2Vec2ForSequenceClassification",
        batches.sound_classes,
        "samples",
        num_labels=3,
    ),
    _of(
        "wav2vec2_frames",
        "Wav2Vec2ForAudioFrameClassification",
        lambda n: batches.frame_classes(n, 39),
        "samples",
        num_labels=3,
    ),
    _of(
        "whisper",
        "WhisperForConditionalGeneration",
        lambda n: batches.spectrograms(n, time_first=False),
        "targets",
        max_source_positions=32,
    ),
    _of(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        lambda n: batches.spectrograms(n, time_first=True),
        "targets",
        input_feat_per_channel=8,
    ),
]


def flat(*names: str) -> Callable[[Sequence[Sample]], Batch]:
    """Collate as models with images of many sizes want it: ``names`` have no batch dimension."""

    def collate(samples: Sequence[Sample]) -> Batch:
        return {k: v.flatten(0, 1) if k in names else v for k, v in stack(samples).items()}

    return collate


def contrasted(samples: Sequence[Sample]) -> Batch:
    """Collate, and ask for the loss, which is not taken from labels."""
    return stack(samples) | {"return_loss": True}


def captioned_pairs(n: int) -> list[Sample]:
    """Return a text and an image each, without labels."""
    rows = batches.tokens(n, last_id=60)
    return [row | image for row, image in zip(rows, batches.images(n), strict=True)]


def captions(n: int) -> list[Sample]:
    """Return an image, and a text with labels."""
    rows = zip(batches.causal(n), batches.images(n), strict=True)
    return [row | image for row, image in rows]


def patches(n: int) -> list[Sample]:
    """Return images as Qwen2-VL reads them: 16 patches each, those of all in one dimension."""
    from tests.families.tiny import tiny_config

    config = tiny_config("qwen2_vl")
    draw = torch.Generator().manual_seed(21)
    rows = batches.pictured(n, config.image_token_id, 4, before=1)
    width = 3 * 2 * 8 * 8
    for row in rows:
        del row["pixel_values"]
        row["pixel_values"] = torch.randn(16, width, generator=draw)
        row["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        row["mm_token_type_ids"] = (row["input_ids"] == config.image_token_id).long()
    return rows


def _pictured(
    name: str,
    class_name: str,
    num_tokens: int,
    *,
    types: bool = False,
    several: bool = False,
    **overrides: Any,
) -> Family:
    """Return a text after one image.

    Args:
        name: of the family.
        class_name: in transformers.
        num_tokens: tokens that the image stands for.
        types: whether the model reads which tokens are an image's.
        several: whether it reads a list of images for each text.
        overrides: of the config.
    """
    model_class = getattr(transformers, class_name)

    def samples(n: int) -> list[Sample]:
        from tests.families.tiny import config_of

        config = config_of(model_class, **overrides)
        token = getattr(config, "image_token_id", None) or config.image_token_index
        rows = batches.pictured(n, token, num_tokens)
        if types:
            rows = [row | {"token_type_ids": (row["input_ids"] == token).long()} for row in rows]
        if several:
            rows = [row | {"pixel_values": row["pixel_values"][None]} for row in rows]
        return rows

    return Family(name, lambda: build(model_class, **overrides), samples, "shifted")


BOTH = [
    _pictured("llava", "LlavaForConditionalGeneration", 16),
    _pictured("paligemma", "PaliGemmaForConditionalGeneration", 16, types=True),
    _pictured("gemma3", "Gemma3ForConditionalGeneration", 4, types=True, mm_tokens_per_image=4),
    _pictured("idefics2", "Idefics2ForConditionalGeneration", 4, several=True),
    _pictured("idefics3", "Idefics3ForConditionalGeneration", 4, several=True),
    Family(
        "qwen2_vl",
        lambda: build(transformers.Qwen2VLForConditionalGeneration),
        patches,
        "shifted",
        collate=flat("pixel_values", "image_grid_thw"),
    ),
    _of("blip", "BlipForConditionalGeneration", captions, "shifted"),
    _of("git", "GitForCausalLM", captions, "shifted"),
    Family(
        "clip",
        lambda: build(transformers.CLIPModel),
        captioned_pairs,
        "unknown",
        collate=contrasted,
        coupled=CONTRASTIVE,
    ),
    Family(
        "siglip",
        lambda: build(transformers.SiglipModel),
        captioned_pairs,
        "unknown",
        collate=contrasted,
        coupled=CONTRASTIVE,
    ),
]

FAMILIES = IMAGES + HEARING + BOTH

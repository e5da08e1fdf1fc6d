"""Families that read text: causal, masked, classifying, answering, translating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tests.families import batches
from tests.families.family import Family, Kind, Sample
from tests.families.tiny import build

Samples = Callable[[int], list[Sample]]


def _of(name: str, class_name: str, samples: Samples, kind: Kind, **overrides: Any) -> Family:
    return _labelled(name, class_name, samples, kind, None, **overrides)


def _labelled(
    name: str,
    class_name: str,
    samples: Samples,
    kind: Kind,
    labels: tuple[str, ...] | None,
    ignored: int = batches.IGNORED,
    **overrides: Any,
) -> Family:
    return Family(
        name,
        lambda: build(getattr(transformers, class_name), **overrides),
        samples,
        kind,
        labels,
        ignored=ignored,
    )


def _causal(name: str, class_name: str, **overrides: Any) -> Family:
    return _of(name, class_name, batches.causal, "shifted", **overrides)


CAUSAL = [
    _causal("llama", "LlamaForCausalLM"),
    _of("llama_zeros", "LlamaForCausalLM", batches.with_labels_of_zeros, "shifted"),
    _causal("qwen2", "Qwen2ForCausalLM"),
    _causal("qwen3", "Qwen3ForCausalLM"),
    _causal("qwen3_moe", "Qwen3MoeForCausalLM"),
    _causal("mixtral", "MixtralForCausalLM"),
    _causal("gemma2", "Gemma2ForCausalLM"),
    _causal("gemma3_text", "Gemma3ForCausalLM"),
    _causal("gpt2", "GPT2LMHeadModel"),
    # The loss of both double heads is the language model's alone; the other is beside it.
    _of("gpt2_double_heads", "GPT2DoubleHeadsModel", batches.double_heads, "shifted"),
    _causal("openai_gpt", "OpenAIGPTLMHeadModel"),
    _of("openai_gpt_double_heads", "OpenAIGPTDoubleHeadsModel", batches.double_heads, "shifted"),
    _causal("ctrl", "CTRLLMHeadModel"),
    _causal("bert_decoder", "BertLMHeadModel", is_decoder=True),
    _causal("roberta_decoder", "RobertaForCausalLM", is_decoder=True),
    _causal("reformer", "ReformerModelWithLMHead"),
    _of("xlnet", "XLNetLMHeadModel", batches.causal, "targets"),
    _of("mamba", "MambaForCausalLM", batches.causal, "shifted"),
    _of("mamba2", "Mamba2ForCausalLM", batches.causal, "shifted"),
    _of("rwkv", "RwkvForCausalLM", batches.causal_unmasked, "shifted"),
    _causal("gpt_neox", "GPTNeoXForCausalLM"),
    _causal("opt", "OPTForCausalLM"),
    _causal("bloom", "BloomForCausalLM"),
    _causal("falcon", "FalconForCausalLM"),
    _causal("phi", "PhiForCausalLM"),
    _causal("gptj", "GPTJForCausalLM"),
    _causal("gpt_neo", "GPTNeoForCausalLM"),
    _causal("codegen", "CodeGenForCausalLM"),
    _causal("biogpt", "BioGptForCausalLM"),
    _of("bart_decoder", "BartForCausalLM", batches.causal, "targets"),
]

MASKED = [
    _of("bert_masked", "BertForMaskedLM", batches.masked, "targets"),
    _of("roberta_masked", "RobertaForMaskedLM", batches.masked, "targets"),
    _of("distilbert_masked", "DistilBertForMaskedLM", batches.masked, "targets"),
    _of("deberta_v2_masked", "DebertaV2ForMaskedLM", batches.masked, "targets"),
    _of("electra_masked", "ElectraForMaskedLM", batches.masked, "targets"),
    _labelled(
        "bert_pretraining",
        "BertForPreTraining",
        batches.pretraining,
        "terms",
        ("labels", "next_sentence_label"),
    ),
    _labelled(
        "albert_pretraining",
        "AlbertForPreTraining",
        lambda n: batches.pretraining(n, "sentence_order_label"),
        "terms",
        ("labels", "sentence_order_label"),
    ),
    _of("electra_pretraining", "ElectraForPreTraining", batches.replaced, "attended"),
]

HEADS = [
    _of("bert_classes", "BertForSequenceClassification", batches.classes, "samples", num_labels=3),
    _of(
        "bert_classes_gaps",
        "BertForSequenceClassification",
        batches.classes_with_gaps,
        "targets",
        num_labels=3,
    ),
    _of(
        "llama_classes", "LlamaForSequenceClassification", batches.classes, "samples", num_labels=3
    ),
    _of(
        "roberta_several_classes",
        "RobertaForSequenceClassification",
        batches.several_classes,
        "samples",
        num_labels=3,
        problem_type="multi_label_classification",
    ),
    _of(
        "distilbert_scores",
        "DistilBertForSequenceClassification",
        batches.scores,
        "samples",
        num_labels=1,
        problem_type="regression",
    ),
    _of(
        "bert_token_classes",
        "BertForTokenClassification",
        batches.token_classes,
        "targets",
        num_labels=3,
    ),
    _of(
        "deberta_v2_token_classes",
        "DebertaV2ForTokenClassification",
        batches.token_classes,
        "targets",
        num_labels=3,
    ),
    _labelled(
        "bert_answers",
        "BertForQuestionAnswering",
        batches.spans,
        "targets",
        ("start_positions", "end_positions"),
        ignored=batches.OUTSIDE,
    ),
    _labelled(
        "bert_answers_cut",
        "BertForQuestionAnswering",
        batches.cut_spans,
        "terms",
        ("start_positions", "end_positions"),
        ignored=batches.OUTSIDE,
    ),
    _labelled(
        "llama_answers",
        "LlamaForQuestionAnswering",
        batches.spans,
        "targets",
        ("start_positions", "end_positions"),
        ignored=batches.OUTSIDE,
    ),
    _of("bert_choices", "BertForMultipleChoice", batches.choices, "samples"),
    _of(
        "bert_next_sentence",
        "BertForNextSentencePrediction",
        lambda n: [row | {"labels": row["labels"] % 2} for row in batches.classes(n)],
        "samples",
    ),
]

TRANSLATING = [
    _of(
        "t5",
        "T5ForConditionalGeneration",
        batches.translations,
        "targets",
        decoder_start_token_id=batches.PAD,
    ),
    _of("bart", "BartForConditionalGeneration", batches.translations, "targets"),
    _of("mbart", "MBartForConditionalGeneration", batches.translations, "targets"),
    _of("marian", "MarianMTModel", batches.translations, "targets"),
    _of("pegasus", "PegasusForConditionalGeneration", batches.translations, "targets"),
    _of("blenderbot", "BlenderbotForConditionalGeneration", batches.translations, "targets"),
    _of("led", "LEDForConditionalGeneration", batches.translations, "targets"),
    _of("prophetnet", "ProphetNetForConditionalGeneration", batches.translations, "targets"),
]

FAMILIES = CAUSAL + MASKED + HEADS + TRANSLATING

"""Models inside ``partitioned(args)``: loaded, resized and saved; and what is refused after it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.core.ranks import barrier
from tests.distributed.runs import make_trainer
from tests.distributed.weights import differences, in_files, whole_state

VISION_LANGUAGE = [
    f"{name}ForConditionalGeneration" for name in ("Llava", "Gemma3", "Gemma4", "Qwen2VL")
]
MERGED = ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"]


def tiny(name: str, **overrides: Any) -> Any:
    """Return a whole tiny model of transformers, always with the same weights."""
    import transformers

    from tests.families.tiny import build

    return build(getattr(transformers, name), **overrides)


def saved_by_one(model: Any, folder: Path, rank: int) -> Path:
    """Save a whole model with ``save_pretrained``, on the first rank."""
    if rank == 0:
        model.save_pretrained(folder)
    barrier()
    return folder


def block(folder: Path, **settings: Any) -> Any:
    """Return ``partitioned(args)`` at stage 3."""
    import dstrain
    from dstrain import TrainingArguments

    return dstrain.partitioned(
        TrainingArguments(str(folder), zero_stage="3", report_to="none", **settings)
    )


def assert_partitioned(model: torch.nn.Module) -> None:
    """Check that every parameter is partitioned, and that none is whole at this moment."""
    from dstrain.engine import is_partitioned

    assert all(is_partitioned(p) and p.numel() == 0 for p in model.parameters())


def detr_config() -> Any:
    """Make the config of a model whose constructor copies the weights of a BatchNorm."""
    import transformers

    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
    backbone = transformers.ResNetConfig(embedding_size=8, layer_type="basic", **sizes)
    parts = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    wide = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16)
    return transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, num_queries=4,
        num_labels=3, **parts, **heads, **wide,
    )  # fmt: skip


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("way", ["class", "from_config"])
def test_a_constructor_may_use_values_of_modules_inside(
    way: str, tmp_path: Path, rank: int
) -> None:
    import transformers

    def build() -> Any:
        transformers.set_seed(5)
        if way == "class":
            return transformers.DetrForObjectDetection(detr_config())
        return transformers.AutoModelForObjectDetection.from_config(detr_config())

    whole = saved_by_one(build(), tmp_path / "whole", rank)
    with block(tmp_path):
        model = build()
    trainer = make_trainer(tmp_path / "run", stage=3, model=model)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.close()
    assert not differences(in_files(tmp_path / "saved"), in_files(whole))


# --- saving -----------------------------------------------------------------------------------


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("name", [*VISION_LANGUAGE, *MERGED])
def test_a_model_that_was_loaded_in_parts_is_saved_as_it_was_stored(
    name: str, tmp_path: Path, rank: int
) -> None:
    """No prefix twice (``model.model.embed_tokens``), no expert transposed or merged."""
    from dstrain.core.ranks import Ranks
    from dstrain.models import HostCopies, save_model, snapshot_weights

    whole = tiny(name)
    stored = in_files(saved_by_one(whole, tmp_path / "stored", rank))
    with block(tmp_path):
        model = type(whole).from_pretrained(tmp_path / "stored")
    assert_partitioned(model)
    ranks = Ranks(rank, rank, 2, 2)
    save_model(model, tmp_path / "saved", ranks)
    held = snapshot_weights(model, ranks, HostCopies(), shard_bytes=20_000)
    assert held is not None
    assert held.shares
    (tmp_path / "held").mkdir(exist_ok=True)
    barrier()
    held.exchanged(None).write(tmp_path / "held", with_index=rank == 0)
    barrier()
    assert differences(stored, in_files(tmp_path / "saved")) == []
    assert differences(stored, in_files(tmp_path / "held")) == []
    index = json.loads((tmp_path / "held/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    assert len(set(index["weight_map"].values())) > 3


@pytest.mark.ranks(2)
def test_only_weights_that_are_merged_are_converted_together(tmp_path: Path, rank: int) -> None:
    """A renamed tensor is gathered alone; of merged experts a group is those of one layer."""
    from dstrain.models import groups_of

    for name in (*VISION_LANGUAGE, "LlamaForCausalLM"):
        saved_by_one(tiny(name), tmp_path / name, rank)
        with block(tmp_path):
            model = type(tiny(name)).from_pretrained(tmp_path / name)
        assert all(group.is_as_trained for group in groups_of(model)), name
    mixtral = tiny("MixtralForCausalLM")
    groups = [group for group in groups_of(mixtral) if not group.is_as_trained]
    layers, experts = mixtral.config.num_hidden_layers, mixtral.config.num_local_experts
    assert [len(group.entries) for group in groups] == [1] * 2 * layers
    assert sorted(len(group.saved) for group in groups) == layers * [experts] + layers * [
        2 * experts
    ]


ALL_IN_BF16 = {"data_types": {"keep_in_fp32_modules": []}}


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=600)
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", [VISION_LANGUAGE[0], MERGED[0], MERGED[2], "Glm4MoeForCausalLM"])
def test_checkpoints_and_exports_have_the_layout_of_save_pretrained(
    name: str, stage: int, tmp_path: Path, rank: int
) -> None:
    """A model that was loaded whole, after training: both ways to save, and out of the slices.

    GLM-4's routing has a buffer that stays in fp32, and a weight that transformers would keep so.
    """
    from dstrain.checkpoint.export import export

    saved_by_one(tiny(name), tmp_path / "stored", rank)
    for asynchronous in (False, True):
        model = type(tiny(name)).from_pretrained(tmp_path / "stored")
        whole = copy.deepcopy(model)
        folder = tmp_path / f"run-{asynchronous}"
        trainer = trained(
            folder, model, stage=stage, bf16=True, save_async=asynchronous, deepspeed=ALL_IN_BF16
        )
        checkpoint = folder / "checkpoint-2"
        trainer.save_model()
        state = whole_state(model)
        trainer.close()
        if rank:
            continue
        whole.load_state_dict(state, assign=True)
        whole.tie_weights()
        whole.save_pretrained(tmp_path / "expected")
        expected = in_files(tmp_path / "expected")
        for found in (folder, checkpoint):
            assert differences(expected, in_files(found)) == [], found
        for dtype in (None, "fp32"):
            out = tmp_path / f"exported-{asynchronous}-{dtype}"
            export(checkpoint, out, dtype=dtype)
            exported = in_files(out)
            if dtype:  # more digits, which round to the weights
                rounded = {n: t.to(expected[n].dtype) for n, t in exported.items()}
                assert any(not torch.equal(rounded[n].float(), exported[n]) for n in exported)
                exported = rounded
            assert differences(expected, exported) == [], dtype


def trained(folder: Path, model: Any, *, stage: int, **settings: Any) -> Any:
    """Train two steps on texts and save a checkpoint; return the trainer."""
    from tests.models import RaggedTokens

    data = RaggedTokens(8)
    for example in data.examples:  # below the tiny vocabulary and its ids of images
        example["input_ids"] = [3 + token % 50 for token in example["input_ids"]]
        example["labels"] = [t if t < 0 else 3 + t % 50 for t in example["labels"]]
    trainer = make_trainer(
        folder, stage=stage, model=model, data=data, evaluation=0, max_steps=2,
        save_strategy="steps", save_steps=2, **settings,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_come_back_from_model_files_in_another_layout(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """``load_weights`` of a checkpoint without slices, of a model whose experts are merged."""
    from dstrain.checkpoint import load_weights, read_manifest

    model = tiny("MixtralForCausalLM")
    trainer = trained(tmp_path, model, stage=stage, save_only_model=True)
    trained_to = whole_state(model)
    folder = tmp_path / "kept"
    if rank == 0:
        (tmp_path / "checkpoint-2").rename(folder)
    trainer.args.max_steps = 4
    trainer.train()
    assert differences(trained_to, whole_state(model))
    load_weights(trainer._engines.training, folder, read_manifest(folder), trainer.ranks)
    assert differences(trained_to, whole_state(model)) == []
    trainer.close()


# --- loading ----------------------------------------------------------------------------------


def base_into_head(folder: Path, rank: int) -> tuple[Any, Path]:
    from transformers import BertForSequenceClassification, BertModel

    base = tiny("BertForSequenceClassification").bert
    assert isinstance(base, BertModel)
    return BertForSequenceClassification, saved_by_one(base, folder, rank)


def head_into_base(folder: Path, rank: int) -> tuple[Any, Path]:
    from transformers import BertModel

    return BertModel, saved_by_one(tiny("BertForSequenceClassification"), folder, rank)


def in_shards(folder: Path, rank: int) -> tuple[Any, Path]:
    model = tiny("MixtralForCausalLM")
    if rank == 0:
        model.save_pretrained(folder, max_shard_size=30_000)
        assert len(list(folder.glob("*.safetensors"))) > 3
    barrier()
    return type(model), folder


def pickled(folder: Path, rank: int) -> tuple[Any, Path]:
    """Save with both names of a tied weight, as torch's own files have them."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    saved_by_one(model, folder, rank)
    if rank == 0:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    barrier()
    return type(model), folder


def tied_in_config_alone(folder: Path, rank: int) -> tuple[Any, Path]:
    """Save two values under names that the config ties; transformers keeps both."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[-1] += 1.0  # in the share of the last rank alone
    model.config.tie_word_embeddings = True
    return type(model), saved_by_one(model, folder, rank)


def with_buffers(folder: Path, rank: int) -> tuple[Any, Path]:
    model = tiny("ResNetForImageClassification")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
    return type(model), saved_by_one(model, folder, rank)


def with_older_names(folder: Path, rank: int) -> tuple[Any, Path]:
    """Save under ``gamma`` and ``beta``, which a conversion of all models renames."""
    from safetensors.torch import save_file

    model = tiny("BertForSequenceClassification")
    saved_by_one(model, folder, rank)
    if rank == 0:
        new = in_files(folder)
        renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        older = {}
        for name, tensor in new.items():
            end = ".".join(name.split(".")[-2:])
            older[name.replace(end, renamed.get(end, end))] = tensor
        save_file(older, folder / "model.safetensors", {"format": "pt"})
    barrier()
    return type(model), folder


SOURCES = [
    base_into_head, head_into_base, in_shards, pickled, tied_in_config_alone, with_buffers,
    with_older_names,
]  # fmt: skip


@pytest.mark.ranks(2)
@pytest.mark.parametrize("source", SOURCES)
def test_loading_in_parts_gives_what_loading_whole_gives(
    source: Callable[[Path, int], tuple[Any, Path]], tmp_path: Path, rank: int
) -> None:
    """Weights, buffers, the report of what was missing, and what is saved afterwards."""
    from dstrain.core.ranks import Ranks
    from dstrain.models import save_model

    cls, folder = source(tmp_path / "stored", rank)
    with block(tmp_path):
        pass  # it seeds nothing and changes nothing outside
    torch.manual_seed(3)
    whole, told_whole = cls.from_pretrained(folder, output_loading_info=True)
    torch.manual_seed(3 + rank)  # the main rank's random values count
    with block(tmp_path):
        model, told = cls.from_pretrained(folder, output_loading_info=True)
    assert_partitioned(model)
    assert differences(whole.state_dict(), whole_state(model)) == []
    assert differences(dict(whole.named_buffers()), dict(model.named_buffers())) == []
    assert told == told_whole
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        assert model.get_parameter(name).requires_grad == parameter.requires_grad
    ties = [len(list(m.parameters())) for m in (whole, model)]
    assert ties[0] == ties[1]
    expected = in_files(saved_by_one(whole, tmp_path / "whole", rank))
    save_model(model, tmp_path / "saved", Ranks(rank, rank, 2, 2))
    assert differences(expected, in_files(tmp_path / "saved")) == []


@pytest.mark.ranks(2)
def test_parameters_have_the_format_of_training_and_buffers_their_own(
    tmp_path: Path, rank: int
) -> None:
    """As the engine makes it of a whole model: bf16 weights, fp32 statistics."""
    for name in ("ResNetForImageClassification", "MixtralForCausalLM"):
        model = tiny(name)
        saved_by_one(model, tmp_path / name, rank)
        with block(tmp_path, bf16=True):
            loaded = type(model).from_pretrained(tmp_path / name)
            built = type(model)._from_config(copy.deepcopy(model.config))
        for made in (loaded, built):
            assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
            formats = [{n: b.dtype for n, b in m.named_buffers()} for m in (model, made)]
            assert formats[0] == formats[1]
        expected = {n: p.to(torch.bfloat16) for n, p in model.named_parameters()}
        state = whole_state(loaded)
        assert differences(expected, {n: state[n] for n in expected}) == []


@pytest.mark.ranks(2)
def test_a_rank_holds_its_share_of_what_it_loads(tmp_path: Path, rank: int) -> None:
    """Memory that is a process's own grows by the partition, and one tensor or a little more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=4096, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    if rank == 0:
        whole = LlamaForCausalLM(config)
        size = sum(p.nbytes for p in whole.parameters())
        whole.save_pretrained(tmp_path / "stored")
        del whole
    else:
        size = 0
    from dstrain.core.ranks import gather_objects

    size = gather_objects(size)[0]
    with block(tmp_path):
        before = own_memory()
        model = LlamaForCausalLM.from_pretrained(tmp_path / "stored")
        grown = own_memory() - before
    assert_partitioned(model)
    assert size > 150e6
    assert grown < 0.65 * size, (grown, size)


@pytest.mark.ranks(2)
def test_a_checkpoint_that_one_rank_cannot_read_stops_all(tmp_path: Path, rank: int) -> None:
    """The others would wait for it otherwise; and afterwards loading works again."""
    from dstrain.core.errors import ModelError

    model = tiny("LlamaForCausalLM")
    saved_by_one(model, tmp_path / "0", rank)
    if rank == 1:
        shutil.copytree(tmp_path / "0", tmp_path / "1")
        path = tmp_path / "1/model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    expected = "rank 1" if rank == 0 else "incomplete|size"
    with block(tmp_path):
        with pytest.raises(Exception, match=expected) as caught:
            type(model).from_pretrained(tmp_path / str(rank))
        assert isinstance(caught.value, ModelError) is (rank == 0)
        assert_partitioned(type(model).from_pretrained(tmp_path / "0"))


@pytest.mark.ranks(2)
def test_a_device_map_is_refused(tmp_path: Path, rank: int) -> None:
    from dstrain.core.errors import ModelError

    model = tiny("LlamaForCausalLM")
    saved_by_one(model, tmp_path / "stored", rank)
    with block(tmp_path), pytest.raises(ModelError, match="leave device_map out"):
        type(model).from_pretrained(tmp_path / "stored", device_map="cpu")


# --- other sizes ------------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_misfitting_weights_are_made_anew_where_that_is_asked_for(
    tmp_path: Path, rank: int
) -> None:
    """As whole loading does it: the head anew, the rest exact; else an error on all ranks."""
    whole = tiny("BertForSequenceClassification")
    cls = type(whole)
    saved_by_one(whole, tmp_path / "stored", rank)
    torch.manual_seed(7)
    expected = cls.from_pretrained(
        tmp_path / "stored", num_labels=5, ignore_mismatched_sizes=True
    ).state_dict()
    torch.manual_seed(7 + rank)
    with block(tmp_path):
        model = cls.from_pretrained(tmp_path / "stored", num_labels=5, ignore_mismatched_sizes=True)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            cls.from_pretrained(tmp_path / "stored", num_labels=5)
    assert_partitioned(model)
    assert tuple(expected["classifier.weight"].shape)[0] == 5
    assert differences(expected, whole_state(model)) == []


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "change",
    [
        {"new_num_tokens": 77},
        {"new_num_tokens": 77, "mean_resizing": False},
        {"new_num_tokens": 70, "pad_to_multiple_of": 16},
        {"new_num_tokens": 50},
    ],
)
def test_a_vocabulary_is_resized_inside_the_block(
    change: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """As for a whole model, number for number: old rows, new rows, tied ones, their biases."""
    for name, overrides in (
        ("LlamaForCausalLM", {"tie_word_embeddings": False}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("BertForMaskedLM", {}),
        ("BartForConditionalGeneration", {}),
        ("T5ForConditionalGeneration", {}),
        (VISION_LANGUAGE[0], {}),
        (VISION_LANGUAGE[2], {}),
    ):
        whole = tiny(name, **overrides)
        saved_by_one(whole, tmp_path / "stored", rank)
        torch.manual_seed(11)
        whole.resize_token_embeddings(**change)
        with block(tmp_path):
            model = type(whole).from_pretrained(tmp_path / "stored")
            torch.manual_seed(11 + rank)
            embeddings = model.resize_token_embeddings(**change)
        assert_partitioned(model)
        assert embeddings is model.get_input_embeddings()
        assert differences(whole.state_dict(), whole_state(model)) == [], name
        assert len(list(whole.parameters())) == len(list(model.parameters())), name
        sizes = [m.config.get_text_config().vocab_size for m in (whole, model)]
        assert sizes[0] == sizes[1]


@pytest.mark.ranks(2)
def test_after_the_block_a_vocabulary_cannot_be_resized(tmp_path: Path, rank: int) -> None:
    """Built or loaded in it, or taken apart by a training: said before anything changes."""
    from dstrain.core.errors import ModelError

    whole = tiny("LlamaForCausalLM")
    saved_by_one(whole, tmp_path / "stored", rank)
    with block(tmp_path):
        loaded = type(whole).from_pretrained(tmp_path / "stored")
        built = type(whole)._from_config(whole.config)
    for model in (loaded, built):
        before = whole_state(model)
        with pytest.raises(ModelError, match="inside `with dstrain.partitioned"):
            model.resize_token_embeddings(100)
        assert differences(before, whole_state(model)) == []
        with pytest.raises(ModelError, match="save_model"):
            model.save_pretrained(tmp_path / "own")
    whole.resize_token_embeddings(100)  # a whole one is nobody's business
    trainer = trained(tmp_path / "run", whole, stage=3)
    with pytest.raises(ModelError, match="inside `with dstrain.partitioned"):
        whole.resize_token_embeddings(120)
    trainer.close()


class Copies(torch.nn.Module):
    """Uses the weights of a part that was built inside of the block, in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        import transformers

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(vocab_size=40, num_attention_heads=2, **sizes)
        self.part = transformers.AutoModelForCausalLM.from_config(config)
        table = self.part.get_input_embeddings().weight
        self.head = torch.nn.Linear(16, 40)
        if way == "data":
            self.head.weight.data.copy_(table.data)
        elif way == "clone":
            self.head.weight = torch.nn.Parameter(table.detach().clone())
        elif way == "change":
            with torch.no_grad():
                table.mul_(2.0)
        elif way == "number":
            self.register_buffer("size", table.norm().detach())
        elif way == "change of data":
            table.data.mul_(2.0).add_(1.0)
        elif way == "format":
            self.part.half().float()  # does not gather, and leaves it in parts
        elif way == "deepcopy":
            self.copied = copy.deepcopy(self.part.get_input_embeddings())
        elif way == "row":
            table.data[3].zero_()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("way", ["data", "clone", "change", "change of data", "number", "deepcopy"])
def test_a_constructor_may_use_a_part_that_was_built_in_the_block(
    way: str, tmp_path: Path, rank: int
) -> None:
    import transformers

    transformers.set_seed(5)
    whole = Copies(way).state_dict()
    transformers.set_seed(5)
    with block(tmp_path):
        model = Copies(way)
    assert not differences(whole_state(model), whole)


@pytest.mark.ranks(2)
def test_a_constructor_that_converts_such_a_part_leaves_it_in_parts(tmp_path: Path) -> None:
    with block(tmp_path):
        model = Copies("format")
    assert_partitioned(model.part)


@pytest.mark.ranks(2)
def test_a_constructor_that_changes_a_row_of_such_a_part_is_told(tmp_path: Path) -> None:
    from dstrain.core.errors import ModelError

    with pytest.raises(ModelError, match="changes a part of a weight in place"), block(tmp_path):
        Copies("row")

"""Model folders that are damaged, forged, or lack something: one error, alike on all ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.core.errors import DstrainError
from dstrain.core.ranks import barrier, gather_objects
from tests.models import tiny_llama

MODEL = "model.safetensors"
BIN = "pytorch_model.bin"


class Evil:
    """Executed by whoever unpickles it."""

    def __reduce__(self) -> Any:
        """Ask for a system command."""
        return os.system, (f"touch {os.environ['TEST_EVIL']}",)


def cut(folder: Path, size: float = 0.5) -> None:
    """Keep only the beginning of the weights."""
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[: int(len(data) * size)])


def as_bin(folder: Path, content: Any = None) -> None:
    """Replace the weights by a file of torch.save, or bytes."""
    (folder / MODEL).unlink()
    if isinstance(content, bytes):
        (folder / BIN).write_bytes(content)
    else:
        torch.save(tiny_llama().state_dict() if content is None else content, folder / BIN)


def cut_bin(folder: Path) -> None:
    """Keep only the beginning of a file of torch.save."""
    as_bin(folder)
    data = (folder / BIN).read_bytes()
    (folder / BIN).write_bytes(data[: len(data) // 2])


def config(**values: Any) -> Callable[[Path], None]:
    """Change the config."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **values}))

    return change


def text(content: str) -> Callable[[Path], None]:
    """Replace the config."""
    return lambda folder: (folder / "config.json").write_text(content) and None


def without(*names: str) -> Callable[[Path], None]:
    """Take weights out."""
    from safetensors.torch import load_file, save_file

    def change(folder: Path) -> None:
        tensors = load_file(folder / MODEL)
        kept = {n: t for n, t in tensors.items() if n not in names}
        save_file(kept, folder / MODEL, {"format": "pt"})

    return change


def stored_as(dtype: torch.dtype, *names: str) -> Callable[[Path], None]:
    """Store weights in another format."""
    from safetensors.torch import load_file, save_file

    def change(folder: Path) -> None:
        tensors = load_file(folder / MODEL)
        tensors |= {name: tensors[name].to(dtype) for name in names}
        save_file(tensors, folder / MODEL, {"format": "pt"})

    return change


def generation(content: Any) -> Callable[[Path], Any]:
    """Replace the generation config."""
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(content))


def shards(folder: Path, *, lose: bool) -> None:
    """Write several files of weights; lose one, or damage their index."""
    (folder / MODEL).unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="100KB")
    if lose:
        next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    else:
        (folder / f"{MODEL}.index.json").write_text('{"weight_map": ')


def nested(levels: int) -> str:
    """Return a JSON text nested as deep as asked."""
    return '{"a":' * levels + "1" + "}" * levels


UP = "model.layers.1.mlp.up_proj.weight"
CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "cut": (cut, [f"{MODEL} cannot be read", "not fully covered", "get the file again"]),
    "cut header": (lambda f: cut(f, 0.0001), [f"{MODEL} cannot be read", "header"]),
    "empty": (lambda f: cut(f, 0), [f"{MODEL} cannot be read", "(0 bytes)"]),
    "no archive": (lambda f: as_bin(f, b"x" * 900), [f"{BIN} cannot be read", "it is no archive"]),
    "cut archive": (cut_bin, [f"{BIN} cannot be read", "its end is missing"]),
    "forbidden": (
        lambda f: as_bin(f, {"a": Evil()}),
        ["are not loaded", "posix.system", "only executing", "safetensors"],
    ),
    "a list": (lambda f: as_bin(f, [1, 2]), ["cannot be loaded"]),
    "no tensors": (lambda f: as_bin(f, {"a": 1}), ["21 in number", "not used of it: a"]),
    "lost shard": (lambda f: shards(f, lose=True), ["lacks files of weights", "model-00001-of"]),
    "bad index": (lambda f: shards(f, lose=False), ["index.json cannot be read"]),
    "negative": (config(hidden_size=-64), ["hidden_size=-64", "1 or more"]),
    "zero": (config(hidden_size=0), ["hidden_size=0", "1 or more"]),
    "text": (config(hidden_size="big"), ['hidden_size="big"', "a whole number"]),
    "fraction": (config(hidden_size=64.5), ["hidden_size=64.5"]),
    "null": (config(hidden_size=None), ["cannot be read", "hidden_size"]),
    "list": (config(hidden_size=[64]), ["cannot be read", "hidden_size"]),
    "huge": (config(hidden_size=10**18), ["no llama model can be built"]),
    "no heads": (config(num_attention_heads=0, vocab_size=-1), ["heads=0", "vocab_size=-1"]),
    "layers": (config(num_hidden_layers=-1), ["num_hidden_layers=-1"]),
    "inside": (config(text_config={"hidden_size": -2}), ["text_config.hidden_size=-2"]),
    "layer upon layer": (config(num_hidden_layers=10**9), ["more than 100,000 of them"]),
    "huge number": (config(hidden_size=10**30), ["no llama model can be built"]),
    "dropout": (
        config(attention_dropout=-1, text_config={"resid_pdrop": 2}),
        ["attention_dropout=-1", "text_config.resid_pdrop=2", "a number from 0 to 1"],
    ),
    "no dropout": (config(attention_dropout=float("nan")), ["attention_dropout=NaN"]),
    "bytes": (stored_as(torch.int8, UP), ["1 weights of", f"{UP} is I8", "no quantisation"]),
    "flags": (stored_as(torch.bool, UP), [f"{UP} is BOOL"]),
    "complex": (stored_as(torch.complex64, UP), [f"{UP} is C64"]),
    "no generation config": (generation([1]), ["generation_config.json cannot be read"]),
    "beams": (generation({"num_beams": 0}), ["num_beams=0 in", "a whole number", "remove the"]),
    "ends": (generation({"eos_token_id": [2, "x"]}), ['eos_token_id=[2, "x"] in']),
    "deep": (text(nested(100_000)), ["cannot be read", "deeper than 200"]),
    "less deep": (text(nested(900)), ["cannot be read", "deeper than 200"]),
    "half": (text('{"model_type": '), ["cannot be read", "config.json"]),
    "array": (text("[1]"), ["it is no JSON object"]),
    "unknown": (config(model_type="frobnicate"), ["cannot be read", "frobnicate"]),
    "number": (config(model_type=7), ["cannot be read"]),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["optimum"]),
    "not quantised": (config(quantization_config=7), ["cannot be read"]),
    "shapes": (
        config(intermediate_size=64),
        ["6 weights of", "another shape", "(128, 64) in the file, and (64, 64) by the config"],
    ),
    "missing": (
        without(UP),
        [
            "lacks weights of the model, 1 in number",
            f"{UP} would be random",
            "--ignore_missing_keys",
        ],
    ),
}


def load(folder: Path, stage: int, **options: Any) -> Any:
    """Load a folder as ``dstrain train causal-lm`` does."""
    from dstrain import TrainingArguments
    from dstrain.tasks.causal_lm.job import CAUSAL_LM
    from dstrain.tasks.common.job import make_model, saved_config
    from dstrain.trainer.build import start_run

    args = TrainingArguments(str(folder.parent / "out"), zero_stage=stage)
    return make_model(
        args,
        CAUSAL_LM,
        name=str(folder),
        ignore_missing=options.pop("ignore_missing", False),
        config=saved_config(str(folder)),
        tokenizer=range(10),
        sequence_length=8,
        ranks=start_run(args),
    )


def make(folder: Path, rank: int, spoil: Callable[[Path], Any], **model: Any) -> None:
    """Write a folder on the main rank."""
    if rank == 0:
        tiny_llama(**model).save_pretrained(folder)
        spoil(folder)
    barrier()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", CASES)
def test_a_bad_folder_is_one_error(
    case: str, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same on both ranks, with what, why and remedy; nothing is executed."""
    monkeypatch.setenv("TEST_EVIL", str(tmp_path / "evil"))
    spoil, expected = CASES[case]
    folder = tmp_path / "model"
    make(folder, rank, spoil)
    stages = (1, 3) if case in ("shapes", "missing", "gptq") else (1,)
    for stage in stages:
        with pytest.raises(DstrainError) as caught:
            load(folder, stage)
        said = str(caught.value)
        assert all(part in said for part in expected), said
        assert "Traceback" not in said
        assert len(set(gather_objects(said))) == 1
    assert not (tmp_path / "evil").exists()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_missing_weights_can_be_ignored_and_tied_ones_are_none(
    stage: int, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With --ignore_missing_keys it begins with random ones, and says which."""
    folder = tmp_path / "model"
    make(folder, rank, without(UP))
    model = load(folder, stage, ignore_missing=True)
    assert UP in dict(model.named_parameters())
    make(tmp_path / "tied", rank, lambda f: None, tie_word_embeddings=True)
    load(tmp_path / "tied", stage)
    barrier()
    make(tmp_path / "bin", rank, as_bin)
    load(tmp_path / "bin", stage)


@pytest.mark.ranks(2)
def test_one_rank_that_cannot_read_its_folder_ends_all(tmp_path: Path, rank: int) -> None:
    """Machines have disks of their own."""
    folder = tmp_path / str(rank)
    make(tmp_path / "0", rank, lambda f: None)
    make(tmp_path / "1", rank, cut)
    from dstrain import TrainingArguments
    from dstrain.models import load_causal_lm
    from dstrain.trainer.build import resolve_config, start_run

    args = TrainingArguments(str(tmp_path / "out"), zero_stage=1)
    resolved = resolve_config(args, start_run(args))
    with pytest.raises(DstrainError, match="cannot be read"):
        load_causal_lm(str(folder), resolved)

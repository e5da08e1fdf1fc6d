"""The presets: each resolves at every size without a leftover, and DeepSpeed takes the result."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, Machine, ModelFacts, ResolvedConfig, resolve
from dstrain.config.resolution.source import preset_folder
from dstrain.core.errors import ConfigError

PRESETS = sorted(path.stem for path in preset_folder().glob("*.json"))
WORLD_SIZES = [1, 8, 64, 512]
MODEL = ModelFacts(10**9, 10**9, largest=10**8, largest_vector=20_000)
ONLY_CUDA = {"zero3_zeropp", "zero3_superoffload"}
SHORT_FIELDS = {
    "zero3_hpz": "zero_hpz_partition_size",
    "zero3_zeropp": "zero_quantized_gradients",
    "zero3_superoffload": "offload_optimizer.super_offload",
    "zero3_nvme": "offload_optimizer.nvme_path",
    "zero3_nvme_params": "offload_param.nvme_path",
}


def resolved(preset: str, world_size: int, device: str = "cuda", **arguments: Any):
    settings = {"bf16": True, "gradient_accumulation_steps": 2, **arguments}
    if "nvme" in preset:
        settings.setdefault("nvme_path", "/local")
    facts = Facts(
        world_size=world_size,
        device=device,
        num_training_steps=100,
        model=MODEL,
        machine=Machine(min(world_size, 8), device_bytes=80 * 2**30),
    )
    return resolve(TrainingArguments(deepspeed=preset, **settings), facts)


@pytest.fixture(scope="module")
def read_by_deepspeed() -> Iterator[Any]:
    """Give DeepSpeed's own reader, in a group of as many ranks as the config was resolved for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime import config as module

        def read(got: ResolvedConfig) -> Any:
            ranks = types.SimpleNamespace(
                get_rank=lambda: 0, get_world_size=lambda: got.facts.world_size
            )
            patch.setattr(module, "dist", ranks)
            return module.DeepSpeedConfig(got.to_deepspeed())

        yield read


def at(config: Any, path: str) -> Any:
    """Return an attribute of one of DeepSpeed's config objects by dotted path."""
    for part in path.split("."):
        config = getattr(config, part)
    return getattr(config, "value", config)  # enums


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_resolves_and_deepspeed_reads_the_same(
    preset: str, world_size: int, device: str, read_by_deepspeed: Any
) -> None:
    """Nothing stays "auto", the batch adds up, and every value of the preset arrives."""
    if preset in ONLY_CUDA and device == "cpu":
        pytest.skip("refused there, as another test shows")
    got = resolved(preset, world_size, device)
    assert "auto" not in [str(value) for value in got.values.values()]
    assert set(got.provenance) == set(got.values)
    assert got.micro_batch_size * got.accumulation * world_size == got.global_batch_size
    read = read_by_deepspeed(got)
    assert read.train_batch_size == got.global_batch_size
    assert int(read.zero_optimization_stage) == got.stage == int(preset[4])
    # Accumulation in 16 bits below stage 2 is worth a word, and nothing else that a preset brings.
    summed_in_bf16 = got.stage < 2 and got.accumulation > 1
    assert len(got.warnings) == summed_in_bf16
    assert all("added up in bf16" in warning for warning in got.warnings)
    for path, value in leaves(
        {k: v for k, v in got.to_deepspeed().items() if k.startswith("zero")}
    ):
        if not path.startswith("zero_optimization."):
            continue
        name = path.removeprefix("zero_optimization.").replace("stage3_", "")
        assert str(at(read.zero_config, name)) == str(value), path


@pytest.mark.parametrize("preset", PRESETS)
def test_the_name_says_where_things_are(preset: str) -> None:
    got = resolved(preset, 8)
    place = "nvme" if "nvme" in preset else "cpu" if "offload" in preset else "none"
    assert got.arguments["offload_optimizer"] == place
    expected = "nvme" if preset.endswith("nvme_params") else "cpu"
    moved = "params" in preset or "nvme" in preset
    assert got.arguments["offload_param"] == (expected if moved else "none")
    if preset in SHORT_FIELDS:
        assert got.values[f"zero_optimization.{SHORT_FIELDS[preset]}"]


@pytest.mark.parametrize(
    ("world_size", "ranks_per_machine", "expected"),
    [(1, 1, 1), (8, 8, 1), (16, 8, 8), (64, 4, 4), (64, None, 8), (12, 8, 1), (4, None, 1)],
)
def test_hpz_takes_the_ranks_of_a_machine(world_size, ranks_per_machine, expected):
    """On one machine, or on machines that do not divide the ranks, it is off and says why."""
    known = ranks_per_machine is not None
    machine = Machine(ranks_per_machine, device_bytes=80 * 2**30) if known else None
    facts = Facts(world_size=world_size, machine=machine)
    key = "zero_optimization.zero_hpz_partition_size"
    for given in ({"deepspeed": "zero3_hpz"}, {"hpz_partition_size": 0}):
        got = resolve(TrainingArguments(**given), facts)
        assert got.values[key] == expected
        assert ("off" in got.provenance[key].detail) == (expected == 1)
        assert got.stage == 3


@pytest.mark.parametrize("preset", sorted(ONLY_CUDA))
def test_what_is_written_for_cuda_is_refused_on_the_cpu(preset: str) -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        resolved(preset, 8, "cpu")


@pytest.mark.parametrize("preset", [name for name in PRESETS if "nvme" in name])
def test_nvme_without_a_path_is_refused(preset: str) -> None:
    with pytest.raises(ConfigError, match="nvme_path"):
        resolved(preset, 8, nvme_path=None)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fixes_nothing_but_zero_and_is_explained(preset: str) -> None:
    """A preset that fixed a learning rate would be a surprise."""
    text = (preset_folder() / f"{preset}.json").read_text()
    fixed = [path for path, value in leaves(json.loads(text)) if value != "auto"]
    assert fixed
    assert all(path.startswith("zero_optimization.") for path in fixed)
    assert f"| `{preset}` |" in (preset_folder() / "README.md").read_text()

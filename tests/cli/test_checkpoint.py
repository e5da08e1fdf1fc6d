"""``dstrain checkpoint``, on checkpoints that a real run wrote."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dstrain.cli.main import main
from tests.distributed.test_restart import job


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Train two ranks at stage 3 in bf16; give the folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    job(
        folder, ranks=2, stage=3, bf16=True, max_steps=4, save_steps=2,
        evaluation=4, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    return folder


@pytest.fixture
def called(monkeypatch, capsys):
    """Run the command in this process; its status and standard output."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> tuple[int, str]:
        status = main(["checkpoint", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.mark.slow
def test_ls_shows_step_size_and_metric(called, run_folder):
    (run_folder / "checkpoint-9").mkdir(exist_ok=True)
    status, text = called("ls", run_folder)
    assert status == 0
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["2", "4"]
    assert "whole" in lines[1]
    assert "eval_loss=5." in lines[2]
    assert lines[3] == "checkpoint-9: not committed (it has no manifest.json)"
    (run_folder / "checkpoint-9").rmdir()


@pytest.mark.slow
def test_verify_says_what_is_damaged(called, run_folder):
    status, text = called("verify", run_folder)
    assert status == 0
    assert text.count(": good (") == 2
    path = run_folder / "checkpoint-4/state/rank-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    status, text = called("verify", run_folder)
    path.write_bytes(content)
    assert status == 1
    assert "checkpoint-2: good" in text
    assert f"state/rank-00001.safetensors has {len(content) - 1} bytes" in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_an_exported_model_is_the_checkpoints(called, run_folder, tmp_path, dtype):
    """As trained it equals what the checkpoint has; in fp32 it has the master weights' digits."""
    import torch
    from transformers import AutoModelForCausalLM

    words = ["export", run_folder / "checkpoint-4", tmp_path / "out"]
    status, text = called(*words, *(["--dtype", dtype] if dtype else []))
    assert status == 0, text
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    trained = AutoModelForCausalLM.from_pretrained(run_folder / "checkpoint-4", dtype="auto")
    assert exported.dtype == (torch.float32 if dtype else torch.bfloat16)
    for name, expected in trained.named_parameters():
        found = dict(exported.named_parameters())[name]
        assert torch.equal(found.to(torch.bfloat16), expected), name
    if dtype:
        assert any(not torch.equal(p, p.bfloat16().float()) for p in exported.parameters())
    assert called(*words)[0] == 2  # not into a folder with files in it


@pytest.mark.slow
def test_an_export_in_shards_is_read_too(called, run_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    status, _ = called("export", run_folder, tmp_path / "out", "--max_shard_bytes", 50_000)
    assert status == 0
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        p.name for p in (tmp_path / "out").glob("*.safetensors")
    }
    assert len(set(index["weight_map"].values())) > 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_diff_shows_what_differs_and_says_so_by_its_status(called, run_folder):
    first, second = run_folder / "checkpoint-2", run_folder / "checkpoint-4"
    status, text = called("diff", second, run_folder)  # the newest of a run
    assert (status, "nothing differs" in text) == (0, True), text
    status, text = called("diff", first, second)
    assert status == 1
    assert "  step: 2 | 4" in text
    assert "  engine.counters.global_steps: 2 | 4" in text
    assert "exp_avg_sq: 21 tensors have other values, at most" in text
    assert "  and 11 more (--all)" in text
    assert "DeepSpeed config" not in text


@pytest.mark.slow
def test_convert_writes_a_file_per_parameter_and_kind_of_state(called, run_folder, tmp_path):
    """That DeepSpeed goes on from it is shown in tests/distributed/test_import.py."""
    import torch

    status, text = called("convert", run_folder, tmp_path / "out", "--to", "deepspeed")
    assert status == 0, text
    assert "load_universal" in text
    tag = (tmp_path / "out/latest_universal").read_text()
    assert tag == "global_step4_universal"
    zero = tmp_path / "out" / tag / "zero"
    assert len(list(zero.iterdir())) == 22  # a folder per parameter, and the optimizer's numbers
    files = {p.name: torch.load(p) for p in (zero / "model.norm.weight").iterdir()}
    assert set(files) >= {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"}
    assert files["fp32.pt"]["param"].shape == (64,)
    assert called("convert", run_folder, tmp_path / "out", "--to", "deepspeed")[0] == 2
    status, text = called("import", run_folder / "checkpoint-4", tmp_path / "again")
    assert (status, "is a dstrain checkpoint already" in text) == (2, True)


@pytest.mark.slow
def test_prune_says_what_it_removes(called, run_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    status, text = called("prune", run, "--keep", 1, "--dry_run")
    assert (status, (run / "checkpoint-2").exists()) == (0, True)
    assert f"would remove {run / 'checkpoint-2'}" in text
    status, text = called("prune", run, "--keep", 1)
    assert (status, (run / "checkpoint-2").exists()) == (0, False)
    assert f"removed {run / 'checkpoint-2'}\nkept {run / 'checkpoint-4'}: newest" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lst", "x"], "did you mean 'ls'?"),
        (["prun", "x"], "did you mean 'prune'?"),
        (["prune", "x"], "required: --keep"),
        (["impot", "x"], "did you mean 'import'?"),
        (["import", "nothing-here", "out"], "is no folder"),
        (["convert", "a", "b"], "required: --to"),
        (["convert", "a", "b", "--to", "megatron"], "choose from"),
        (["diff", "a", "b"], "is no checkpoint and has none in it"),
        (["ls"], "required: dir"),
        (["verify", "nothing-here"], "is no checkpoint and has none in it"),
        (["export", "a", "b", "--dtyp", "fp32"], "--dtyp"),
    ],
)
def test_mistakes_are_explained(called, words, says):
    status, text = called(*words)
    assert status == 2
    assert says in text


def test_help_needs_no_torch(called):
    status, text = called("--help")
    assert status == 0
    for action in (
        "ls DIR",
        "verify DIR",
        "export DIR OUT",
        "diff A B",
        "prune DIR --keep N",
        "import SRC OUT",
    ):
        assert action in text
    assert os.environ.get("RANK") is None

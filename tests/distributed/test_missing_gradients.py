"""Parameters that get a gradient on some ranks only, or in some micro-batches of a window only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.distributed.runs import whole_weights

WIDTH, ROWS, RATE, DECAY, CLIP = 8, 24, 1e-2, 0.1, 0.5

# Which blocks a sample runs, in which order, and by which head it is judged. Neighbours differ, so
# that ranks do; some windows of 1 and of 3 leave blocks out on all ranks, or in the last
# micro-batch only.
ROUTES = (
    ((0, 1), 0), ((1, 0), 1), ((2,), 0), ((), 1), ((0,), 0), ((0, 1, 2), 0), ((), 0), ((), 0),
    ((1, 2), 1), ((2, 1), 0), ((0, 1), 1), ((1,), 1),
)  # fmt: skip


class Routed(nn.Module):
    """Blocks and heads of which each sample uses some; ``unused`` is for none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Linear(5, 3)
        self.head = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(2))
        self.body = nn.Linear(WIDTH, WIDTH)
        self.block = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 40), nn.Tanh(), nn.Linear(40, WIDTH)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = torch.tanh(self.body(x))
        blocks, head = ROUTES[int(route)]
        for number in blocks:
            hidden = hidden + self.block[number](hidden)
        return {"loss": functional.mse_loss(self.head[head](hidden).squeeze(-1), labels)}


def data() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(WIDTH, generator=draw),
            "route": torch.tensor(number % len(ROUTES)),
            "labels": torch.randn((), generator=draw),
        }
        for number in range(ROWS)
    ]


def trainer_of(folder: Path, model: nn.Module, **arguments: Any) -> Any:
    from dstrain import Trainer, TrainingArguments

    evaluation = arguments.pop("evaluation", None)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1, "num_train_epochs": 1, "learning_rate": RATE,
        "weight_decay": DECAY, "lr_scheduler_type": "constant", "max_grad_norm": CLIP,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False, **arguments,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **settings)
    return Trainer(model, args, train_dataset=data(), eval_dataset=evaluation)


def global_batches(size: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    from dstrain.data import EpochOrder

    order, rows = EpochOrder(ROWS, seed=42, shuffle=True).indices(0).tolist(), data()
    for first in range(0, ROWS, size):
        yield [rows[k] for k in order[first : first + size]]


def plain_torch(model: nn.Module, size: int) -> list[tuple[float, float]]:
    """Train in one process over global batches; return loss and gradient norm of every step."""
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "bias" not in n], "weight_decay": DECAY},
            {"params": [p for n, p in named.items() if "bias" in n], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    found = []
    for batch in global_batches(size):
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)  # a missing one counts as zeros
        samples = [{k: v[None] for k, v in row.items()} for row in batch]
        loss = sum(model(**sample)["loss"] for sample in samples) / size
        loss.backward()
        norm = nn.utils.clip_grad_norm_(named.values(), CLIP)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def steps(trainer: Any) -> list[tuple[float, float]]:
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]


def zero(**values: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": values}}


OFFLOAD = {"offload_optimizer": "cpu"}
BELOW_3: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": {"overlap_comm": True},
    "small buckets": zero(reduce_bucket_size=100),  # smaller than the weights of a block
    "small, overlap": {"overlap_comm": True, **zero(reduce_bucket_size=100)},
    "not contiguous": {"contiguous_gradients": False, **zero(reduce_bucket_size=100)},
    "round robin": {"round_robin_gradients": True},
    "offload": OFFLOAD,
    "all": {"overlap_comm": True, "round_robin_gradients": True, **OFFLOAD},
}


def check(
    folder: Path, arguments: dict[str, Any], model: type[nn.Module] = Routed, rel: float = 2e-4
) -> None:
    """Train both ways; losses, norms and weights must be the same."""
    import torch.distributed as dist

    accumulation = arguments.get("gradient_accumulation_steps", 1)
    twin = model()
    expected = plain_torch(twin, dist.get_world_size() * accumulation)
    trainer = trainer_of(folder, model(), **arguments)
    trainer.train()
    found, weights = steps(trainer), whole_weights(trainer)
    trainer.close()
    assert found == [pytest.approx(step, rel=rel, abs=1e-6) for step in expected], arguments
    if arguments.get("bf16"):
        return  # Adam moves by the rate in either direction where a gradient is but rounding
    for name, values in twin.named_parameters():
        assert torch.allclose(weights[name], values, atol=5 * rel * RATE), (name, arguments)


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [1, 2])
def test_each_option_trains_as_plain_torch(stage: int, accumulation: int, tmp_path: Path) -> None:
    for options in BELOW_3.values():
        arguments = {"gradient_accumulation_steps": accumulation, **options}
        check(tmp_path, {"zero_stage": str(stage), **arguments})


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_16_bit_formats_train_as_plain_torch(stage: int, tmp_path: Path) -> None:
    """As far as their rounding lets one see; gradients added to others differ by far more."""
    for options in ({}, {"grad_accum_dtype": "bf16"}, {"overlap_comm": True}, OFFLOAD):
        if stage == 0 and options:
            continue
        arguments = {"bf16": True, "gradient_accumulation_steps": 3, **options}
        check(tmp_path, {"zero_stage": str(stage), **arguments}, rel=0.03)


class Checkpointed(Routed):
    """Blocks are computed again in the backward pass; the body is used twice, and its weight too.

    Attributes:
        reentrant: whether that is done by a backward pass inside the backward pass, per block.
    """

    reentrant = (False, False, False)

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(WIDTH, WIDTH)
        self.twin.weight = self.body.weight

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        from torch.utils.checkpoint import checkpoint

        hidden = torch.tanh(self.body(x))
        blocks, head = ROUTES[int(route)]
        for number in blocks:
            step = checkpoint(self.block[number], hidden, use_reentrant=self.reentrant[number])
            hidden = hidden + step
        if blocks:
            hidden = self.twin(self.body(hidden))
        return {"loss": functional.mse_loss(self.head[head](hidden).squeeze(-1), labels)}


class Reentrant(Checkpointed):
    reentrant = (True, True, True)


class Mixed(Checkpointed):
    reentrant = (True, False, True)


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("model", [Checkpointed, Reentrant, Mixed])
def test_checkpointed_and_tied_parts_train_as_plain_torch(
    model: type[nn.Module], tmp_path: Path
) -> None:
    for stage in ("1", "2"):
        for options in ({"overlap_comm": True}, zero(reduce_bucket_size=100)):
            check(tmp_path, {"zero_stage": stage, **options}, model=model)


@pytest.mark.ranks(1)
def test_a_part_that_becomes_reentrant_is_told(tmp_path: Path) -> None:
    """Its gradient has been taken for a missing one, as torch does not know of the inner pass."""
    from dstrain.core.errors import TrainingError

    class Late(Checkpointed):
        calls = 0

        def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
            self.calls += 1
            self.reentrant = (self.calls > 2, False, False)
            return super().forward(x, torch.tensor([1 if self.calls < 3 else 0]), labels)

    trainer = trainer_of(tmp_path, Late(), zero_stage="2")
    with pytest.raises(TrainingError, match=r"block\.0\.2\.\w+ came.*\n.*\n.*use_reentrant"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(1)
def test_a_part_that_is_computed_again_twice_is_refused_by_deepspeed_as_ever(
    tmp_path: Path,
) -> None:
    """Its gradient comes twice in one pass; the second part is not dropped without a word."""

    class Twice(Routed):
        def __init__(self) -> None:
            super().__init__()
            del self.unused, self.block[1:], self.head[0]

        def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
            from torch.utils.checkpoint import checkpoint

            hidden = torch.tanh(self.body(x))
            for _ in range(2):
                hidden = checkpoint(self.block[0], hidden, use_reentrant=True)
            return {"loss": functional.mse_loss(self.head[0](hidden).squeeze(-1), labels)}

    trainer = trainer_of(tmp_path, Twice(), zero_stage="2")
    with pytest.raises(AssertionError, match="already been reduced"):
        trainer.train()
    trainer.close()


class Leaf(Routed):
    """The parts that samples choose from stand in a module of their own, which all run."""

    class Choice(nn.Module):
        def __init__(self, block: nn.ModuleList, head: nn.ModuleList) -> None:
            super().__init__()
            self.block, self.head = block, head

        def forward(self, hidden: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
            blocks, head = ROUTES[int(route)]
            for number in blocks:
                hidden = hidden + self.block[number](hidden)
            return self.head[head](hidden)

    def __init__(self) -> None:
        super().__init__()
        self.choice = Leaf.Choice(self.block, self.head)
        del self.block, self.head

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        scores = self.choice(torch.tanh(self.body(x)), route)
        return {"loss": functional.mse_loss(scores.squeeze(-1), labels)}


AT_3: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing kept": {
        "deepspeed": {
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": 100,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            }
        }
    },
    "offload": {"offload_optimizer": "cpu", "offload_param": "cpu"},
}


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_leaf_trains_as_plain_torch_at_stage_3(accumulation: int, tmp_path: Path) -> None:
    for options in AT_3.values():
        arguments = {"gradient_accumulation_steps": accumulation, "leaf_modules": ["Choice"]}
        check(tmp_path, {"zero_stage": "3", **arguments, **options}, model=Leaf)


@pytest.mark.ranks(2)
def test_a_leaf_is_evaluated_and_saved(tmp_path: Path, rank: int) -> None:
    """While and after it trains; the loss is that of the saved file in plain torch."""
    from safetensors.torch import load_file

    trainer = trainer_of(
        tmp_path, Leaf(), zero_stage="3", leaf_modules=["Choice"], max_steps=4, eval_steps=2,
        eval_strategy="steps", per_device_eval_batch_size=1, evaluation=data()[:7],
        **AT_3["nothing kept"],
    )  # fmt: skip
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    during = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    trainer.close()
    assert len(during) == 3
    assert during[1:] == [pytest.approx(loss, rel=1e-6)] * 2
    if rank == 0:
        twin = Leaf()
        twin.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
        rows = [{k: v[None] for k, v in row.items()} for row in data()[:7]]
        expected = sum(twin(**row)["loss"].item() for row in rows) / len(rows)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.ranks(1, timeout=240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_trains_as_plain_torch(stage: int, tmp_path: Path) -> None:
    """A step in which a parameter has no gradient does not use that of the step before."""
    for options in ({}, OFFLOAD):
        for accumulation in (1, 3):
            arguments = {"gradient_accumulation_steps": accumulation, **options}
            check(tmp_path, {"zero_stage": str(stage), **arguments})


# --- stage 3: ranks that run different modules ----------------------------------------------------


class Told(Routed):
    """Routes of each step are given, for rank 0 and rank 1."""

    def __init__(self, *routes: tuple[int, int]) -> None:
        super().__init__()
        self.routes, self.calls = routes, 0

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        import torch.distributed as dist

        given = self.routes[min(self.calls, len(self.routes) - 1)][dist.get_rank()]
        self.calls += 1
        return super().forward(x, torch.tensor([given]), labels)


@pytest.mark.ranks(2)
def test_ranks_that_run_different_modules_are_told_in_the_first_step(
    tmp_path: Path, rank: int
) -> None:
    """Both, naming the modules, before weights of one are taken for those of the other."""
    from dstrain.core.errors import ModelError

    # 4 runs block 0, 2 block 2: of one size, which would be gathered without a word.
    trainer = trainer_of(tmp_path, Told((4, 2)), zero_stage="3", max_steps=2)
    with pytest.raises(ModelError) as told:
        trainer.train()
    assert "rank 0 came to block.0 (Sequential), rank 1 to block.2 (Sequential)" in str(told.value)
    assert "leaf_modules" in str(told.value)
    assert "zero_stage=2" in str(told.value)
    trainer.close()
    # 3 runs no block; the ranks then come to a head and to a block.
    trainer = trainer_of(tmp_path, Told((3, 2)), zero_stage="3", max_steps=2)
    with pytest.raises(ModelError, match=r"head.1 \(Linear\), rank 1 to block.2"):
        trainer.train()
    trainer.close()


class TwoResults(Routed):
    """All modules run on all ranks; the loss of each leaves one of the heads out."""

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        import torch.distributed as dist

        hidden = torch.tanh(self.body(x))
        results = [head(hidden).squeeze(-1) for head in self.head]
        return {"loss": functional.mse_loss(results[dist.get_rank()], labels)}


@pytest.mark.ranks(2)
def test_a_result_that_one_rank_does_not_use_is_told_in_the_first_step(tmp_path: Path) -> None:
    from dstrain.core.errors import ModelError

    trainer = trainer_of(tmp_path, TwoResults(), zero_stage="3", max_steps=2)
    with pytest.raises(ModelError, match=r"rank 0 came to head.0 \(Linear\), rank 1 to head.1"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(2)
def test_an_order_that_changes_on_all_ranks_alike_trains_on(tmp_path: Path) -> None:
    routes = [(n, n) for n in (0, 0, 0, 1, 1, 1, 5, 0, 3, 3, 3, 0)]
    trainer = trainer_of(tmp_path, Told(*routes), zero_stage="3")
    trainer.train()
    found = steps(trainer)
    trainer.close()
    whole = trainer_of(tmp_path, Told(*routes), zero_stage="0")
    whole.train()
    assert found == [pytest.approx(step, rel=1e-4) for step in steps(whole)]
    whole.close()
    assert len(found) == 12


def test_a_rank_that_leaves_the_recorded_order_later_is_told(tmp_path: Path) -> None:
    """After steps that were alike; the rank that waits for it says the same."""
    from tests.distributed.forked import run_job

    for said in run_job("part", tmp_path, timeout=100)["said"]:
        assert "3 steps, then: rank 1 came to block.2 (Sequential), and other ranks did" in said
        assert "leaf_modules" in said


# --- LayerDrop ------------------------------------------------------------------------------------


def layer_dropping_bart(**settings: float) -> nn.Module:
    from transformers import BartConfig, BartForSequenceClassification

    torch.manual_seed(0)
    return BartForSequenceClassification(
        BartConfig(
            vocab_size=32, d_model=16, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=16,
            decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=16, dropout=0.0, num_labels=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, **settings,
        )
    )  # fmt: skip


def drop_layers(folder: Path, stage: int) -> list[tuple[float, float]]:
    from dstrain import Trainer, TrainingArguments

    rows = [{"input_ids": [3 + n, 5, 7 + n, 2], "labels": n % 2} for n in range(16)]
    args = TrainingArguments(
        str(folder), zero_stage=str(stage), per_device_train_batch_size=1, max_steps=6,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_accumulation_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    model = layer_dropping_bart(encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    trainer = Trainer(model, args, train_dataset=rows)
    try:
        trainer.train()
    finally:
        trainer.close()
    return steps(trainer)


@pytest.mark.ranks(2)
def test_layerdrop_trains_below_stage_3_and_is_refused_there(tmp_path: Path) -> None:
    """Ranks skip different layers; all stages draw alike."""
    from dstrain.core.errors import ModelError

    whole = drop_layers(tmp_path, 0)
    for stage in (1, 2):
        assert drop_layers(tmp_path, stage) == [pytest.approx(s, rel=1e-4) for s in whole]
    with pytest.raises(ModelError) as told:
        drop_layers(tmp_path, 3)
    assert "set config.encoder_layerdrop=0.0" in str(told.value)
    assert "set config.decoder_layerdrop=0.0" in str(told.value)

"""Values that contradict each other are refused, all in one error; the arithmetic of batches."""

from __future__ import annotations

import pytest

from dstrain.config import Facts
from tests.unit.config.resolution.resolving import (
    problems_of,
    resolved,
)

# --- conflicts -----------------------------------------------------------------------------------


def test_all_conflicts_come_in_one_error():
    """One start per mistake would cost a queue on a cluster each time."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3, "madeup": "auto"}},
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}},
        "train_batch_size": 17,
    }
    arguments = {
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.1,
        "optim": "adagrad",
        "learning_rate": 1.0,
    }
    del config["optimizer"]["params"]["madeup"]
    texts = "\n".join(problems_of(lambda: resolved(config, **arguments)))
    for expected in (
        "train_micro_batch_size_per_gpu=4 in your config, but argument per_device_train_batch_size",
        "gradient_clipping=0.5 in your config, but argument max_grad_norm=0.1",
        "optimizer.type='SGD' in your config, but argument optim='adagrad'",
        "optimizer.params.lr=0.001 in your config, but argument learning_rate=1.0",
        "bf16.enabled and fp16.enabled are both true",
        "offload_param.device='cpu' with stage 2",
        "train_batch_size=17",
    ):
        assert expected in texts


def test_all_unknown_keys_come_in_one_error_with_the_nearest_names():
    config = {"gradient_cliping": 1.0, "zero_optimization": {"stag": 2}, "bf16": {"enabled": "x"}}
    texts = problems_of(lambda: resolved(config))
    assert len(texts) == 3
    assert any("gradient_clipping" in text for text in texts)
    assert any("zero_optimization.stage" in text for text in texts)


@pytest.mark.parametrize(("lr", "top"), [(5e-5, 1e-3), (1e-3, 5e-5), (1e-3, 2e-3)])
def test_two_keys_of_one_argument_must_agree_in_any_order(lr, top):
    """Also where one of the two happens to equal the argument's default."""
    config = {
        "optimizer": {"params": {"lr": lr}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": top}},
    }
    (text,) = problems_of(lambda: resolved(config))
    assert "learning_rate" in text
    assert repr(lr) in text
    assert repr(top) in text


def test_two_keys_of_one_argument_that_agree_are_taken():
    config = {
        "optimizer": {"params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "0.001"}},
    }
    assert resolved(config).arguments["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}),
        ({"bf16": {"enabled": True}}, {"fp16": True}),
        ({"fp16": {"enabled": True}}, {"bf16": True}),
    ],
)
def test_two_16_bit_formats_are_refused_wherever_each_was_set(config, arguments):
    assert any("one 16-bit format" in t for t in problems_of(lambda: resolved(config, **arguments)))


@pytest.mark.parametrize(
    ("config", "arguments", "what"),
    [
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "param"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, {}, "optim"),
        ({"zero_optimization": {"stage": 2}}, {"offload_param": "cpu"}, "param"),
        ({"zero_optimization": {"stage": 0}}, {"offload_optimizer": "cpu"}, "optim"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, {"zero_stage": 1}, "param"),
        ("zero2", {"offload_param": "cpu"}, "param"),
        ("zero0", {"offload_optimizer": "cpu"}, "optim"),
    ],
)
def test_offload_below_its_stage_is_refused_wherever_each_was_set(config, arguments, what):
    texts = problems_of(lambda: resolved(config, **arguments))
    assert any(f"offload_{what}" in text and "stage" in text for text in texts)


def test_offloaded_parameters_choose_stage_3_where_none_was_chosen():
    got = resolved(offload_param="cpu")
    assert got.stage == 3
    assert "offload_param" in got.provenance["zero_optimization.stage"].detail


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro", "accumulation", "world_size"), [(1, 1, 1), (8, 1, 1), (4, 2, 3), (1, 16, 512)]
)
def test_global_batch_is_the_product(micro, accumulation, world_size):
    got = resolved(
        facts=Facts(world_size=world_size),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
    )
    assert got.micro_batch_size == micro
    assert got.accumulation == accumulation
    assert got.global_batch_size == micro * accumulation * world_size


def test_wrong_train_batch_size_is_refused_with_the_arithmetic():
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    (text,) = problems_of(lambda: resolved({"train_batch_size": 32}, Facts(3), **arguments))
    assert "train_batch_size=32" in text
    assert "micro-batch 4 x accumulation 2 x ranks 3 = 24" in text
    assert "give a multiple of 3 ranks" in text  # no micro-batch and accumulation make 32
    (text,) = problems_of(lambda: resolved({"train_batch_size": 48}, Facts(3), **arguments))
    assert "their product with 3 ranks is 48" in text


def test_right_train_batch_size_is_taken():
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert resolved({"train_batch_size": 24}, Facts(3), **arguments).global_batch_size == 24


def test_train_batch_size_decides_the_accumulation_that_nobody_else_decided():
    got = resolved({"train_batch_size": 64}, Facts(2), per_device_train_batch_size=4)
    assert got.accumulation == 8
    assert got.arguments["gradient_accumulation_steps"] == 8
    reason = got.provenance["gradient_accumulation_steps"]
    assert str(reason) == "train_batch_size 64 / (micro-batch 4 x ranks 2)"
    assert reason.source == "derived"


def test_train_batch_size_and_micro_batch_of_the_config_decide_the_accumulation():
    config = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}
    assert resolved(config, Facts(2)).accumulation == 16


@pytest.mark.parametrize(
    ("config", "arguments", "arithmetic"),
    [
        ({"train_batch_size": 65}, {}, "accumulation 1 x ranks 2 = 8"),  # no whole number
        ({"train_batch_size": 4}, {}, "accumulation 1 x ranks 2 = 8"),  # less than a micro-step
        (
            {"train_batch_size": 64, "gradient_accumulation_steps": 2},
            {},
            "accumulation 2 x ranks 2 = 16",
        ),
        (
            {"train_batch_size": 64},
            {"gradient_accumulation_steps": 2},
            "accumulation 2 x ranks 2 = 16",
        ),
    ],
)
def test_train_batch_size_that_cannot_be_is_refused(config, arguments, arithmetic):
    """Here 2 ranks with micro-batch 4: catches accumulation rounded, or an argument overruled."""
    arguments = {"per_device_train_batch_size": 4, **arguments}
    (text,) = problems_of(lambda: resolved(config, Facts(2), **arguments))
    assert f"train_batch_size={config['train_batch_size']}" in text
    assert arithmetic in text

"""The memory model: what it must agree with by hand, and what may never happen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.config.memory.activations import Batch, activation_bytes, layer_bytes, logits_bytes
from dstrain.config.memory.closed_forms import closed_form
from dstrain.config.memory.footprint import Footprint, footprint
from dstrain.config.memory.host import pinned
from dstrain.config.memory.placement import Buckets, Placement, Work, parse_size
from dstrain.config.memory.sizes import Block, ModelSizes
from dstrain.core.errors import ConfigError

BUCKETS = Buckets(reduce=1000, prefetch=1000, persistence=10)
BATCH = Batch(micro_batch=2, seq_len=128, width=2)
PLACEMENTS = [
    *(Placement(s) for s in range(4)),
    *(Placement(s, "cpu") for s in (1, 2, 3)),
    Placement(3, "cpu", "cpu"),
    Placement(3, "nvme", "cpu"),
    Placement(3, "nvme", "nvme"),
]


def llama(**values: int) -> ModelSizes:
    found = closed_form({"model_type": "llama", **values})
    assert found is not None
    return found


SMALL = llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
              vocab_size=512)  # fmt: skip


def of(
    placement: Placement, sizes: ModelSizes = SMALL, *, ranks: int = 4, **work: object
) -> Footprint:
    arguments = {"world_size": ranks, "precision": "bf16", **work}
    return footprint(sizes, Work(**arguments), BATCH, placement, BUCKETS)


# --- states: the table of the ZeRO paper ----------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "parameters", "rest"),
    [(0, 1.0, 1.0), (1, 1.0, 0.25), (2, 1.0, 0.25), (3, 0.25, 0.25)],
)
def test_states_are_those_of_the_zero_paper(stage, parameters, rest):
    """Rajbhandari et al. 2020, figure 1: 2 bytes of weights and 12 of masters and moments."""
    kinds, total = of(Placement(stage)).kinds, SMALL.elements()
    assert kinds["parameters"] == pytest.approx(2 * total * parameters, rel=0.03)
    assert kinds["master weights"] == pytest.approx(4 * total * rest, rel=0.03)
    assert kinds["optimizer"] == pytest.approx(8 * total * rest, rel=0.03)


def test_gradients_are_whole_until_stage_2():
    total = SMALL.elements()
    assert of(Placement(1)).kinds["gradients"] == 2 * total
    assert 2 * total / 4 <= of(Placement(2)).kinds["gradients"] < 2 * total
    assert of(Placement(3)).kinds["gradients"] == pytest.approx(2 * total / 4, rel=0.03)


def test_fp32_has_no_master_weights_without_zero_only():
    """Seen in stage_1_and_2.py and stage3.py: they clone fp32 weights as well."""
    assert of(Placement(0), precision="fp32").kinds["master weights"] == 0
    for stage in (1, 2, 3):
        assert of(Placement(stage), precision="fp32").kinds["master weights"] > 0


@pytest.mark.parametrize(("optimizer", "num_bytes"), [("adamw", 8), ("sgd", 0), ("lion", 4)])
def test_optimizers_differ_in_their_states(optimizer, num_bytes):
    got = of(Placement(0), optimizer=optimizer)
    assert got.kinds["optimizer"] == num_bytes * SMALL.elements()


def test_frozen_parameters_cost_their_weights_alone():
    frozen = replace(SMALL, tensors=tuple(replace(t, trainable=False) for t in SMALL.tensors[1:]))
    frozen = replace(frozen, tensors=(SMALL.tensors[0], *frozen.tensors))
    trainable = SMALL.tensors[0].elements
    kinds = of(Placement(1), frozen, ranks=1).kinds
    assert kinds["parameters"] == 2 * SMALL.elements()
    assert kinds["optimizer"] == 8 * trainable
    assert kinds["gradients"] == 2 * trainable


def test_offload_moves_states_to_the_host():
    for stage in (1, 2, 3):
        got = of(Placement(stage, "cpu"), device="cpu")
        total = SMALL.elements()
        assert got.kinds["optimizer"] == got.kinds["master weights"] == got.kinds["step"] == 0
        assert got.host["optimizer"] == pytest.approx(8 * total / 4, rel=0.03)
        assert got.host["master weights"] == pytest.approx(4 * total / 4, rel=0.03)
    got = of(Placement(3, "nvme", "nvme"))
    assert got.nvme["optimizer"] == pytest.approx(8 * SMALL.elements() / 4, rel=0.03)
    assert got.nvme["parameters"] == pytest.approx(2 * SMALL.elements() / 4, rel=0.03)
    assert "optimizer" not in got.host


def test_masters_and_states_in_bf16_take_half():
    """With states in fp32, which only the host has, the master weights alone shrink."""
    shard = SMALL.trainable_shard(4, 2)
    lean = {"master_width": 2, "narrow_states": True}
    for stage in (1, 2, 3):
        got, usual = (of(Placement(stage), **more) for more in (lean, {}))
        assert got.kinds["optimizer"] == usual.kinds["optimizer"] // 2
        assert got.kinds["master weights"] == usual.kinds["master weights"] // 2
        assert got.kinds["step"] < usual.kinds["step"]
        assert got.peak < usual.peak
    host = of(Placement(2, "cpu"), master_width=2).host
    assert host["master weights"] == pinned(2 * shard, Work(4))
    assert host["optimizer"] == 8 * shard
    disk = of(Placement(3, "nvme"), **lean).nvme
    assert disk["optimizer"] == 2 * disk["master weights"] == 2 * disk["gradients"]


def test_overlap_doubles_the_bucket():
    work = Work(world_size=4)
    one, two = (
        footprint(SMALL, work, BATCH, Placement(2), replace(BUCKETS, overlap=overlap))
        for overlap in (False, True)
    )
    assert two.kinds["buckets"] - one.kinds["buckets"] == 2 * BUCKETS.reduce


def test_page_locked_buffers_are_rounded_up_where_pages_are_locked():
    assert pinned(5, Work(1)) == 8
    assert pinned(8, Work(1)) == 8
    assert pinned(5, Work(1, device="cpu")) == 5


def test_gradients_on_the_host_are_rounded_up_by_sub_group_at_stage_3():
    """As a whole, those of a 70B model on 8 GPUs would be 64 GiB per rank, almost twice theirs."""
    shard, work = SMALL.trainable_shard(4, 3), Work(4)
    whole = pinned(4 * SMALL.trainable_shard(4, 2), work)
    by_group = shard // 10_000 * 65536 + pinned(4 * (shard % 10_000), work)  # of 40,000 bytes each
    for stage, expected in ((2, whole), (3, by_group)):
        buckets = replace(BUCKETS, sub_group=10_000)
        got = footprint(SMALL, work, BATCH, Placement(stage, "cpu"), buckets)
        assert got.host["gradients"] == expected


# --- activations ----------------------------------------------------------------------------------

GPT = Block(layers=1, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=256, gated=False,
            rms_norm=False)  # fmt: skip


def test_layer_is_korthikanti_without_dropout_and_stored_scores():
    """Their 34 sbh, less three masks (1 + 1 and two products), is 32 at most; scores are apart.

    Ours, in sbh: norms 8, queries, keys, values and output 8, MLP 16; their 34 has in addition two
    masks (2). (Their softmax, its mask and product are the 5as/h.)
    """
    sbh = BATCH.tokens * GPT.hidden
    small = (2 * 2 * 4 + 4 * GPT.heads) * BATCH.tokens  # statistics, log-sum-exp
    assert layer_bytes(GPT, BATCH) - small == 32 * sbh
    assert layer_bytes(replace(GPT, dropout=True), BATCH) - small == 34 * sbh
    scores = BATCH.micro_batch * GPT.heads * BATCH.seq_len**2
    eager = replace(BATCH, attention="eager")
    difference = layer_bytes(GPT, eager) - layer_bytes(GPT, BATCH)
    assert difference + 4 * GPT.heads * BATCH.tokens == 6 * scores  # fp32 softmax and 16-bit copy


def test_checkpointing_keeps_one_input_per_layer():
    many = replace(GPT, layers=10)
    on, off = replace(BATCH, checkpointing=True), BATCH
    last = activation_bytes(replace(GPT, layers=0), off)
    assert activation_bytes(many, on) - last == 2 * 10 * BATCH.tokens * GPT.hidden
    assert activation_bytes(many, off) - last == 10 * layer_bytes(GPT, off)


def test_grouped_heads_and_experts_change_a_layer():
    grouped = replace(GPT, kv_heads=1)
    assert layer_bytes(GPT, BATCH) - layer_bytes(grouped, BATCH) == 2 * 2 * 48 * BATCH.tokens
    assert layer_bytes(replace(GPT, experts_per_token=2), BATCH) > layer_bytes(GPT, BATCH)


def test_logits_are_three_fp32_copies():
    assert logits_bytes(1000, BATCH) == 12 * 1000 * 256
    assert logits_bytes(1000, BATCH, fp32_loss=False) == 6 * 1000 * 256


# --- what may never happen ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 64),
    hidden=st.integers(1, 8),
    layers=st.integers(1, 6),
    accumulation=st.integers(1, 3),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_more_partitioning_never_costs_more(ranks, hidden, layers, accumulation, precision, device):
    """Each stage's states are at most those of the one before; more ranks never cost more."""
    sizes = llama(hidden_size=64 * hidden, intermediate_size=96, num_hidden_layers=layers,
                  num_attention_heads=4, vocab_size=300)  # fmt: skip
    work = Work(ranks, precision=precision, accumulation=accumulation, device=device)
    batch = replace(BATCH, width=work.width)
    rows = [footprint(sizes, work, batch, p, BUCKETS) for p in PLACEMENTS]
    for row in rows:
        values = [*row.kinds.values(), *row.host.values(), *row.nvme.values()]
        assert all(isinstance(v, int) and v >= 0 for v in values)
        assert row.peak >= row.states
    for kind, (less, more) in itertools.product(
        ("optimizer",), itertools.pairwise(rows[i].kinds for i in range(4))
    ):
        padding = 16 * sum(t.count for t in sizes.tensors) * ranks
        assert more[kind] <= less[kind] + padding
    doubled = replace(work, world_size=2 * ranks)
    for placement in (Placement(1), Placement(2)):
        assert (
            footprint(sizes, doubled, batch, placement, BUCKETS).states
            <= footprint(sizes, work, batch, placement, BUCKETS).states
        )
    checkpointed = replace(batch, checkpointing=True)
    assert activation_bytes(sizes.block, checkpointed) <= activation_bytes(sizes.block, batch)


# --- sizes as text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("1TB", 10**12),
        ("640GiB", 640 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("123", 123),
    ],
)
def test_sizes_are_read(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80GX", "1e400GB", "nan", "0"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError):
        parse_size(text, "gpu_memory")

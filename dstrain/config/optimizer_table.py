"""Table of optimizers: devices they run on, their parameters, and reasons why they cannot run.

Names are those of transformers' ``OptimizerNames``, of DeepSpeed's optimizers, and of optimizers of
torch that have no name in transformers. ZeRO stages 1 to 3 give an optimizer flat slices of many
parameters joined together. An update rule that treats each element alone is the same on slices; a
rule that uses whole tensors is another one, and ``whole`` says how it would differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dstrain.config.schema.entry import Key


@dataclass(frozen=True)
class Build:
    """An implementation of an optimizer.

    Attributes:
        cls: dotted path of the class that runs.
        type: the name by which DeepSpeed builds it; empty if dstrain builds ``cls``.
        params: parameters that are always passed.
        op: DeepSpeed's compiled op that it needs (a key of ``engine.ops.OPS``).
        devices: types of device that it runs on; empty for all.
        options: further parameters for ``optim_args``, if they differ from the optimizer's.
        state_bytes: bytes of state per parameter, if they differ from the optimizer's.
    """

    cls: str
    type: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    op: str = ""
    devices: tuple[str, ...] = ()
    options: Mapping[str, Key] | None = None
    state_bytes: float | None = None


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with its implementations.

    Attributes:
        name: value of the argument ``optim``.
        builds: implementations without offload; the first one that the device can run is used.
        offload: implementation on host cores, for an offloaded optimizer; None if there is none.
        hyper: the ones of betas, eps and weight_decay that it takes from the arguments.
        options: further parameters, for ``optim_args``.
        state_bytes: bytes of state per parameter, without fp32 master weights.
        package: Python package that it needs; ``install`` is its name for pip if that differs.
        refused: reason why it never runs; empty if it does.
        whole: reason why it needs whole tensors, so that stages 1 to 3 are refused; or empty.
        warning: difference from the algorithm of that name, from stage ``warns_from`` on; or empty.
        no_offload: reason why it cannot run on the host.
        instead: remedy of errors about it.
        argument: whether ``optim`` takes the name; else only a DeepSpeed config can name it.
        note: a remark for the table.
    """

    name: str
    builds: tuple[Build, ...] = ()
    offload: Build | None = None
    hyper: tuple[str, ...] = ("weight_decay",)
    options: Mapping[str, Key] = field(default_factory=dict)
    state_bytes: float = 8
    package: str = ""
    install: str = ""
    refused: str = ""
    whole: str = ""
    warning: str = ""
    warns_from: int = 1
    no_offload: str = "it has no implementation for host cores"
    instead: str = "use optim='adamw_torch'"
    argument: bool = True
    note: str = ""


_FLOAT, _INT, _BOOL = Key((float,)), Key((int,)), Key((bool,))
_DTYPE = Key((str,), choices=("float32", "bfloat16", "float16"))
_PAIR = Key((list,), items=_FLOAT)
_ALL: Final = ("betas", "eps", "weight_decay")
_DECAY: Final = ("weight_decay",)
_MAXIMIZE = {"maximize": _BOOL}
_TORCH_FLAGS = {"foreach": _BOOL, **_MAXIMIZE}
_HOST_STATES = {"fp32_optimizer_states": _BOOL}
_HOST_ADAM_OPTIONS = {"bias_correction": _BOOL, **_HOST_STATES}


def _torch(cls: str, **params: Any) -> Build:
    """Return an implementation of torch, which DeepSpeed builds by the name of its class."""
    return Build(f"torch.optim.{cls}", cls, params)


def _on_host_too(name: str, cls: str, hyper: tuple[str, ...], **more: Any) -> Optimizer:
    """Return an optimizer of torch that runs on the accelerator and on the host."""
    options = {**more.pop("options"), **_TORCH_FLAGS}
    note = "offloaded it runs torch's code on host cores, slower than DeepSpeed's kernels"
    return Optimizer(name, (_torch(cls),), _torch(cls), hyper, options, note=note, **more)


def _bitsandbytes(name: str, cls: str, bits: int, state_bytes: float, **more: Any) -> Optimizer:
    paged = name.startswith("paged")
    params = {"optim_bits": bits, **({"is_paged": paged} if cls != "RMSprop" else {})}
    path = f"bitsandbytes.optim.{cls}"
    # It has CPU kernels for states of 32 bits only, and pages only between a GPU and its host.
    anywhere = bits == 32 and not paged
    return Optimizer(
        name,
        (Build(path, params=params, devices=() if anywhere else _GPUS),),
        Build(path, params=params) if anywhere else None,
        state_bytes=state_bytes,
        package="bitsandbytes",
        no_offload="bitsandbytes has kernels for it on GPUs only, and offloaded states are on the "
        "host",
        instead="use optim='adamw_torch' with offload (DeepSpeed's CPU Adam), or do not offload",
        warning=_EMBEDDINGS if bits == 8 else "",
        warns_from=0,
        **more,
    )


_GPUS = ("cuda", "xpu")
_EMBEDDINGS = (
    "embeddings have 8-bit states like all other parameters (transformers' Trainer keeps theirs in "
    "32 bits; DeepSpeed gives the optimizer copies in which it cannot tell them apart)"
)
_CPU_ADAM = "deepspeed.ops.adam.DeepSpeedCPUAdam"
_CPU_LION = "deepspeed.ops.lion.DeepSpeedCPULion"
_HOST_ADAM = Build(
    _CPU_ADAM, "AdamW", {"torch_adam": False}, "cpu_adam", options=_HOST_ADAM_OPTIONS
)
_AMSGRAD = {"amsgrad": _BOOL}
_LION: dict[str, Any] = {
    "builds": (
        # DeepSpeed builds its fused Lion, a CUDA kernel, for "Lion" on every device.
        Build(_CPU_LION, op="cpu_lion", devices=("cpu",), options=_HOST_STATES, state_bytes=8),
        Build("deepspeed.ops.lion.FusedLion", "Lion", op="fused_lion", devices=("cuda",)),
    ),
    "offload": Build(_CPU_LION, "Lion", op="cpu_lion", options=_HOST_STATES, state_bytes=8),
    "hyper": ("betas", "weight_decay"),
    "state_bytes": 4,
}
_FLAT = "ZeRO stages 1 to 3 give the optimizer flat slices of many parameters joined together"
_LOW_RANK: dict[str, Any] = {
    "hyper": _ALL,
    "refused": "it projects whole two-dimensional gradients: ZeRO stages 1 to 3 give the optimizer "
    "flat slices, and dstrain does not set its parameter groups up at stage 0",
    "instead": "use optim='adamw_torch', or train few parameters with LoRA (peft); an optimizer "
    "that you build yourself can be passed at stage 0: optimizers=(optimizer, None)",
}
_LAYERWISE: dict[str, Any] = {
    **_LOW_RANK,
    "refused": "it steps inside the backward pass, and DeepSpeed's engine owns gradients and step",
}
_SCHEDULE_FREE: dict[str, Any] = {
    "refused": "it trains one set of weights and evaluates another, which it swaps in the "
    "optimizer's own copy; DeepSpeed copies that to the model only in a step, so every evaluation "
    "and every saved model would be of the wrong one",
}
_IN_BACKWARD: dict[str, Any] = {
    "refused": "it updates weights inside the backward pass, and DeepSpeed's engine owns gradients "
    "and step",
    "instead": "use optim='sgd' or optim='adafactor', with ZeRO stage 3 or offload for memory",
}
_RMSPROP = {"alpha": _FLOAT, "eps": _FLOAT, "momentum": _FLOAT}
_ADEMAMIX = {"beta3": _FLOAT, "alpha": _FLOAT, "t_alpha": _INT, "t_beta3": _INT}
_TORCHAO: dict[str, Any] = {
    "hyper": _ALL,
    "options": {"block_size": _INT, "bf16_stochastic_round": _BOOL},
    "package": "torchao",
    "no_offload": "torchao compiles its step for the accelerator",
    "whole": "it quantises the states of a tensor whose size is a multiple of its block size, and "
    "keeps others in 32 bits; ZeRO stages 1 to 3 give it slices of any size",
}
_MUP: dict[str, Any] = {"package": "mup", "hyper": _DECAY, "argument": False}

OPTIMIZERS: Final[tuple[Optimizer, ...]] = (
    # --- Adam ------------------------------------------------------------------------------------
    Optimizer(
        "adamw_torch", (_torch("AdamW", torch_adam=True),), _HOST_ADAM, _ALL,
        {**_AMSGRAD, **_TORCH_FLAGS},
    ),
    Optimizer(
        "adamw_torch_fused", (_torch("AdamW", torch_adam=True, fused=True),), _HOST_ADAM, _ALL,
        {**_AMSGRAD, **_MAXIMIZE},
    ),
    Optimizer(
        "adamw_apex_fused",
        (Build("deepspeed.ops.adam.FusedAdam", "AdamW", {"torch_adam": False}, "fused_adam"),),
        _HOST_ADAM,
        _ALL,
        {"bias_correction": _BOOL},
        note="DeepSpeed's FusedAdam, which is apex's kernel",
    ),
    Optimizer(
        "adam",
        (_torch("Adam", torch_adam=True, adam_w_mode=False),),
        Build(
            _CPU_ADAM, "Adam", {"torch_adam": False, "adam_w_mode": False}, "cpu_adam",
            options=_HOST_ADAM_OPTIONS,
        ),
        _ALL,
        {**_AMSGRAD, **_TORCH_FLAGS},
        note="weight decay joins the gradient (L2)",
    ),
    Optimizer(
        "adamw_hf",
        refused="transformers 5 removed its own AdamW",
        instead="use optim='adamw_torch', the same rule (eps added after the bias correction)",
    ),
    Optimizer(
        "adamw_torch_xla",
        refused="it is for XLA devices, which DeepSpeed does not drive",
    ),
    Optimizer(
        "adamw_torch_npu_fused",
        (Build("torch_npu.optim.NpuFusedAdamW", devices=("npu",)),),
        _HOST_ADAM,
        _ALL,
        package="torch_npu",
    ),
    Optimizer(
        "adamw_anyprecision",
        (Build("torchdistx.optimizers.AnyPrecisionAdamW"),),
        Build("torchdistx.optimizers.AnyPrecisionAdamW"),
        _ALL,
        {
            "use_kahan_summation": _BOOL,
            "momentum_dtype": _DTYPE,
            "variance_dtype": _DTYPE,
            "compensation_buffer_dtype": _DTYPE,
        },
        package="torchdistx",
    ),
    Optimizer(
        "adamw_torch_4bit", (Build("torchao.optim.AdamW4bit"),), state_bytes=1, **_TORCHAO
    ),
    Optimizer(
        "adamw_torch_8bit", (Build("torchao.optim.AdamW8bit"),), state_bytes=2, **_TORCHAO
    ),
    _bitsandbytes("adamw_bnb_8bit", "AdamW", 8, 2, hyper=_ALL),
    _bitsandbytes("adamw_8bit", "AdamW", 8, 2, hyper=_ALL),
    _bitsandbytes("paged_adamw_32bit", "AdamW", 32, 8, hyper=_ALL),
    _bitsandbytes("paged_adamw_8bit", "AdamW", 8, 2, hyper=_ALL),
    _bitsandbytes("ademamix", "AdEMAMix", 32, 12, hyper=_ALL, options=_ADEMAMIX),
    _bitsandbytes("ademamix_8bit", "AdEMAMix", 8, 3, hyper=_ALL, options=_ADEMAMIX),
    _bitsandbytes("paged_ademamix_32bit", "AdEMAMix", 32, 12, hyper=_ALL, options=_ADEMAMIX),
    _bitsandbytes("paged_ademamix_8bit", "AdEMAMix", 8, 3, hyper=_ALL, options=_ADEMAMIX),
    _on_host_too(
        "nadam", "NAdam", _ALL,
        options={"momentum_decay": _FLOAT, "decoupled_weight_decay": _BOOL},
    ),
    _on_host_too("radam", "RAdam", _ALL, options={"decoupled_weight_decay": _BOOL}),
    _on_host_too("adamax", "Adamax", _ALL, options={}),
    Optimizer(
        "stable_adamw",
        (Build("optimi.StableAdamW"),),
        None,
        _ALL,
        {"decouple_lr": _BOOL, "max_lr": _FLOAT, "kahan_sum": _BOOL},
        package="optimi",
        install="torch-optimi",
        whole=f"it limits each tensor's update by that tensor's own norm; {_FLAT}",
    ),
    Optimizer(
        "grokadamw",
        (Build("grokadamw.GrokAdamW"),),
        None,
        _ALL,
        {
            "alpha_init": _FLOAT, "lamb": _FLOAT, "gamma": _FLOAT,
            "grokking_signal_decay_rate": _FLOAT, "gradient_clipping": _FLOAT,
        },
        state_bytes=12,
        package="grokadamw",
        whole="its momentum depends on the place of each tensor among the parameters, and it "
        f"clips tensor by tensor; {_FLAT}",
    ),
    # --- Lion, Muon, LAMB ------------------------------------------------------------------------
    Optimizer("lion", **_LION),
    Optimizer("lion_32bit", note="DeepSpeed's Lion, the same rule as bitsandbytes'", **_LION),
    _bitsandbytes("lion_8bit", "Lion", 8, 1, hyper=("betas", "weight_decay")),
    _bitsandbytes("paged_lion_32bit", "Lion", 32, 4, hyper=("betas", "weight_decay")),
    _bitsandbytes("paged_lion_8bit", "Lion", 8, 1, hyper=("betas", "weight_decay")),
    Optimizer(
        "muon",
        (Build("deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam", "Muon",
               {"torch_adam": True}),),
        Build("deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam", "Muon",
              {"torch_adam": False}, "cpu_adam"),
        _ALL,
        {
            "momentum": _FLOAT, "muon_lr": _FLOAT, "adam_lr": _FLOAT,
            "ns_method": Key((str,), choices=("gram", "standard")),
        },
        # 4 bytes for hidden matrices, 8 for the fewer embeddings, head, norms and biases.
        state_bytes=5,
        note="orthogonalises whole matrices at each stage, after clipping gradients; embeddings, "
        "head, norms and biases run AdamW; optim_args: muon_lr and adam_lr, a rate for each half",
    ),
    Optimizer(
        "lamb",
        (Build("deepspeed.ops.lamb.FusedLamb", "Lamb", op="fused_lamb", devices=("cuda",)),),
        None,
        _ALL,
        {
            "bias_correction": _BOOL, "eps_inside_sqrt": _BOOL, "max_coeff": _FLOAT,
            "min_coeff": _FLOAT,
        },
        whole=f"its trust ratio is a quotient of norms of one whole tensor; {_FLAT}",
    ),
    # --- Adafactor, Adagrad, SGD and the like ----------------------------------------------------
    Optimizer(
        "adafactor",
        (Build("transformers.optimization.Adafactor",
               params={"scale_parameter": False, "relative_step": False}),),
        Build("transformers.optimization.Adafactor",
              params={"scale_parameter": False, "relative_step": False}),
        _DECAY,
        {"clip_threshold": _FLOAT, "decay_rate": _FLOAT, "beta1": _FLOAT},
        state_bytes=4,
        warning="Adafactor runs unfactored: ZeRO gives it flat slices, so its second moment is "
        "whole (4 bytes per parameter, half of AdamW's states) and it clips updates by the norm of "
        "a rank's slice, which depends on the number of ranks; only stage 0 factors, and its "
        "checkpoints need checkpoint_format='deepspeed'",
    ),
    Optimizer(
        "adagrad",
        (_torch("Adagrad"),),
        Build(
            "deepspeed.ops.adagrad.DeepSpeedCPUAdagrad", "Adagrad", op="cpu_adagrad",
            options={"eps": _FLOAT, **_HOST_STATES},
        ),
        _DECAY,
        {"eps": _FLOAT, "lr_decay": _FLOAT, "initial_accumulator_value": _FLOAT, **_TORCH_FLAGS},
        state_bytes=4,
    ),
    _on_host_too(
        "sgd", "SGD", _DECAY, state_bytes=0,
        options={"momentum": _FLOAT, "dampening": _FLOAT, "nesterov": _BOOL},
    ),
    _on_host_too(
        "rmsprop", "RMSprop", _DECAY, state_bytes=4, options={**_RMSPROP, "centered": _BOOL}
    ),
    _bitsandbytes("rmsprop_bnb", "RMSprop", 32, 4, options=_RMSPROP),
    _bitsandbytes("rmsprop_bnb_32bit", "RMSprop", 32, 4, options=_RMSPROP),
    _bitsandbytes("rmsprop_bnb_8bit", "RMSprop", 8, 1, options=_RMSPROP),
    _on_host_too("adadelta", "Adadelta", _DECAY, options={"rho": _FLOAT, "eps": _FLOAT}),
    _on_host_too(
        "asgd", "ASGD", _DECAY, state_bytes=4,
        options={"lambd": _FLOAT, "alpha": _FLOAT, "t0": _FLOAT},
    ),
    _on_host_too("rprop", "Rprop", (), options={"etas": _PAIR, "step_sizes": _PAIR}),
    # --- what cannot run -------------------------------------------------------------------------
    Optimizer("galore_adamw", **_LOW_RANK),
    Optimizer("galore_adamw_8bit", **_LOW_RANK),
    Optimizer("galore_adafactor", **_LOW_RANK),
    Optimizer("apollo_adamw", **_LOW_RANK),
    Optimizer("galore_adamw_layerwise", **_LAYERWISE),
    Optimizer("galore_adamw_8bit_layerwise", **_LAYERWISE),
    Optimizer("galore_adafactor_layerwise", **_LAYERWISE),
    Optimizer("apollo_adamw_layerwise", **_LAYERWISE),
    Optimizer("lomo", **_IN_BACKWARD),
    Optimizer("adalomo", **_IN_BACKWARD),
    Optimizer("schedule_free_radam", **_SCHEDULE_FREE),
    Optimizer("schedule_free_adamw", **_SCHEDULE_FREE),
    Optimizer("schedule_free_sgd", **_SCHEDULE_FREE),
    # --- only by a type in the DeepSpeed config --------------------------------------------------
    Optimizer("muadam", (Build("mup.MuAdam", "MuAdam"),), Build("mup.MuAdam", "MuAdam"), **_MUP),
    Optimizer(
        "muadamw", (Build("mup.MuAdamW", "MuAdamW"),), Build("mup.MuAdamW", "MuAdamW"), **_MUP
    ),
    Optimizer("musgd", (Build("mup.MuSGD", "MuSGD"),), Build("mup.MuSGD", "MuSGD"), **_MUP),
    Optimizer(
        "torch_adafactor",
        (_torch("Adafactor"),),
        state_bytes=4,
        whole="it scales each tensor's step by that tensor's own size and factors its second "
        f"moment by rows and columns; {_FLAT}",
        instead="use optim='adafactor', whose step is not scaled",
        argument=False,
    ),
    Optimizer(
        "lbfgs",
        (_torch("LBFGS"),),
        hyper=(),
        refused="it evaluates the loss several times in one step, through a closure that "
        "DeepSpeed's engine does not pass",
        argument=False,
    ),
    Optimizer(
        "sparseadam",
        (_torch("SparseAdam"),),
        hyper=(),
        refused="it takes sparse gradients only, and DeepSpeed 0.19.8 removed sparse gradients",
        argument=False,
    ),
)  # fmt: skip

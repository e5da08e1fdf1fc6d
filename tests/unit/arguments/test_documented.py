"""Every documented argument exists with its default, and what is declared of it is what happens."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from dstrain.arguments import (
    SentenceTransformerTrainingArguments,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    enforce,
    table,
)
from dstrain.arguments.choice import Choice
from dstrain.arguments.fields import default_of, kinds_of, treatment_of
from dstrain.arguments.treatment import NOT_YET
from dstrain.config.resolution.rules import RULES, Binding
from dstrain.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT.parent / "shared" / "reference"
CLASSES: dict[str, type[Any]] = {cls.__name__: cls for cls in table.CLASSES}
# Names and defaults of the reference documents' signatures.
DOCUMENTED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("documented_arguments.json").read_text()
)
# What transformers makes of the documented default on construction.
COERCED: dict[str, Any] = {"debug": [], "include_num_input_tokens_seen": "no"}
PAIRS = [(cls, name) for cls, names in DOCUMENTED.items() for name in names]
ALL = enforce.declared(SentenceTransformerTrainingArguments) | enforce.declared(
    Seq2SeqTrainingArguments
)


def fields_of(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls)}


def owner(name: str) -> type[Any]:
    """Return a class that has the argument."""
    return next(cls for cls in CLASSES.values() if name in fields_of(cls))


def names_of(*kinds: str) -> list[str]:
    return [name for name, (treatment, _) in ALL.items() if treatment.kind in kinds]


def other_value(name: str) -> Any:
    """Return a legal value that is not the default."""
    special = {
        "save_strategy": "epoch", "past_index": 2, "tp_size": 2, "report_to": ["wandb"],
        "fsdp_config": {"min_num_params": 1}, "evaluation_strategy": "epoch",
        "accelerator_config": {"even_batches": False}, "debug": ["underflow_overflow"],
        "label_smoothing_factor": 0.1, "half_precision_backend": "apex", "optim_args": "a=1",
        "include_for_metrics": ["loss"], "include_num_input_tokens_seen": "non_padding",
    }  # fmt: skip
    if name in special:
        return special[name]
    field, kinds = fields_of(owner(name))[name], kinds_of(owner(name))[name]
    default, choices = default_of(field), field.metadata.get("choices")
    if choices:
        return next(value for value in choices if value != default)
    if bool in kinds:
        return not default
    for kind, value in ((int, 7), (float, 0.5), (dict, {"a": 1}), (str, "x"), (list, ["x"])):
        if kind in kinds:
            return value
    return object()


def build(name: str, **more: Any) -> Any:
    return owner(name)(**{name: other_value(name)}, **more)


def test_the_documents_have_142_arguments():
    """Catches a data file that lost some of them."""
    assert [len(names) for names in DOCUMENTED.values()] == [125, 130, 134]
    assert len(set().union(*DOCUMENTED.values())) == 142


@pytest.mark.parametrize(("cls", "name"), PAIRS)
def test_a_documented_argument_has_its_documented_default(cls, name):
    """A script moved from transformers must not train with another value without a word."""
    default = default_of(fields_of(CLASSES[cls])[name])
    value = getattr(CLASSES[cls](), name)
    if name == "output_dir":  # documented as required, or as None, which means this
        assert (default, value) == ("trainer_output", "trainer_output")
        assert CLASSES[cls](output_dir=None).output_dir == "trainer_output"
    elif name in COERCED:
        assert default == value == COERCED[name]
        assert getattr(CLASSES[cls](**{name: DOCUMENTED[cls][name]}), name) == value
    else:
        assert default == value == DOCUMENTED[cls][name]
        assert type(value) in (type(DOCUMENTED[cls][name]), float, Choice)  # False is not 0


@pytest.mark.parametrize("cls", CLASSES.values())
def test_an_argument_is_our_own_exactly_if_no_document_has_it(cls):
    documented = set().union(*DOCUMENTED.values())
    for name, (treatment, _) in enforce.declared(cls).items():
        assert treatment.own == (name not in documented), name


@pytest.mark.parametrize("cls", CLASSES.values())
def test_every_field_declares_its_treatment(cls):
    assert [f.name for f in dataclasses.fields(cls) if treatment_of(f) is None] == []


def test_the_data_file_is_what_the_reference_documents_say():
    if not REFERENCE.is_dir():
        pytest.skip("the reference documents are not beside this checkout")
    for cls, names in DOCUMENTED.items():
        read = _signature(cls)
        assert list(read) == list(names)
        for name, default in read.items():
            assert default in (names[name], "<factory>"), name


def _signature(cls: str) -> dict[str, Any]:
    """Return names and defaults in the signature of a reference document."""
    if cls == "SentenceTransformerTrainingArguments":
        text = (REFERENCE / "sentence-transformer-training-arguments.txt").read_text()
        line = next(line for line in text.splitlines() if line.startswith("*[class]"))
        line = re.sub(r"[\[\]\\]", "", line)
        body = line[line.index("(*") + 2 : line.index("*)")]
        starts = list(re.finditer(r"(?:^|, )(\w+): ", body))
    else:
        lines = (REFERENCE / "trainer-and-training-arguments.txt").read_text().splitlines()
        line = lines[lines.index(f"class transformers.{cls}") + 1]
        body = line[line.index("(") + 1 : line.rindex(")")]
        starts = list(re.finditer(r"(\w+): \w+", body))
    ends = [m.start() for m in starts[1:]] + [len(body)]
    texts = {
        m.group(1): body[m.end() : end].rpartition("= ")[2].strip(" ,")
        for m, end in zip(starts, ends, strict=True)
    }
    known = {
        "": "<required>", "<factory>": "<factory>",
        "BatchSamplers.BATCH_SAMPLER": "batch_sampler",
        "MultiDatasetBatchSamplers.PROPORTIONAL": "proportional",
    }  # fmt: skip
    return {n: known[t] if t in known else ast.literal_eval(t) for n, t in texts.items()}


def test_the_page_is_not_stale():
    assert table.PAGE.read_text() == table.page(), "run: python -m dstrain.arguments.table"


def test_the_page_has_every_documented_argument_with_what_happens_to_it():
    rows = dict(re.findall(r"^\| `(\w+)`(?: \*)? \| .* \| (.+) \|$", table.page(), re.MULTILINE))
    assert set().union(*DOCUMENTED.values()) <= set(rows)
    assert all(rows.values())


@pytest.mark.parametrize("name", names_of("refused", "pending"))
def test_what_is_refused_or_pending_is_an_error_with_reason_and_remedy(name):
    treatment, default = ALL[name]
    with pytest.raises(ConfigError) as caught:
        build(name)
    problem = next(p for p in caught.value.problems if p.what.startswith(f"{name}="))
    assert problem.remedy
    assert (NOT_YET in problem.why) == (treatment.kind == "pending")
    assert problem.why


@pytest.mark.parametrize("name", names_of("no effect"))
def test_what_has_no_effect_warns_and_says_why(name):
    with pytest.warns(UserWarning, match=f"{name}=.* has no effect: .{{15,}}") as caught:
        args = build(name)
    assert getattr(args, name) == other_value(name)
    assert caught[0].filename == __file__, "it names the line that built the arguments"


@pytest.mark.parametrize("kind", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_a_schedule_without_warm_up_says_so(kind):
    with pytest.warns(UserWarning, match="has no warm-up"):
        TrainingArguments(lr_scheduler_type=kind, warmup_ratio=0.1, eval_strategy="epoch")


@pytest.mark.parametrize("name", names_of("implemented", "deepspeed", "stored"))
def test_what_is_implemented_is_taken_without_a_word(name):
    more: dict[str, Any] = {
        "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
        "dataloader_persistent_workers": {"dataloader_num_workers": 1},
        "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
        "offload_param": {"zero_stage": "3"},
        "offload_optimizer": {"zero_stage": "2"},
        "load_best_model_at_end": {"eval_strategy": "steps"},
    }.get(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(build(name, **more), name) == other_value(name)


ALIASES: list[tuple[str, Any, str, Any]] = [
    ("no_cuda", True, "use_cpu", True),
    ("per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
    ("per_gpu_train_batch_size", "3", "per_device_train_batch_size", 3),
    ("per_gpu_eval_batch_size", 3, "per_device_eval_batch_size", 3),
    ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
    ("dispatch_batches", False, "accelerator_config", {"dispatch_batches": False}),
    ("dispatch_batches", True, "accelerator_config", {"dispatch_batches": True}),
    ("split_batches", False, "accelerator_config", {"split_batches": False}),
    ("push_to_hub_model_id", "m", "hub_model_id", "m"),
    ("push_to_hub_organization", "org", "hub_model_id", "org/trainer_output"),
    ("push_to_hub_token", "t", "hub_token", "t"),
    ("adafactor", True, "optim", "adafactor"),
    ("include_inputs_for_metrics", True, "include_for_metrics", ["inputs"]),
    ("torchdynamo", "inductor", "torch_compile_backend", "inductor"),
    ("sortish_sampler", True, "group_by_length", True),
]


@pytest.mark.parametrize(("old", "value", "new", "expected"), ALIASES)
def test_an_old_name_moves_to_the_new_one_with_a_warning(old, value, new, expected):
    with pytest.warns(FutureWarning, match=f"{old} is deprecated: {new}=") as caught:
        args = owner(old)(**{old: value})
    assert getattr(args, new) == expected
    assert getattr(args, old) == default_of(fields_of(owner(old))[old]), "moved, not copied"
    assert caught[0].filename == __file__


# Old names of what is not usable here: the error names the new argument.
REFUSED_ALIASES = [
    ("fp16_backend", "apex", "half_precision_backend"),
    ("evaluation_strategy", "step", "eval_strategy"),
]


@pytest.mark.parametrize(("old", "value", "new"), REFUSED_ALIASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_name_is_checked_like_the_new_one(old, value, new):
    with pytest.raises(ConfigError) as caught:
        Seq2SeqTrainingArguments(**{old: value})
    assert caught.value.problems[0].what.startswith(new)


def test_every_alias_is_tested():
    tested = {old for old, *_ in ALIASES} | {old for old, *_ in REFUSED_ALIASES}
    assert tested == set(names_of("alias"))


CONTRADICTIONS: list[dict[str, Any]] = [
    {"eval_strategy": "epoch", "evaluation_strategy": "steps"},
    {"per_device_train_batch_size": 4, "per_gpu_train_batch_size": 2},
    {"optim": "sgd", "adafactor": True},
    {"accelerator_config": {"split_batches": True}, "split_batches": False},
    {"hub_model_id": "me/m", "push_to_hub_organization": "org"},
]


@pytest.mark.parametrize("given", CONTRADICTIONS, ids=str)
def test_an_old_name_that_contradicts_the_new_one_is_an_error(given):
    (new, old) = given
    with pytest.raises(ConfigError, match=f"{old} is the old name of {new}"):
        TrainingArguments(**given)


@pytest.mark.filterwarnings("error")
def test_a_contradiction_shows_no_token():
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(hub_token="secret1", push_to_hub_token="secret2", push_to_hub=True)
    assert "hub_token=<HUB_TOKEN>" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_old_name_with_the_same_value_as_the_new_one_is_taken():
    with pytest.warns(FutureWarning):
        args = TrainingArguments(eval_strategy="epoch", evaluation_strategy="epoch")
    assert args.eval_strategy == "epoch"


def test_a_moved_name_does_not_come_back_when_the_arguments_are_checked_again():
    with pytest.warns(FutureWarning):
        args = TrainingArguments(evaluation_strategy="steps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args.set_evaluate("epoch")
        assert TrainingArguments(**args.to_dict()) == args


def test_other_ranks_of_a_machine_do_not_repeat_a_warning(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingArguments(no_cuda=True)


@dataclasses.dataclass
class Thrifty(TrainingArguments):
    """A user's arguments, with a default of their own for one of ours."""

    use_ipex: bool = True


def test_a_subclass_cannot_slip_in_what_is_refused_as_its_own_default():
    assert ALL["use_ipex"][0].kind == "refused"
    with pytest.raises(ConfigError, match="use_ipex=True[^$]*leave it out"):
        Thrifty()


def test_all_refusals_come_in_one_error_with_illegal_values():
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(fsdp="full_shard", use_ipex=True, learning_rate=-1)
    assert [p.what.split("=")[0] for p in caught.value.problems] == [
        "fsdp", "use_ipex", "learning_rate",
    ]  # fmt: skip


@pytest.mark.parametrize("given", [None, False, "", []])
def test_fsdp_that_is_off_is_no_fsdp(given):
    assert TrainingArguments(fsdp=given).fsdp == ""


@pytest.mark.parametrize("given", [True, "full_shard", ["full_shard", "offload"]])
def test_fsdp_in_every_spelling_is_refused_with_the_stage_to_use(given):
    with pytest.raises(ConfigError, match="3 for full_shard"):
        TrainingArguments(fsdp=given)


def test_arguments_that_are_deepspeed_keys_are_bound_to_these_keys():
    bound: dict[str, set[str]] = {}
    for rule in RULES:
        if isinstance(rule, Binding):
            for name in rule.arguments:
                bound.setdefault(name, set()).add(rule.key)
    declared = {n: set(t.targets) for n, (t, _) in ALL.items() if t.kind == "deepspeed"}
    assert declared == bound

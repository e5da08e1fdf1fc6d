"""Scripts of which one rank breaks: the other ranks end, and the cause is shown."""

from __future__ import annotations

import time

from tests.cli.launched import TIMEOUT_SECONDS, the_others_end
from tests.launch import launch

# A rank that waits in a collective of a forward pass for one that is gone, in an evaluation whose
# predictions are collected.
BROKEN_SCRIPT = """
import os, pathlib, time
from dstrain import Trainer, TrainingArguments
from tests.models import RaggedTokens, pad_collate, tiny_llama

class Breaks(Trainer):
    def prediction_step(self, model, inputs, *args, **kwargs):
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 3 and os.environ["RANK"] == "1":
            pathlib.Path("broke").write_text(str(time.time()))
            raise RuntimeError("rank 1 broke on purpose")
        return super().prediction_step(model, inputs, *args, **kwargs)

Breaks(
    tiny_llama(),
    TrainingArguments(
        "out", max_steps=20, eval_strategy="steps", eval_steps=2, report_to="none",
        per_device_eval_batch_size=1, eval_accumulation_steps=ACCUMULATION,
        deepspeed={"zero_optimization": {
            "stage": STAGE, "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
        }},
    ),
    data_collator=pad_collate,
    train_dataset=RaggedTokens(64),
    eval_dataset=RaggedTokens(32),
    compute_metrics=lambda prediction: {},
).train()
print("went on to the end")
"""

# An error that all ranks can hear of, then one in the middle of a forward pass of training.
BREAKS_IN_TRAINING = """
import os, pathlib, time
from dstrain import Trainer, TrainingArguments
from tests.models import RaggedTokens, pad_collate, tiny_llama

RANK, seen = os.environ["RANK"], 0

def reduce(logits, labels):
    global seen
    seen += 1
    if RANK == "1" and seen == 2:
        raise RuntimeError("logits of rank 1")
    return logits.argmax(-1)

def in_the_middle(module, inputs):
    if RANK == "1" and trainer.is_in_train and trainer.state.global_step == 1:
        pathlib.Path("broke").write_text(str(time.time()))
        raise RuntimeError("rank 1 broke on purpose")

trainer = Trainer(
    tiny_llama(),
    TrainingArguments(
        "out", max_steps=20, report_to="none", per_device_eval_batch_size=1,
        eval_accumulation_steps=4,
        deepspeed={"zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
        }},
    ),
    data_collator=pad_collate,
    train_dataset=RaggedTokens(64),
    eval_dataset=RaggedTokens(32),
    compute_metrics=lambda prediction: {},
    preprocess_logits_for_metrics=reduce,
)
try:
    trainer.evaluate()
except RuntimeError as error:
    pathlib.Path(f"heard-{RANK}").write_text(str(error))
trainer.model.model.layers[0].register_forward_pre_hook(in_the_middle)
trainer.train()
print("went on to the end")
"""


def test_a_rank_that_breaks_in_an_evaluation_of_a_script_ends_the_others(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BROKEN_SCRIPT.replace("STAGE", "3").replace("ACCUMULATION", "1"))
    done = launch(["--quiet", script], timeout=TIMEOUT_SECONDS, cwd=tmp_path)
    the_others_end(done, tmp_path, time.time(), where="prediction_step")


def test_a_rank_that_breaks_in_a_forward_pass_of_training_ends_the_others(tmp_path):
    """At stage 3, where the others wait in that pass; after an evaluation that failed on all."""
    script = tmp_path / "script.py"
    script.write_text(BREAKS_IN_TRAINING)
    done = launch(["--quiet", script], timeout=TIMEOUT_SECONDS, cwd=tmp_path)
    for rank in (0, 1):
        assert (tmp_path / f"heard-{rank}").read_text() == "logits of rank 1", done.stderr
    the_others_end(done, tmp_path, time.time(), where="in_the_middle")

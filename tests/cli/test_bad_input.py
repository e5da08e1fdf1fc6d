"""Bad input that only a started rank can know: one error, before anything expensive.

What is expensive fails a test when it is reached.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.cli.main import main
from tests.cli.corpus import TINY_MODEL, flags, text, write_corpus
from tests.cli.refusals import TRAIN, ZERO_STAGE_TWICE, the_error


@pytest.fixture
def job(monkeypatch):
    """Give the training job, whose expensive parts fail when they are reached."""
    from dstrain.tasks.causal_lm import job

    def reached(*args, **kwargs):
        raise AssertionError("a model was built before the error was found")

    for name in ("build_causal_lm", "load_causal_lm", "CausalLMTrainer"):
        monkeypatch.setattr(job, name, reached)
    return job


@pytest.fixture
def before_data(job, monkeypatch):
    """Let the reading of data fail too, which is one of the expensive parts."""

    def reached(*args, **kwargs):
        raise AssertionError("data was read before the error was found")

    monkeypatch.setattr(job, "prepare_data", reached)


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """Give a cache of its own for the data of a test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def small_config(folder: Path) -> Path:
    path = folder / "small.json"
    path.write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    return path


def folder_without_weights(folder: Path) -> Path:
    model = folder / "no-weights"
    model.mkdir()
    small_config(model).rename(model / "config.json")
    return model


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "out"


def dead_link(folder: Path) -> Path:
    (folder / "dead").symlink_to("gone/out")
    return folder / "dead"


LONG = TINY_MODEL + ",max_position_embeddings=64"
FP16_ON = '{"fp16": {"enabled": true}}'


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # An argument may be a function of the test's folder.
        pytest.param(
            {"block_size": 65, "model_config": LONG},
            ["block_size=65", "at most 64 tokens", "set --block_size 64 or less"],
            id="block size, short form",
        ),
        pytest.param(
            {"block_size": 65, "model_config": small_config},
            ["block_size=65", "at most 64 tokens", "set --block_size 64 or less"],
            id="block size, config.json",
        ),
        pytest.param(
            {"block_size": 65, "model_config": "gpt2:n_positions=64,n_embd=32,n_layer=1,n_head=2"},
            ["block_size=65", "at most 64 tokens"],
            id="block size, own name",
        ),
        pytest.param(
            {"model_config": "llama:hiden_size=32"},
            ["'hiden_size'", "no such key", "did you mean 'hidden_size'?"],
            id="model key",
        ),
        pytest.param(
            {"model_config": "lama:hidden_size=32"},
            ["model type 'lama'", "did you mean 'llama'?"],
            id="model type",
        ),
        pytest.param(
            {"model_config": None, "model_name_or_path": folder_without_weights},
            ["no-weights' has no weights", "it holds config.json", "--model_config"],
            id="no weights",
        ),
        pytest.param(
            {"model_config": None, "model_name_or_path": "/no/such/model"},
            ["model_name_or_path='/no/such/model'", "no such folder"],
            id="no model folder",
        ),
        pytest.param(
            {"model_config": None, "model_name_or_path": "no-such-model"},
            ["model_name_or_path='no-such-model' cannot be read", "check the name"],
            id="no such model",
        ),
        pytest.param(
            {"output_dir": below_a_file},
            ["file/out' cannot be written", "file is a file, not a folder", "another output_dir"],
            id="output folder below a file",
        ),
        pytest.param(
            {"output_dir": dead_link},
            ["dead' cannot be written", "dead is a link that leads nowhere: to 'gone/out'"],
            id="output folder is a dead link",
        ),
        pytest.param(
            {"output_dir": "/proc/out"},
            ["output_dir '/proc/out' cannot be written", "choose another output_dir"],
            id="output folder in /proc",
        ),
        pytest.param(
            {"eval_strategy": "steps", "validation_percentage": 0},
            ["eval_strategy='steps'", "no evaluation data", "give --validation_file"],
            id="nothing to evaluate on",
        ),
        pytest.param(
            {"eval_on_start": "true", "validation_percentage": 0},
            ["eval_on_start=True", "no evaluation data", "give --validation_file"],
            id="nothing to evaluate on at the start",
        ),
        pytest.param(
            {"streaming": "true"},
            ["streaming=True without max_steps", "length of a stream", "set --max_steps"],
            id="a stream of unknown length",
        ),
        pytest.param(
            {"deepspeed": '{"train_batch_size": 12}', "gradient_accumulation_steps": 2},
            ["train_batch_size=12", "micro-batch 8 x accumulation 2 x ranks 1 = 16", "auto"],
            id="batch arithmetic",
        ),
        pytest.param(
            {"deepspeed": '{"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}}'},
            ["no such key in zero_optimization", "did you mean", "stage3_prefetch_bucket_size?"],
            id="unknown JSON key",
        ),
        pytest.param({"deepspeed": ZERO_STAGE_TWICE}, ["stands twice"], id="duplicate JSON key"),
        pytest.param(
            {"bf16": "true", "deepspeed": FP16_ON},
            ["bf16.enabled and fp16.enabled", "one 16-bit format"],
            id="fp16 and bf16",
        ),
    ],
)
@pytest.mark.usefixtures("before_data")
def test_what_is_wrong_is_found_before_data_is_read(tmp_path, capsys, given, expected):
    given = {k: v(tmp_path) if callable(v) else v for k, v in given.items()}
    words = flags(tmp_path / "out", **given)
    error = the_error(main([*TRAIN, *words]), capsys.readouterr())
    for part in expected:
        assert part in error


@pytest.mark.ranks(1)
@pytest.mark.usefixtures("before_data")
def test_mistakes_of_different_kinds_are_listed_together(tmp_path, capsys):
    words = flags(
        below_a_file(tmp_path),
        block_size=65,
        model_config=LONG,
        eval_strategy="epoch",
        validation_percentage=0,
        deepspeed='{"train_batch_size": 7, "zero_optimization": {"stage": 1}}',
    )
    error = the_error(main([*TRAIN, *words]), capsys.readouterr())
    assert error.startswith("4 problems:\n")
    for part in ("cannot be written", "train_batch_size=7", "eval_strategy='epoch'", "at most 64"):
        assert part in error


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        pytest.param(None, "none.txt", ["does not exist", "check the path"], id="missing"),
        pytest.param("", "empty.txt", ["holds no text", "give data"], id="empty"),
        pytest.param(" \n\n", "blank.txt", ["holds no text", "give data"], id="blank"),
        pytest.param("", "empty.jsonl", ["holds no text", "give data"], id="empty jsonl"),
        pytest.param('{"a": 1}\n{"a": ', "broken.jsonl", ["line 2", "mend the file"], id="broken"),
        pytest.param('{"body": "x"}\n', "rows.jsonl", ["no column 'text'", "body"], id="column"),
        pytest.param("x", "notes.docx", ["suffix '.docx'", ".txt", "convert"], id="suffix"),
        pytest.param("", "folder/", ["without files", "looked in", "give a folder"], id="folder"),
    ],
)
@pytest.mark.usefixtures("job", "cache")
def test_training_data_that_is_none(tmp_path, capsys, content, name, expected):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    words = flags(tmp_path / "out", train_file=path)
    captured = main([*TRAIN, *words]), capsys.readouterr()
    error = the_error(*captured)
    assert f"--train_file {path}" in error
    for part in expected:
        assert part in error


BAD_ROLE = {"messages": [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]}


@pytest.mark.ranks(1)
@pytest.mark.usefixtures("job", "cache")
def test_rows_that_are_no_conversation(tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b"}}\n{json.dumps(BAD_ROLE)}\n{{"x": 1}}\n')
    words = flags(tmp_path / "out", train_file=path, data_format="chat")
    error = the_error(main([*TRAIN, *words]), capsys.readouterr())
    assert f"message 2 of 'messages' in line 2 of {path} has the role 'bot'" in error
    assert f"line 3 of {path} holds no conversation" in error


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"model_config": TINY_MODEL},
            ["is a llama, which has no encoder and decoder", "--data_format chat"],
        ),
        (
            {"model_config": "bart:d_model=16,max_position_embeddings=64"},
            ["max_source_length=512", "at most 64 tokens", "set --max_source_length 64 or less"],
        ),
        ({"model_config": "t5:d_modle=16"}, ["'d_modle'", "did you mean 'd_model'?"]),
        ({"model_config": "t5:vocab_size=100"}, ["embedding has 100 rows"]),
        (
            {"source_column": "text"},
            ["no column 'text'", "--source_column"],
        ),
    ],
)
@pytest.mark.usefixtures("cache")
def test_what_is_wrong_with_a_job_on_pairs(tmp_path, capsys, monkeypatch, given, expected):
    from dstrain.tasks.seq2seq import job

    for name in ("build_seq2seq", "load_seq2seq"):
        monkeypatch.setattr(job, name, None)
    rows = [{"source": f"return {i}", "target": f"{i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model_config": None, "block_size": None, "completion_tokens": None} | given
    given["train_file"] = tmp_path / "rows.jsonl"
    words = flags(tmp_path / "out", **given)
    error = the_error(main(["train", "seq2seq", *words]), capsys.readouterr())
    for part in expected:
        assert part in error


@pytest.mark.ranks(1)
@pytest.mark.usefixtures("job", "cache")
def test_training_text_too_short_to_hold_out_a_part(tmp_path, capsys):
    """Only reading shows it; no model is built for it all the same."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"text": text(0)}) + "\n")
    words = flags(tmp_path / "out", train_file=path, eval_strategy="epoch")
    error = the_error(main([*TRAIN, *words]), capsys.readouterr())
    assert "eval_strategy='epoch', but there is no evaluation data" in error
    assert "why: the training text is too short" in error
    assert "give --validation_file" in error


@pytest.mark.ranks(1)
@pytest.mark.usefixtures("job", "cache")
def test_model_with_too_small_a_vocabulary(tmp_path, capsys):
    words = flags(
        tmp_path / "out",
        train_file=write_corpus(tmp_path / "corpus"),
        model_config=TINY_MODEL + ",vocab_size=100",
    )
    error = the_error(main([*TRAIN, *words]), capsys.readouterr())
    assert "the tokenizer has " in error
    assert "embedding has 100 rows" in error
    assert "set vocab_size of the model to " in error


@pytest.fixture
def diverging(tmp_path, monkeypatch):
    """Give flags of a run whose first step ruins the weights; the loss of the second is NaN."""

    return flags(
        tmp_path / "out",
        train_file=write_corpus(tmp_path / "corpus"),
        max_steps=4,
        learning_rate=1e30,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        disable_tqdm="true",
    )


@pytest.mark.ranks(1)
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_nan_loss_stops_and_names_the_step(diverging, capsys, logging_steps):
    """The first bad step is named, also where a later one was the next to be logged."""
    status = main([*TRAIN, *diverging, "--logging_steps", str(logging_steps)])
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.err.count("dstrain: error: ") == 1
    assert "Traceback" not in captured.err
    error = captured.err.split("dstrain: error: ")[1]
    assert "the training loss was NaN or infinite at step 2" in error
    assert "lower learning_rate" in error
    assert "--nan_loss continue" in error or "nan_loss='continue'" in error


@pytest.mark.ranks(1)
@pytest.mark.usefixtures("cache")
def test_nan_loss_goes_on_where_that_is_asked_for(diverging, capsys, tmp_path, caplog):
    status = main([*TRAIN, *diverging, "--nan_loss", "continue"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "dstrain: error" not in captured.err
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    warned = captured.err + caplog.text
    assert "NaN or infinite at step 2" in warned

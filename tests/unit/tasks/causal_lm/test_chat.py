"""Conversations of the causal language model task: reading, answers, packing, errors."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from dstrain.core.errors import ConfigError, DataError
from dstrain.core.ranks import Ranks
from dstrain.data import Resumable
from dstrain.tasks.causal_lm import job
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.chat import (
    DEFAULT_TEMPLATE,
    ChatEncoder,
    collate_conversations,
    joined,
    pack,
)
from dstrain.tasks.causal_lm.chat_prepare import prepare_chat, set_template
from dstrain.tasks.causal_lm.conversations import load_conversations, messages_in, messages_of
from dstrain.tasks.causal_lm.data import prepare_data
from dstrain.tasks.common.tokenizer import train_tokenizer
from tests.models import tiny_llama

pytestmark = pytest.mark.usefixtures("cache")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The blank after the colon is the prompt's, but a tokenizer joins it to the answer's first word.
COLON = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Qwen3 does with thoughts: an answer is rendered in another way once more follows.
FORGETS = (
    "{% for m in messages %}{{ m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('!')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
TWO_TURNS = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name a colour"},
    {"role": "assistant", "content": "red it is"},
    {"role": "user", "content": "Another"},
    {"role": "assistant", "content": "so blue"},
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["colour red it is so blue answer: assistant: user: brief"] * 9, 320, folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(str(tokenizer_folder))


def answers_of(tokenizer, ids, labels):
    """Decode each run of labels, and check that labels are the ids or -100."""
    runs, before = [], -100
    for token, label in zip(ids, labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            if before == -100:
                runs.append([])
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


# --- which tokens are answers ----------------------------------------------------------------


def test_answers_of_all_turns_are_learned_and_nothing_else(tokenizer):
    tokenizer.chat_template = DEFAULT_TEMPLATE
    ids, labels = ChatEncoder(tokenizer)(TWO_TURNS)
    end = tokenizer.eos_token
    assert tokenizer.decode(ids) == (
        "<|system|>\nYou are brief.\n<|user|>\nName a colour\n"
        f"<|assistant|>\nred it is{end}\n<|user|>\nAnother\n<|assistant|>\nso blue{end}\n"
    )
    assert answers_of(tokenizer, ids, labels) == [f"red it is{end}\n", f"so blue{end}\n"]


def test_only_the_last_answer_where_that_is_asked_for(tokenizer):
    tokenizer.chat_template = DEFAULT_TEMPLATE
    ids, labels = ChatEncoder(tokenizer, answers="last")(TWO_TURNS)
    assert answers_of(tokenizer, ids, labels) == [f"so blue{tokenizer.eos_token}\n"]


def test_masks_are_those_of_a_template_that_marks_its_answers(tokenizer):
    """Against transformers, which reads {% generation %}; ours never looks at it."""
    tokenizer.chat_template = CHATML
    marked = tokenizer.apply_chat_template(
        TWO_TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = ChatEncoder(tokenizer)(TWO_TURNS)
    assert ids == marked["input_ids"]
    assert [int(label != -100) for label in labels] == marked["assistant_masks"]


def test_a_token_over_the_edge_of_an_answer_is_cut(tokenizer):
    tokenizer.chat_template = COLON
    encode = ChatEncoder(tokenizer)
    whole = tokenizer(encode.answer_spans(TWO_TURNS)[0], add_special_tokens=False)["input_ids"]
    ids, labels = encode(TWO_TURNS)
    assert ids != whole  # the blank and the word are one token there
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    assert answers_of(tokenizer, ids, labels) == ["red it is\n", "so blue\n"]
    # What the model is given when it is asked is what it was trained to go on from.
    asked = encode.question(TWO_TURNS[:2])
    assert ids[: len(asked)] == asked
    assert labels[: len(asked)] == [-100] * len(asked)
    assert labels[len(asked)] == ids[len(asked)]


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = FORGETS
    messages = [*TWO_TURNS[:2], {"role": "assistant", "content": "hm!red"}, *TWO_TURNS[3:]]
    with pytest.raises(DataError) as caught:
        ChatEncoder(tokenizer)(messages, "line 7 of a.jsonl")
    text = str(caught.value)
    for part in ("message 3 of line 7 of a.jsonl", "hm!red", "--train_on_answers last"):
        assert part in text
    ids, labels = ChatEncoder(tokenizer, answers="last")(messages)
    assert answers_of(tokenizer, ids, labels) == ["so blue\n"]


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{% for"])
def test_a_template_that_fails_names_the_row(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        ChatEncoder(tokenizer)(TWO_TURNS, "line 7 of a.jsonl")
    assert "the chat template cannot render line 7 of a.jsonl" in str(caught.value)
    assert "--chat_template" in str(caught.value)


def test_a_greeting_is_read_and_not_learned(tokenizer):
    tokenizer.chat_template = DEFAULT_TEMPLATE
    ids, labels = ChatEncoder(tokenizer)([{"role": "assistant", "content": "hi"}, *AS_MESSAGES])
    assert "hi" in tokenizer.decode(ids)
    assert answers_of(tokenizer, ids, labels) == [f"red{tokenizer.eos_token}\n"]


def test_the_first_token_is_never_a_target(tokenizer):
    """In a packed block it would be predicted from the conversation before."""
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}"
    )
    ids, labels = ChatEncoder(tokenizer)(AS_MESSAGES)
    assert labels == [-100, *ids[1:]]


def test_the_default_template_is_saved_with_the_tokenizer(tokenizer, tmp_path):
    set_template(tokenizer, DataArguments(data_format="chat", train_file="x.jsonl"))
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert loaded.chat_template == DEFAULT_TEMPLATE
    given = tmp_path / "mine.jinja"
    given.write_text(COLON)
    set_template(
        loaded,
        DataArguments(data_format="chat", train_file="x.jsonl", chat_template=str(given)),
    )
    assert loaded.chat_template == COLON


# --- packing -----------------------------------------------------------------------------------


def conversations(tokenizer, count=7):
    tokenizer.chat_template = DEFAULT_TEMPLATE
    encode, draw = ChatEncoder(tokenizer), np.random.default_rng(0)
    words = ["red", "blue", "so", "it", "is", "brief"]
    found = []
    for _ in range(count):
        said = [" ".join(draw.choice(words, size=draw.integers(1, 9))) for _ in range(2)]
        found.append(
            encode(
                [
                    {"role": "user", "content": said[0]},
                    {"role": "assistant", "content": said[1]},
                ]
            )
        )
    return found


def packed_samples(found, block_size):
    return [joined(block) for block in pack(found, block_size)]


def test_packed_blocks_hold_every_conversation_whole_and_once(tokenizer):
    found = conversations(tokenizer, 40)
    blocks = pack(found, 64)
    assert sorted(ids for block in blocks for ids, _ in block) == sorted(ids for ids, _ in found)
    sizes = [sum(len(ids) for ids, _ in block) for block in blocks]
    assert max(sizes) <= 64
    assert sum(sizes) / (64 * len(sizes)) > 0.8


def total_loss(model, batch):
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def tiny_gpt2(vocab_size):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    )


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_packed_conversations_have_the_loss_and_gradient_of_each_alone(tokenizer, build):
    """Catches attention from one to another, wrong positions and labels across the edges."""
    found = conversations(tokenizer)
    model = build(vocab_size=len(tokenizer)).double().eval()
    model.config.use_cache = False  # as the trainer has it
    alone = sum(
        total_loss(model, collate_conversations([{"input_ids": ids, "labels": labels}]))
        for ids, labels in found
    )
    alone.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for samples in (
        packed_samples(found, 100),
        [{"input_ids": ids, "labels": labels} for ids, labels in found],
    ):
        model.zero_grad()
        batch = collate_conversations(samples)
        assert batch["input_ids"].shape[0] > 1
        assert (batch["labels"] == -100).any()
        loss = total_loss(model, batch)
        loss.backward()
        assert loss.item() == pytest.approx(alone.item(), rel=1e-10)
        for parameter, expected in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-10)


def test_packing_is_refused_for_a_model_without_positions():
    model = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=1))
    with pytest.raises(ConfigError, match="packing=True with BloomForCausalLM"):
        job._check_packing(model)
    job._check_packing(tiny_llama())


def test_positions_begin_again_in_the_padding():
    batch = collate_conversations(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]},
            {"input_ids": [5, 6], "labels": [-100, 6], "position_ids": [0, 1]},
        ],
        pad_token_id=9,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, 6, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
    assert "attention_mask" not in batch


def test_padded_samples_have_a_mask():
    batch = collate_conversations(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [-100]}]
    )
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]


# --- reading -----------------------------------------------------------------------------------

PAIR = {"prompt": "Name a colour", "completion": "red"}
AS_MESSAGES = [
    {"role": "user", "content": "Name a colour"},
    {"role": "assistant", "content": "red"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": AS_MESSAGES},
        {"conversations": AS_MESSAGES, "id": 1},
        {
            "conversations": [
                {"from": "human", "value": "Name a colour"},
                {"from": "gpt", "value": "red"},
            ]
        },
        PAIR | {"score": 1.0},
        PAIR | {"messages": None},
    ],
)
def test_shapes_of_a_row(row):
    assert messages_in(row, "line 1 of a.jsonl") == AS_MESSAGES


def with_message(**changes):
    return {"messages": [AS_MESSAGES[0], {**AS_MESSAGES[1], **changes}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], ["line 3 of a.jsonl is not an object", "a list"]),
        ({"text": "x"}, ["line 3 of a.jsonl holds no conversation", "'text'", "'messages'"]),
        ({"messages": []}, ["'messages' in line 3 of a.jsonl is empty"]),
        ({"messages": "hi"}, ["'messages' in line 3 of a.jsonl is a str", "a list of messages"]),
        ({"messages": ["hi"]}, ["message 1 of", "line 3", "is a str", "'role' and 'content'"]),
        (with_message(role="asistant"), ["message 2", "'asistant'", "did you mean 'assistant'?"]),
        (with_message(role=None), ["message 2", "the role None", "system, user, assistant"]),
        (with_message(content=None), ["message 2", "null", "tool calls"]),
        (with_message(content=[{"type": "text"}]), ["message 2", "a list", "text is expected"]),
        (with_message(content=" \n"), ["message 2", "an empty answer"]),
        ({"messages": AS_MESSAGES[:1]}, ["line 3 of a.jsonl has no answer"]),
        ({"messages": AS_MESSAGES[1:]}, ["line 3 of a.jsonl has no answer"]),
        ({"prompt": 1, "completion": "x"}, ["message 1 of line 3 of a.jsonl", "a int ('1')"]),
    ],
)
def test_what_is_wrong_with_a_row(row, expected):
    problem = messages_in(row, "line 3 of a.jsonl")
    for part in expected:
        assert part in str(problem)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_arguments(path, **given):
    return DataArguments(data_format="chat", train_file=str(path), **given)


def test_bad_rows_come_in_one_error_with_their_lines(tmp_path):
    rows = [PAIR, {"messages": []}, PAIR, with_message(role="bot"), {"x": 1}]
    with pytest.raises(DataError) as caught:
        load_conversations(chat_arguments(write_jsonl(tmp_path / "a.jsonl", rows)))
    lines = [int(p.what.split("line ")[1].split(" ")[0]) for p in caught.value.problems]
    assert lines == [2, 4, 5]
    assert str(tmp_path / "a.jsonl") in str(caught.value)


def test_broken_json_names_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + '\n\n{"prompt": \n')
    with pytest.raises(DataError, match=r"line 3 of .*a\.jsonl is not JSON"):
        load_conversations(chat_arguments(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_files_are_read_and_split_by_content(tmp_path, suffix):
    rows = [{"prompt": f"Name colour {i}", "completion": f"{i}"} for i in range(60)]
    rows += rows[:20]  # copies must stay on one side
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        lines = [f"{row['prompt']},{row['completion']}\n" for row in rows]
        path.write_text("prompt,completion\n" + "".join(lines))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    found = load_conversations(chat_arguments(path, validation_percentage=10))
    train, held_out = (
        [messages_of(row)[0]["content"] for row in part] for part in (found.train, found.validation)
    )
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(row["prompt"] for row in rows)
    assert held_out


def test_conversations_cut_and_left_out(tokenizer, tmp_path, caplog):
    rows = [
        PAIR,
        {"prompt": "Name a colour", "completion": "red " * 100},  # cut in its answer
        {"prompt": "Name a colour " * 100, "completion": "red"},  # no answer within the block
    ]
    args = chat_arguments(
        write_jsonl(tmp_path / "a.jsonl", rows), validation_percentage=0, block_size=48
    )
    set_template(tokenizer, args)
    with caplog.at_level("WARNING"):
        samples = prepare_chat(load_conversations(args), tokenizer, args)
    whole = len(ChatEncoder(tokenizer)(AS_MESSAGES)[0])
    assert [len(row["input_ids"]) for row in samples.train] == [whole, 48]
    assert "of 3 conversations 1 are cut" in caplog.text
    assert "1 are left out" in caplog.text
    short = chat_arguments(args.train_file, validation_percentage=0, block_size=4)
    with pytest.raises(DataError, match="no train conversation has an answer within block_size=4"):
        prepare_chat(load_conversations(short), tokenizer, short)


def test_packed_samples_are_those_of_each_conversation(tmp_path):
    """From a file to samples; and a second run finds them in the cache."""
    rows = [{"prompt": f"Name colour {i}", "completion": f"red {i}"} for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    plain = prepare_data(chat_arguments(path, vocab_size=300), None, Ranks())
    args = chat_arguments(
        path, vocab_size=300, packing=True, block_size=128, preprocessing_num_workers=2
    )
    packed = prepare_data(args, None, Ranks())
    assert len(packed.train) < len(plain.train) / 2
    for name in ("input_ids", "labels"):
        tokens = [
            sorted(int(t) for sample in data.train for t in sample[name])
            for data in (plain, packed)
        ]
        assert tokens[0] == tokens[1]
    for sample in packed.train:
        starts = np.flatnonzero(sample["position_ids"] == 0)
        assert (sample["labels"][starts] == -100).all()
    again = prepare_data(args, None, Ranks())
    assert again.train.cache_files == packed.train.cache_files


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stream_gives_the_samples_of_its_conversations(
    tokenizer, tmp_path, caplog, monkeypatch, suffix, packing
):
    """Bad rows are left out and named once; it goes on inside of what was mapped, and of a file."""
    monkeypatch.setattr("dstrain.tasks.common.lines.SHARD_BYTES", 1000)
    rows = [{"prompt": f"Name colour {i}", "completion": f"red {i}"} for i in range(80)]
    good = tmp_path / "good.jsonl"
    write_jsonl(good, rows)
    rows[50:50] = [
        {"prompt": "Name a colour", "completion": " "},
        {"prompt": "Name a colour " * 100, "completion": "red"},  # no answer within the block
        rows[1],  # a copy of what is held out
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    else:
        write_jsonl(path, rows)
    given = {"block_size": 64, "packing": packing}
    args = chat_arguments(path, streaming=True, validation_percentage=5, **given)
    set_template(tokenizer, args)
    found = load_conversations(args)
    assert [messages_of(row)[0]["content"] for row in found.validation] == [
        row["prompt"] for row in rows[:4]
    ]
    with caplog.at_level("WARNING"):
        streamed = prepare_chat(found, tokenizer, args)
        samples = list(streamed.train)
        assert list(streamed.train) == samples
    before = sum(map(len, path.read_bytes().splitlines(keepends=True)[:50]))
    place = f"the line at byte {before:,} of {path}"
    if suffix == "parquet":
        place = f"row 51 of --train_file {path}"
    assert found.train.num_shards >= 5
    assert caplog.text.count(place) == 1
    assert caplog.text.count("without an answer in their first 64 tokens") == 1

    whole = chat_arguments(good, validation_percentage=0, block_size=64)
    by_hand = list(prepare_chat(load_conversations(whole), tokenizer, whole).train)[4:]
    tokens = [
        [list(map(int, sample[name])) for sample in by_hand] for name in ("input_ids", "labels")
    ]
    if not packing:
        assert [[sample[n] for sample in samples] for n in ("input_ids", "labels")] == tokens
    else:
        assert len(samples) <= len(by_hand) / 2
        blocks = pack(list(zip(*tokens, strict=True)), 64)
        assert [s["input_ids"] for s in samples] == [sum((i for i, _ in b), []) for b in blocks]
        assert all(s["position_ids"][0] == 0 for s in samples)

    half = len(samples) // 2
    stream = Resumable.of(streamed.train)
    reading = iter(stream.source)
    for _ in range(half):
        next(reading)
    again = Resumable.of(prepare_chat(load_conversations(args), tokenizer, args).train)
    assert again.load(stream.state())
    assert list(again.source) == samples[half:]


def test_a_stream_without_a_conversation_says_what_is_wrong(tokenizer, tmp_path):
    args = chat_arguments(
        write_jsonl(tmp_path / "a.jsonl", [{"x": 1}, {"messages": []}]), streaming=True
    )
    with pytest.raises(DataError, match="line 1 of .*holds no conversation") as caught:
        load_conversations(args)
    assert len(caught.value.problems) == 2
    short = chat_arguments(
        write_jsonl(tmp_path / "b.jsonl", [PAIR] * 3), streaming=True, block_size=4,
        validation_percentage=0,
    )  # fmt: skip
    set_template(tokenizer, short)
    with pytest.raises(DataError, match="no train conversation has an answer within block_size=4"):
        prepare_chat(load_conversations(short), tokenizer, short)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"data_format": "chat"}, "--data_format chat without data"),
        (
            {"data_format": "chat", "train_file": "a.jsonl", "text_column": "body"},
            "--text_column body with --data_format chat",
        ),
        (
            {"data_format": "chat", "train_file": "a.jsonl", "chat_template": "no/such.jinja"},
            "--chat_template no/such.jinja is no file",
        ),
        ({"packing": True}, "--packing True with --data_format text"),
        ({"train_on_answers": "last"}, "--train_on_answers last with --data_format text"),
    ],
)
def test_arguments_that_do_not_go_together(given, expected):
    with pytest.raises(DataError) as caught:
        DataArguments(**given)
    assert expected in str(caught.value)


def test_text_is_no_conversation(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match="is text without rows"):
        load_conversations(chat_arguments(tmp_path / "a.txt"))

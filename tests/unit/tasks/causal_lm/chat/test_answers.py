"""Answers of conversations: which tokens a chat template makes targets."""

import pytest
from transformers import (
    AutoTokenizer,
)

from dstrain.core.errors import DataError
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.chat import (
    DEFAULT_TEMPLATE,
    ChatEncoder,
)
from dstrain.tasks.causal_lm.chat_prepare import set_template
from tests.unit.tasks.causal_lm.chat.messages import AS_MESSAGES

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

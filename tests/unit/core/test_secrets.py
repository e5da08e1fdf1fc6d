"""Which names and texts hold a credential, and that nothing else is hidden."""

from __future__ import annotations

import base64
import json
import logging
import sys
import time
from collections import namedtuple
from contextlib import nullcontext

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.cli.train import _refuse_credentials
from dstrain.config.difference import as_text, differences
from dstrain.config.resolution.source import read_config
from dstrain.core.errors import ConfigError, Problem
from dstrain.core.log import get_logger
from dstrain.core.secret_names import is_secret_name
from dstrain.core.secrets import (
    command_without_secrets,
    has_secrets,
    hidden_in_text,
    hidden_in_words,
    without_masks,
    without_secrets,
)

SECRET = "s3cr3t-value"


NamedPair = namedtuple("NamedPair", ["user", "password"])

NAMES = """api_key comet.api_key apiKey API-KEY WANDB_API_KEY hub_token push_to_hub_token token
use_auth_token access_key aws_secret_access_key access_key_id secret client_secret password
db_password passwd authorization Authorization proxy-authorization credentials HF_TOKEN
private_key --hub_token --hub-token auth_tokens apikey hf_token secrets session_token
tracker_token webhook_url basic_auth pin PIN card_pin userPin pin_code otp wifi_psk"""


@pytest.mark.parametrize("name", NAMES.split())
def test_names_of_credentials(name):
    """However they are written."""
    assert is_secret_name(name)
    assert without_secrets({name: SECRET})[name] != SECRET


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("bos_token", "<s>"), ("eos_token", "eos"), ("pad_token_id", 0), ("num_tokens", 5)),
        *(("include_tokens_per_second", True), ("max_new_tokens", 64), ("tokenizer", "gpt2")),
        *(("tokenizer_name", "gpt2"), ("keys", ["a"]), ("key", "input_ids"), ("image_token", "i")),
        *(("num_key_value_heads", 4), ("length_column_name", "n"), ("stop_tokens", ["a"])),
        *(("end_of_turn_token", "x"), ("special_tokens", {"a": "b"}), ("token_type_ids", [0])),
        *(("hub_token", None), ("use_auth_token", True), ("token", "<tok>"), ("token", 3)),
        *(("author", "me"), ("experiment_key", "run-7"), ("passed", "yes"), ("compass", "n")),
        *(
            ("tokens_per_second", 3.0),
            ("hub_model_id", "me/m"),
            ("password", ""),
            ("api_key", "auto"),
        ),
        ("include_num_input_tokens_seen", "all"),
        *(("pin_memory", "x"), ("dataloader_pin_memory", True), ("pin", True), ("mapping", "a")),
        *(("opinion", "a"), ("pinned", 3), ("spin", "up"), ("pins", 2)),
    ],
)
def test_what_is_no_credential(name, value):
    """Tokens of a vocabulary, counts, keys of a table, and values that say nothing."""
    given = {name: value}
    assert without_secrets(given) is given


def test_nested_values():
    """At any depth, in lists too; everything in a section of credentials; nothing is changed."""
    given = {
        "comet": {"enabled": True, "api_key": SECRET, "mode": "auto"},
        "kwargs": [{"headers": {"Authorization": SECRET}}, {"lr": 1.0}],
        "credentials": {"user": "me" + SECRET, "numbers": [SECRET, 12]},
        "password": 1234,
        "url": f"https://me:{SECRET}@host/path?x=1",
        "text": json.dumps({"comet": {"api_key": SECRET}}),
        "base64": base64.urlsafe_b64encode(json.dumps({"api_key": SECRET}).encode()).decode(),
        "tuple": ({"token": SECRET},),
    }
    before = json.dumps(given)
    shown = without_secrets(given)
    assert json.dumps(given) == before
    assert SECRET not in json.dumps(shown)
    assert "1234" not in json.dumps(shown)
    assert shown["comet"] == {"enabled": True, "api_key": "<API_KEY>", "mode": "auto"}
    assert shown["kwargs"][1] is given["kwargs"][1]
    assert shown["url"] == "https://<SECRET>@host/path?x=1"
    assert not has_secrets(shown)  # masks are none
    assert without_masks(shown)["comet"] == {"enabled": True, "mode": "auto"}


@pytest.mark.parametrize(
    "text",
    [
        f"hub_token='{SECRET}' and more",
        f"api_key={SECRET}, x=1",
        f"comet.api_key = '{SECRET}'",
        f'{{"comet": {{"api_key": "{SECRET}"}}}}',
        f"{{'comet.api_key': '{SECRET}', 'b': 1}}",
        f'deepspeed=\'{{"comet": {{"api_key": "{SECRET}',  # cut where it was long
        'x = "{\\"api_key\\": \\"' + SECRET + '\\"}"',
        f"train --hub_token {SECRET} --lr 1",
        f"['python', '-m', 'dstrain', '--hub_token', '{SECRET}', '--lr', '1'] exits with 1",
        f"--hub-token={SECRET}",
        f"git+https://user:{SECRET}@github.com/a/b",
        f"Illegal header value b'Bearer {SECRET}'",
        f"api_key=['{SECRET}'] is no text",
        f"GET /x?token={SECRET}&a=b",
        f"comet ...... enabled=False project=None api_key='{SECRET}' mode=None",
        f"Authorization: {SECRET}".replace("Authorization", "x-api-key"),
        f"looked for /data/https:/me:{SECRET}@host/x.txt",  # a path that was made of an address
        f"https:/{SECRET}@host/x is no folder",
        f"s3:/{SECRET}:{SECRET}@bucket/x, and //me:{SECRET}@h/c",
        f"https://s3.host/x?X-Amz-Expires=9&X-Amz-Signature={SECRET}&a=b",
        f"https://a.blob.host/c/x?sv=2024&sig={SECRET}",
    ],
)
def test_texts_with_a_credential(text):
    """Messages of ours, of libraries, commands and JSON."""
    shown = hidden_in_text(text)
    assert SECRET not in shown
    assert hidden_in_text(shown) == shown


@pytest.mark.parametrize(
    "given",
    [
        *(("auth", SECRET), [("auth", SECRET)], [["Authorization", SECRET], ["Accept", "x"]]),
        *({"headers": [("X-Auth-Token", SECRET)]}, {"a": {"b": (("pin", 4711), ("n", 3))}}),
        *(["hub_token", SECRET], ("auth", ("me", SECRET)), ("auth", {"me": SECRET})),
        *([("password", "hunter")], {"basic_auth": ("me", SECRET)}, [{"auth": ["me", SECRET]}]),
        *({"name": "Authorization", "value": SECRET}, [{"key": "api_key", "value": SECRET}]),
        *(NamedPair("me", SECRET), [("auth", SECRET.encode())], {"pin": 4711}, {"pin": "4711"}),
    ],
)
def test_pairs_of_a_name_and_a_value_hide_it(given):
    """Headers, items of mappings, basic authentication."""
    shown = str(without_secrets(given))
    assert not any(part in shown for part in (SECRET, "4711", "hunter"))


@pytest.mark.parametrize(
    "given",
    [["token", "label"], ["input_ids", "token"], ("pin_memory", "true"), [("lr", 1), ("n", "x")],
     {"name": "token_count", "value": "x"}, {"name": "a", "value": "b"}, ["token"], []],
)  # fmt: skip
def test_pairs_without_a_credential_stay(given):
    """Columns of a table, settings."""
    assert without_secrets(given) is given


OF_COMMANDS = """train.py --hub_token hunter
train.py --hub_token hunter --lr 1
train.py --password hunter; echo
train.py --password hunter > log
train.py --password=hunter
train.py --hub_token Hunter2 is used
train.py --hub_token hunter_two is used
train.py --hub_token hunterhunterhunterhunter is used
'--hub_token', 'hunter', 'is'
--hub_token 'hunter' is wrong
HF_TOKEN=hunter train.py
--password hunTer is used"""


@pytest.mark.parametrize("text", OF_COMMANDS.splitlines())
def test_flags_of_commands_in_a_text_hide_their_values(text):
    """Plain words too, where no sentence goes on after them."""
    shown = hidden_in_text(text)
    assert "hunter" not in shown.lower()
    assert hidden_in_text(shown) == shown


OF_SENTENCES = """leave --hub_token out: `export HF_TOKEN=...` before
--hub_token is wrong
without --hub_token the Hub refuses
say `export HF_TOKEN=...` in place of --hub_token, which everybody sees
pass --password once, or export PASSWORD=*** instead
use HF_TOKEN=... instead"""


@pytest.mark.parametrize("text", OF_SENTENCES.splitlines())
def test_flags_in_sentences_stay(text):
    """Our own messages were once garbled."""
    assert hidden_in_text(text) == text


def test_our_own_refusal_of_a_credential_is_readable():
    """The message that the rule is for."""
    with pytest.raises(ConfigError) as caught:
        _refuse_credentials(["--hub_token", SECRET])
    assert "<HUB_TOKEN>" not in str(caught.value).partition("fix:")[2]
    assert "HF_TOKEN=..." in str(caught.value)


@pytest.mark.parametrize("known", ["hf_" + "aB3" * 10, "ghp_" + "x1Y" * 10, "AKIA" + "ABCD" * 4])
def test_keys_of_services_are_known_by_their_form(known):
    """Also where no name stands beside them."""
    assert known not in hidden_in_text(f"401 for {known}: no access")


@pytest.mark.parametrize(
    "text",
    [
        "bos_token='<s>', eos_token=None, pad_token_id=0, num_tokens=12",
        "unexpected token: '}' in line 3",
        "the tokenizer has 500 tokens, the key 'input_ids' is missing",
        "learning_rate=1e-05, keys: a, b; see https://huggingface.co/docs/x?y=1",
        "hub_token=None, use_auth_token=True; api_key=<API_KEY>",
        "me@example.org wrote to http://host:8080/path",
        "host:/data@v1, //server/share@2, /mnt/a:b@c and C:/me@home are paths; a?signed=1&design=2",
        "step 20  loss 6.1023  num_input_tokens_seen 512  tokens_per_second 12.5",
    ],
)
def test_texts_without_one_stay(text):
    """Messages must stay readable."""
    assert hidden_in_text(text) == text


def test_known_values_and_words_of_a_command():
    """What the caller knows to be a credential; and flags, in both ways to write them."""
    assert hidden_in_text(f"no access with {SECRET}", known=[None, "", SECRET]) == (
        "no access with <SECRET>"
    )
    words = ["--hub_token", SECRET, "--hub-token=" + SECRET, "--lr", "1", "--push_to_hub"]
    assert hidden_in_words(words) == [
        *("--hub_token", "<HUB_TOKEN>", "--hub-token=<HUB_TOKEN>", "--lr", "1", "--push_to_hub"),
    ]


def test_errors_and_logs_hide_them(caplog):
    """By construction: an error's parts as its message, and whatever handler an application has."""
    problem = Problem(f"api_key='{SECRET}'", f"token='{SECRET}'", f"set password={SECRET}")
    error = ConfigError([problem, problem])
    assert SECRET not in str(error) + repr(error.problems)
    logger = get_logger("dstrain.of_a_test")
    with caplog.at_level(logging.INFO, logger="dstrain"):
        logger.info("with %s", {"api_key": SECRET})
        try:
            raise ValueError(f"hub_token={SECRET}")
        except ValueError:
            logger.exception("failed")
    assert "<API_KEY>" in caplog.text
    assert SECRET not in caplog.text


def test_masks_are_taken_for_nothing():
    """Arguments made of a record have none; a DeepSpeed config that was copied from one says so."""
    given = {"comet": {"enabled": False, "api_key": SECRET}, "wandb": {"team": "t"}}
    args = TrainingArguments("out", hub_token=SECRET, deepspeed=given)
    assert SECRET not in repr(args) + args.to_json_string()
    again = TrainingArguments(**args.to_dict())
    assert again.hub_token is None
    assert again.deepspeed == {"comet": {"enabled": False}, "wandb": {"team": "t"}}
    with pytest.raises(ConfigError, match=r"comet.api_key = <API_KEY>(.|\n)*COMET_API_KEY"):
        read_config(json.dumps(without_secrets(given)))


def test_a_key_is_masked_as_a_text_is_and_takes_no_other_entrys_place():
    urls = {f"https://a:{SECRET}@host/": 1, f"https://b:{SECRET}@host/": 2, "plain": [3]}
    given = {"servers": urls, ("x", f"Bearer {SECRET}"): 4}
    shown = without_secrets(given)
    assert SECRET not in repr(shown)
    assert list(shown["servers"].values()) == [1, 2, [3]]
    assert shown["servers"]["plain"] is urls["plain"]
    plain = {"a": {"b": 1}, 3: 4, ("x", 1): 2}
    assert without_secrets(plain) is plain


def test_a_comparison_shows_none_of_an_older_record():
    """One that was written before credentials were hidden."""
    reason = {"comet.api_key": {"detail": "your config"}}
    old = {"deepspeed": {"comet": {"api_key": SECRET}}, "provenance": reason}
    new = {"deepspeed": {"comet": {"api_key": "<API_KEY>"}}, "provenance": reason}
    assert differences(old, new) == ()
    empty = {"deepspeed": {}, "provenance": {}}
    assert SECRET not in as_text(differences(old, empty), other=f"--hub_token {SECRET}")


def test_a_command_shows_masks_to_trackers(monkeypatch):
    """W&B sends ``sys.argv``; the process has its own words back afterwards."""
    words = ["job.py", "--hub_token", SECRET, f'--deepspeed={{"comet": {{"api_key": "{SECRET}"}}}}']
    monkeypatch.setattr(sys, "argv", words)
    with command_without_secrets():
        assert SECRET not in str(sys.argv)
        assert sys.argv[:2] == ["job.py", "--hub_token"]
    assert sys.argv is words


@pytest.mark.parametrize(
    "text",
    ["a" * 300_000, "a." * 150_000, "\\" * 300_000, "eyJ" * 100_000, '"' * 300_000, "--a" * 100_000,
     "token: '" * 20_000, "x://" * 80_000, "//a" * 100_000, "https:/a:" * 40_000,
     "//" + "a:" * 99_000],
)  # fmt: skip
def test_no_text_takes_long(text):
    """A log line may hold anything."""
    started = time.monotonic()
    hidden_in_text(f"auth {text}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        (["--hub_token", SECRET], True),
        ([f"--hub-token={SECRET}"], True),
        (["--deepspeed", f'{{"comet": {{"api_key": "{SECRET}"}}}}'], True),
        (["--deepspeed", base64.b64encode(b'{"comet": {"api_key": "abcdef"}}').decode()], True),
        (["--dataset_name", f"https://me:{SECRET}@host/data"], True),
        (["--train_file", f"s3://{SECRET}:{SECRET}@bucket/data"], True),
        (["--completion_prompt", f"my password: {SECRET}"], False),
        (["--completion_prompt=def login(token=None, api_key=x):"], False),
        (["--deepspeed", '{"comet": {"enabled": true}}', "--push_to_hub", "--bf16"], False),
        (["--include_num_input_tokens_seen", "all", "--seed", "1"], False),
    ],
)
def test_what_a_launchers_command_may_not_have(words, is_refused):
    """Flags of credentials, and settings with one; a prompt may say anything."""
    with pytest.raises(ConfigError, match="of a launcher") if is_refused else nullcontext():
        _refuse_credentials(words)

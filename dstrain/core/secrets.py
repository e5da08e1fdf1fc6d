"""Recognition of credentials by name and content, and masking of them in all output.

All data that leaves the process passes through here: records, logs, errors, uploads, trackers. A
value is judged by its name (``comet.api_key``, ``hub_token``, ``--password``), a text also by its
content (``https://user:word@host``, ``Bearer ...``, keys of well-known services, JSON). A
credential is replaced by its name in angle brackets, as transformers does: ``<HUB_TOKEN>``.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dstrain.core.secret_names import is_always_secret, is_secret_name, is_token, words_of

_MARK = re.compile(r"</?[^<>\s]+>|\[[\w|]+\]|\$?\{[\w.]+\}")
_PLAIN = frozenset({"", "none", "null", "true", "false", "auto"})
_ELLIPSIS = re.compile(r"(?:\.{3}|…|\*+)[`.,:;!?]*")
_IDENTIFIER = re.compile(r"-{0,2}[A-Za-z_][\w.\-]*")
_COLUMN = re.compile(r"[a-z]+(?:_[a-z]+)*")


def without_secrets(value: Any, name: str = "") -> Any:
    """Return the value with a mask in place of each credential in it, at any depth.

    A value without credentials is returned itself, not a copy.

    Args:
        value: text, numbers, and mappings and sequences of these; other objects stay.
        name: name of the value, such as its key in a mapping; "" for none.
    """
    return _hidden(value, name, inside=False)


def has_secrets(value: Any) -> bool:
    """Tell whether ``without_secrets`` would mask something in the value."""
    return without_secrets(value) is not value


def is_mask(name: str, value: Any) -> bool:
    """Tell whether ``value`` is the mask that stands for a credential of this name."""
    return isinstance(value, str) and is_secret_name(name) and value == mask_of(name)


def mask_of(name: str) -> str:
    """Return the mask of a credential: the last part of its name in angle brackets."""
    last = name.lstrip("-").rpartition(".")[2]
    return f"<{last.replace('-', '_').upper() or 'SECRET'}>"


def without_masks(value: Any) -> Any:
    """Remove entries whose value is a mask from a mapping, at any depth of nested mappings.

    Any other value is returned as it is.
    """
    if not isinstance(value, Mapping):
        return value
    return {
        name: without_masks(part) for name, part in value.items() if not is_mask(str(name), part)
    }


def hidden_in_text(text: str, *, known: Iterable[str | None] = ()) -> str:
    """Return a text with a mask in place of each credential that can be recognised in it.

    Args:
        text: a message, a log line, a command, JSON.
        known: credentials to mask wherever they occur in the text.
    """
    for secret in known:
        if secret:
            text = text.replace(secret, "<SECRET>")
    if not _MAY_HOLD.search(text):
        return text
    text = _BASE64.sub(_hidden_base64, text)
    text = _URL.sub(r"\g<1><SECRET>@", text)
    text = _FLAT_URL.sub(_without_user, text)
    text = _SIGNED.sub(r"\g<1><SIGNATURE>", text)
    text = _KNOWN.sub("<SECRET>", text)
    text = _AFTER_SCHEME.sub(r"\g<1> <SECRET>", text)
    return _hidden_after(_NAMED, _hidden_after(_FLAG, text))


def hidden_in_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command with masks in place of credentials."""
    shown = []
    flag = ""
    for word in words:
        name, equals, value = word.partition("=")
        if flag and not word.startswith("--"):
            shown.append(without_secrets(word, flag))
        elif name.startswith("--") and equals:
            shown.append(f"{name}={without_secrets(value, name)}")
        else:
            shown.append(hidden_in_text(word))
        flag = word if word.startswith("--") and not equals else ""
    return shown


@contextmanager
def command_without_secrets() -> Iterator[None]:
    """Mask credentials in ``sys.argv`` during the body: trackers upload the command of a run."""
    words = sys.argv
    sys.argv = [*words[:1], *hidden_in_words(words[1:])]
    try:
        yield
    finally:
        sys.argv = words


class HidesSecrets(logging.Filter):
    """Logging filter that masks credentials in messages and tracebacks, before any handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record's message and traceback; keep every record."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # wrong arguments: logging itself reports them
            return True
        shown = hidden_in_text(message)
        if shown != message:
            record.msg, record.args = shown, ()
        if record.exc_info and not record.exc_text:
            text = logging.Formatter().formatException(record.exc_info)
            if (hidden := hidden_in_text(text)) != text:
                record.exc_text = hidden
        return True


# --- values --------------------------------------------------------------------------------------


def _hidden(value: Any, name: str, *, inside: bool) -> Any:
    """Mask credentials in a value; mask all texts and numbers where ``inside`` a credential."""
    inside = inside or is_always_secret(name)
    if isinstance(value, Mapping):
        parts = {k: _hidden(v, str(k), inside=inside) for k, v in value.items()}
        if _names_its_value(value):
            parts["value"] = _hidden(value["value"], _name_in(value), inside=inside)
        shown_keys = [_hidden_key(key) for key in value]
        same = all(parts[k] is v for k, v in value.items())
        if same and all(shown is key for shown, key in zip(shown_keys, value, strict=True)):
            return value
        return dict(zip(_distinct(shown_keys), parts.values(), strict=True))
    if isinstance(value, (list, tuple, set, frozenset)):
        inner = name if inside or is_token(name) else ""
        if hasattr(value, "_fields"):
            names = list(value._fields) if not inner else [inner] * len(value)
        elif _is_named_pair(value):
            names = [inner, next(iter(value))]
        else:
            names = [inner] * len(value)
        listed = [_hidden(v, n, inside=inside) for v, n in zip(value, names, strict=True)]
        if all(new is old for new, old in zip(listed, value, strict=True)):
            return value
        if hasattr(value, "_fields"):
            return type(value)(*listed)
        return type(value)(listed)
    if isinstance(value, bytes):
        return mask_of(name) if inside or is_token(name) else value
    if isinstance(value, str):
        if (inside or is_token(name)) and not _shows_nothing(value):
            return mask_of(name)
        shown = hidden_in_text(value)
        return value if shown == value else shown
    if inside and isinstance(value, (int, float)) and not isinstance(value, bool):
        return mask_of(name)
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and not hasattr(value, "to_dict")
    ):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        shown_fields = _hidden(fields, name, inside=inside)
        return value if shown_fields is fields else shown_fields
    return value


def _hidden_key(key: Any) -> Any:
    """Mask credentials in the text of a mapping's key, such as the address of a server."""
    if isinstance(key, str):
        shown = hidden_in_text(key)
        return key if shown == key else shown
    return _hidden(key, "", inside=False) if isinstance(key, tuple) else key


def _distinct(keys: Sequence[Any]) -> list[Any]:
    """Append numbers to keys that became equal by masking, so that no entry is lost."""
    plain = set(keys)
    found: dict[Any, None] = {}
    counts: dict[Any, int] = {}
    for key in keys:
        counts[key] = number = counts.get(key, 0) + 1
        free = key if number == 1 else f"{key} {number}"
        while free in found or (number > 1 and free in plain):
            counts[key] = number = number + 1
            free = f"{key} {number}"
        found[free] = None
    return list(found)


def _name_in(value: Mapping[Any, Any]) -> str:
    """Return the name in an entry such as ``{"name": ..., "value": ...}``; "" without one."""
    named = (value.get(key) for key in ("name", "key", "header"))
    return next((name for name in named if isinstance(name, str)), "")


def _names_its_value(value: Mapping[Any, Any]) -> bool:
    return "value" in value and is_secret_name(_name_in(value))


def _is_named_pair(value: Any) -> bool:
    """Tell whether a sequence is a pair of a credential's name and value, such as a header.

    A list of two words such as ["token", "label"] is a list of columns, not such a pair.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not isinstance(value[0], str):
        return False
    name, part = value
    if not _IDENTIFIER.fullmatch(name) or not is_secret_name(name):
        return False
    is_columns = isinstance(value, list) and isinstance(part, str) and _COLUMN.fullmatch(part)
    return is_always_secret(name) or not is_columns


def _shows_nothing(text: str) -> bool:
    """Tell whether a text is no credential under any name: empty, "...", or a mark like ``<s>``."""
    bare = text.strip()
    return bare.lower() in _PLAIN or any(form.fullmatch(bare) for form in (_MARK, _ELLIPSIS))


# --- text ----------------------------------------------------------------------------------------

# A text without any of these holds no credential; most lines end here.
_MAY_HOLD = re.compile(
    r"token|pass|pwd|(?:pin|otp|psk)(?![a-z])|(?:pin|otp|psk)[_\-]?(?:code|number)|secret|credential|auth|key|bearer|basic|jwt|cookie|webhook|://|@|[?&](?:sig|x-)"
    r"|hf_|sk-|gh[pousr]_|github_pat|glpat|xox|AKIA|e[yw3][A-Za-z0-9]",
    re.IGNORECASE,
)
_URL = re.compile(r"(?<![A-Za-z0-9+.\-])([A-Za-z][A-Za-z0-9+.\-]*+://)[^\s/@'\"<>]+@")
# An address that was handled as a path has lost a slash or its scheme: https:/name:word@host. One
# with neither a known scheme nor a colon in it is a path such as host:/data@v1.
_FLAT_URL = re.compile(
    r"(?<![A-Za-z0-9+.\-])((?:https?|ftps?|sftp|ssh|git|s3a?|gs|hf|wss?):/)(?!/)[^\s/@'\"<>]+@"
    r"|(?<![A-Za-z0-9+.\-])([A-Za-z][A-Za-z0-9+.\-]*+:/|(?<!:)//)[^\s/@:'\"<>]*+:[^\s/@'\"<>]+@",
    re.IGNORECASE,
)
# Signatures that give access to a file in an address of S3, Azure, Google or CloudFront.
_SIGNED = re.compile(
    r"([?&](?:sig|signature|x-(?:amz|goog)-signature)=)[^&\s'\"<>]+", re.IGNORECASE
)
_KNOWN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_\-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_\-]{16,}|\bxox[abprs]-[A-Za-z0-9\-]{10,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\beyJ[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]+"
)
_AFTER_SCHEME = re.compile(r"\b(Bearer|Basic)\s+(?!<)[A-Za-z0-9+/_.~\-]{6,}={0,2}")
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/_\-])e[yw3][A-Za-z0-9+/_\-]{14,}={0,2}")
# A name is matched once and whole (no backtracking), so that the time is linear in the text.
_NAMED = re.compile(
    r"(?<![\w.\-\\])(?P<open>\\*+[\"']?)(?P<name>-{0,2}[A-Za-z_][\w.\-]*+)(?P=open)"
    r"(?P<sign>\s*+(?:=>|:=|==?|:)\s*+)"
)
_FLAG = re.compile(
    r"(?<![\w.\-])(?P<open>[\"']?)(?P<name>--[A-Za-z][\w.\-]*+)(?P=open)(?P<sign>(?:\s*+,)?\s++)"
)
# A word of a sentence: letters only, as no generated key has them, and a punctuation mark.
_PROSE = re.compile(r"(?:[A-Z]?[a-z]{1,15}|[A-Za-z]'[a-z]+)[.,:;!?]?")
_AFTER_VALUE = re.compile(r"[ \t]*(?:$|[\n\r]|-{1,2}[A-Za-z]|[|&;<>)\]}\\]|\d>)")
_LAST_WORDS = frozenset({"instead.", "instead", "again", "again.", "out", "out.", "too", "twice"})
_VALUE = re.compile(
    r"(?P<quote>\\*[bf]?\\*[\"'])(?P<inner>(?:\\.|(?!(?P=quote)).)*)(?P<end>(?P=quote)?)"
    r"|\[[^\]]*\]?|\([^)]*\)?|\{[^}]*\}?|[^\s,;&)}\]\"']+"
)


def _without_user(address: re.Match[str]) -> str:
    return f"{address[1] or address[2]}<SECRET>@"


def _hidden_after(names: re.Pattern[str], text: str) -> str:
    """Return the text with masks in place of the values that follow names of credentials."""
    shown, position = [], 0
    for match in names.finditer(text):
        if match.start() < position or not is_secret_name(match["name"]):
            continue
        value = _VALUE.match(text, match.end())
        if value is None or not _is_worth_hiding(match, value):
            continue
        if names is _FLAG and _is_prose(match, value, text):
            continue
        quote, end = value["quote"] or "", value["end"] or ""
        shown += [text[position : match.end()], quote, mask_of(match["name"]), end]
        position = value.end()
    return "".join([*shown, text[position:]])


def _is_worth_hiding(named: re.Match[str], value: re.Match[str]) -> bool:
    bare = value[0] if value["quote"] is None else value["inner"]
    if _shows_nothing(bare) or (value["quote"] is None and bare.startswith("--")):
        return False
    if is_always_secret(named["name"]):
        return True
    if re.fullmatch(r"[-+]?[0-9.]+", bare):
        return False  # a count of tokens
    # Prose such as "no such token: ..." names no credential.
    is_prose = named["sign"].strip() == ":" and not named["open"]
    return not (is_prose and len(words_of(named["name"])) < 2)


def _is_prose(flag: re.Match[str], value: re.Match[str], text: str) -> bool:
    """Tell whether a flag's name is followed by a sentence ("--hub_token is wrong"), not a value.

    In a sentence a plain word follows, and more words after it. In a command the value is followed
    by nothing, by the next flag, or by a sign of the shell. In doubt the word counts as a value.
    """
    if value["quote"] is not None or flag["open"] or not _PROSE.fullmatch(value[0]):
        return False
    return _AFTER_VALUE.match(text, value.end()) is None or value[0] in _LAST_WORDS


def _hidden_base64(match: re.Match[str]) -> str:
    """Decode a base64 JSON object and return it as JSON with masks, where it holds credentials.

    Any other match is returned as it is. Launchers pass a config through shells in base64.
    """
    try:
        content = json.loads(base64.urlsafe_b64decode(match[0]).decode())
    except (ValueError, RecursionError):
        return match[0]
    if not isinstance(content, dict) or not has_secrets(content):
        return match[0]
    return json.dumps(without_secrets(content))

"""Recognising credentials by their names."""

from __future__ import annotations

import re

# Words that make a name that of a credential wherever they stand in it.
_ALWAYS = frozenset(
    {
        *("password", "passwords", "passwd", "passphrase", "passcode", "pwd"),
        *("secret", "secrets", "credential", "credentials", "authorization", "bearer"),
        *("apikey", "apikeys", "accesskey", "secretkey", "authtoken", "apitoken", "accesstoken"),
        *("hubtoken", "hftoken", "jwt", "cookie", "cookies", "webhook"),
    }
)
# Words that say so where a name ends in them, or goes on with one of the words below.
_CODES = frozenset({"pin", "otp", "totp", "psk", "passkey"})
_OF_CODES = frozenset({"code", "codes", "number"})
# What a key is that opens something; others name entries of a table, or columns.
_KEYS = frozenset(
    {
        *("api", "access", "secret", "private", "signing", "encryption", "account", "license"),
        *("ssh", "auth", "master", "subscription", "storage", "deploy", "client", "shared"),
    }
)
# Words that make `..._token` one of a vocabulary. Any other that is a text is a credential.
_VOCABULARY = frozenset(
    {
        *("bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "speech"),
        *("start", "end", "stop", "special", "additional", "added", "extra", "new", "next"),
        *("first", "last", "max", "min", "num", "per", "text", "prompt", "response", "think"),
        *("boi", "eoi", "bot", "eot", "eom", "boa", "eoa", "turn", "fim", "prefix", "suffix"),
        *("middle", "language", "task", "vision", "modal", "object", "placeholder", "split"),
        *("no", "blank", "delimiter", "word", "decoder", "encoder", "forced", "completion"),
        *("chunk", "patch", "global", "separator", "padding", "unknown"),
    }
)
# Words that make a list `..._tokens` one of credentials; other lists are of a vocabulary.
_OPENING = frozenset(
    {"api", "auth", "access", "hub", "hf", "bearer", "refresh", "session", "login"}
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def is_secret_name(name: str) -> bool:
    """Tell whether a value of this name is a credential, judged by the name's last part.

    Of ``comet.api_key`` the words ``api`` and ``key`` count; capital letters part words too, as in
    ``apiKey``.
    """
    return is_always_secret(name) or is_token(name)


def words_of(name: str) -> list[str]:
    """Return the words of a name's last part, in small letters."""
    return [word.lower() for word in _WORD.findall(name.rpartition(".")[2])]


def is_always_secret(name: str) -> bool:
    """Tell whether all that is under this name is a credential, numbers and nested parts too."""
    words = words_of(name)
    if not _ALWAYS.isdisjoint(words):
        return True
    pairs = zip(words, words[1:], strict=False)
    if any(first in _KEYS and second in ("key", "keys") for first, second in pairs):
        return True
    if words[-1:] == ["auth"] or not _CODES.isdisjoint(words[-1:]):
        return True
    if not _CODES.isdisjoint(words[-2:-1]) and not _OF_CODES.isdisjoint(words[-1:]):
        return True
    return words[-1:] == ["tokens"] and words[-2:-1] != [] and words[-2] in _OPENING


def is_token(name: str) -> bool:
    """Tell whether a text of this name is a token that opens something, not one of a vocabulary."""
    words = words_of(name)
    return words[-1:] == ["token"] and _VOCABULARY.isdisjoint(words[:-1])

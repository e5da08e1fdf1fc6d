"""Recognition of credentials by their names."""

from __future__ import annotations

import re

# Words that mark a name as a credential's wherever they stand in it.
_ALWAYS = frozenset(
    {
        *("password", "passwords", "passwd", "passphrase", "passcode", "pwd"),
        *("secret", "secrets", "credential", "credentials", "authorization", "bearer"),
        *("apikey", "apikeys", "accesskey", "secretkey", "authtoken", "apitoken", "accesstoken"),
        *("hubtoken", "hftoken", "jwt", "cookie", "cookies", "webhook"),
    }
)
# Words that mark a name as a credential's where it ends in them, or where a word of ``_OF_CODES``
# follows.
_CODES = frozenset({"pin", "otp", "totp", "psk", "passkey"})
_OF_CODES = frozenset({"code", "codes", "number"})
# Words before "key" that make it a credential; other keys name entries of a table, or columns.
_KEYS = frozenset(
    {
        *("api", "access", "secret", "private", "signing", "encryption", "account", "license"),
        *("ssh", "auth", "master", "subscription", "storage", "deploy", "client", "shared"),
    }
)
# Words that make `..._token` a token of a vocabulary. Any other `..._token` with a text as its
# value is a credential.
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
# Words that make `..._tokens` a list of credentials; other such lists hold tokens of a vocabulary.
_OPENING = frozenset(
    {"api", "auth", "access", "hub", "hf", "bearer", "refresh", "session", "login"}
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def is_secret_name(name: str) -> bool:
    """Tell whether a value of this name is a credential, judged by the part after the last dot.

    Of ``comet.api_key`` the words ``api`` and ``key`` count; capital letters separate words too, as
    in ``apiKey``.
    """
    return is_always_secret(name) or is_token(name)


def words_of(name: str) -> list[str]:
    """Return the words of the part of a name after its last dot, in lower case."""
    return [word.lower() for word in _WORD.findall(name.rpartition(".")[2])]


def is_always_secret(name: str) -> bool:
    """Tell whether any value of this name is a credential, numbers and nested values included."""
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
    """Tell whether a text of this name is an access token, not a token of a vocabulary."""
    words = words_of(name)
    return words[-1:] == ["token"] and _VOCABULARY.isdisjoint(words[:-1])

"""Conversations that tests of several files use."""

PAIR = {"prompt": "Name a colour", "completion": "red"}
AS_MESSAGES = [
    {"role": "user", "content": "Name a colour"},
    {"role": "assistant", "content": "red"},
]

"""Settings of a run over ssh, from `multi_node.sh` and the user."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field


@dataclass
class Settings:
    """Settings that `multi_node.sh` writes as KEY=VALUE, each ended by a zero byte."""

    root: str = ""
    ssh_port: str = ""
    ssh_options: str = ""
    master_addr: str = ""
    master_port: str = ""
    task: str = ""
    link_seconds: int = 60
    start_seconds: int = 120
    stop_seconds: int = 120
    hosts: list[tuple[str, int]] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, data: bytes) -> Settings:
        """Read the settings."""
        settings = cls()
        for line in os.fsdecode(data).split("\0")[:-1]:
            key, _, value = line.partition("=")
            if key == "host":
                name, _, slots = value.partition(" ")
                settings.hosts.append((name, int(slots)))
            elif key == "set":
                settings.environment.append(value)
            else:
                setattr(settings, key, type(getattr(settings, key))(value))
        return settings

    def ssh(self, host: str) -> list[str]:
        """Return the command that connects to a machine.

        The user's options come first: of an option that is given twice, ssh takes the first.
        """
        alive = max(1, self.link_seconds // 4)
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": str(alive),
            "ServerAliveCountMax": "3",
            "ControlPath": "none",  # a connection that is shared ends when another run wants it to
            "ClearAllForwardings": "yes",
        }
        return [
            "ssh",
            *(["-p", self.ssh_port] if self.ssh_port else []),
            *shlex.split(self.ssh_options),
            *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
            *("-T", "-a", "-x", "--", host, "bash -s"),
        ]

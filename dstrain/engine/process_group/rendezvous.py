"""Checks of MASTER_ADDR and MASTER_PORT before torch connects the ranks there.

Where they are wrong, torch would wait for ``ddp_timeout``, or raise an error full of C++ frames.
Only the first rank of each machine checks, so rank 0 accepts one more connection per machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator

from dstrain.core.errors import ConfigError, DstrainError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks

logger = get_logger(__name__)

WITHIN_SECONDS = 45.0
_TRY_SECONDS = 5.0
_PAUSE_SECONDS = 0.5
_REMIND_SECONDS = 30.0


def check_rendezvous(ranks: Ranks, *, timeout_seconds: float) -> None:
    """Check that this machine's ranks can connect to rank 0 at MASTER_ADDR and MASTER_PORT.

    If nothing answers at the address within 45 seconds, that is an error. If the connection is
    refused, the machine is up and its rank 0 may start later, so the wait is longer.

    Args:
        ranks: rank of this process, and the number of ranks.
        timeout_seconds: how long to wait for a rank 0 that has not started.

    Raises:
        ConfigError: the address or the port is wrong; the launcher ends the machine's other ranks.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if ranks.world_size == 1 or not ranks.is_local_main or not address:
        return
    if not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            Problem(f"MASTER_PORT={port!r}", "a port is a number from 1 to 65535", "set it so")
        )
    # Under torchrun its agent listens on the port already.
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if ranks.is_main and not has_agent:
        listening = _listen(int(port))
        try:
            if not _is_of_this_machine(address):
                _reach(address, int(port), ranks, timeout_seconds, listening=listening)
        finally:
            # Ends accept() in the other thread, which would keep the port in use.
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        return
    _reach(address, int(port), ranks, timeout_seconds)


@contextlib.contextmanager
def warning_when_slow(ranks: Ranks) -> Iterator[None]:
    """Warn once on each machine if the block, which connects the ranks, takes long."""
    if ranks.world_size == 1 or not ranks.is_local_main:
        yield
        return
    timer = threading.Timer(_REMIND_SECONDS, _remind, args=(ranks,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _remind(ranks: Ranks) -> None:
    """Log that the ranks have not connected yet."""
    logger.warning(
        "rank %d has waited %.0f s for all %d ranks to meet at MASTER_ADDR=%s, port %s: are all "
        "machines started, with this address? (DeepSpeed may also be compiling an op)",
        ranks.rank,
        _REMIND_SECONDS,
        ranks.world_size,
        os.environ.get("MASTER_ADDR"),
        os.environ.get("MASTER_PORT"),
    )


def rendezvous_error(error: Exception, ranks: Ranks) -> ConfigError:
    """Return an error, without C++ frames, for a process group that torch could not form."""
    message = str(error).strip().partition("\nException raised from")[0]
    return ConfigError(
        Problem(
            f"the {ranks.world_size} ranks did not meet at MASTER_ADDR={os.environ['MASTER_ADDR']},"
            f" port {os.environ['MASTER_PORT']}",
            next(iter(message.splitlines()), type(error).__name__),
            "see what the other ranks show: one of them has failed, was not started, cannot "
            "reach that address, or belongs to another run, which has this port already",
        )
    )


@contextlib.contextmanager
def as_rendezvous_error(ranks: Ranks) -> Iterator[None]:
    """Turn torch's errors in the block, the first collective, into ``rendezvous_error``.

    Raises:
        ConfigError: the ranks could not connect.
    """
    try:
        yield
    except DstrainError:
        raise
    except RuntimeError as error:
        raise rendezvous_error(error, ranks) from error


def _listen(port: int) -> socket.socket:
    """Return a socket that listens on the port in the way torch's store will.

    Raises:
        ConfigError: another process listens on the port, or the user has no right to.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another process listens there, perhaps another run",
            errno.EACCES: "ports below 1024 are for root",
        }.get(error.errno or 0, str(error))
        raise ConfigError(
            Problem(
                f"port {port} of this machine, MASTER_PORT, cannot be used by rank 0",
                why,
                "choose another: --master_port N of deepspeed, MASTER_PORT of launch/multi_node.sh",
            )
        ) from error


def _reach(
    address: str,
    port: int,
    ranks: Ranks,
    timeout_seconds: float,
    *,
    listening: socket.socket | None = None,
) -> None:
    """Wait until a process accepts connections at the address.

    Args:
        address: MASTER_ADDR.
        port: MASTER_PORT.
        ranks: rank of this process, for messages.
        timeout_seconds: how long to wait where the connection is refused.
        listening: on rank 0, its socket, on which this call then accepts connections.

    Raises:
        ConfigError: no process has answered in time.
    """
    if listening is not None:
        threading.Thread(target=_accept_all, args=(listening,), daemon=True).start()
    started, reminded = time.monotonic(), 0.0
    while True:
        failure = _try(address, port)
        if failure is None:
            return
        waited = time.monotonic() - started
        refused = failure.errno == errno.ECONNREFUSED
        may_come = refused and listening is None and not _is_of_this_machine(address)
        if waited > (timeout_seconds if may_come else WITHIN_SECONDS):
            raise _unreachable(address, port, ranks, failure, waited)
        if waited - reminded > _REMIND_SECONDS / (1 if may_come else 3):
            reminded = waited
            logger.warning(
                "rank %d has waited %.0f s for rank 0 at MASTER_ADDR=%s, port %d: %s",
                ranks.rank,
                waited,
                address,
                port,
                _reason(failure),
            )
        time.sleep(_PAUSE_SECONDS)


def _try(address: str, port: int) -> OSError | None:
    """Open and close a connection; return the error, or None."""
    try:
        socket.create_connection((address, port), timeout=_TRY_SECONDS).close()
    except OSError as error:
        return error
    return None


def _accept_all(listening: socket.socket) -> None:
    """Accept and close connections until the socket is shut down; runs in a thread."""
    while True:
        try:
            listening.accept()[0].close()
        except OSError:  # it has been closed
            return


def _is_of_this_machine(address: str) -> bool:
    """Tell whether an address or host name belongs to this machine, by binding a socket to it."""
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, where in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((where[0], 0, *where[2:]))
            except OSError:
                continue
            return True
    return False


def _reason(failure: OSError) -> str:
    """Describe why a connection failed."""
    if isinstance(failure, socket.gaierror):
        return "no address is known for this name"
    if isinstance(failure, TimeoutError):
        return "no answer"
    return (failure.strerror or str(failure)).lower()


def _unreachable(
    address: str, port: int, ranks: Ranks, failure: OSError, waited: float
) -> ConfigError:
    """Return the error for an address at which no process has answered."""
    is_here = _is_of_this_machine(address)
    why = _reason(failure)
    if ranks.is_main:
        why += "; this machine runs rank 0, and cannot reach itself there"
    elif is_here:
        why += "; that is this machine's own address, and rank 0 runs on another"
    return ConfigError(
        Problem(
            f"rank {ranks.rank} could not reach MASTER_ADDR={address}, port {port}, in "
            f"{waited:.0f} s",
            why,
            "set MASTER_ADDR (deepspeed --master_addr) to the address of rank 0's machine, "
            "as the others reach it, and see that no firewall closes the port",
        )
    )

# SPDX-License-Identifier: Apache-2.0
"""A broker for one program, which ends with it (`bypass run` where no broker runs).

    bypass run --fork--> (ends at once) --fork--> private broker, waits for the program's end by a pidfd
        |                                             ^ ready, or why not: through a pipe
        `-- exec --> the program, with the same process number, parent and terminal

The program keeps the process number that was started, so that exit codes, signals and job control need no help; and
the broker is not its child, since a program may wait for all of its children.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable

from bypass.broker.server import Server, listen
from bypass.broker.site import Site
from bypass.errors import BypassError, ForeignProgramError, NameTakenError

FREE_S = 5.0


def start_private(make_site: Callable[[], Site], uid: int) -> str:
    """Starts a broker that lives as long as the calling process (whatever program it becomes) and its applications.

    Args:
        make_site: makes what it serves, in its process.
        uid: a user who may use every rule, beside root.

    Returns:
        The name of its socket.

    Raises:
        BypassError: with the broker's own words.
    """
    name = f"@bypass/run/{os.getpid()}-{secrets.token_hex(8)}"
    program = os.pidfd_open(os.getpid())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            if os.fork() == 0:
                os.setsid()
                serve(make_site, name, uid, program, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    os.close(program)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    if said != b"ready":
        raise BypassError(said.decode(errors="replace") or "the broker ended before it was ready")
    return name


def site_when_free(make_site: Callable[[], Site]) -> Site:
    """What it serves. Who had it before, as the private broker of a program that has just ended, may need a moment to
    let go of it.

    Raises:
        BypassError: as make_site(); ForeignProgramError, NameTakenError: somebody has the interface after FREE_S still.
    """
    until = time.monotonic() + FREE_S
    while True:
        try:
            return make_site()
        except (ForeignProgramError, NameTakenError) as e:
            if not e.ours or time.monotonic() >= until:
                raise
            time.sleep(0.05)


def serve(make_site: Callable[[], Site], name: str, uid: int, program: int, writer: int) -> None:
    """The broker's process."""
    quieten()
    try:
        server = Server(site_when_free(make_site), listen(name), trusted=frozenset((uid,)))
    except BypassError as e:
        os.write(writer, str(e).encode())
        return
    ended = False

    def program_ended() -> None:
        nonlocal ended
        ended = True
        server.unwatch(program)

    with server:
        server.watch(program, program_ended)
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.write(writer, b"ready")
        os.close(writer)
        while not server.stopped and not (ended and not server.broker.apps):
            server.turn()


def quieten() -> None:
    """Whoever reads the program's output until its end shall not wait for the broker. A terminal sees errors."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout, *(() if os.isatty(2) else (sys.stderr,))):
        os.dup2(null, stream.fileno())
    os.close(null)

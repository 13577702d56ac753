# SPDX-License-Identifier: Apache-2.0
"""`bypass conns` of users who may not look into their own programs, which are not dumpable in shared mode.

The broker has every memory file, and passes none: who could write one, or read the token in it, would have the
application. It starts a program that reads those of one user (look.py) and gives who asked the end of a pipe. Nothing
that an application wrote passes through the broker, and it waits for nobody.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

from bypass.broker.apps import App
from bypass.broker.state import Loop
from bypass.errors import BypassError

MAX_LOOKS, MAX_PER_USER = 8, 2
"""At the same time."""


class Looks:
    """Those under way. Close it."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # user, by pidfd

    def begin(self, uid: int, apps: Iterable[App]) -> int:
        """Reads these for a user. Where it is told, a pipe, which is the caller's.

        Raises:
            BypassError: too many are under way, or it cannot be started.
        """
        mine = sum(whose == uid for whose, _ in self._running.values())
        if mine >= MAX_PER_USER or len(self._running) >= MAX_LOOKS:
            raise BypassError("several such questions are being answered: ask again in a moment")
        apps = list(apps)
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
        except OSError as e:
            raise _failed(e) from e
        try:
            program = subprocess.Popen(
                [sys.executable, "-P", "-m", "bypass.broker.look", *map(_told, apps)],
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=subprocess.DEVNULL,
                pass_fds=[app.memory.fd for app in apps],
                cwd="/",
            )
            pidfd = os.pidfd_open(program.pid)
        except OSError as e:
            os.close(reader)
            raise _failed(e) from e
        finally:
            os.close(writer)
        self._running[pidfd] = uid, program
        self._loop.watch(pidfd, lambda: self._ended(pidfd))
        return reader

    def _ended(self, pidfd: int) -> None:
        self._loop.unwatch(pidfd)
        os.close(pidfd)
        self._running.pop(pidfd)[1].wait()

    def close(self) -> None:
        for pidfd, (_, program) in list(self._running.items()):
            program.kill()
            self._ended(pidfd)


def _told(app: App) -> str:
    """What look.py is to know of it."""
    pids = [*(p.pid for p in app.processes), *app.children]
    return f"{app.memory.fd}:{app.user.uid}:{','.join(map(str, pids))}"


def _failed(e: OSError) -> BypassError:
    return BypassError(f"the memory cannot be read now: {e.strerror}")


__all__ = ["MAX_LOOKS", "MAX_PER_USER", "Looks"]

# SPDX-License-Identifier: Apache-2.0
"""How applications end, and what makes them last: children, exec, the reaper.

An application ends with its last process, at once: its listeners in the kernel stop, lest that accept connections for
nobody; its live entries go, so that the kernel has its packets and answers with resets; then its AF_XDP sockets, its
memory, and the duplicates that held its ports.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from functools import partial

from bypass.broker.apps import App, Process
from bypass.broker.leasing import Leasing
from bypass.broker.protocol import Message
from bypass.broker.reaper import start_reaper
from bypass.broker.state import Refused, State, app_of

log = logging.getLogger("bypass.broker")

EXEC_NS = 5_000_000_000
MAX_CHILDREN = 4096


class Departures:
    """Of all applications."""

    def __init__(self, state: State, leasing: Leasing) -> None:
        self._state = state
        self._leasing = leasing

    # ---- ends that are announced
    def exec(self, process: Process, m: Message, fds: list[int]) -> Message:
        """APP_EXEC."""
        process.exec = True
        return m.answer()

    def fork(self, process: Process, m: Message, fds: list[int]) -> None:
        """APP_FORK. No answer, and nothing where it cannot be: a child that has ended by now, or somebody else's."""
        app, pid = app_of(process), m.index
        if len(app.children) >= MAX_CHILDREN or any(p.pid == pid for p in app.processes):
            return
        with suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid in (app.user.uid, process.user.uid):
                self._watch_child(app, pid)

    def linger(self, process: Process, m: Message, fds: list[int]) -> Message:
        """APP_LINGER."""
        app = app_of(process)
        if app.lingering:
            raise Refused(errno.EALREADY, "a reaper is at work")
        self._watch_child(app, start_reaper(app, self._state.name))
        app.lingering = True
        self._state.site.keep(app)
        log.info("%s: a reaper drives its stack until its connections have ended", app.who())
        return m.answer()

    # ---- children that have not said hello
    def _watch_child(self, app: App, pid: int) -> None:
        """The application lasts as long as this process, too. OSError: it has ended."""
        if pid not in app.children:
            app.children[pid] = os.pidfd_open(pid)
            self._state.site.joined(app.number, app.children[pid])
            self._state.loop.watch(app.children[pid], partial(self._child_ended, app, pid))

    def go_on(self, app: App) -> None:
        """With the processes of an application that was taken over, all of which are as children."""
        for pid, pidfd in list(app.children.items()):
            self._state.loop.watch(pidfd, partial(self._child_ended, app, pid))
        if not app.children:
            self.end(app)

    def _forget_child(self, app: App, pid: int) -> None:
        pidfd = app.children.pop(pid, -1)
        if pidfd >= 0:
            self._state.loop.unwatch(pidfd)
            os.close(pidfd)

    def _child_ended(self, app: App, pid: int) -> None:
        self._forget_child(app, pid)
        if not app.processes and not app.children and not app.ends_ns:
            self.end(app)

    # ---- processes
    def joined(self, app: App, process: Process) -> None:
        """It has said hello: the application lasts as long as it."""
        process.app = app
        app.processes.append(process)
        if process.pidfd >= 0:
            self._state.site.joined(app.number, process.pidfd)
        self._not_waiting(app)
        self._forget_child(app, process.pid)

    def gone(self, process: Process, *, dead: bool) -> None:
        """A connection has ended; dead: and its process with it. The caller closes it afterwards."""
        app, process.app = process.app, None
        if app is None:
            return
        app.processes.remove(process)
        if app.lingering:
            _stop_listeners(app)  # nobody is left who accepts
        if app.processes or app.children:
            return
        if process.exec and not dead:
            self._await_exec(app, process.pidfd)
        else:
            self.end(app)

    def _await_exec(self, app: App, pidfd: int) -> None:
        """Until another process says hello, the one that becomes another program ends, or time is up."""
        app.ends_ns = self._state.clock() + EXEC_NS
        if pidfd >= 0:
            app.pidfd = os.dup(pidfd)
            self._state.loop.watch(app.pidfd, lambda: self.end(app))

    def _not_waiting(self, app: App) -> None:
        app.ends_ns = 0
        if app.pidfd >= 0:
            self._state.loop.unwatch(app.pidfd)
            os.close(app.pidfd)
            app.pidfd = -1

    # ---- applications
    def end(self, app: App, *, dead: bool = True) -> None:
        """Takes everything from an application; dead: its processes have ended. Else they go on, on the kernel."""
        del self._state.apps[app.number]
        if dead:
            _stop_listeners(app)
        for lease in app.leases.values():
            self._state.site.unuse(lease.key)
        self._state.site.close_device(app.number)
        for fd in app.fds:
            os.close(fd)
        for lease in app.leases.values():
            self._leasing.give_back(app, lease)
        app.leases.clear()
        app.memory.close()
        self._not_waiting(app)
        for pid in list(app.children):
            self._forget_child(app, pid)
        log.info("%s has ended", app.who())
        for process in list(app.processes):
            process.app = None
            self._state.loop.drop(process)
        app.processes.clear()

    # ---- time
    def due_ns(self) -> list[int]:
        return [app.ends_ns for app in self._state.apps.values() if app.ends_ns]

    def tick(self, now_ns: int) -> None:
        for app in [a for a in self._state.apps.values() if a.ends_ns and a.ends_ns <= now_ns]:
            self.end(app)


def _stop_listeners(app: App) -> None:
    for lease in app.leases.values():
        if lease.shadow is not None:
            lease.shadow.stop()

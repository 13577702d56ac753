# SPDX-License-Identifier: Apache-2.0
"""How applications begin: hello, of a new one or of a relative; memory and device; what the header tells.

The kernel closes AF_XDP sockets late: who comes when their owner has just ended waits for a moment, and others after
it are refused meanwhile.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import secrets
from dataclasses import dataclass
from typing import Any

from bypass._core import lib
from bypass.access import Quota
from bypass.broker.apps import App, Process
from bypass.broker.departures import Departures
from bypass.broker.memory import AppMemory
from bypass.broker.news import News
from bypass.broker.protocol import ABI, Message
from bypass.broker.state import Refused, State, code_of, words_of
from bypass.errors import BypassError, QueueBusyError
from bypass.profiles import StackOptions

log = logging.getLogger("bypass.broker")

BUSY_NS = 2_000_000_000
"""How long a hello waits for AF_XDP sockets that the kernel is still closing."""
BUSY_STEP_NS = 25_000_000


@dataclass(slots=True)
class _Hello:
    """A new application whose device cannot be opened yet."""

    process: Process
    message: Message
    until_ns: int
    next_ns: int


class Arrivals:
    """Of all applications."""

    def __init__(self, state: State, news: News, departures: Departures) -> None:
        self._state = state
        self._news = news
        self._departures = departures
        self._hellos: list[_Hello] = []
        self._last_app = 0

    def hello(self, process: Process, m: Message, fds: list[int]) -> None:
        """APP_HELLO. Answers by itself, maybe later."""
        if process.app is not None or any(h.process is process for h in self._hellos):
            raise Refused(errno.EISCONN, "hello was said already")
        if m.abi != ABI:
            raise Refused(
                errno.EPROTO, f"the broker speaks version {ABI}, the program {m.abi}: install one for both"
            )
        if m.app:
            self._relative(process, m)
        else:
            self._new(process, m)

    def go_on(self, apps: list[App]) -> None:
        """With those of a killed broker, whose processes are yet to say hello."""
        for app in apps:
            self._state.apps[app.number] = app
            self._last_app = max(self._last_app, app.number)
            app.tune(self._state.site.options)
            self._state.site.limit(app.number, self._state.site.quota(app.user))
            log.warning("%s is taken over, with %d leases", app.who(), len(app.leases))
            self._departures.go_on(app)

    def gone(self, process: Process) -> None:
        """It waits no more."""
        self._hellos = [h for h in self._hellos if h.process is not process]

    def _relative(self, process: Process, m: Message) -> None:
        app = self._state.apps.get(m.app)
        if app is None or not hmac.compare_digest(app.token, m.token):
            raise Refused(errno.EACCES, "no such application, or the token is another's")
        self._join(process, app, m)

    def _join(self, process: Process, app: App, m: Message) -> None:
        self._departures.joined(app, process)
        answer = m.answer(app=app.number, token=app.token, abi=ABI)
        self._news.answer(process, answer, (app.memory.fd, *app.fds))
        self._news.begin(process)

    # ---- new applications
    def _new(self, process: Process, m: Message) -> None:
        self._admit(process)
        now = self._state.clock()
        hello = _Hello(process, m, now + BUSY_NS, now)
        if not self._try_new(hello, last=False):
            self._hellos.append(hello)

    def _admit(self, process: Process) -> None:
        """Refused: it can have none."""
        site, apps = self._state.site, self._state.apps.values()
        if self._state.draining:
            raise Refused(errno.ESHUTDOWN, "the broker is about to end")
        if not any(site.grants(process.user).steered()):
            raise Refused(errno.EACCES, f"the policy allows user {process.user.uid} nothing")
        if site.busy() or self._hellos:
            owner = next(iter(apps), None)
            who = owner.who() if owner is not None else "another application"
            raise Refused(errno.EBUSY, f"{site.ifname} is taken by {who}")
        most = site.quota(process.user).apps
        if most is not None and sum(a.user.uid == process.user.uid for a in apps) >= most:
            raise Refused(
                errno.EDQUOT, f"user {process.user.uid} has {most} applications, which is all it may have"
            )

    def _try_new(self, hello: _Hello, *, last: bool) -> bool:
        """Makes an application. Whether the process has its answer; last: it has it in any case."""
        process, m = hello.process, hello.message
        try:
            app = self._make(process, m)
        except QueueBusyError as e:
            if not last:
                return False
            self._news.answer(process, m.answer(errno.EBUSY, str(e)))
        except (BypassError, OSError, ValueError) as e:
            self._news.answer(process, m.answer(code_of(e), words_of(e)))
        else:
            self._place(process)
            self._join(process, app, m)
        return True

    def _make(self, process: Process, m: Message) -> App:
        site, number = self._state.site, self._last_app + 1
        quota = site.quota(process.user)
        config = self._config(quota)
        memory = AppMemory(f"bypass-app-{number}", site.device, config, quota.memory, site.numa)
        try:
            fds = site.open(memory, number, quota)
            app = App(number, secrets.token_bytes(lib.APP_TOKEN), process.user, m.name, memory, 0, fds)
            app.limit = int(config.max_socks) + int(config.max_conns)
            self._fill_header(app)
            site.keep(app)
        except BaseException:
            memory.close()
            raise
        self._last_app = number
        self._state.apps[number] = app
        log.info("%s begins, user %d", app.who(), app.user.uid)
        return app

    def _config(self, quota: Quota) -> Any:
        options = self._state.site.options
        if quota.conns is not None:
            conns = min(quota.conns, options.conns or quota.conns)
            options = StackOptions(conns=conns).over(options)
        return options.config(None).fill(self._state.site.flags)

    def _place(self, process: Process) -> None:
        """Has a process, which has only begun, run on the policy's CPUs; what it starts inherits that."""
        cpus = self._state.site.cpus
        if cpus is not None and process.pid > 0:
            try:
                os.sched_setaffinity(process.pid, cpus)
            except OSError as e:
                log.warning("process %d: CPUs %s: %s", process.pid, list(cpus), e.strerror)

    def _fill_header(self, app: App) -> None:
        h, site = app.memory.header, self._state.site
        h.app = app.number
        h.token = app.token
        h.name = app.name.encode()[: lib.APP_NAME - 1].decode(errors="ignore").encode()
        h.congestion = (site.congestion or "").encode()
        app.memory.publish()
        app.tune(site.options)

    # ---- time
    def due_ns(self) -> list[int]:
        return [h.next_ns for h in self._hellos]

    def tick(self, now_ns: int) -> None:
        for hello in [h for h in self._hellos if h.next_ns <= now_ns]:
            hello.next_ns = now_ns + BUSY_STEP_NS
            if self._try_new(hello, last=now_ns >= hello.until_ns):
                self._hellos.remove(hello)

# SPDX-License-Identifier: Apache-2.0
"""The broker: which message is whose, what the site tells, and the operator's wishes. Its parts, in a program's order:

    arrivals.py     an application begins, a relative joins
    leasing.py      it gets addresses and ports, and gives them back
    news.py         it is told what changes
    departures.py   it ends

What does not live here: sockets and the loop (server.py), the interface (site.py), words of the protocol (protocol.py).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from bypass.broker.apps import App, Process
from bypass.broker.arrivals import Arrivals
from bypass.broker.departures import Departures
from bypass.broker.leasing import Leasing
from bypass.broker.news import News
from bypass.broker.protocol import Kind, Message
from bypass.broker.site import Site
from bypass.broker.state import Loop, Refused, State, code_of, words_of
from bypass.errors import BypassError
from bypass.netlink import Interface
from bypass.policy import Policy

log = logging.getLogger("bypass.broker")

Handler = Callable[[Process, Message, list[int]], Message | None]


class Broker:
    """The applications of one site.

    Args:
        site: where their packets come from; the broker closes it.
        loop: who sends, and watches descriptors.
        name: of the broker's socket, for those whom it starts.
        clock: nanoseconds, as time.monotonic_ns.

    Attributes:
        failure: why it had to end by itself; empty: it had not.
    """

    def __init__(self, site: Site, loop: Loop, name: str, clock: Callable[[], int]) -> None:
        self.failure = ""
        self._state = State(site, loop, name, clock)
        self._news = News(self._state)
        self._leasing = Leasing(self._state, self._news)
        self._departures = Departures(self._state, self._leasing)
        self._arrivals = Arrivals(self._state, self._news, self._departures)
        self._handlers: dict[int, Handler] = {
            Kind.HELLO: self._arrivals.hello,
            Kind.LEASE: self._leasing.lease,
            Kind.RELEASE: self._leasing.release,
            Kind.RESOLVE: self._news.resolve,
            Kind.EXEC: self._departures.exec,
            Kind.FORK: self._departures.fork,
            Kind.LINGER: self._departures.linger,
        }
        site.told = self
        self._arrivals.go_on(site.left)

    @property
    def site(self) -> Site:
        return self._state.site

    @property
    def apps(self) -> dict[int, App]:
        """By number."""
        return self._state.apps

    @property
    def draining(self) -> bool:
        """Nothing new begins any more."""
        return self._state.draining

    # ---- processes
    def message(self, process: Process, m: Message, fds: list[int]) -> None:
        """Acts on one message. Descriptors that it takes are removed from `fds`; the rest is the caller's to close."""
        act = self._handlers.get(m.type)
        try:
            if act is None:
                raise Refused(errno.EPROTO, f"a message of type {m.type} is not for the broker")
            if process.app is None and m.type != Kind.HELLO:
                raise Refused(errno.EPROTO, "hello comes first")
            answer = act(process, m, fds)
        except Refused as e:
            answer = m.answer(e.code, e.text)
        except (BypassError, OSError) as e:
            answer = m.answer(code_of(e), words_of(e))
        if answer is not None:
            self._news.answer(process, answer)

    def gone(self, process: Process, *, dead: bool) -> None:
        """A connection has ended; dead: and its process with it. The caller closes it afterwards."""
        self._arrivals.gone(process)
        self._departures.gone(process, dead=dead)

    def caught_up(self, process: Process) -> None:
        """A process that had to be left out reads again: it is told everything."""
        self._news.caught_up(process)

    # ---- what the site tells (bypass.broker.site.Told)
    def address_added(self, address: str, prefix_len: int) -> None:
        self._news.address_added(address, prefix_len)

    def address_gone(self, address: str) -> None:
        self._news.address_gone(address)

    def next_hop(self, address: str, mac: bytes | None, mtu: int) -> None:
        self._news.next_hop(address, mac, mtu)

    def next_hop_forgotten(self, address: str | None) -> None:
        self._news.next_hop_forgotten(address)

    def link(self, state: int, interface: Interface) -> None:
        self._news.link(state, interface)

    def queue(self, owner: int, number: int, of: int, fd: int) -> None:
        self._news.queue(self.apps[owner], number, of, fd)
        self.site.keep(self.apps[owner])

    def cut(self, owner: int, why: str) -> None:
        app = self.apps.get(owner)
        if app is not None:
            log.error("%s %s: it ends", app.who(), why)
            self._departures.end(app, dead=False)

    def lost(self, why: str) -> None:
        self.failure = f"{self.site.ifname}: {why}; {self.site.without_fwd}"
        log.error("%s", self.failure)
        self._state.loop.stop()

    # ---- the operator's wishes
    def drain(self, *, at_once: bool) -> None:
        """From now on nothing new begins; applications are told, and give back what they do not use."""
        self._state.draining = True
        self._news.everybody(Message(Kind.DRAIN, flags=int(at_once)))

    def swap(self, policy: Policy) -> int:
        """Puts another policy in force. What it grants no more is the kernel's, and its application is told; what
        running applications can still take up, they do.

        Returns:
            How many leases were lost.

        Raises:
            BypassError: it cannot be put in force; the old one is.
        """
        self.site.swap(policy)
        lost = 0
        for app in self.apps.values():
            app.tune(self.site.options)
            self.site.limit(app.number, self.site.quota(app.user))
            lost += self._leasing.revoke_ungranted(app)
            self._news.grants_changed(app)
        return lost

    # ---- time
    def due_ns(self) -> int | None:
        """When tick() has something to do."""
        times = self._arrivals.due_ns() + self._departures.due_ns()
        site = self.site.due_ns()
        return min(times if site is None else [*times, site], default=None)

    def tick(self) -> None:
        """Does what is due."""
        now = self._state.clock()
        self._arrivals.tick(now)
        self._departures.tick(now)
        due = self.site.due_ns()
        if due is not None and due <= now:
            self.site.update(now)

    def close(self) -> None:
        """Ends every application and gives the interface back."""
        for app in list(self.apps.values()):
            self._departures.end(app, dead=False)
        self.site.close()

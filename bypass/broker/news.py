# SPDX-License-Identifier: Apache-2.0
"""What processes are told without having asked: addresses, grants, next hops, the link, and all of it anew.

What lives here: who hears of what, as messages. What does not: where it is known from (site.py), sending (server.py).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from bypass._core import lib
from bypass.broker.apps import App, Process
from bypass.broker.protocol import Kind, Message
from bypass.broker.state import Refused, State, app_of, plain
from bypass.grants import ANY, Grants
from bypass.netlink import Interface
from bypass.rules import PortRange, Rule
from bypass.stack_api import DGRAM, STREAM

MAX_GRANTS = 256
"""Grants that are listed one by one; if there are more, the last one says `anything`, and leases decide."""
MAX_ASKED = 16384
MAPPED_BITS = 96
NEXTHOP_UNREACHABLE, NEXTHOP_FORGET = 1, 2
GRANTS_END, GRANTS_EMPTY = 1, 2


class News:
    """Tells the processes of all applications."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._heard: list[Message] = []  # next hops that the site tells while somebody asks for one

    def answer(self, process: Process, message: Message, fds: tuple[int, ...] = ()) -> None:
        """To who has asked."""
        process.answer(message, fds)
        self._state.loop.changed(process)

    def tell(self, processes: Iterator[Process], message: Message) -> None:
        for process in processes:
            process.tell(message)
            self._state.loop.changed(process)

    def everybody(self, message: Message) -> None:
        self.tell((p for app in self._state.apps.values() for p in app.processes), message)

    # ---- all there is to know
    def begin(self, process: Process) -> None:
        """It has just joined."""
        app = app_of(process)
        if app.restored:  # what it was not told meanwhile; what it has given back meanwhile
            app.restored = False
            process.tell(Message(Kind.NEXTHOP, flags=NEXTHOP_FORGET))
            for number in app.leases:
                process.answer(Message(Kind.LEASED, app=app.number, lease=number))
        self._all(process)
        process.tell(Message(Kind.READY))
        self._state.loop.changed(process)

    def caught_up(self, process: Process) -> None:
        """A process that had to be left out reads again: it is told everything."""
        process.lagging = False
        if process.app is not None:
            process.tell(Message(Kind.NEXTHOP, flags=NEXTHOP_FORGET))
            self._all(process)
            if self._state.site.device == lib.APP_DEV_AFXDP:
                fds = process.app.fds
                for number, fd in enumerate(fds):
                    process.tell(_queue(number, len(fds)), (fd,))
            self._state.loop.changed(process)

    def _all(self, process: Process) -> None:
        for address, prefix_len in self._state.site.addresses.items():
            process.tell(_address(Kind.ADDR_ADD, address, prefix_len))
        self._grants(process)

    def grants_changed(self, app: App) -> None:
        for process in app.processes:
            self._grants(process)
            self._state.loop.changed(process)

    def _grants(self, process: Process) -> None:
        messages = list(_grants(self._state.site.grants(app_of(process).user)))
        if not messages:
            messages = [Message(Kind.GRANT, flags=GRANTS_EMPTY)]
        messages[-1].flags |= GRANTS_END
        for index, message in enumerate(messages):
            message.index = index
            process.tell(message)

    # ---- next hops
    def resolve(self, process: Process, m: Message, fds: list[int]) -> Message:
        """APP_RESOLVE."""
        app = app_of(process)
        host = plain(m.remote[0])
        if host == ANY:
            raise Refused(errno.EINVAL, "that is no destination")
        app.ask(host, MAX_ASKED)
        self._heard.clear()
        self._state.site.resolve(host)
        known = next((told for told in self._heard if told.remote[0] == host), None)
        if known is None:
            return m.answer(errno.EINPROGRESS, remote=(host, 0))
        return m.answer(remote=(host, 0), mac=known.mac, mtu=known.mtu, flags=known.flags)

    def next_hop(self, address: str, mac: bytes | None, mtu: int) -> None:
        flags = NEXTHOP_UNREACHABLE if mac is None else 0
        message = Message(Kind.NEXTHOP, remote=(address, 0), mac=mac or bytes(6), mtu=mtu, flags=flags)
        self._heard[:] = [message]
        apps = self._state.apps.values()
        self.tell((p for app in apps if address in app.asked for p in app.processes), message)

    def next_hop_forgotten(self, address: str | None) -> None:
        for app in self._state.apps.values():
            if address is None or app.asked.pop(address, 0) is None:
                message = Message(Kind.NEXTHOP, remote=(address or "::", 0), flags=NEXTHOP_FORGET)
                self.tell(iter(app.processes), message)

    # ---- the interface
    def address_added(self, address: str, prefix_len: int) -> None:
        self.everybody(_address(Kind.ADDR_ADD, address, prefix_len))

    def address_gone(self, address: str) -> None:
        self.everybody(_address(Kind.ADDR_DEL, address, 0))

    def link(self, state: int, interface: Interface) -> None:
        mac = interface.mac[:6].ljust(6, b"\0")
        self.everybody(Message(Kind.LINK, flags=state, mtu=interface.mtu & 0xFFFF, mac=mac))

    def queue(self, app: App, number: int, of: int, fd: int) -> None:
        """It has one more, of so many that there are going to be; the socket is the application's from now on."""
        app.fds.append(fd)
        for process in app.processes:
            process.tell(_queue(number, of), (fd,))
            self._state.loop.changed(process)


def _queue(number: int, of: int) -> Message:
    return Message(Kind.QUEUE, index=number, flags=of)


def _address(kind: Kind, address: str, prefix_len: int) -> Message:
    return Message(kind, local=(address, 0), prefix_len=prefix_len)


def _grants(grants: Grants) -> Iterator[Message]:
    """A list of grants as messages, at most MAX_GRANTS of them."""
    everything = _grant(Rule(0, "", None, None, None, None, None, None, "steer"), None)
    for count, (rule, ports) in enumerate(grants.steered()):
        if count == MAX_GRANTS - 1:
            yield everything
            return
        yield _grant(rule, ports)


def _grant(rule: Rule, ports: PortRange | None) -> Message:
    kinds = {6: STREAM, 17: DGRAM}
    message = Message(Kind.GRANT, kind=kinds.get(rule.proto or 0, 0), text=rule.name)
    for end, net in (("local", rule.local), ("remote", rule.remote)):
        host, bits = (str(net.network_address), net.prefixlen) if net is not None else ("0.0.0.0", 0)
        first, last = 0, 65535
        chosen = ports if end == "local" else rule.remote_port
        if chosen is not None:
            first, last = chosen.first, chosen.last
        setattr(message, end, (host, first))
        if end == "local":
            message.prefix_len, message.last_port = MAPPED_BITS + bits, last
        else:
            message.remote_prefix_len, message.last_remote_port = MAPPED_BITS + bits, last
    return message

# SPDX-License-Identifier: Apache-2.0
"""The broker's decisions: what each message means, and what happens when a process ends.

What lives here: the state of all applications and the answers to their messages. What does not: sockets and the loop
(server.py), the interface (site.py), words of the protocol (protocol.py).

An application ends with its last process, at once: its listeners in the kernel stop, lest that accept connections for
nobody; its live entries go, so that the kernel has its packets and answers with resets; then its AF_XDP sockets, its
memory, and the duplicates that held its ports.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from bypass._core import lib
from bypass.access import Quota
from bypass.broker.apps import App, Lease, Process
from bypass.broker.blocks import Blocks, still_granted
from bypass.broker.memory import AppMemory
from bypass.broker.protocol import ABI, Kind, Message
from bypass.broker.reaper import start_reaper
from bypass.broker.shadow import Shadow
from bypass.broker.site import BATCH, Site
from bypass.errors import BypassError, QueueBusyError
from bypass.grants import ANY, Grants
from bypass.netlink import Interface
from bypass.policy import Policy
from bypass.profiles import StackOptions
from bypass.rules import PortRange, Rule
from bypass.stack_api import DGRAM, STREAM

log = logging.getLogger("bypass.broker")

EXEC_NS = 5_000_000_000
BUSY_NS = 2_000_000_000
"""How long a hello waits for AF_XDP sockets that the kernel is still closing."""
BUSY_STEP_NS = 25_000_000
MAX_GRANTS = 256
"""Grants that are listed one by one; if there are more, the last one says `anything`, and leases decide."""
MAX_ASKED = 16384
MAX_CHILDREN = 4096
MAPPED_BITS = 96
LEASE_BLOCK, LEASE_ANOTHER = 1, 2
NEXTHOP_UNREACHABLE, NEXTHOP_FORGET = 1, 2
GRANTS_END, GRANTS_EMPTY = 1, 2


class Refused(Exception):
    """The answer to a request is this error."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(code, text)
        self.code, self.text = code, text


class Loop(Protocol):
    """What the broker needs of the one who runs it."""

    def changed(self, process: Process) -> None:
        """It has something to send."""

    def drop(self, process: Process) -> None:
        """Its connection has to go."""

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """call() whenever fd is readable."""

    def unwatch(self, fd: int) -> None: ...

    def stop(self) -> None:
        """Everything ends."""


@dataclass(slots=True)
class _Hello:
    """A new application whose device cannot be opened yet."""

    process: Process
    message: Message
    until_ns: int
    next_ns: int


class Broker:
    """The applications of one site.

    Args:
        site: where their packets come from; the broker closes it.
        loop: who sends, and watches descriptors.
        name: of the broker's socket, for those whom it starts.
        clock: nanoseconds, as time.monotonic_ns.
    """

    def __init__(self, site: Site, loop: Loop, name: str, clock: Callable[[], int]) -> None:
        self.site = site
        self.name = name
        self.apps: dict[int, App] = {}
        self.draining = False
        self._loop = loop
        self._clock = clock
        self._last_app = 0
        self._hellos: list[_Hello] = []
        self._heard: list[Message] = []  # next hops that the site tells while somebody asks for one
        self._blocks = Blocks() if site.blocks else None
        site.told = self

    # ---- messages -------------------------------------------------------------------------------------------
    def message(self, process: Process, m: Message, fds: list[int]) -> None:
        """Acts on one message. Descriptors that it takes are removed from `fds`; the rest is the caller's to close."""
        act = HANDLERS.get(m.type)
        try:
            if act is None:
                raise Refused(errno.EPROTO, f"a message of type {m.type} is not for the broker")
            if process.app is None and m.type != Kind.HELLO:
                raise Refused(errno.EPROTO, "hello comes first")
            answer = act(self, process, m, fds)
        except Refused as e:
            answer = m.answer(e.code, e.text)
        except (BypassError, OSError) as e:
            answer = m.answer(_code(e), _words(e))
        if answer is not None:
            self._answer(process, answer)

    def _answer(self, process: Process, message: Message, fds: tuple[int, ...] = ()) -> None:
        process.answer(message, fds)
        self._loop.changed(process)

    # ---- hello
    def _hello(self, process: Process, m: Message, fds: list[int]) -> Message | None:
        if process.app is not None or any(h.process is process for h in self._hellos):
            raise Refused(errno.EISCONN, "hello was said already")
        if m.abi != ABI:
            raise Refused(
                errno.EPROTO, f"the broker speaks version {ABI}, the program {m.abi}: install one for both"
            )
        if m.app:
            self._hello_relative(process, m)
            return None
        if self.draining:
            raise Refused(errno.ESHUTDOWN, "the broker is about to end")
        if not any(self.site.grants(process.user).steered()):
            raise Refused(errno.EACCES, f"the policy allows user {process.user.uid} nothing")
        if self.site.busy() or self._hellos:
            owner = next(iter(self.apps.values()), None)
            who = owner.who() if owner is not None else "another application"
            raise Refused(errno.EBUSY, f"{self.site.ifname} is taken by {who}")
        most = self.site.quota(process.user).apps
        if most is not None and sum(a.user.uid == process.user.uid for a in self.apps.values()) >= most:
            raise Refused(
                errno.EDQUOT, f"user {process.user.uid} has {most} applications, which is all it may have"
            )
        now = self._clock()
        hello = _Hello(process, m, now + BUSY_NS, now)
        if not self._try_new(hello, last=False):
            self._hellos.append(hello)
        return None

    def _hello_relative(self, process: Process, m: Message) -> None:
        app = self.apps.get(m.app)
        if app is None or not hmac.compare_digest(app.token, m.token):
            raise Refused(errno.EACCES, "no such application, or the token is another's")
        self._join(process, app, m)

    def _try_new(self, hello: _Hello, *, last: bool) -> bool:
        """Makes an application. Whether the process has its answer; last: it has it in any case."""
        process, m = hello.process, hello.message
        try:
            app = self._new_app(process, m)
        except QueueBusyError as e:
            if not last:
                return False
            self._answer(process, m.answer(errno.EBUSY, str(e)))
        except (BypassError, OSError, ValueError) as e:
            self._answer(process, m.answer(_code(e), _words(e)))
        else:
            self._place(process)
            self._join(process, app, m)
        return True

    def _new_app(self, process: Process, m: Message) -> App:
        number = self._last_app + 1
        quota = self.site.quota(process.user)
        config = self._config(quota)
        memory = AppMemory(f"bypass-app-{number}", self.site.device, config, quota.memory, self.site.numa)
        try:
            fds = self.site.open(memory, number, quota)
            app = App(number, secrets.token_bytes(lib.APP_TOKEN), process.user, m.name, memory, 0, fds)
            app.limit = int(config.max_socks) + int(config.max_conns)
            self._fill_header(app)
        except BaseException:
            memory.close()
            raise
        self._last_app = number
        self.apps[number] = app
        log.info("%s begins, user %d", app.who(), app.user.uid)
        return app

    def _config(self, quota: Quota) -> Any:
        options = self.site.options
        if quota.conns is not None:
            conns = min(quota.conns, options.conns or quota.conns)
            options = StackOptions(conns=conns).over(options)
        return options.config(None).fill(self.site.flags)

    def _place(self, process: Process) -> None:
        """Has a process, which has only begun, run on the policy's CPUs; what it starts inherits that."""
        if self.site.cpus is not None and process.pid > 0:
            try:
                os.sched_setaffinity(process.pid, self.site.cpus)
            except OSError as e:
                log.warning("process %d: CPUs %s: %s", process.pid, list(self.site.cpus), e.strerror)

    def _fill_header(self, app: App) -> None:
        h, options = app.memory.header, self.site.options
        h.app = app.number
        h.token = app.token
        h.name = app.name.encode()[: lib.APP_NAME - 1].decode(errors="ignore").encode()
        h.spin_us = options.spin_us or 0
        h.batch = options.batch or BATCH
        h.congestion = (self.site.congestion or "").encode()
        app.memory.publish()

    def _join(self, process: Process, app: App, m: Message) -> None:
        process.app = app
        app.processes.append(process)
        if process.pidfd >= 0:
            self.site.joined(app.number, process.pidfd)
        self._not_waiting(app)
        self._forget_child(app, process.pid)
        answer = m.answer(app=app.number, token=app.token, abi=ABI)
        self._answer(process, answer, (app.memory.fd, *app.fds))
        self._tell_all(process)
        process.tell(Message(Kind.READY))
        self._loop.changed(process)

    def _tell_all(self, process: Process) -> None:
        """What there is to know, from the beginning."""
        assert process.app is not None
        for address, prefix_len in self.site.addresses.items():
            process.tell(_address(Kind.ADDR_ADD, address, prefix_len))
        self._tell_grants(process)

    def _tell_grants(self, process: Process) -> None:
        assert process.app is not None
        messages = list(_grants(self.site.grants(process.app.user)))
        if not messages:
            messages = [Message(Kind.GRANT, flags=GRANTS_EMPTY)]
        messages[-1].flags |= GRANTS_END
        for index, message in enumerate(messages):
            message.index = index
            process.tell(message)

    # ---- leases
    def _lease(self, process: Process, m: Message, fds: list[int]) -> Message:
        app = _app_of(process)
        if self.draining:
            raise Refused(errno.ESHUTDOWN, "the broker is about to end")
        if len(fds) != 1:
            raise Refused(errno.EBADF, f"a lease comes with one descriptor, not {len(fds)}")
        if m.kind not in (STREAM, DGRAM):
            raise Refused(errno.EPROTONOSUPPORT, f"kind {m.kind} is neither stream nor datagram")
        if len(app.leases) >= app.limit:
            raise Refused(errno.EDQUOT, f"the application has {app.limit} leases, which is all it may have")
        if m.flags & LEASE_BLOCK and self._blocks is not None:
            block = self._block(app, m, self._blocks)
            if block is not None:
                return m.answer(
                    lease=block.number, local=block.local, last_port=block.last_port, flags=LEASE_BLOCK
                )
        shadow = Shadow(fds[0], m.kind)
        fds.clear()  # it is the shadow's now
        try:
            lease = self._take(app, m, shadow)
        except BaseException:
            shadow.close()
            raise
        app.leases[lease.number] = lease
        return m.answer(lease=lease.number, local=lease.local)

    def _take(self, app: App, m: Message, shadow: Shadow) -> Lease:
        grants = self.site.grants(app.user)
        remote = (_plain(m.remote[0]), m.remote[1]) if m.remote[1] else None
        local = (_plain(m.local[0]), m.local[1])
        if remote is not None and remote[0] == ANY:
            raise Refused(errno.EINVAL, "the peer has no address")
        if local[1]:
            grants.check(m.kind, local, remote)
            shadow.require(local)
        elif remote is None or shadow.bound() is not None:
            raise Refused(
                errno.EINVAL, "a lease without a local port is for a socket that connects and is not bound"
            )
        else:
            host = local[0] if local[0] != ANY else self.site.source_for(remote[0])
            local = grants.choose_port(m.kind, host, remote, shadow.bind)
        if remote is not None and local[0] == ANY:
            local = (self.site.source_for(remote[0]), local[1])
            grants.check(m.kind, local, remote)
        key = (m.kind, local, remote)
        if remote is not None and any(lease.key == (m.kind, local, None) for lease in app.leases.values()):
            key = (m.kind, local, None)  # every peer's packets come already
        self.site.use(key, app.number)
        app.last_lease += 1
        return Lease(app.last_lease, m.kind, local, remote, key, shadow)

    def _block(self, app: App, m: Message, blocks: Blocks) -> Lease | None:
        """None: an ordinary lease will do."""
        local, remote = (_plain(m.local[0]), m.local[1]), (_plain(m.remote[0]), m.remote[1])
        if local[1] or not remote[1] or remote[0] == ANY:
            return None
        return blocks.lease(app, m.kind, local[0], remote, self.site, another=bool(m.flags & LEASE_ANOTHER))

    def _give_back(self, lease: Lease) -> None:
        """Its port is free, or its ports are."""
        if lease.shadow is not None:
            lease.shadow.close()
        elif self._blocks is not None:
            self._blocks.give(lease.local[1])

    def _release(self, process: Process, m: Message, fds: list[int]) -> Message:
        app = _app_of(process)
        lease = app.leases.pop(m.lease, None)
        if lease is None:
            raise Refused(errno.ENOENT, f"the application has no lease {m.lease}")
        self.site.unuse(lease.key)
        self._give_back(lease)
        return m.answer(lease=m.lease)

    # ---- next hops
    def _resolve(self, process: Process, m: Message, fds: list[int]) -> Message:
        app = _app_of(process)
        host = _plain(m.remote[0])
        if host == ANY:
            raise Refused(errno.EINVAL, "that is no destination")
        app.ask(host, MAX_ASKED)
        self._heard.clear()
        self.site.resolve(host)
        known = next((told for told in self._heard if told.remote[0] == host), None)
        if known is None:
            return m.answer(errno.EINPROGRESS, remote=(host, 0))
        return m.answer(remote=(host, 0), mac=known.mac, mtu=known.mtu, flags=known.flags)

    # ---- ends that are announced
    def _exec(self, process: Process, m: Message, fds: list[int]) -> Message:
        process.exec = True
        return m.answer()

    def _fork(self, process: Process, m: Message, fds: list[int]) -> None:
        """No answer, and nothing where it cannot be: a child that has ended by now, or is somebody else's."""
        app, pid = _app_of(process), m.index
        if len(app.children) >= MAX_CHILDREN or any(p.pid == pid for p in app.processes):
            return
        with suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid in (app.user.uid, process.user.uid):
                self._watch_child(app, pid)

    def _watch_child(self, app: App, pid: int) -> None:
        """The application lasts as long as this process, too. OSError: it has ended."""
        if pid not in app.children:
            app.children[pid] = os.pidfd_open(pid)
            self.site.joined(app.number, app.children[pid])
            self._loop.watch(app.children[pid], lambda: self._child_ended(app, pid))

    def _forget_child(self, app: App, pid: int) -> None:
        pidfd = app.children.pop(pid, -1)
        if pidfd >= 0:
            self._loop.unwatch(pidfd)
            os.close(pidfd)

    def _child_ended(self, app: App, pid: int) -> None:
        self._forget_child(app, pid)
        if not app.processes and not app.children and not app.ends_ns:
            self.end(app)

    def _linger(self, process: Process, m: Message, fds: list[int]) -> Message:
        app = _app_of(process)
        if app.lingering:
            raise Refused(errno.EALREADY, "a reaper is at work")
        self._watch_child(app, start_reaper(app, self.name))
        app.lingering = True
        log.info("%s: a reaper drives its stack until its connections have ended", app.who())
        return m.answer()

    def gone(self, process: Process, *, dead: bool) -> None:
        """A connection has ended; dead: and its process with it. The caller closes it afterwards."""
        self._hellos = [h for h in self._hellos if h.process is not process]
        app, process.app = process.app, None
        if app is None:
            return
        app.processes.remove(process)
        if app.lingering:
            for lease in app.leases.values():
                if lease.shadow is not None:
                    lease.shadow.stop()  # nobody is left who accepts
        if app.processes or app.children:
            return
        if process.exec and not dead:
            self._await_exec(app, process.pidfd)
        else:
            self.end(app)

    def _await_exec(self, app: App, pidfd: int) -> None:
        """Until another process says hello, the one that becomes another program ends, or time is up."""
        app.ends_ns = self._clock() + EXEC_NS
        if pidfd >= 0:
            app.pidfd = os.dup(pidfd)
            self._loop.watch(app.pidfd, lambda: self.end(app))

    def end(self, app: App, *, dead: bool = True) -> None:
        """Takes everything from an application; dead: its processes have ended. Else they go on, on the kernel."""
        del self.apps[app.number]
        if dead:
            for lease in app.leases.values():
                if lease.shadow is not None:
                    lease.shadow.stop()
        for lease in app.leases.values():
            self.site.unuse(lease.key)
        self.site.close_device(app.number)
        for fd in app.fds:
            os.close(fd)
        for lease in app.leases.values():
            self._give_back(lease)
        app.leases.clear()
        app.memory.close()
        self._not_waiting(app)
        for pid in list(app.children):
            self._forget_child(app, pid)
        log.info("%s has ended", app.who())
        for process in list(app.processes):
            process.app = None
            self._loop.drop(process)
        app.processes.clear()

    def _not_waiting(self, app: App) -> None:
        app.ends_ns = 0
        if app.pidfd >= 0:
            self._loop.unwatch(app.pidfd)
            os.close(app.pidfd)
            app.pidfd = -1

    # ---- what the site tells (bypass.broker.site.Told)
    def _everybody(self) -> Iterator[Process]:
        for app in self.apps.values():
            yield from app.processes

    def _tell(self, processes: Iterator[Process], message: Message) -> None:
        for process in processes:
            process.tell(message)
            self._loop.changed(process)

    def address_added(self, address: str, prefix_len: int) -> None:
        self._tell(self._everybody(), _address(Kind.ADDR_ADD, address, prefix_len))

    def address_gone(self, address: str) -> None:
        self._tell(self._everybody(), _address(Kind.ADDR_DEL, address, 0))

    def next_hop(self, address: str, mac: bytes | None, mtu: int) -> None:
        flags = NEXTHOP_UNREACHABLE if mac is None else 0
        message = Message(Kind.NEXTHOP, remote=(address, 0), mac=mac or bytes(6), mtu=mtu, flags=flags)
        self._heard[:] = [message]
        users = (p for app in self.apps.values() if address in app.asked for p in app.processes)
        self._tell(users, message)

    def next_hop_forgotten(self, address: str | None) -> None:
        for app in self.apps.values():
            if address is None or app.asked.pop(address, 0) is None:
                message = Message(Kind.NEXTHOP, remote=(address or "::", 0), flags=NEXTHOP_FORGET)
                self._tell(iter(app.processes), message)

    def link(self, state: int, interface: Interface) -> None:
        message = Message(
            Kind.LINK, flags=state, mtu=interface.mtu & 0xFFFF, mac=interface.mac[:6].ljust(6, b"\0")
        )
        self._tell(self._everybody(), message)

    def cut(self, owner: int, why: str) -> None:
        app = self.apps.get(owner)
        if app is not None:
            log.error("%s %s: it ends", app.who(), why)
            self.end(app, dead=False)

    def lost(self, why: str) -> None:
        log.error("%s: %s; the kernel has all of its flows", self.site.ifname, why)
        self._loop.stop()

    def caught_up(self, process: Process) -> None:
        """A process that had to be left out reads again: it is told everything."""
        process.lagging = False
        if process.app is not None:
            process.tell(Message(Kind.NEXTHOP, flags=NEXTHOP_FORGET))
            self._tell_all(process)
            self._loop.changed(process)

    # ---- the operator's wishes
    def drain(self, *, at_once: bool) -> None:
        """From now on nothing new begins; applications are told, and give back what they do not use."""
        self.draining = True
        self._tell(self._everybody(), Message(Kind.DRAIN, flags=int(at_once)))

    def swap(self, policy: Policy) -> int:
        """Puts another policy in force. What it grants no more is the kernel's, and its application is told.

        Returns:
            How many leases were lost.

        Raises:
            BypassError: it cannot be put in force; the old one is.
        """
        self.site.swap(policy)
        lost = 0
        for app in self.apps.values():
            grants = self.site.grants(app.user)
            for lease in list(app.leases.values()):
                if not still_granted(grants, lease):
                    self._revoke(app, lease)
                    lost += 1
            for process in app.processes:
                self._tell_grants(process)
                self._loop.changed(process)
        return lost

    def _revoke(self, app: App, lease: Lease) -> None:
        del app.leases[lease.number]
        self.site.unuse(lease.key)
        self._give_back(lease)
        self._tell(iter(app.processes), Message(Kind.REVOKED, lease=lease.number, app=app.number))

    # ---- time
    def due_ns(self) -> int | None:
        """When tick() has something to do."""
        times = [h.next_ns for h in self._hellos] + [a.ends_ns for a in self.apps.values() if a.ends_ns]
        site = self.site.due_ns()
        return min(times if site is None else [*times, site], default=None)

    def tick(self) -> None:
        """Does what is due."""
        now = self._clock()
        for hello in [h for h in self._hellos if h.next_ns <= now]:
            hello.next_ns = now + BUSY_STEP_NS
            if self._try_new(hello, last=now >= hello.until_ns):
                self._hellos.remove(hello)
        for app in [a for a in self.apps.values() if a.ends_ns and a.ends_ns <= now]:
            self.end(app)
        due = self.site.due_ns()
        if due is not None and due <= now:
            self.site.update(now)

    def close(self) -> None:
        """Ends every application and gives the interface back."""
        for app in list(self.apps.values()):
            self.end(app, dead=False)
        self.site.close()


HANDLERS: dict[int, Callable[[Broker, Process, Message, list[int]], Message | None]] = {
    Kind.HELLO: Broker._hello,
    Kind.LEASE: Broker._lease,
    Kind.RELEASE: Broker._release,
    Kind.RESOLVE: Broker._resolve,
    Kind.EXEC: Broker._exec,
    Kind.FORK: Broker._fork,
    Kind.LINGER: Broker._linger,
}


def _code(e: Exception) -> int:
    """An error's errno; EIO: it has none, the text says what it is."""
    return (e.errno if isinstance(e, OSError) else None) or errno.EIO


def _words(e: Exception) -> str:
    return (e.strerror if isinstance(e, OSError) else None) or str(e)


def _app_of(process: Process) -> App:
    assert process.app is not None  # hello comes first
    return process.app


def _plain(host: str) -> str:
    """IPv4 as text; any address as 0.0.0.0. Refused: IPv6."""
    if host == "::":
        return ANY
    if ipaddress.ip_address(host).version == 6:
        raise Refused(errno.EAFNOSUPPORT, f"{host}: only IPv4 is steered, IPv6 is the kernel's")
    return host


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


__all__ = ["Broker", "Refused"]

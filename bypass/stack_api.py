# SPDX-License-Identifier: Apache-2.0
"""Stack: a TCP/IP stack for Python programs, on a network device (from a policy) or on a simulated wire.

What lives here: the stack as one object: its sockets' life, its events, its end. What does not: the clock and the
packets (bypass.driver and its two implementations), grants and steering (bypass.embedded), socket objects
(bypass.sockets), asyncio (bypass.aio).
"""

from __future__ import annotations

import errno
import os
import socket as _socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from bypass._core import lib
from bypass.core import FOREVER, Address, ConnInfo, CoreStack
from bypass.driver import Driver
from bypass.zerocopy import Lendings

if TYPE_CHECKING:
    from pathlib import Path

    from bypass.policy import Policy
    from bypass.sim import Port
    from bypass.sockets import Socket

__all__ = ["Control", "Lease", "Stack"]

STREAM: int = lib.BYPASS_STREAM
DGRAM: int = lib.BYPASS_DGRAM
KINDS: dict[int, int] = {_socket.SOCK_STREAM: STREAM, _socket.SOCK_DGRAM: DGRAM}

ENDED: int = lib.BYPASS_ERR | lib.BYPASS_HUP

# States in which nothing of the program is under way any more.
SETTLED = frozenset({"TIME_WAIT", "CLOSED", "FIN_WAIT_2"})


@dataclass(slots=True)
class Lease:
    """A local address that control has reserved for a socket, and the keys of what it made live for it."""

    kind: int
    local: Address
    live: list[tuple[int, Address, Address | None]] = field(default_factory=list)


class Control(Protocol):
    """What has to be asked outside the stack before a socket may use an address. All with the lock held."""

    def lease(self, kind: int, local: Address, remote: Address | None) -> Lease:
        """Reserves a local address; port 0, and any address where there is a peer, are resolved.

        Raises:
            PermissionError: no rule of the policy grants it.
            OSError: EADDRINUSE: a program has it; ENETUNREACH: there is no way to the peer.
        """

    def activate(self, lease: Lease, remote: Address | None) -> None:
        """From now on packets of this flow come to the stack. PermissionError: no rule grants it."""

    def release(self, lease: Lease) -> None:
        """A socket has let go of it; what is live stays as long as the stack has connections on that port."""


class _Entry:
    """A handle of the stack, and what control knows of it."""

    __slots__ = ("connecting", "handle", "handler", "kind", "lease", "listening", "user")

    def __init__(self, handle: int, kind: int, user: int) -> None:
        self.handle = handle
        self.kind = kind
        self.user = user
        self.listening = False
        self.connecting = False
        self.lease: Lease | None = None
        self.handler: Callable[[int], None] | None = None


class Stack:
    """A stack. Made by `Stack.from_policy` or by `bypass.sim.Network.stack`.

    Attributes:
        core: the C core, for what is not here (next hops, counters in detail). With `driver.lock` held only.
        driver: its clock and its packets.
        port: its port, on a simulated wire.
    """

    def __init__(
        self,
        core: CoreStack,
        driver: Driver,
        *,
        name: str = "stack",
        control: Control | None = None,
        port: Port | None = None,
    ) -> None:
        self.core = core
        self.driver = driver
        self.name = name
        self.port = port
        self._control = control
        self._entries: dict[int, _Entry] = {}  # by user value
        self._by_handle: dict[int, _Entry] = {}
        self._next_user = 1
        self.lent = Lendings(core)  # buffers of zero-copy calls that are out
        self._orphans: deque[int] = deque()  # handles whose objects were forgotten unclosed

    @classmethod
    def from_policy(cls, policy: str | Path | Policy, **options: Any) -> Stack:
        """Takes the flows of a policy off its interface, in this process (needs root).

        Nothing is taken before a socket asks for it: rules grant, listening, binding and connecting make them live.

        Args:
            policy: a file's path, or a Policy.
            options: those of bypass.embedded.open_stack().

        Raises:
            PolicyError, PrivilegeError, DeviceError, SteeringError, ForeignProgramError.
        """
        from bypass.embedded import open_stack

        return open_stack(policy, **options)

    # ---- sockets for programs
    def socket(self, type: int = _socket.SOCK_STREAM) -> Socket:
        """A blocking socket (bypass.sockets.Socket), SOCK_STREAM or SOCK_DGRAM."""
        from bypass.sockets import Socket

        return Socket(self, type)

    def create_server(self, address: Address, *, backlog: int = 128) -> Socket:
        """A listening socket, as socket.create_server()."""
        from bypass.sockets import create_server

        return create_server(self, address, backlog=backlog)

    def create_connection(
        self, address: Address, timeout: float | None = None, source_address: Address | None = None
    ) -> Socket:
        """A connected socket, as socket.create_connection(). timeout in seconds."""
        from bypass.sockets import create_connection

        return create_connection(self, address, timeout, source_address)

    # ---- driving
    def run(self, until: Callable[[], bool] | None = None, timeout: float | None = None) -> bool:
        """Lets the stack work until `until` is true (it is asked after each event), or `timeout` seconds of its
        clock have passed.

        Returns:
            Whether `until` came true; without it: False, after the timeout.
        """
        driver = self.driver
        with driver.lock:
            deadline = FOREVER if timeout is None else driver.now_ns() + round(timeout * 1e9)
            while not (until is not None and until()):
                if not driver.wait(deadline):
                    return until is not None and until()
        return True

    # ---- handles, for socket objects. Lock held in all of them; OSError as the C call
    def open(self, kind: int) -> int:
        """A new handle. kind: STREAM or DGRAM."""
        self._check_open()
        while self._orphans:
            self.close_handle(self._orphans.popleft())
        return self._adopt(self.core.socket(kind), kind)

    def _adopt(self, handle: int, kind: int) -> int:
        user = self._next_user
        self._next_user += 1
        self.core.set_user(handle, user)
        self._entries[user] = self._by_handle[handle] = _Entry(handle, kind, user)
        return handle

    def _check_open(self) -> None:
        if self.core.closed:
            raise OSError(errno.EBADF, "the stack is closed")

    def bind(self, handle: int, address: Address) -> None:
        entry = self._by_handle[handle]
        if self._control is None:
            self.core.bind(handle, address)
            return
        if entry.lease is not None:
            raise OSError(errno.EINVAL, "the socket is bound already")
        self._bind_lease(entry, self._control.lease(entry.kind, address, None))
        if entry.kind == DGRAM:
            self._activate(entry, None)

    def _bind_lease(self, entry: _Entry, lease: Lease) -> None:
        assert self._control is not None
        try:
            self.core.bind(entry.handle, lease.local)
        except OSError:
            self._control.release(lease)
            raise
        entry.lease = lease

    def _activate(self, entry: _Entry, remote: Address | None) -> None:
        if self._control is not None and entry.lease is not None:
            self._control.activate(entry.lease, remote)

    def listen(self, handle: int, backlog: int) -> None:
        entry = self._by_handle[handle]
        if entry.kind == STREAM and self.core.local(handle)[1] == 0:
            self.bind(handle, ("0.0.0.0", 0))
        self.core.listen(handle, backlog)
        self._activate(entry, None)
        entry.listening = True
        self.touched()

    def connect(self, handle: int, address: Address) -> int:
        """0, or -errno: -EINPROGRESS is no failure. Called again it tells how the first one went.

        Raises:
            PermissionError: no rule grants the flow.
        """
        entry = self._by_handle[handle]
        self._may_connect(entry, address)
        result = self.core.connect(handle, address)
        entry.connecting = result in (-errno.EINPROGRESS, -errno.EALREADY, -errno.EISCONN) or (
            entry.connecting and result == 0
        )
        self.touched()
        return result

    def _may_connect(self, entry: _Entry, address: Address) -> None:
        if self._control is not None and not entry.connecting:
            if entry.lease is None:
                self._bind_lease(entry, self._control.lease(entry.kind, ("0.0.0.0", 0), address))
            # Live before the SYN leaves: its answer must find the entry.
            self._activate(entry, address)

    def fastopen(self, handle: int, data: Any, address: Address) -> int:
        """Connects, with data in the SYN (RFC 7413). Its bytes, or -errno: -EINPROGRESS means that none went with it.

        Raises:
            PermissionError: no rule grants the flow.
        """
        entry = self._by_handle[handle]
        self._may_connect(entry, address)
        result = self.core.sendto(handle, data, address, lib.BYPASS_FASTOPEN)
        entry.connecting = entry.connecting or result >= 0 or result == -errno.EINPROGRESS
        self.touched()
        return result

    def accept(self, handle: int) -> int:
        """A handle, or -EAGAIN; other errors raise."""
        got = self.core.accept(handle)
        if got < 0:
            if got == -errno.EAGAIN:
                return got
            raise OSError(-got, os.strerror(-got))
        return self._adopt(got, STREAM)

    def close_handle(self, handle: int, *, abort: bool = False) -> None:
        """Closes in order, or resets. Queued data is still delivered after a close in order."""
        entry = self._by_handle.pop(handle, None)
        if entry is None or self.core.closed:
            return
        del self._entries[entry.user]
        if abort:
            self.core.abort(handle)
        else:
            self.core.close_socket(handle)
        if self._control is not None and entry.lease is not None:
            self._control.release(entry.lease)
        self.touched()

    def sendto(self, handle: int, data: Any, address: Address | None, flags: int = 0) -> int:
        """A datagram. Bytes, or -errno. A socket without address gets one first."""
        entry = self._by_handle[handle]
        if self._control is not None and entry.lease is None and address is not None:
            self._bind_lease(entry, self._control.lease(DGRAM, ("0.0.0.0", 0), address))
            self._activate(entry, None)
        sent = self.core.sendto(handle, data, address, flags)
        self.touched()
        return sent

    def orphan(self, handle: int) -> None:
        """The object of this handle was forgotten: it is closed at the next chance. Any thread, no lock."""
        self._orphans.append(handle)

    def set_handler(self, handle: int, handler: Callable[[int], None] | None) -> None:
        """handler(mask) is called for each event of the handle, with the lock held: it only takes a note."""
        self._by_handle[handle].handler = handler

    def dispatch(self, user: int, mask: int) -> None:
        """An event of the core."""
        entry = self._entries.get(user)
        if entry is not None and entry.handler is not None:
            entry.handler(mask)

    def touched(self) -> None:
        """After calls that may send."""
        self.driver.touched(self)

    # ---- what it is doing
    def stats(self) -> dict[str, int]:
        """Counters by name (bypass/stack/counters.h)."""
        with self.driver.lock:
            return self.core.stats()

    def conns(self) -> list[ConnInfo]:
        """Connections in every state."""
        with self.driver.lock:
            return list(self.core.conns())

    def audit(self) -> dict[str, int]:
        """What is in use, by kind; all zero after an orderly end."""
        with self.driver.lock:
            return self.core.audit()

    # ---- end
    def close(self, linger: float = 1.0) -> None:
        """Closes every socket in order, waits up to `linger` seconds of the stack's clock until what was sent has
        been acknowledged, resets the rest, and lets go of device and steering. A second call does nothing.

        Raises:
            BufferError: views of lent buffers are alive (bypass.zerocopy): nothing is closed.
        """
        driver = self.driver
        with driver.lock:
            if self.core.closed:
                return
            self.lent.end()
            watchers = [e.handler for e in self._entries.values() if e.handler is not None]
            try:
                # Listeners first: nothing new comes in while the rest ends.
                for entry in sorted(self._by_handle.values(), key=lambda e: not e.listening):
                    self.close_handle(entry.handle)
                deadline = driver.now_ns() + round(linger * 1e9)
                while any(c.state not in SETTLED for c in self.core.conns()):
                    if driver.failure is not None or not driver.wait(deadline):
                        break
            finally:
                self.destroy()
                for handler in watchers:
                    handler(ENDED)

    def destroy(self) -> None:
        """Lock held. Ends at once: connections are reset. BufferError: as close()."""
        if not self.core.closed:
            self.lent.end()
            self.core.close()
            self.alert()
            self._entries.clear()
            self._by_handle.clear()
            self.driver.remove(self)
            self.driver.cond.notify_all()

    def alert(self) -> None:
        """Lock held. The stack has ended, or its device: everybody with a handler shall look."""
        for entry in self._entries.values():
            if entry.handler is not None:
                entry.handler(ENDED)

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<bypass.Stack {self.name}{' closed' if self.core.closed else ''}>"

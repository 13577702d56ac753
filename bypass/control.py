# SPDX-License-Identifier: Apache-2.0
"""Control of a stack that takes flows off a live interface: grants, reserved ports, live entries.

In the order of a socket's life: the policy must grant the flow; a shadow socket reserves its port in the kernel, so
that nobody else takes it; a live entry of the steering program brings its packets. The entry lives as long as the
stack has any connection on that port, TIME_WAIT included: TCP of a live flow must never reach the kernel, which would
answer with a reset.

What does not live here: the rules themselves (bypass.policy), what they grant and what is live (bypass.grants), the XDP
program (bypass.steering), packets.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from bypass.core import Address, CoreStack
from bypass.grants import ANY, Grants, KernelView, Key, Live, LiveEntries, shadow
from bypass.policy import Policy
from bypass.stack_api import Lease
from bypass.steering_api import Steers

__all__ = ["KernelView", "PolicyControl"]


@dataclass(slots=True)
class _Shadow:
    """A kernel socket that holds a port."""

    sock: socket.socket
    users: int


class PolicyControl:
    """Grants, shadows and live entries of one stack. Calls with the stack's lock held.

    Attributes:
        changed: called with the stack's lock held, whenever a live entry may have to go: tick() soon.
    """

    def __init__(self, policy: Policy, steering: Steers, kernel: KernelView) -> None:
        self.policy = policy
        self.steering = steering
        self.kernel = kernel
        self.core: CoreStack | None = None  # set when the stack exists
        self.changed: Callable[[], None] = lambda: None
        self._grants = Grants(policy)
        self._entries = LiveEntries(steering, kernel)
        self._shadows: dict[tuple[int, Address], _Shadow] = {}
        self._leaving: set[Key] = set()  # entries without a socket

    # ---- Control of bypass.stack_api
    def lease(self, kind: int, local: Address, remote: Address | None) -> Lease:
        host, port = local[0] or ANY, local[1]
        if remote is not None and host == ANY:
            host = self.kernel.source_for(remote[0])
        if not port:
            chosen = self._grants.choose_port(kind, host, remote, lambda place: self._hold(kind, place))
            return Lease(kind, chosen)
        self._grants.check(kind, (host, port), remote)
        held = self._shadows.get((kind, (host, port)))
        if held is not None:
            held.users += 1
        else:
            self._hold(kind, (host, port))
        return Lease(kind, (host, port))

    def activate(self, lease: Lease, remote: Address | None) -> None:
        kind, local = lease.kind, lease.local
        if remote is not None:
            self._grants.check(kind, local, remote)
            if (kind, local, None) in lease.live:
                return  # every peer's packets come already
        key = (kind, local, remote)
        if self._entries.use(key).drain:  # it may be that of a socket closed a moment ago: taken over
            self.changed()
        lease.live.append(key)

    def release(self, lease: Lease) -> None:
        for key in lease.live:
            if self._entries.unuse(key):
                self._leaving.add(key)
        lease.live.clear()
        self._shadows[lease.kind, lease.local].users -= 1
        self.changed()

    # ---- ports
    def _hold(self, kind: int, local: Address) -> None:
        """Reserves a port in the kernel. OSError EADDRINUSE: it is taken, by this stack or another program."""
        if (kind, local) in self._shadows:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self._shadows[kind, local] = _Shadow(shadow(kind, local), 1)

    # ---- now and then
    def tick(self, now_ns: int) -> int:
        """Removes entries that nothing uses any more, and ends draining where the kernel's connections are gone.

        Returns:
            How many are on their way out: as long as there are some it has to be called again.
        """
        for key in list(self._leaving):
            live = self._entries[key]
            if live.users > 0:
                self._leaving.discard(key)
            elif self._unused(live):
                self._entries.remove(key)
                self._leaving.discard(key)
        draining = self._entries.check_draining(now_ns)
        self._close_shadows()
        return len(self._leaving) + draining

    def _unused(self, live: Live) -> bool:
        """TIME_WAIT counts as use."""
        assert self.core is not None
        port = live.local[1]
        if not self.core.port_users(live.kind, None, port):
            return True
        # Looking at addresses walks all connections: only where another entry may own them.
        others = (v for v in self._entries if v is not live)
        if live.local[0] == ANY or not any(v.kind == live.kind and v.local[1] == port for v in others):
            return False
        return self.core.port_users(live.kind, live.local[0], port) == 0

    def _close_shadows(self) -> None:
        """Gives ports back that no socket holds and no entry needs."""
        free = [place for place, shadow in self._shadows.items() if shadow.users <= 0]
        if not free:
            return
        needed = {(live.kind, live.local) for live in self._entries}
        for place in free:
            if place not in needed:
                self._shadows.pop(place).sock.close()

    def close(self) -> None:
        """Removes every live entry and gives the ports back to the kernel."""
        self._entries.clear()
        self._leaving.clear()
        for held in self._shadows.values():
            held.sock.close()
        self._shadows.clear()

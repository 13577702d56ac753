# SPDX-License-Identifier: Apache-2.0
"""Leases: what an application may have, from APP_LEASE to its end.

What lives here: whether a request is granted, and what follows. What does not: what is live (site.py), the kernel
sockets that hold ports (shadow.py), blocks of ports (blocks.py).
"""

from __future__ import annotations

import errno
from functools import partial

from bypass.broker.apps import App, Lease, Process
from bypass.broker.blocks import Blocks, still_granted
from bypass.broker.news import News
from bypass.broker.protocol import Kind, Message
from bypass.broker.shadow import Shadow
from bypass.broker.state import Refused, State, app_of, plain
from bypass.core import Address
from bypass.grants import ANY, Key
from bypass.stack_api import DGRAM, STREAM

LEASE_BLOCK, LEASE_ANOTHER, LEASE_AHEAD = 1, 2, 4


class Leasing:
    """The leases of all applications."""

    def __init__(self, state: State, news: News) -> None:
        self._state = state
        self._news = news
        left = [lease for app in state.site.left for lease in app.leases.values() if lease.shadow is None]
        self._blocks = Blocks(keeper=state.site.keeper(), left=left) if state.site.blocks else None

    def lease(self, process: Process, m: Message, fds: list[int]) -> Message:
        """APP_LEASE."""
        app = app_of(process)
        self._admit(app, m, fds)
        if m.flags & LEASE_BLOCK and self._blocks is not None:
            block = self._block(app, m, self._blocks)
            if block is not None:
                return m.answer(
                    lease=block.number, local=block.local, last_port=block.last_port, flags=LEASE_BLOCK
                )
        if m.flags & LEASE_AHEAD:
            raise Refused(errno.EDQUOT, "there is no block of ports to be had")
        shadow = Shadow(fds[0], m.kind)
        fds.clear()  # it is the shadow's now
        try:
            lease = self._take(app, m, shadow)
        except BaseException:
            shadow.close()
            raise
        app.leases[lease.number] = lease
        return m.answer(lease=lease.number, local=lease.local)

    def _admit(self, app: App, m: Message, fds: list[int]) -> None:
        """Refused: whatever it asks for."""
        if self._state.draining:
            raise Refused(errno.ESHUTDOWN, "the broker is about to end")
        wanted = 0 if m.flags & LEASE_AHEAD else 1
        if len(fds) != wanted:
            raise Refused(errno.EBADF, f"such a lease comes with {wanted} descriptors, not {len(fds)}")
        if m.kind not in (STREAM, DGRAM):
            raise Refused(errno.EPROTONOSUPPORT, f"kind {m.kind} is neither stream nor datagram")
        if len(app.leases) >= app.limit:
            raise Refused(errno.EDQUOT, f"the application has {app.limit} leases, which is all it may have")

    def _take(self, app: App, m: Message, shadow: Shadow) -> Lease:
        site = self._state.site
        grants = site.grants(app.user)
        remote = (plain(m.remote[0]), m.remote[1]) if m.remote[1] else None
        if remote is not None and remote[0] == ANY:
            raise Refused(errno.EINVAL, "the peer has no address")
        local = self._local(app, m, shadow, remote)
        if remote is not None and local[0] == ANY:
            local = (site.source_for(remote[0]), local[1])
            grants.check(m.kind, local, remote)
        key: Key = (m.kind, local, remote)
        if remote is not None and any(lease.key == (m.kind, local, None) for lease in app.leases.values()):
            key = (m.kind, local, None)  # every peer's packets come already
        app.last_lease += 1
        lease = Lease(app.last_lease, m.kind, local, remote, key, shadow)
        site.leased(app, lease)
        try:
            site.use(key, app.number)
        except BaseException:
            site.released(app, lease)
            raise
        return lease

    def _local(self, app: App, m: Message, shadow: Shadow, remote: Address | None) -> Address:
        """The address that is granted, which the shadow holds."""
        site = self._state.site
        grants = site.grants(app.user)
        local = (plain(m.local[0]), m.local[1])
        if local[1]:
            grants.check(m.kind, local, remote)
            shadow.require(local)
            return local
        if remote is None or shadow.bound() is not None:
            raise Refused(
                errno.EINVAL, "a lease without a local port is for a socket that connects and is not bound"
            )
        host = local[0] if local[0] != ANY else site.source_for(remote[0])
        return grants.choose_port(m.kind, host, remote, partial(shadow.bind, free=site.apart))

    def _block(self, app: App, m: Message, blocks: Blocks) -> Lease | None:
        """None: an ordinary lease will do."""
        local, remote = (plain(m.local[0]), m.local[1]), (plain(m.remote[0]), m.remote[1])
        if local[1] or not remote[1] or remote[0] == ANY:
            return None
        another = bool(m.flags & LEASE_ANOTHER)
        return blocks.lease(app, m.kind, local[0], remote, self._state.site, another=another)

    def release(self, process: Process, m: Message, fds: list[int]) -> Message:
        """APP_RELEASE."""
        app = app_of(process)
        lease = app.leases.pop(m.lease, None)
        if lease is None:
            raise Refused(errno.ENOENT, f"the application has no lease {m.lease}")
        self._state.site.unuse(lease.key)
        self.give_back(app, lease)
        return m.answer(lease=m.lease)

    def give_back(self, app: App, lease: Lease) -> None:
        """Its port is free, or its ports are."""
        self._state.site.released(app, lease)
        if lease.shadow is not None:
            lease.shadow.close()
        elif self._blocks is not None:
            self._blocks.give(lease.local[1])

    def revoke_ungranted(self, app: App) -> int:
        """Ends what the policy grants no more; how many leases."""
        grants = self._state.site.grants(app.user)
        lost = [lease for lease in app.leases.values() if not still_granted(grants, lease)]
        for lease in lost:
            del app.leases[lease.number]
            self._state.site.unuse(lease.key)
            self.give_back(app, lease)
            self._news.tell(iter(app.processes), Message(Kind.REVOKED, lease=lease.number, app=app.number))
        return len(lost)

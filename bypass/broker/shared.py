# SPDX-License-Identifier: Apache-2.0
"""Shared mode: several applications, which do not trust each other, on one interface.

    XDP program --> AF_XDP sockets of bypass-fwd --> memory of the application whose live entry the verdict names
    application --> copied and checked by bypass-fwd (addresses, ports, headers, rate) --> interface

What lives here: telling bypass-fwd who may send and receive what. What does not: how it checks (bypass/fwd/).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from bypass._core import ffi, lib
from bypass.access import Quota
from bypass.afxdp import MODES, interface_queues
from bypass.broker.apps import App, Lease
from bypass.broker.interface import DirectSite, InterfaceSite
from bypass.broker.memory import AppMemory
from bypass.broker.site import Site
from bypass.broker.takeover import Left, find_left
from bypass.errors import BypassError, DeviceError
from bypass.fwd import Doorbells, ForwarderError
from bypass.fwd import Lease as FwdLease
from bypass.grants import ANY, WHOLE_BLOCK, Key, protocol_of
from bypass.policy import Policy

BIND_WAIT_MS = 2000
LEAST_BURST = 1 << 16  # bytes
BURSTS_PER_SECOND = 50
PORT_FRAMES = 8192
FWD_TRIES = 3  # seconds


class SharedSite(InterfaceSite):
    """An interface whose frames bypass-fwd moves."""

    mode = "shared"
    device: int = lib.APP_DEV_PORT
    _about: Mapping[str, Any] = {}

    def __init__(self, policy: Policy, name: str = "", left: Left | None = None) -> None:
        super().__init__(policy, name, left)
        self._ports: set[int] = set()
        self._sockets = 0  # AF_XDP sockets that bypass-fwd has
        self._asked = 0  # times that it was asked to serve new queues
        self.forwarder = self.holder.forwarder
        if left:
            self._go_on(left)
            return
        try:
            self._open_device()
            self._tell_locals()
        except BaseException as e:
            self.close()
            if isinstance(e, OSError) and not isinstance(e, BypassError):
                raise DeviceError(f"{self.ifname}: bypass-fwd cannot open it: {e.strerror}") from e
            raise

    def _open_device(self) -> None:
        b = self.policy.backend
        queues = range(interface_queues(self.ifname)) if b.queues is None else b.queues
        config = {
            "ifname": self.ifname,
            "queues": list(queues),
            "mode": MODES.get(b.mode, lib.AFXDP_AUTO if self.steering.mode == "native" else lib.AFXDP_COPY),
            "ring_size": b.ring_size,
            "frames": b.default_frames(len(queues)),
            "frame_size": b.frame_size,
            "bind_wait_ms": BIND_WAIT_MS,
        }
        about = self.forwarder.device_open(config, self.steering.sockets_fd)
        self.holder.tell(device=about | {"mac": about["mac"].hex(), "numbers": list(queues)})
        self._opened(about, tuple(queues))
        self._sockets = len(queues)

    def _opened(self, about: Mapping[str, Any], queues: tuple[int, ...]) -> None:
        self._about, self.queues = about, queues
        self.device_mode = "zerocopy" if about["zerocopy"] else "copy"
        self.device_reason = "bypass-fwd has the interface"

    def _go_on(self, left: Left) -> None:
        about = left.about["device"]
        self._opened(about | {"mac": bytes.fromhex(about["mac"])}, tuple(about["numbers"]))
        self._sockets = max(self.forwarder.queues, len(self.queues))
        self._ports = {app.number for app, _ in left.apps}
        super()._go_on(left)
        self._tell_locals()

    def _is_live(self, app: App, lease: Lease, entry: int) -> None:
        with suppress(FileExistsError):
            self.forwarder.lease_add(_lease(app.number, lease.key))
        self.forwarder.entry(entry, app.number)

    def _never_live(self, app: App, lease: Lease) -> None:
        super()._never_live(app, lease)
        with suppress(FileNotFoundError):
            self.forwarder.lease_del(_lease(app.number, lease.key))

    def _tell_locals(self) -> None:
        self.forwarder.locals(f"{host}/{bits}" for host, bits in self.addresses.items())

    # ---- devices
    def busy(self) -> bool:
        return len(self._ports) >= int(lib.FWD_PORTS_MAX)

    def open(self, memory: AppMemory, owner: int, quota: Quota) -> list[int]:
        config = self._port_config(quota)
        size = int(lib.port_mem_size(config))
        if not size:
            raise DeviceError(
                f"{self.ifname}: {config.frames} frames are too few for a ring of {config.rx_ring}"
            )
        mem = memory.map(size)
        try:
            if lib.port_init(mem, size, config) < 0:
                raise DeviceError("the port cannot be made")
        finally:
            memory.unmap()
        header = memory.header
        header.mtu, header.mac, header.ifname = config.mtu, bytes(config.mac), self.ifname.encode()
        doorbells = Doorbells.make()
        try:
            self._ports.add(owner)
            item = self.holder.begin(owner)
            self.forwarder.port_add(owner, memory.fd, int(header.dev_off), config, doorbells, item=item)
            if quota.rate is not None:
                self.limit(owner, quota)
        except BaseException:
            doorbells.close()
            self.close_device(owner)
            raise
        os.close(doorbells.fwd)
        return [doorbells.to_fwd, doorbells.app]

    def limit(self, owner: int, quota: Quota) -> None:
        rate = quota.rate or 0  # 0: as fast as it likes
        burst = max(rate // BURSTS_PER_SECOND, LEAST_BURST) if rate else 0
        with suppress(FileNotFoundError):  # it was cut
            self.forwarder.rate(owner, bytes_=rate, bytes_burst=burst)

    def swap(self, policy: Policy) -> None:
        super().swap(policy)
        spin_us = policy.stack.spin_us
        self.forwarder.spin(int(lib.FWD_SPIN_US) if spin_us is None else spin_us)

    def _port_config(self, quota: Quota) -> Any:
        ring = self.policy.backend.ring_size
        frames = min(
            self.policy.backend.frames or PORT_FRAMES, quota.frames or PORT_FRAMES, lib.PORT_MAX_FRAMES
        )
        while ring > 16 and 4 * ring > frames:
            ring //= 2
        config = ffi.new("struct port_config *")
        config.frames, config.rx_ring, config.tx_ring = frames, ring, ring
        config.caps, config.queues = self._about["caps"], len(self.queues)
        config.mtu, config.mac = min(self._about["mtu"], lib.PORT_MAX_MTU), self._about["mac"]
        return config

    def close_device(self, owner: int) -> None:
        if owner in self._ports:
            self._ports.discard(owner)
            with suppress(FileNotFoundError, ForwarderError):  # it was cut, or bypass-fwd has ended
                self.forwarder.port_del(owner)
            self.holder.end(owner)

    # ---- live entries
    def use(self, key: Key, owner: int) -> None:
        self.entries.require(key, owner)  # before bypass-fwd knows the lease: from then on its owner may send
        if key in self.entries:
            self.entries.use(key, owner)
            return
        self.forwarder.lease_add(_lease(owner, key))
        try:
            super().use(key, owner)
            self.forwarder.entry(self.entries[key].entry, owner)
        except BaseException:
            self.forwarder.lease_del(_lease(owner, key))
            raise

    def unuse(self, key: Key) -> None:
        live = self.entries[key]
        super().unuse(key)
        if key not in self.entries:
            with suppress(FileNotFoundError, ForwarderError):
                self.forwarder.entry(live.entry, 0)
                self.forwarder.lease_del(_lease(live.owner, key))

    # ---- queues
    def _take_queues(self, unserved: range) -> str:
        if self._sockets > len(self.queues):
            self._serve(range(self._sockets))
            self._asked = 0
            return ""
        self._asked += 1
        self.forwarder.look()
        if self._asked < FWD_TRIES:
            return ""
        shown = ", ".join(map(str, unserved))
        return (
            f"{self.ifname} has got queues, and bypass-fwd cannot serve {shown}, which it has told: live TCP is not "
            "served there"
        )

    def _serve(self, queues: range) -> None:
        super()._serve(queues)
        about = dict(self._about)
        self.holder.tell(device=about | {"mac": about["mac"].hex(), "numbers": list(queues)})

    def _sockets_opened(self, queues: int) -> None:
        self._sockets = queues
        self._queues_ns = 0

    # ---- what happens
    def addr_add(self, address: str, prefix_len: int) -> None:
        super().addr_add(address, prefix_len)
        self._locals_changed()

    def addr_del(self, address: str) -> None:
        super().addr_del(address)
        self._locals_changed()

    def _locals_changed(self) -> None:
        if self._about:  # else they are told when the device is open
            self._tell_locals()

    def due_ns(self) -> int | None:
        return 0 if self.forwarder.pending else super().due_ns()

    def update(self, now_ns: int) -> None:
        super().update(now_ns)
        if self.forwarder.pending:
            self._holder_events()


def _lease(owner: int, key: Key) -> FwdLease:
    kind, (host, port), remote = key
    block = remote == WHOLE_BLOCK
    peer = ("", 0) if block or remote is None else remote
    return FwdLease(owner, protocol_of(kind), "" if host == ANY else host, port, peer, block)


def site_of(policy: Policy, name: str = "") -> Site:
    """The site that a policy asks for.

    Args:
        policy: in force from now on.
        name: of the broker's socket; what a broker that was killed there has left is taken over. Empty: a private one.

    Raises:
        BypassError: as InterfaceSite; or what is left cannot be taken over.
    """
    left = find_left(policy, name) if name else None
    return (SharedSite if policy.mode == "shared" else DirectSite)(policy, name, left)

# SPDX-License-Identifier: Apache-2.0
"""Several applications, which do not trust each other, on one interface. bypass-fwd has it, whatever it is:

    interface --> bypass-fwd --> memory of the application whose live entry the verdict names
    application --> copied and checked by bypass-fwd (addresses, ports, headers, rate) --> interface

What lives here: telling bypass-fwd who may send and receive what. What does not: how it checks (bypass/fwd/), and how
it comes to its interface (shared.py).
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from bypass._core import ffi, lib
from bypass.access import Quota
from bypass.broker.apps import App, Lease
from bypass.broker.interface import InterfaceSite
from bypass.broker.memory import AppMemory
from bypass.broker.takeover import Left
from bypass.errors import BypassError, DeviceError
from bypass.fwd import Doorbells, ForwarderError
from bypass.fwd import Lease as FwdLease
from bypass.grants import ANY, WHOLE_BLOCK, Key, protocol_of
from bypass.policy import Policy

LEAST_BURST = 1 << 16  # bytes
BURSTS_PER_SECOND = 50
PORT_FRAMES, PORT_BYTES = 8192, 32 << 20
"""Of an application's port, whichever is less: frames are larger where the interface's MTU is."""


class PortsSite(InterfaceSite):
    """An interface whose frames bypass-fwd moves."""

    mode = "shared"
    device: int = lib.APP_DEV_PORT
    _about: Mapping[str, Any] = {}

    def __init__(self, policy: Policy, name: str = "", left: Left | None = None) -> None:
        super().__init__(policy, name, left)
        self._ports: set[int] = set()
        self.forwarder = self.holder.forwarder
        if left:
            self._go_on(left)
            return
        try:
            about, numbers = self._open_device()
            self.holder.tell(device=about | {"mac": about["mac"].hex(), "numbers": list(numbers)})
            self._opened(about, numbers)
            self._tell_locals()
        except BaseException as e:
            self.close()
            if isinstance(e, OSError) and not isinstance(e, BypassError):
                raise DeviceError(f"{self.ifname}: bypass-fwd cannot open it: {e.strerror}") from e
            raise

    @abstractmethod
    def _open_device(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Has bypass-fwd open it: what it tells of the device (Forwarder.device_open()), and the queues' numbers."""

    def _opened(self, about: Mapping[str, Any], queues: tuple[int, ...]) -> None:
        self._about, self.queues = about, queues

    def _go_on(self, left: Left) -> None:
        about = left.about["device"]
        self._opened(about | {"mac": bytes.fromhex(about["mac"])}, tuple(about["numbers"]))
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
        ring, mtu = self.policy.backend.ring_size, self._about["mtu"]
        frame_size = _frame_size(mtu)
        usual = min(PORT_FRAMES, PORT_BYTES // frame_size)
        frames = min(self.policy.backend.frames or usual, quota.frames or usual, lib.PORT_MAX_FRAMES)
        while ring > 16 and 4 * ring > frames:
            ring //= 2
        config = ffi.new("struct port_config *")
        config.frames, config.rx_ring, config.tx_ring = frames, ring, ring
        config.caps, config.queues = self._about["caps"], len(self.queues)
        config.mtu, config.mac, config.frame_size = mtu, self._about["mac"], frame_size
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

    # ---- what happens
    def addr_add(self, address: str, prefix_len: int) -> None:
        super().addr_add(address, prefix_len)
        self._locals_changed()

    def addr_del(self, address: str) -> None:
        super().addr_del(address)
        self._locals_changed()

    def _locals_changed(self) -> None:
        if self._about:  # else they are told when the device is open
            with suppress(
                ForwarderError
            ):  # it has ended, which its descriptor tells; a TAP's addresses end with it
                self._tell_locals()

    def due_ns(self) -> int | None:
        return 0 if self.forwarder.pending else super().due_ns()

    def update(self, now_ns: int) -> None:
        super().update(now_ns)
        if self.forwarder.pending:
            self._holder_events()


def _frame_size(mtu: int) -> int:
    """Of a port's frames: what holds such a packet behind headroom and Ethernet header."""
    stride = int(lib.PORT_STRIDE)
    return -(-(mtu + int(lib.PORT_HEADROOM + lib.PORT_ETH_HEADER)) // stride) * stride


def _lease(owner: int, key: Key) -> FwdLease:
    kind, (host, port), remote = key
    block = remote == WHOLE_BLOCK
    peer = ("", 0) if block or remote is None else remote
    return FwdLease(owner, protocol_of(kind), "" if host == ANY else host, port, peer, block)

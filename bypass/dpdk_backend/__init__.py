# SPDX-License-Identifier: Apache-2.0
"""Whole ports driven by DPDK: classifier, exception path, and the plug-in that has DPDK in it.

What lives here: `DpdkDevice`, a port as a netdev for the stack: opening with clear errors, what it became, statistics,
audit, closing. Packets never pass through here: the stack drives the port in C (bypass/dpdk_backend/plugin.h).

    with DpdkDevice("bypass0", policy.dpdk()) as device:
        CoreStack(device.netdev, ...)

Source: DPDK's programmer's guide, chapter Poll Mode Driver.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bypass._core import ffi
from bypass.afxdp import Audit
from bypass.dpdk_backend.eal import explain, port_config, start_eal
from bypass.errors import DeviceError

if TYPE_CHECKING:
    from bypass.dpdk_backend.flows import Refused
    from bypass.hwflow.inforce import InForce
    from bypass.policy_backend import DpdkBackend

__all__ = ["About", "DpdkDevice", "Member", "link_counters"]


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a bonding device. `active`: takes part in sending and receiving."""

    name: str
    link_up: bool
    active: bool


@dataclass(frozen=True, slots=True)
class About:
    """What a port became.

    Attributes:
        driver: DPDK's. device: the port's name within EAL.
        rx_ring, tx_ring: descriptors of each queue. stride: bytes of memory for each frame.
        speed_mbps: None: unknown.
        if_index: of the kernel's device below it; 0: none.
        wake: what wakes a program that sleeps; why not interrupts, where it is a timer.
        numa: memory node; None: any.
        rx_offered, rx_used, tx_offered, tx_used: names of offloads, as DPDK has them.
        bonding_mode: DPDK's number (1 active-backup, 4 LACP); None: no bonding device.
    """

    driver: str
    device: str
    mac: str
    mtu: int
    queues: int
    rx_ring: int
    tx_ring: int
    frames: int
    frame_size: int
    stride: int
    link_up: bool
    speed_mbps: int | None
    if_index: int
    wake: str
    numa: int | None
    rx_offered: tuple[str, ...]
    rx_used: tuple[str, ...]
    tx_offered: tuple[str, ...]
    tx_used: tuple[str, ...]
    bonding_mode: int | None
    members: tuple[Member, ...]


def link_counters(up: bool, speed_mbps: int | None) -> dict[str, int]:
    """A port's link as `bypass stats` shows it, which leaves out what is 0."""
    return {"up": int(up), "down": int(not up), "speed_mbps": speed_mbps or 0}


def _struct(pointer: Any) -> dict[str, int]:
    """A C struct of numbers as a dict, in the order of its declaration."""
    return {name: int(getattr(pointer, name)) for name, _ in ffi.typeof(pointer).item.fields}


def _text(array: Any) -> str:
    return str(ffi.string(array).decode(errors="replace"))


class DpdkDevice:
    """A DPDK port, open. A context manager; `close()` ends it, after which the same device may be opened again.

    EAL is started when it does not run yet in this process. Members are those of `bypass.afxdp.AfxdpDevice` as far as
    they make sense.

    Attributes:
        ifname: for messages: the interface of the policy, or the device.
        mode: 'poll': the driver is polled; nothing is copied between it and the stack.
        queue_numbers: 0 to queues - 1.
        fds: empty: a port has no sockets.
        hardware: what the port does of the policy by rules of its own; set by who puts them on it.

    Args:
        ifname: the interface of the policy, for messages; None: the device.
        backend: what the policy says of the port (`bypass.policy_backend.DpdkBackend`).
        rx_csum_trust: take received TCP and UDP checksums as right: memory between two processes, or a veth whose
            other end leaves them to hardware that is not there.

    Raises:
        DeviceError: no plug-in, no such device, another driver has it, it is open already, too few frames, no memory.
        PrivilegeError: DPDK or its driver may not.
    """

    mode = "poll"

    def __init__(self, ifname: str | None, backend: DpdkBackend, *, rx_csum_trust: bool = False) -> None:
        self._port: Any = None
        self.ifname = ifname or backend.device.partition(",")[0]
        self.backend = backend
        self._plugin = start_eal(backend)
        config = ffi.new("struct dpdk_config *", port_config(backend, rx_csum_trust=rx_csum_trust))
        error = ffi.new("struct dpdk_error *")
        port = self._plugin.open(config, error)
        if port == ffi.NULL:
            raise explain(error)
        self._port = port
        self.queue_numbers: tuple[int, ...] = tuple(range(int(self.netdev.queues)))
        self.fds: dict[int, int] = {}
        self.hardware: InForce | None = None
        self._reason = self.mode_reason

    # ---- Using -------------------------------------------------------------------------------------------------
    @property
    def closed(self) -> bool:
        return self._port is None

    def _live(self) -> Any:
        if self._port is None:
            raise DeviceError(f"the DPDK port of {self.ifname} is closed")
        return self._port

    @property
    def mode_reason(self) -> str:
        """DPDK's version, the driver, and what wakes a program that sleeps."""
        if self._port is not None:
            about = self.about()
            self._reason = f"{_text(self._plugin.version)}, driver {about.driver}, woken by {about.wake}"
        return self._reason

    @property
    def netdev(self) -> Any:
        """The cffi `struct bypass_netdev *` for the stack. Valid until `close()`."""
        return self._plugin.netdev(self._live())

    @property
    def mac(self) -> str:
        """The port's MAC address, with colons."""
        return ":".join(f"{b:02x}" for b in self.netdev.mac)

    @property
    def mtu(self) -> int:
        """The largest IP packet, bytes."""
        return int(self.netdev.mtu)

    def health(self) -> int:
        """0 when usable; errno.ENETDOWN without link (it recovers by itself); errno.ENXIO when it was removed."""
        return -int(self._plugin.health(self._live()))

    def set_link(self, up: bool) -> None:
        """Switches the port on or off administratively.

        Raises:
            DeviceError: the driver cannot, or the port was removed.
        """
        err = int(self._plugin.set_link(self._live(), int(up)))
        if err < 0:
            raise DeviceError(f"{self.ifname}: link {'up' if up else 'down'}: {os.strerror(-err)}")

    def queues_now(self) -> int:
        """Queues that the port has: they do not change while it is open."""
        return len(self.queue_numbers)

    def take_new_queues(self) -> dict[int, int]:
        """There never are any."""
        return {}

    def put_flows(self, flows: Any, rest: int) -> Refused | None:
        """Has the port drop packets and choose queues by these rules, in place of those before (rte_flow).

        Args:
            flows: `struct dpdk_flow[]`, as bypass.dpdk_backend.flows.pack() makes it.
            rest: the queue of what no rule matches; -1: as the port hashes.

        Returns:
            None; or what the port does not take: then no rule is in force.
        """
        from bypass.dpdk_backend.flows import Refused

        at, error = ffi.new("uint32_t *"), ffi.new("struct dpdk_error *")
        if self._plugin.flows(self._live(), flows, len(flows), rest, at, error) == 0:
            return None
        return Refused(int(at[0]), _text(error.text))

    # ---- Looking -----------------------------------------------------------------------------------------------
    def about(self) -> About:
        """What the port became, with its link as it is now."""
        out = ffi.new("struct dpdk_about *")
        self._plugin.about(self._live(), out)
        names = ("mtu", "queues", "rx_ring", "tx_ring", "frames", "frame_size", "stride", "if_index")
        return About(
            driver=_text(out.driver),
            device=_text(out.device),
            mac=self.mac,
            wake=_text(out.wake),
            link_up=bool(out.link_up),
            speed_mbps=int(out.speed_mbps) if 0 < out.speed_mbps < 0xFFFFFFFF else None,
            numa=int(out.numa) if out.numa >= 0 else None,
            rx_offered=self._offloads(0, out.rx_offered),
            rx_used=self._offloads(0, out.rx_used),
            tx_offered=self._offloads(1, out.tx_offered),
            tx_used=self._offloads(1, out.tx_used),
            bonding_mode=int(out.bonding_mode) if out.members else None,
            members=tuple(
                Member(_text(m.name), bool(m.link_up), bool(m.active)) for m in out.member[0 : out.members]
            ),
            **{name: int(getattr(out, name)) for name in names},
        )

    def _offloads(self, tx: int, bits: int) -> tuple[str, ...]:
        set_bits = (1 << i for i in range(64) if bits >> i & 1)
        return tuple(_text(self._plugin.offload_name(tx, bit)) for bit in set_bits)

    def statistics(self) -> dict[int, dict[str, int]]:
        """Our counters since opening, by queue number (`struct dpdk_counters`): packets, bytes or events each."""
        ours = ffi.new("struct dpdk_counters *")
        result = {}
        for number in self.queue_numbers:
            self._plugin.counters(self._live(), number, ours)
            result[number] = _struct(ours)
        return result

    def device_statistics(self) -> dict[str, int]:
        """The driver's counters (`rte_eth_stats`), since opening.

        Raises:
            DeviceError: the driver has none, or the port was removed.
        """
        out = ffi.new("struct dpdk_stats *")
        err = int(self._plugin.stats(self._live(), out))
        if err < 0:
            raise DeviceError(f"{self.ifname}: statistics: {os.strerror(-err)}")
        return _struct(out)

    def extended_statistics(self) -> Mapping[str, int]:
        """All that the driver counts, by its own names (xstats). Empty: it has none, or the port was removed."""
        port = self._live()
        n = int(self._plugin.xstats(port, ffi.NULL, 0))
        if n in (-errno.ENXIO, -errno.ENOTSUP, 0):
            return {}
        out = ffi.new("struct dpdk_xstat[]", max(n, 1))
        got = int(self._plugin.xstats(port, out, n))
        if got < 0:
            raise DeviceError(f"{self.ifname}: extended statistics: {os.strerror(-got)}")
        return {_text(x.name): int(x.value) for x in out[0 : min(got, n)]}

    def audit(self) -> Audit:
        """Counts every frame by where it is. Walks all frames: for tests and tools."""
        out = ffi.new("struct frame_audit *")
        conserved = self._plugin.audit(self._live(), out) == 0
        return Audit(**_struct(out), conserved=conserved)

    # ---- Closing -----------------------------------------------------------------------------------------------
    def close(self, wait_s: float = 0.2) -> int:
        """Waits up to wait_s seconds for transmissions to complete, then stops and removes the port in any case.
        Idempotent.

        Returns:
            Frames whose transmission the driver had not completed.
        """
        if self._port is None:
            return 0
        port, self._port = self._port, None
        return int(self._plugin.close(port, round(wait_s * 1000)))

    def __enter__(self) -> DpdkDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_port", None) is not None and not sys.is_finalizing():
            self.close(0)

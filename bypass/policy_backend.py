# SPDX-License-Identifier: Apache-2.0
"""Backends of a policy: how frames reach the stack, and what the port has where there is no kernel device.

What lives here: the result of reading `backend`, `addresses` and `routes`, and the checks between them. What does not:
how each field is read (`policy_fields.py`), the rest of a policy (`policy.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any, Literal

from bypass.policy_fields import AfxdpModel, HardwareRules, HeadModel, Mode, Wrong, backend_kind
from bypass.profiles import RING_SIZES
from bypass.rules import Address, Network


@dataclass(frozen=True, slots=True)
class AfxdpBackend:
    """Frames come by AF_XDP sockets, and the kernel keeps the interface.

    Attributes:
        mode: `auto` chooses between zerocopy and copy; `skb` is the kernel's generic XDP.
        queues: receive queues of the interface, ascending; None: all that it has.
        ring_size: descriptors of each of a queue's rings, a power of two.
        frames: frames of packet memory, all queues together; None: `default_frames` of the queues in use.
        frame_size: bytes of a frame, 2048 or 4096.
        hardware_rules: whether the interface keeps all but steered flows off `queues` by rules of its own; `auto`:
            where it can, else all queues are used.
    """

    kind: Literal["afxdp"] = "afxdp"
    mode: Mode = "auto"
    queues: tuple[int, ...] | None = None
    ring_size: int = 2048
    frames: int | None = None
    frame_size: int = 2048
    hardware_rules: HardwareRules = "none"

    def default_frames(self, queues: int) -> int:
        """Frames for this many queues: each queue's fill and receive rings full, and as many to send."""
        return self.frames if self.frames is not None else 4 * self.ring_size * queues

    def on_all(self, queues: int) -> AfxdpBackend:
        """The same on all queues of an interface that has so many, with as many frames as they take at least."""
        frames = None if self.frames is None else max(self.frames, 2 * self.ring_size * queues)
        return replace(self, queues=None, frames=frames)


@dataclass(frozen=True, slots=True)
class EalOptions:
    """How DPDK's environment abstraction layer is started, once a process.

    Attributes:
        lcores: CPUs that it may use; None: those of the process.
        memory: bytes that it may use; None: what the frames need.
        hugepages: False: ordinary pages.
        drivers: folder of the drivers to load; None: the system's.
        vfio_intr: interrupts that vfio-pci is asked for; None: the first that the device has.
        devices: what has to be there before the port is opened, such as the members of a bond.
    """

    lcores: tuple[int, ...] | None = None
    memory: int | None = None
    hugepages: bool = True
    drivers: str | None = None
    devices: tuple[str, ...] = ()
    vfio_intr: Literal["msix", "msi", "legacy"] | None = None


@dataclass(frozen=True, slots=True)
class DpdkBackend:
    """A poll-mode driver of DPDK has the whole port; what no rule steers goes to the kernel by an exception path.

    Attributes:
        device: PCI address, or a virtual device with its arguments.
        queues: number of receive queues, and as many to send.
        ring_size: descriptors of each of a queue's rings, a power of two.
        frames: frames of packet memory, all queues together; None: `default_frames()`.
        frame_size: bytes of a packet that a frame holds, headroom not included.
        mtu: largest IP packet; None: the port's.
        vlan: 802.1Q tag of all that the stack receives and sends; None: untagged.
        offloads: `auto`: what the port offers; `none`: everything in software.
        idle_us: how long a program sleeps when nothing has come, microseconds, where a timer wakes it.
        rx_interrupts: `auto`: what arrives wakes it where the driver can tell; `required`: or the port is not opened;
            `none`.
        link_poll_ms: how often the port's link is looked at, milliseconds.
        exception: `tap`: a TAP device of the policy's `interface` name; `none`: the port has no kernel.
        exception_rate: packets a second that the kernel is given at most.
        addresses, routes: what the port is given; a route is its destinations and its gateway.
        hardware_rules: whether the port drops and chooses queues by rules of its own; `auto`: where it can.
    """

    device: str
    queues: int = 1
    ring_size: int = 1024
    frames: int | None = None
    frame_size: int = 2048
    mtu: int | None = None
    vlan: int | None = None
    offloads: Literal["auto", "none"] = "auto"
    idle_us: int = 100
    link_poll_ms: int = 100
    eal: EalOptions = EalOptions()
    exception: Literal["tap", "none"] = "tap"
    exception_rate: int = 10_000
    addresses: tuple[IPv4Interface | IPv6Interface, ...] = ()
    routes: tuple[tuple[Network, Address], ...] = ()
    hardware_rules: HardwareRules = "none"
    rx_interrupts: Literal["auto", "required", "none"] = "auto"
    kind: Literal["dpdk"] = "dpdk"

    def default_frames(self) -> int:
        """Frames of all queues: both rings full, which drivers empty late, and as many for what waits to be read."""
        return self.frames if self.frames is not None else 4 * self.ring_size * self.queues


def read_backend(head: HeadModel) -> AfxdpBackend | DpdkBackend:
    b = head.backend
    if isinstance(b, AfxdpModel):
        return AfxdpBackend(
            b.kind, b.mode, b.queues, ring_size(head), b.frames, b.frame_size, b.hardware_rules
        )
    said = b.model_dump(exclude={"eal", "ring_size"})
    return DpdkBackend(
        **said,
        ring_size=ring_size(head),
        eal=EalOptions(**b.eal.model_dump()),
        addresses=head.addresses,
        routes=tuple((r.to, r.via) for r in head.routes),
    )


def across_head(head: HeadModel) -> Iterator[Wrong]:
    """What is wrong between backend, mode, addresses and routes."""
    b = head.backend
    if isinstance(b, AfxdpModel):
        least = 2 * ring_size(head) * len(b.queues or (0,))
        for name, command in (("addresses", "ip address add"), ("routes", "ip route add")):
            if name in head.model_fields_set:
                right = f"with afxdp the interface is the kernel's: `{command}`"
                yield Wrong((name,), "is for kind: dpdk", right, whole=True, at_key=True)
        if b.hardware_rules != "none" and b.queues is None:
            right = "name some in queues, such as queues: [3]: the kernel keeps the others"
            yield Wrong(("backend", "hardware_rules"), "needs queues of the stack's own", right)
    else:
        # Drivers give frames back late: both rings may be full of what the stack has long forgotten.
        least = 3 * ring_size(head) * b.queues
        if head.mode == "direct":
            yield Wrong(("mode",), "a DPDK port has one owner", "leave mode out", whole=True)
        if b.exception == "none":
            yield from _without_kernel(head)
        yield from _unreachable(head)
    if b.frames is not None and b.frames < least:
        yield Wrong(("backend", "frames"), "is too few for the rings", f"at least {least}")


def _without_kernel(head: HeadModel) -> Iterator[Wrong]:
    """The stack itself has the addresses and routes."""
    if not head.addresses:
        right = "name the port's in addresses, such as addresses: [192.0.2.10/24]"
        yield Wrong(("backend", "exception"), "leaves the port without any address", right)
    for at, address in enumerate(head.addresses):
        if address.version == 6:
            yield Wrong(("addresses", at), "is IPv6, which the stack does not speak yet", "exception: tap")
    for at, route in enumerate(head.routes):
        if str(route.to) != "0.0.0.0/0":
            right = "without a kernel there is one gateway for all: to: 0.0.0.0/0; or exception: tap"
            yield Wrong(("routes", at, "to"), "is not for all destinations", right)


def _unreachable(head: HeadModel) -> Iterator[Wrong]:
    for at, route in enumerate(head.routes):
        if route.via.version != route.to.version:
            wrong = f"is IPv{route.via.version}, but the route is for IPv{route.to.version}"
            yield Wrong(("routes", at, "via"), wrong, "both of one family")
        elif not any(route.via in a.network for a in head.addresses):
            right = "a gateway of which the port has a neighbour's address"
            yield Wrong(("routes", at, "via"), "is in no prefix of addresses", right)
        elif any(route.via == a.ip for a in head.addresses):
            yield Wrong(("routes", at, "via"), "is the port's own address", "the gateway's address")
        if any(route.to == other.to for other in head.routes[:at]):
            yield Wrong(("routes", at, "to"), "has a route already", "one gateway for each prefix")


def has_port_vlan(data: dict[str, Any]) -> bool:
    """The port takes the tags off before rules see a frame."""
    backend = data.get("backend")
    return isinstance(backend, dict) and backend_kind(backend) == "dpdk" and "vlan" in backend


def ring_size(head: HeadModel) -> int:
    named = "ring_size" in head.backend.model_fields_set or head.profile is None
    return head.backend.ring_size if named or head.profile is None else RING_SIZES[head.profile]

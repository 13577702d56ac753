# SPDX-License-Identifier: Apache-2.0
"""Whether a device has rules of its own, as far as it can be known before they are put on it."""

from __future__ import annotations

from dataclasses import dataclass

from bypass.errors import DeviceError
from bypass.hwflow.apply import Ask, room_of
from bypass.policy import Policy
from bypass.rss import ask

__all__ = ["NO_FLOWS", "Offer", "of_interface", "of_port", "offered"]

NO_FLOWS = (
    "net_af_packet",
    "net_af_xdp",
    "net_memif",
    "net_null",
    "net_pcap",
    "net_ring",
    "net_vhost",
    "net_virtio",
)
"""Virtual devices whose drivers have no rte_flow (DPDK 22.11)."""


@dataclass(frozen=True, slots=True)
class Offer:
    """`has`: None: it is known when it is tried. `text`: in words."""

    has: bool | None
    text: str


def of_interface(ifname: str, asking: Ask = ask) -> Offer:
    """Of an interface of the kernel's, in the network namespace of the calling thread."""
    try:
        room = room_of(ifname, asking)
    except DeviceError as error:
        return Offer(False, str(error).removeprefix(f"{ifname}: "))
    places = (
        "places of its driver's choice" if room.rules is None else f"room for {room.free} of {room.rules}"
    )
    return Offer(True, f"{places}; a hash table of {room.entries} entries")


def of_port(device: str) -> Offer:
    """Of a port of DPDK, by `backend.device`."""
    name = device.partition(",")[0].removeprefix("vdev:")
    if name.startswith(NO_FLOWS):
        return Offer(False, f"the driver of {name} has no rules (rte_flow)")
    return Offer(None, f"whether {name} takes them is seen when it is opened (bypass stats)")


def offered(policy: Policy) -> Offer:
    """Of the policy's device."""
    if policy.backend.kind == "dpdk":
        return of_port(policy.backend.device)
    return of_interface(policy.interface)

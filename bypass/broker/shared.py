# SPDX-License-Identifier: Apache-2.0
"""Shared mode by AF_XDP: bypass-fwd has the sockets, and the steering program hands it the packets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bypass._core import lib
from bypass.afxdp import MODES, interface_queues
from bypass.broker.afxdp import AfxdpSite
from bypass.broker.direct import DirectSite
from bypass.broker.dpdk import DpdkSite
from bypass.broker.interface import InterfaceSite
from bypass.broker.ports import PortsSite
from bypass.broker.site import Site
from bypass.broker.takeover import Left, find_left
from bypass.policy import DpdkBackend, Policy

BIND_WAIT_MS = 2000
FWD_TRIES = 3  # seconds


class SharedSite(PortsSite, AfxdpSite):
    """An interface whose AF_XDP sockets are bypass-fwd's."""

    _sockets = 0  # that bypass-fwd has
    _asked = 0  # times that it was asked to serve new queues

    def _open_device(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        b = self.backend
        queues = tuple(range(interface_queues(self.ifname)) if b.queues is None else b.queues)
        config = {
            "ifname": self.ifname,
            "queues": list(queues),
            "mode": MODES.get(b.mode, lib.AFXDP_AUTO if self.steering.mode == "native" else lib.AFXDP_COPY),
            "ring_size": b.ring_size,
            "frames": b.default_frames(len(queues)),
            "frame_size": b.frame_size,
            "bind_wait_ms": BIND_WAIT_MS,
        }
        return self.forwarder.device_open(config, self.steering.sockets_fd), queues

    def _opened(self, about: Mapping[str, Any], queues: tuple[int, ...]) -> None:
        super()._opened(about, queues)
        self._sockets = len(queues)
        self.device_mode = "zerocopy" if about["zerocopy"] else "copy"
        self.device_reason = "bypass-fwd has the interface"

    def _go_on(self, left: Left) -> None:
        super()._go_on(left)
        self._sockets = max(self.forwarder.queues, len(self.queues))

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


def site_of(policy: Policy, name: str = "") -> Site:
    """The site that a policy asks for.

    Args:
        policy: in force from now on.
        name: of the broker's socket; what a broker that was killed there has left is taken over. Empty: a private one.

    Raises:
        BypassError: as InterfaceSite; or what is left cannot be taken over.
    """
    left = find_left(policy, name) if name else None
    kind: type[InterfaceSite] = DirectSite
    if isinstance(policy.backend, DpdkBackend):
        kind = DpdkSite
    elif policy.mode == "shared":
        kind = SharedSite
    return kind(policy, name, left)

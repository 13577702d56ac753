# SPDX-License-Identifier: Apache-2.0
"""Direct mode: the AF_XDP sockets of an interface, handed to one application."""

from __future__ import annotations

import time
from typing import Any

from bypass._core import ffi, lib
from bypass.access import Quota
from bypass.afxdp import AfxdpDevice, interface_queues
from bypass.broker.afxdp import AfxdpSite
from bypass.broker.memory import AppMemory
from bypass.broker.takeover import Left
from bypass.policy import Policy

TAKE_NS = 20_000_000
"""What an application has to give frames to a new queue, before packets come there."""


class DirectSite(AfxdpSite):
    """An interface that one application at a time uses directly: a grant equal to CAP_NET_RAW on it."""

    mode = "direct"
    device: int = lib.APP_DEV_AFXDP

    def __init__(self, policy: Policy, name: str = "", left: Left | None = None) -> None:
        super().__init__(policy, name, left)
        self._owner = 0
        self._device: AfxdpDevice | None = None  # handed over
        if left:
            self._go_on(left)

    def _go_on(self, left: Left) -> None:
        super()._go_on(left)
        for app, device in left.apps:
            self._owner, self.queues = app.number, tuple(device["queues"])
            self.fds = dict(zip(device["sockets"], app.fds, strict=True))
            self.device_mode, self.device_reason = device["mode"], device["reason"]

    def _kept(self) -> dict[str, Any]:
        return super()._kept() | {"sockets": list(self.fds)}

    # ---- devices
    def busy(self) -> bool:
        return self._owner != 0

    def open(self, memory: AppMemory, owner: int, quota: Quota) -> list[int]:
        b = self.backend
        device = AfxdpDevice(
            self.ifname,
            queues="all" if b.queues is None else b.queues,
            mode=b.mode,
            ring_size=b.ring_size,
            frames=self.frames(quota),
            frame_size=b.frame_size,
            bind_wait_s=0,
            memory=memory,
        )
        try:
            self._describe(device, memory.header)
            self.device_mode, self.device_reason = device.mode, device.mode_reason
            self.queues = device.queue_numbers
            fds = device.hand_over()
        finally:
            device.close()
        for queue, fd in fds.items():
            self.steering.set_socket(0, queue, fd)
        self.fds, self._owner, self._device = fds, owner, device
        self.holder.begin(owner)
        return list(fds.values())

    def frames(self, quota: Quota) -> int | None:
        if quota.frames is None:
            return self.backend.frames
        queues = self.backend.queues
        count = interface_queues(self.ifname) if queues is None else len(queues)
        return min(quota.frames, self.backend.default_frames(count))

    def _describe(self, device: AfxdpDevice, header: Any) -> None:
        header.mtu = device.mtu
        header.mac = bytes(ffi.buffer(device.netdev.mac))
        header.ifname = self.ifname.encode()

    def _take_queues(self, unserved: range) -> str:
        if len(self.fds) > len(self.queues):
            for queue in range(len(self.queues), len(self.fds)):
                self.steering.set_socket(0, queue, self.fds[queue])
            self._serve(range(len(self.fds)))
            return self.trouble  # of those that are still to come
        if self._device is None:
            return (
                f"{self.ifname} has got queues, and its application was taken over from a broker that was killed: live "
                "connections stall there, and new ones are the kernel's, before it is started anew"
            )
        self._queues_ns = time.monotonic_ns() + TAKE_NS
        for number in unserved:
            self.fds[number] = self._device.more_socket(number, unserved.stop, self.fds[0])
            self.told.queue(self._owner, number, unserved.stop, self.fds[number])
        return ""

    def close_device(self, owner: int) -> None:
        if owner == self._owner:
            for queue in self.queues:
                self.steering.clear_socket(0, queue)
            self.holder.end(owner)
            self.fds, self._owner, self._device = {}, 0, None
            self.queues, self.trouble = (), ""

# SPDX-License-Identifier: Apache-2.0
"""Raw access: batches of whole Ethernet frames in and out of a netdev, for those who bring their own protocol.

    with bypass.raw.open_port("policy.yaml", [("udp", "192.0.2.10", 5000)]) as port:
        while True:
            for frame in port.recv():
                port.send([answer(frame.data)], queue=frame.queue)

What lives here: `RawPort` over any netdev (AF_XDP, DPDK or simulated), and `open_port()`, which steers flows of a
policy into one. Frames are copied, a batch at a time in C (bypass/afxdp/raw.c). A netdev has one user: not a RawPort
and a stack.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bypass._core import ffi, lib
from bypass.errors import DeviceError, SteeringError

if TYPE_CHECKING:
    from bypass.policy import Policy
    from bypass.status import StatusServer
    from bypass.steering_api import Steers

__all__ = ["Endpoint", "Frame", "RawPort", "open_port"]

Endpoint = tuple[str, str | None, int] | tuple[str, str | None, int, str, int]
"""("udp" or "tcp", local address or None for any, local port), and a peer's address and port for its flow alone."""

MAX_BATCH = 1024
IP_FREEBIND = 15  # linux/in.h; the socket module has it from 3.13 on


@dataclass(frozen=True, slots=True)
class Frame:
    """A received Ethernet frame.

    Attributes:
        data: from the destination MAC address on, without checksum (FCS).
        queue: index of the queue it came by; an answer is best sent by the same.
        entry, rule: live entry and policy rule (in file order, from 0) that steered it; None: steered by none.
        hash: of its flow, as the steering program computed it (not keyed); 0 without a verdict.
    """

    data: bytes
    queue: int
    entry: int | None
    rule: int | None
    hash: int


class RawPort:
    """Sends and receives frames on a netdev. A context manager; not thread-safe.

    Args:
        device: `bypass.afxdp.AfxdpDevice`, `bypass.dpdk_backend.DpdkDevice`, a port of a simulated wire
            (`bypass.sim`), or a cffi `struct bypass_netdev *`.
        on_close: called once by `close()`, for what the port stands on.
        turn: called with the time before frames are received, for devices that have to know it.

    Attributes:
        device: as given.
        steering: the steering that feeds the port, for counters and for more endpoints; None: not of `open_port()`.
        status: answers `bypass flows` and `bypass stats` while recv() waits; in an event loop, poll() it when its
            descriptor is readable. None: not of `open_port()`.
    """

    def __init__(
        self,
        device: Any,
        *,
        on_close: Callable[[], object] | None = None,
        turn: Callable[[int], object] | None = None,
    ) -> None:
        self.device = device  # keeps the owner of the memory alive
        self.steering: Steers | None = None
        self.status: StatusServer | None = None
        self._netdev: Any = getattr(device, "netdev", None) or getattr(device, "dev", device)
        self._on_close = on_close
        self._turn = turn
        self._buffer = ffi.new("uint8_t[]", MAX_BATCH * self._netdev.stride)
        self._frames = ffi.new("struct rawport_frame[]", MAX_BATCH)

    # ---- Receiving ---------------------------------------------------------------------------------------------
    def recv(self, max_frames: int = 64, timeout: float | None = None) -> list[Frame]:
        """Receives what is there, in order per queue.

        Args:
            max_frames: at most this many, 1..1024.
            timeout: seconds to wait for the first frame; None: forever; 0: do not wait.

        Returns:
            At least one frame, or none when the timeout passed.

        Raises:
            DeviceError: the interface is gone.
            OSError: ENOTSUP, a device that cannot be waited for (a simulated one) and a timeout that is not 0.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._turn is not None:
                self._turn(time.monotonic_ns())
            n = int(
                lib.rawport_recv(
                    self._live(),
                    self._buffer,
                    len(self._buffer),
                    self._frames,
                    max(1, min(max_frames, MAX_BATCH)),
                )
            )
            if n > 0:
                return [self._frame(self._frames[i]) for i in range(n)]
            if n < 0:
                self._fail(-n)
            if timeout == 0:
                if not self._dozes():  # the caller may sleep on fileno() now
                    return []
            elif not self._wait(deadline):
                return []

    def _frame(self, info: Any) -> Frame:
        data = bytes(ffi.buffer(self._buffer + info.off, info.len))
        if info.flags & lib.BYPASS_RX_VERDICT:
            return Frame(data, info.queue, info.entry, info.rule, info.hash)
        return Frame(data, info.queue, None, None, 0)

    def _dozes(self) -> bool:
        """Tells the device that somebody is about to sleep on its descriptor. Whether frames have come already."""
        sleep = self._live().ops.sleep
        return bool(sleep) and int(sleep(self._netdev)) > 0

    def _wait(self, deadline: float | None) -> bool:
        """Sleeps until frames arrive or the deadline (False) has passed."""
        fds = [self.fileno()] if self.status is None else [self.fileno(), self.status.fileno()]
        if self._dozes():
            return True
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = select.select(fds, [], [], left)[0]
            if self.status is not None and fds[1] in ready:
                self.status.poll()
            if fds[0] in ready or not ready:
                return bool(ready)

    # ---- Sending -----------------------------------------------------------------------------------------------
    def send(self, frames: Sequence[bytes], queue: int = 0, timeout: float | None = None) -> int:
        """Sends Ethernet frames in order, by one queue (modulo the device's number of queues).

        Args:
            frames: each from the destination MAC address on, complete with checksums, 14 bytes to MTU + 18.
            queue: index of the queue.
            timeout: seconds to go on while the rings are full; None: forever; 0: take what fits now.

        Returns:
            How many were handed to the device. Fewer than given only when the timeout passed.

        Raises:
            DeviceError: the interface is gone.
            OSError: ENETDOWN (down at the moment), EMSGSIZE or EINVAL (the length of a frame). Frames before the
                one at fault have been sent.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        sent, pause = 0, 0.00005
        while sent < len(frames):
            n = self._send_batch(frames[sent : sent + MAX_BATCH], queue)
            sent += n
            if n:
                pause = 0.00005
                continue
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(pause, left))  # completions announce themselves by no descriptor
            pause = min(2 * pause, 0.005)
        return sent

    def _send_batch(self, frames: Sequence[bytes], queue: int) -> int:
        data = b"".join(frames)
        lengths = ffi.new("uint32_t[]", [len(f) for f in frames])
        n = int(lib.rawport_send(self._live(), ffi.from_buffer(data), lengths, len(frames), queue))
        if n < 0:
            self._fail(-n)
        return n

    # ---- The port ----------------------------------------------------------------------------------------------
    def _live(self) -> Any:
        if self._netdev is None:
            raise DeviceError("this raw port is closed")
        return self._netdev

    def _fail(self, err: int) -> None:
        if err == errno.ENXIO:
            raise DeviceError("the interface is gone")
        raise OSError(err, os.strerror(err))

    def fileno(self) -> int:
        """A descriptor that is readable when frames wait, for selectors and event loops.

        Raises:
            OSError: ENOTSUP, the device has none (a simulated one).
        """
        fd = int(self._live().ops.wait_fd(self._netdev))
        if fd < 0:
            self._fail(-fd)
        return fd

    @property
    def mac(self) -> bytes:
        """The device's MAC address, 6 bytes."""
        return bytes(ffi.buffer(self._live().mac))

    @property
    def mtu(self) -> int:
        """The largest IP packet, bytes."""
        return int(self._live().mtu)

    @property
    def queues(self) -> int:
        return int(self._live().queues)

    def close(self) -> None:
        """Ends the port and what `open()` made for it. Idempotent."""
        if self._netdev is None:
            return
        self._netdev = None
        if self._on_close is not None:
            self._on_close()

    def __enter__(self) -> RawPort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_port(
    policy: str | os.PathLike[str] | Policy, endpoints: Sequence[Endpoint], **options: Any
) -> RawPort:
    """Steers flows off the interface of a policy into a raw port; `close()` gives them back to the kernel.

    Each port is reserved in the kernel by a bound socket, so that no other program takes it meanwhile. Answers to ARP
    and ICMP echo stay the kernel's (on a DPDK port the kernel gets its
    frames, and sends its own, while recv() is called; with `exception: none` recv() returns them too). Packets count as
    ours when they are sent to an address that the host has now.

    Args:
        policy: a policy or the path of one. Its rules have to grant the endpoints.
        endpoints: whose packets to take.
        options: further arguments of the device; mode, queues and sizes are the policy's.

    Raises:
        PolicyError, GrantError, DeviceError, SteeringError, ForeignProgramError, PrivilegeError.
        OSError: EADDRINUSE, a program of the kernel's listens on that port.
    """
    from bypass.backends import attach
    from bypass.policy import Policy, load_policy
    from bypass.status import Snapshot, StatusServer

    policy = policy if isinstance(policy, Policy) else load_policy(policy)
    ifname = policy.interface
    with ExitStack() as undo:
        attached = attach(policy, **options)
        undo.callback(attached.close)
        for endpoint in endpoints:
            undo.callback(_reserve(endpoint, policy.backend.kind == "dpdk").close)
        attached.tell_addresses()
        for endpoint in endpoints:
            _make_live(attached.steering, endpoint)
        snapshot = Snapshot(attached.steering, attached.device, name="raw", more=attached.counters)
        status = undo.enter_context(StatusServer(ifname, snapshot))
        port = RawPort(attached.netdev, on_close=undo.pop_all().close, turn=attached.turn)
        port.device = attached.device
        port.steering, port.status = attached.steering, status
        return port


def _make_live(steering: Steers, endpoint: Endpoint) -> None:
    """TCP connections that the kernel holds on the port at the moment stay the kernel's."""
    from bypass.netlink import NETLINK_SOCK_DIAG, NetlinkSocket, tcp_connections

    proto, (_, laddr, lport, *_) = _kind_of(endpoint[0]), endpoint
    if len(endpoint) == 5:
        steering.add_endpoint(proto, laddr, lport, endpoint[3], endpoint[4])
        return
    with NetlinkSocket(NETLINK_SOCK_DIAG) as diag:
        drain = proto == socket.IPPROTO_TCP and tcp_connections(diag, lport) > 0
    steering.add_endpoint(proto, laddr, lport, drain=drain)


def _kind_of(kind: str) -> int:
    """socket.IPPROTO_*."""
    kinds = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
    if kind not in kinds:
        raise SteeringError(f"an endpoint begins with 'tcp' or 'udp', not {kind!r}")
    return kinds[kind]


def _reserve(endpoint: Endpoint, anywhere: bool) -> socket.socket:
    """A kernel socket that holds the port and never receives from it. SO_REUSEADDR lets connections that the kernel
    still has on the port live on. `anywhere`: the address need not be the kernel's."""
    tcp = _kind_of(endpoint[0]) == socket.IPPROTO_TCP
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    try:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if tcp else socket.SO_RCVBUF, int(tcp))
        s.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, int(anywhere))
        s.bind((endpoint[1] or "", endpoint[2]))
    except OSError as e:
        s.close()
        where = f"{endpoint[0]} {endpoint[1] or '*'}:{endpoint[2]}"
        raise OSError(e.errno, f"{where}: {os.strerror(e.errno or 0)}") from e
    return s

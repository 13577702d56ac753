# SPDX-License-Identifier: Apache-2.0
"""Backend: the kernel of this machine, behind a TUN device in a network namespace of its own, in real time.

The calling process moves into a new namespace: use a child process for each script (oracle.py does). Segments that the
kernel sends are read from a packet socket, whose timestamps the kernel takes when they leave, so that a busy machine
does not make them late. Calls that block run in a thread.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import pyroute2

from .infos import CodeError
from .lang import SECOND, Script, ScriptError
from .packets import PEER, PEER_PORT, PORT, US
from .play import CONSTANTS, Stuck

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
SO_TIMESTAMPNS = 35
TCP_CONGESTION = 13
STUCK_S = 1.0  # a call that is not said to block has to be back within
DEVICE = "tun0"

# struct tcp_info of linux/tcp.h: names in order, by size
INFO_BYTES = ("state", "ca_state", "retransmits", "probes", "backoff", "options", "wscales", "app_limited")
INFO_WORDS = (
    "rto", "ato", "snd_mss", "rcv_mss", "unacked", "sacked", "lost", "retrans", "fackets", "last_data_sent",
    "last_ack_sent", "last_data_recv", "last_ack_recv", "pmtu", "rcv_ssthresh", "rtt", "rttvar", "snd_ssthresh",
    "snd_cwnd", "advmss", "reordering", "rcv_rtt", "rcv_space", "total_retrans",
)  # fmt: skip
INFO_QUADS = ("pacing_rate", "max_pacing_rate", "bytes_acked", "bytes_received")
INFO_WORDS_2 = ("segs_out", "segs_in", "notsent_bytes", "min_rtt", "data_segs_in", "data_segs_out")
INFO_QUADS_2 = ("delivery_rate", "busy_time", "rwnd_limited", "sndbuf_limited")
INFO_WORDS_3 = ("delivered", "delivered_ce")
INFO_QUADS_3 = ("bytes_sent", "bytes_retrans")
INFO_WORDS_4 = ("dsack_dups", "reord_seen", "rcv_ooopack", "snd_wnd", "rcv_wnd", "rehash")
INFO_FORMAT = "=8B24I4Q6I4Q2I2Q6I"
INFO_NAMES = (
    INFO_BYTES
    + INFO_WORDS
    + INFO_QUADS
    + INFO_WORDS_2
    + INFO_QUADS_2
    + INFO_WORDS_3
    + INFO_QUADS_3
    + INFO_WORDS_4
)

# Common ground of all scripts: what would make the kernel's answers depend on the machine or on its history is off.
DEFAULTS = {
    "net.ipv4.tcp_no_metrics_save": "1",
    "net.ipv4.tcp_wmem": "4096 262144 4194304",
    "net.ipv4.tcp_rmem": "4096 540000 15728640",
    "net.ipv4.tcp_comp_sack_nr": "0",  # compressed ACKs (4.18) leave later than the segment that draws them
    "net.ipv6.conf.all.disable_ipv6": "1",
    "net.ipv6.conf.default.disable_ipv6": "1",
}
LIBC = ctypes.CDLL(None, use_errno=True)


def sysctl(name: str, value: str) -> None:
    path = Path("/proc/sys") / name.replace(".", "/")
    path.write_text(value)


class Job:
    """A call in a thread."""

    def __init__(self, backend: Linux, op: str, args: list[Any]) -> None:
        self.done, self.at_ns = False, 0
        self.result: Any = None
        self._backend, self._op, self._args = backend, op, args
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def here(self) -> None:
        """In this thread."""
        self._run()

    def _run(self) -> None:
        try:
            self.result = getattr(self._backend, f"do_{self._op}")(*self._args)
        except (OSError, CodeError) as e:
            self.result = e
        self.at_ns = self._backend.now()
        self.done = True
        self._ended.set()

    def wait(self, seconds: float) -> bool:
        return self._ended.wait(seconds)


class Linux:
    flaky = True
    late_share = 0.15  # the granularity of long timers (kernel/time/timer.c)

    def __init__(self, script: Script, tolerance_ms: int = 20) -> None:
        self.early_ns = self.late_ns = tolerance_ms * 1_000_000
        self.cc = script.last("cc", "reno")
        self.sockets: dict[int, socket.socket] = {}
        self.next_fd = 0
        self.queue: deque[tuple[int, bytes]] = deque()
        if LIBC.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        self.tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(self.tun, TUNSETIFF, struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
        self._configure(script)
        self.sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
        self.sniffer.bind((DEVICE, 0x0003))
        self.sniffer.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.sniffer.setblocking(False)
        signal.signal(signal.SIGALRM, self._alarm)
        self.begin_now()

    def begin_now(self) -> None:
        """The script's time begins."""
        self.start = time.monotonic_ns()
        self.real = time.time_ns() - self.start  # a packet's time is the real-time clock's

    def _configure(self, script: Script) -> None:
        for name, value in DEFAULTS.items():
            sysctl(name, value)
        for said in script.directives.get("kernel", []):
            name, _, value = said.partition("=")
            if not value:
                raise ScriptError(str(script.path), 1, 1, f"kernel: {said!r} is not NAME=VALUE")
            if name == "cc":
                self.cc = value
            else:
                sysctl(name.strip(), value.strip())
        with pyroute2.IPRoute() as ip:
            index = ip.link_lookup(ifname=DEVICE)[0]
            ip.addr("add", index=index, address=US, prefixlen=24)
            # One segment a packet: deferral for the sake of segmentation offload is no part of TCP.
            ip.link("set", index=index, state="up", mtu=script.number("mtu", 1500), gso_max_segs=1)
            ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")

    def _alarm(self, _signal: int, _frame: FrameType | None) -> None:
        raise Stuck("the call blocks")

    # ---- the clock and the wire
    def now(self) -> int:
        return time.monotonic_ns() - self.start

    def wait(self, until_ns: int) -> None:
        while (left := until_ns - self.now()) > 0:
            self._read(left / SECOND)

    def inject(self, packet: bytes) -> int:
        at = self.now()
        os.write(self.tun, packet)
        return at

    def _read(self, timeout_s: float) -> None:
        """Collects what the kernel sent; waits for it so long at most."""
        readable, _, _ = select.select([self.sniffer.fileno(), self.tun], [], [], max(0.0, timeout_s))
        if self.tun in readable:
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.read(self.tun, 65536)
        if self.sniffer.fileno() in readable:
            with contextlib.suppress(BlockingIOError):
                while True:
                    data, extra, _, source = self.sniffer.recvmsg(65536, 128)
                    if source[2] != socket.PACKET_OUTGOING:
                        continue
                    seconds, nano = struct.unpack("=qq", extra[0][2])
                    self.queue.append((seconds * SECOND + nano - self.real - self.start, data))

    def heard(self, until_ns: int) -> tuple[int, bytes] | None:
        self._read(0)
        while not self.queue and (left := until_ns - self.now()) > 0:
            self._read(left / SECOND)
        return self.queue.popleft() if self.queue else None

    def unread(self, packet: tuple[int, bytes]) -> None:
        self.queue.appendleft(packet)

    # ---- calls
    def begin(self, op: str, args: list[Any], blocks: bool) -> Job:
        job = Job(self, op, args)
        if blocks:
            job.start()
            return job
        signal.setitimer(signal.ITIMER_REAL, STUCK_S)
        try:
            job.here()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return job

    def finish(self, job: Job, until_ns: int) -> bool:
        while not job.done and (left := until_ns - self.now()) > 0:
            job.wait(left / SECOND)
        if isinstance(job.result, CodeError):
            raise job.result
        return job.done

    def adopt(self, made: socket.socket) -> int:
        self.next_fd += 1
        self.sockets[self.next_fd] = made
        return self.next_fd

    def do_socket(self, kind: int) -> int:
        made = socket.socket(socket.AF_INET, kind)
        made.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, self.cc.encode())
        return self.adopt(made)

    def do_bind(self, fd: int) -> int:
        self.sockets[fd].bind(("0.0.0.0", PORT))
        return 0

    def do_listen(self, fd: int, backlog: int) -> int:
        self.sockets[fd].listen(backlog)
        return 0

    def do_accept(self, fd: int) -> int:
        # not accept(): Python's looks at the timeout of its own
        raw, _ = self.sockets[fd]._accept()  # type: ignore[attr-defined]
        made = socket.socket(fileno=raw)
        os.set_blocking(raw, True)
        return self.adopt(made)

    def do_connect(self, fd: int) -> int:
        s = self.sockets[fd]
        if s.getsockname()[1] == 0:
            s.bind((US, PORT))
        s.connect((PEER, PEER_PORT))
        return 0

    def do_send(self, fd: int, data: bytes, flags: int) -> int:
        return self.sockets[fd].send(data, flags | socket.MSG_NOSIGNAL)

    def do_sendto(self, fd: int, data: bytes, flags: int) -> int:
        s = self.sockets[fd]
        if s.getsockname()[1] == 0:
            s.bind((US, PORT))
        return s.sendto(data, flags | socket.MSG_NOSIGNAL, (PEER, PEER_PORT))

    def do_recv(self, fd: int, n: int, flags: int) -> bytes:
        return self.sockets[fd].recv(n, flags)

    def do_shutdown(self, fd: int, how: int) -> int:
        self.sockets[fd].shutdown(how)
        return 0

    def do_close(self, fd: int) -> int:
        self.sockets.pop(fd).close()
        return 0

    def do_fcntl(self, fd: int, what: int, value: int) -> int:
        return fcntl.fcntl(self.sockets[fd], what, value)

    def do_poll(self, fds: list[tuple[int, int]], timeout_ms: int) -> tuple[int, list[int]]:
        poll = select.poll()
        for fd, events in fds:
            poll.register(self.sockets[fd], events)
        ready = dict(poll.poll(timeout_ms))
        found = [ready.get(self.sockets[fd].fileno(), 0) for fd, _ in fds]
        return sum(map(bool, found)), found

    def do_ioctl(self, fd: int, what: int) -> tuple[int, int]:
        value = array.array("i", [0])
        fcntl.ioctl(self.sockets[fd], what, value)
        return 0, value[0]

    def do_setsockopt(self, fd: int, level: int, name: str, value: Any) -> int:
        if isinstance(value, dict):
            value = struct.pack("=ii", value["onoff"], value["linger"])
        elif isinstance(value, str):
            value = value.encode()
        self.sockets[fd].setsockopt(level, self._option(name), value)
        return 0

    def do_getsockopt(self, fd: int, level: int, name: str, shape: Any) -> tuple[int, Any]:
        s, option = self.sockets[fd], self._option(name)
        if isinstance(shape, dict):
            onoff, linger = struct.unpack("=ii", s.getsockopt(level, option, 8))
            return 0, {"onoff": onoff, "linger": linger}
        if name == "TCP_CONGESTION":
            return 0, s.getsockopt(level, option, 16).rstrip(b"\0").decode()
        return 0, s.getsockopt(level, option)

    def _option(self, name: str) -> int:
        if name not in CONSTANTS:
            raise CodeError(f"no such option is known here: {name}")
        return CONSTANTS[name]

    # ---- TCP_INFO
    def info(self, fd: int, name: str) -> int:
        size = struct.calcsize(INFO_FORMAT)
        raw = self.sockets[fd].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
        values = dict(zip(INFO_NAMES, struct.unpack(INFO_FORMAT, raw), strict=True))
        values["snd_wscale"], values["rcv_wscale"] = values["wscales"] & 15, values["wscales"] >> 4
        word = name.removeprefix("tcpi_")
        if word not in values:
            raise CodeError(f"TCP_INFO has no {name}")
        return int(values[word])

    def close(self) -> None:
        """The namespace goes with the process."""

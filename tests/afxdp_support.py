# SPDX-License-Identifier: Apache-2.0
"""What the AF_XDP tests share: an XDP program that follows no policy, and the lab's two ends in Python."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from bypass import libbpf, netns
from bypass.afxdp import AfxdpDevice
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, SERVER_IP, Lab
from bypass.raw import Frame, RawPort

VERDICT_MAGIC = 0x42595053
XDP_PASS = 2
BPF_PROG_TYPE_RAW_TRACEPOINT = 17
PORT = 9000

Insn = tuple[str | None, int, int, int, int | str, int]  # label, code, dst, src, offset or label, immediate


def _assemble(insns: Sequence[Insn]) -> bytes:
    """struct bpf_insn of linux/bpf.h; jumps name the label of their target. LD_IMM64 is written with its second
    half."""
    at = {insn[0]: n for n, insn in enumerate(insns) if insn[0]}
    code = b""
    for n, (_, op, dst, src, off, imm) in enumerate(insns):
        distance = at[off] - n - 1 if isinstance(off, str) else off
        code += struct.pack("=BBhi", op, src << 4 | dst, distance, imm)
    return code


def redirect_program(xsks_fd: int, verdict: tuple[int, int, int] | None) -> bytes:
    """XDP: IPv4 UDP and TCP go to the socket of their queue in the map, with a verdict (entry, rule, hash) in front if
    one is given; everything else passes."""
    mov, mov_r, add, ldw, ldh, ldb, stw = 0xB7, 0xBF, 0x07, 0x61, 0x69, 0x71, 0x62
    jne, jeq, jgt_r, call, leave, ld64 = 0x55, 0x15, 0x2D, 0x85, 0x95, 0x18
    code: list[Insn] = [
        (None, mov_r, 6, 1, 0, 0),  # r6 = ctx
        (None, ldw, 2, 6, 0, 0),  # r2 = data
        (None, ldw, 3, 6, 4, 0),  # r3 = data_end
        (None, mov_r, 4, 2, 0, 0),
        (None, add, 4, 0, 0, 34),
        (None, jgt_r, 4, 3, "pass", 0),
        (None, ldh, 4, 2, 12, 0),
        (None, jne, 4, 0, "pass", socket.htons(0x0800)),
        (None, ldb, 4, 2, 23, 0),
        (None, jeq, 4, 0, "take", socket.IPPROTO_UDP),
        (None, jne, 4, 0, "pass", socket.IPPROTO_TCP),
        ("take", mov, 0, 0, 0, 0),
    ]
    if verdict:
        code += [
            (None, mov_r, 1, 6, 0, 0),
            (None, mov, 2, 0, 0, -16),
            (None, call, 0, 0, 0, 54),  # bpf_xdp_adjust_meta
            (None, jne, 0, 0, "pass", 0),
            (None, ldw, 2, 6, 8, 0),  # data_meta
            (None, ldw, 3, 6, 0, 0),
            (None, mov_r, 4, 2, 0, 0),
            (None, add, 4, 0, 0, 16),
            (None, jgt_r, 4, 3, "pass", 0),
        ]
        for offset, value in zip((0, 4, 8, 12), (VERDICT_MAGIC, *verdict), strict=True):
            code.append((None, stw, 2, 0, offset, value))
    code += [
        (None, ld64, 1, 1, 0, xsks_fd),
        (None, 0, 0, 0, 0, 0),
        (None, ldw, 2, 6, 16, 0),  # rx_queue_index
        (None, mov, 3, 0, 0, XDP_PASS),
        (None, call, 0, 0, 0, 51),  # bpf_redirect_map
        (None, leave, 0, 0, 0, 0),
        ("pass", mov, 0, 0, 0, XDP_PASS),
        (None, leave, 0, 0, 0, 0),
    ]
    return _assemble(code)


class Redirect:
    """Attaches redirect_program() to an interface of this network namespace, for sockets by queue."""

    def __init__(
        self,
        ifname: str,
        fds: dict[int, int],
        *,
        verdict: tuple[int, int, int] | None = None,
        skb: bool = False,
    ) -> None:
        self.map = libbpf.Map(libbpf.MAP_XSKMAP, "xsks", 4, 4, 64)
        self.prog: Any = None
        self.link: Any = None
        log: list[str] = []
        try:
            for queue, fd in fds.items():
                self.map.put(struct.pack("=I", queue), struct.pack("=I", fd))
            code = redirect_program(self.map.fd, verdict)
            self.prog = libbpf.Prog(libbpf.PROG_XDP, "redirect_all", code, libbpf.ATTACH_XDP, log)
            flags = libbpf.XDP_SKB_MODE if skb else libbpf.XDP_DRV_MODE
            self.link = libbpf.Link(self.prog, socket.if_nametoindex(ifname), libbpf.ATTACH_XDP, flags)
        except OSError as e:
            self.close()
            raise AssertionError(f"{e}: {''.join(log)}") from e

    def close(self) -> None:
        for owned in (self.link, self.prog, self.map):
            if owned is not None:
                owned.close()

    def __enter__(self) -> Redirect:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RedirectErrors:
    """Counts the tracepoint xdp:xdp_redirect_err for one map: the only place where the kernel shows packets that a
    socket refused because they came by another queue."""

    def __init__(self, map_fd: int) -> None:
        mov, mov_r, add, ldd, stw, xadd = 0xB7, 0xBF, 0x07, 0x79, 0x62, 0xDB
        jne, jeq, call, leave, ld64 = 0x55, 0x15, 0x85, 0x95, 0x18
        self.counts = libbpf.Map(libbpf.MAP_ARRAY, "errors", 4, 8, 1)
        info = Path(f"/proc/self/fdinfo/{map_fd}").read_text()
        map_id = int(info.split("map_id:")[1].split()[0])
        code: list[Insn] = [
            (
                None,
                ldd,
                2,
                1,
                5 * 8,
                0,
            ),  # include/trace/events/xdp.h: dev, xdp, tgt, err, map_type, map_id, index
            (None, jne, 2, 0, "out", map_id),
            (None, stw, 10, 0, -4, 0),
            (None, mov_r, 2, 10, 0, 0),
            (None, add, 2, 0, 0, -4),
            (None, ld64, 1, 1, 0, self.counts.fd),
            (None, 0, 0, 0, 0, 0),
            (None, call, 0, 0, 0, 1),  # bpf_map_lookup_elem
            (None, jeq, 0, 0, "out", 0),
            (None, mov, 1, 0, 0, 1),
            (None, xadd, 0, 1, 0, 0),
            ("out", mov, 0, 0, 0, 0),
            (None, leave, 0, 0, 0, 0),
        ]
        self.prog = libbpf.Prog(BPF_PROG_TYPE_RAW_TRACEPOINT, "count_errors", _assemble(code), 0, [])
        self.link = ctypes.CDLL("libbpf.so.1").bpf_raw_tracepoint_open(b"xdp_redirect_err", self.prog.fd)
        assert self.link >= 0

    def count(self) -> int:
        value = self.counts.get(bytes(4))
        assert value is not None
        return int.from_bytes(value, "little")

    def close(self) -> None:
        os.close(self.link)
        self.prog.close()
        self.counts.close()

    def __enter__(self) -> RedirectErrors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def set_queues(lab: Lab, count: int) -> None:
    """Of both ends, as `ethtool -L IFACE combined COUNT` does. A veth's receive queues are the peer's to fill."""
    for ns, ifname in ((lab.server_ns, SERVER_IFNAME), (lab.client_ns, CLIENT_IFNAME)):
        subprocess.run(
            ["ip", "netns", "exec", ns, "ethtool", "-L", ifname, "rx", str(count), "tx", str(count)],
            check=True,
        )


@contextmanager
def udp_clients(lab: Lab) -> Iterator[Callable[[], socket.socket]]:
    """Makes UDP sockets of the client, connected to the server's PORT."""
    with ExitStack() as stack:

        def make() -> socket.socket:
            with netns.entered(lab.client_ns):
                s = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            s.settimeout(5)
            s.connect((SERVER_IP, PORT))
            return s

        yield make


@contextmanager
def attached(
    lab: Lab, *, verdict: tuple[int, int, int] | None = None, skb: bool = False, **options: Any
) -> Iterator[tuple[AfxdpDevice, RawPort]]:
    """The server's interface open, all its IPv4 UDP and TCP steered into it."""
    settings = {"ring_size": 256, "frames": 4096} | options
    with ExitStack() as stack:
        with netns.entered(lab.server_ns):
            dev = stack.enter_context(AfxdpDevice(SERVER_IFNAME, **settings))
            stack.enter_context(Redirect(SERVER_IFNAME, dev.fds, verdict=verdict, skb=skb))
        yield dev, stack.enter_context(RawPort(dev))


def xdp_socket(fd: int) -> socket.socket:
    """The device's socket once more, for its options."""
    return socket.socket(44, socket.SOCK_RAW, 0, fileno=os.dup(fd))


def answer(frame: bytes) -> bytes:
    """UDP or TCP over IPv4 with both ends swapped; no checksum changes by it."""
    return b"".join(
        frame[a:b] for a, b in ((6, 12), (0, 6), (12, 26), (30, 34), (26, 30), (36, 38), (34, 36), (38, None))
    )


def sum16(data: bytes) -> int:
    """The Internet checksum's sum (RFC 1071), not complemented."""
    data += bytes(len(data) % 2)
    n = sum(struct.unpack(f">{len(data) // 2}H", data))
    while n >> 16:
        n = (n & 0xFFFF) + (n >> 16)
    return n


def with_data(frame: bytes, data: bytes) -> bytes:
    """A UDP frame with other data, and no UDP checksum."""
    ip = frame[14:16] + (28 + len(data)).to_bytes(2, "big") + frame[18:24] + b"\0\0" + frame[26:34]
    ip = ip[:10] + (~sum16(ip) & 0xFFFF).to_bytes(2, "big") + ip[12:]
    return frame[:14] + ip + frame[34:38] + (8 + len(data)).to_bytes(2, "big") + b"\0\0" + data


def payload(frame: Frame | bytes) -> bytes:
    data = frame.data if isinstance(frame, Frame) else frame
    return data[42 : 14 + int.from_bytes(data[16:18], "big")]


def receive(port: RawPort, count: int) -> list[Frame]:
    """Exactly that many frames, or fewer when none comes for 2 s."""
    got: list[Frame] = []
    while len(got) < count:
        more = port.recv(min(64, count - len(got)), timeout=2)
        if not more:
            break
        got += more
    return got


def link(ns: str, ifname: str, **what: Any) -> None:
    from pyroute2 import IPRoute

    with IPRoute(netns=ns) as ip:
        ip.link("set", index=ip.link_lookup(ifname=ifname)[0], **what)


def total(dev: AfxdpDevice, name: str) -> int:
    return sum(q[name] for q in dev.statistics().values())

# SPDX-License-Identifier: Apache-2.0
"""Packets lost at random in a lab, in both directions, by two BPF programs on the client's interface."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

from bypass import libbpf, netns
from bypass.lab import CLIENT_IFNAME, Lab

__all__ = ["loss"]


def insn(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    return struct.pack("=BBhi", code, src << 4 | dst, off, imm)


XDP_DROP, XDP_PASS, TCX_PASS = 1, 2, 0  # linux/bpf.h
NOWHERE = 0x7FFFFFFF  # no interface has this number
REDIRECT = 23  # bpf_redirect()
BY_XDP = insn(0xB7, 0, 0, 0, XDP_DROP)  # r0 = XDP_DROP
# A plain drop at this place is told to the kernel's TCP, which sends again at once: no loss that has to be found. What
# is redirected to an interface that is not there has left, as far as TCP knows.
BY_TC = insn(0xB7, 1, 0, 0, NOWHERE) + insn(0xB7, 2) + insn(0x85, 0, 0, 0, REDIRECT)


def _lossy_code(counters: libbpf.Map, per_million: int, drop: bytes, go_on: int) -> bytes:
    """BPF: counters[1]++, and with the given probability counters[0]++ and drop. Instructions of linux/bpf.h."""

    def count(key: int) -> bytes:
        return b"".join((
            insn(0x62, 10, 0, -4, key),  # *(u32 *)(fp - 4) = key
            insn(0x18, 1, 1, 0, counters.fd), insn(0),  # r1 = map
            insn(0xBF, 2, 10), insn(0x07, 2, 0, 0, -4),  # r2 = fp - 4
            insn(0x85, 0, 0, 0, 1),  # r0 = map_lookup_elem()
            insn(0x15, 0, 0, 2, 0),  # if !r0 skip
            insn(0xB7, 1, 0, 0, 1), insn(0xDB, 0, 1, 0, 0),  # lock *(u64 *)r0 += 1
        ))  # fmt: skip

    threshold = per_million * (1 << 16) // 1_000_000
    random = insn(0x85, 0, 0, 0, 7) + insn(0x57, 0, 0, 0, 0xFFFF)  # r0 = get_prandom_u32() & 0xffff
    dropped = count(0) + drop + insn(0x95)
    jump = insn(0x35, 0, 0, len(dropped) // 8, threshold)  # if r0 >= threshold go on
    return count(1) + random + jump + dropped + insn(0xB7, 0, 0, 0, go_on) + insn(0x95)


@contextlib.contextmanager
def loss(lab: Lab, per_million: int) -> Iterator[dict[str, tuple[int, int]]]:
    """Random loss on the client's interface: an XDP program for what comes from the server, a tc one for what goes
    there. A packet that the kernel segments after tc (GSO) is lost whole: who wants to lose frames switches that off.

    Yields a dict that is filled at the end: {"from_bypass" | "to_bypass": (dropped, seen)}.
    """
    index = netns.run(lab.client_ns, socket.if_nametoindex, CLIENT_IFNAME)
    seen: dict[str, tuple[int, int]] = {}
    with contextlib.ExitStack() as undo:
        counters = {}
        for name, kind, attach, drop, go_on in (
            ("from_bypass", libbpf.PROG_XDP, libbpf.ATTACH_XDP, BY_XDP, XDP_PASS),
            ("to_bypass", libbpf.PROG_SCHED_CLS, libbpf.ATTACH_TCX_EGRESS, BY_TC, TCX_PASS),
        ):
            counters[name] = libbpf.Map(libbpf.MAP_ARRAY, "loss", 4, 8, 2)
            undo.callback(counters[name].close)
            prog = libbpf.Prog(
                kind, "loss", _lossy_code(counters[name], per_million, drop, go_on), attach, []
            )
            undo.callback(prog.close)
            link = netns.run(lab.client_ns, libbpf.Link, prog, index, attach)
            undo.callback(link.close)
        yield seen
        for name, held in counters.items():
            dropped, total = (struct.unpack("=Q", held.get(struct.pack("=I", k)) or b"")[0] for k in (0, 1))
            seen[name] = (dropped, total)

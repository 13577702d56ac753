# SPDX-License-Identifier: Apache-2.0
"""Segments joined into large packets for a device that cuts them up (eth/tso.c), without a device: what one would send
is what was given, whatever that is, and what a stack sends is joined. `fuzz_tso` asks the same of any bytes."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
import wire as w
from c_programs import CFLAGS, run
from hypothesis import example, given
from test_fuzz import TSO, dpdk_headers

IP, TCP = 14, 34
HOSTS = ("10.0.0.1", "10.0.0.2")
MACS = b"\x02\0\0\0\0\x0b\x02\0\0\0\0\x0a"
TIMESTAMPS = b"\x01\x01\x08\x0a" + bytes(range(8))
MOST = 32
"""Segments in a large packet."""


@dataclass(frozen=True)
class Packet:
    """What a driver gets: bytes, of how many frames, where the payload begins, how much of it a segment has."""

    data: bytes
    frames: int
    headers: int
    segment: int


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    so: Path = tmp_path_factory.mktemp("tso") / "tso.so"
    include = ["-Ibypass/include", *TSO, *dpdk_headers()]
    run("gcc", *CFLAGS, "-O1", "-shared", "-fPIC", "tests/c/tso_steps.c", *include, "-o", so)
    return ctypes.CDLL(str(so))


def join(library: ctypes.CDLL, frames: list[bytes], pieces: int, ip_sum: bool) -> list[Packet]:
    """What the driver gets. What it refuses is as it was before."""
    n, whole = len(frames), b"".join(frames)
    lens = (ctypes.c_uint16 * n)(*map(len, frames))
    told = (ctypes.c_uint32 * (4 * n))()
    out = ctypes.create_string_buffer(len(whole))
    packed = library.tso_steps(whole, lens, n, pieces, int(ip_sum), 1, out, told)
    assert out.raw == whole
    assert library.tso_steps(whole, lens, n, pieces, int(ip_sum), 0, out, told) == packed
    found, at = [], 0
    for i in range(packed):
        count, size, headers, segment = told[4 * i : 4 * i + 4]
        found.append(Packet(out.raw[at : at + size], count, headers, segment))
        at += size
    return found


# ---- A device ------------------------------------------------------------------------------------------------------
def with_sums(frame: bytes, ident: int = 0) -> bytes:
    """With right checksums, and this identification."""
    head = (
        frame[IP : IP + 4]
        + struct.pack("!H", ident)
        + frame[IP + 6 : IP + 10]
        + b"\0\0"
        + frame[IP + 12 : TCP]
    )
    segment = frame[TCP : TCP + 16] + b"\0\0" + frame[TCP + 18 :]
    over = frame[IP + 12 : TCP] + struct.pack("!BBH", 0, w.TCP, len(segment))
    sums = struct.pack("!H", w.checksum(head)), struct.pack("!H", w.checksum(over + segment))
    return frame[:IP] + head[:10] + sums[0] + head[12:] + segment[:16] + sums[1] + segment[18:]


def cut_up(p: Packet) -> list[bytes]:
    """As a device does by the large packet and what it is told (mbuf library, 7.6); without identifications."""
    head, payload, sent = p.data[: p.headers], p.data[p.headers :], []
    (seq,) = struct.unpack_from("!I", head, TCP + 4)
    for at in range(0, len(payload), p.segment):
        part = bytearray(head + payload[at : at + p.segment])
        struct.pack_into("!H", part, IP + 2, len(part) - IP)
        struct.pack_into("!I", part, TCP + 4, (seq + at) % 2**32)
        if at + p.segment < len(payload):
            part[TCP + 13] &= ~(w.FIN | w.PSH)
        sent.append(with_sums(bytes(part)))
    return sent


def check(packets: list[Packet], frames: list[bytes], pieces: int, ip_sum: bool) -> None:
    left = iter(frames)
    for p in packets:
        given = [next(left) for _ in range(p.frames)]
        if p.frames == 1:
            assert [p.data] == given, "as it was"
            continue
        assert p.frames <= min(pieces, MOST)
        assert all(w.checksum(f[IP:TCP]) == 0 for f in given), "a device would make it right"
        assert all(f[IP + 6 : IP + 8] == b"\x40\0" for f in given), "a device would number it"
        assert len(p.data) - IP == int.from_bytes(p.data[IP + 2 : IP + 4], "big")
        assert p.data[IP + 10 : IP + 12] == b"\0\0" if ip_sum else w.checksum(p.data[IP:TCP]) == 0
        assert cut_up(p) == [with_sums(f) for f in given]
    assert list(left) == []


# ---- Frames --------------------------------------------------------------------------------------------------------
def segment(seq: int, data: bytes, flags: int = w.ACK, **ip: int) -> bytes:
    """As the stack makes them. The TCP checksum is the device's to complete."""
    body = w.tcp(*HOSTS, 80, 4711, seq, 7, flags, 1000, data, options=TIMESTAMPS)
    return MACS + struct.pack("!H", w.ETH_IPV4) + w.ipv4(*HOSTS, w.TCP, body, **ip)


sizes = st.integers(1, 300)
offloads = st.tuples(st.integers(1, 40), st.booleans())


@given(
    st.integers(0, 2**32 - 1), sizes, st.integers(1, 60), sizes, st.sampled_from([0, w.PSH, w.FIN]), offloads
)
def test_a_conversations_segments_are_joined_as_far_as_the_device_takes(
    library: ctypes.CDLL, seq: int, mss: int, n: int, last: int, flag: int, device: tuple[int, bool]
) -> None:
    pieces, ip_sum = device
    data = [bytes([i]) * mss for i in range(n - 1)] + [b"z" * min(last, mss)]
    frames = [
        segment(seq + i * mss, part, w.ACK | (flag if i == n - 1 else 0)) for i, part in enumerate(data)
    ]
    packets = join(library, frames, pieces, ip_sum)
    check(packets, frames, pieces, ip_sum)
    assert len(packets) == -(-n // min(pieces, MOST))


@st.composite
def nearly_a_conversation(draw: st.DrawFn) -> list[bytes]:
    """Segments of one connection, some of which anybody may have made: with other bytes in their headers, other IP
    headers, checksums that are wrong or made right again, cut off, or followed by more."""
    seq, frames = draw(st.integers(0, 2**32 - 1)), []
    mss = draw(sizes)
    for _ in range(draw(st.integers(1, 12))):
        size = draw(st.sampled_from([mss, mss, mss, 1, 0]))
        ip = draw(
            st.sampled_from([{}, {}, {}, {"frag": 0, "ident": 7}, {"ident": 9}, {"tos": 1}, {"total": 60}])
        )
        flags = draw(st.sampled_from([w.ACK, w.ACK, w.ACK | w.PSH, w.ACK | w.CWR, w.SYN]))
        frame = bytearray(segment(seq, draw(st.binary(min_size=size, max_size=size)), flags, **ip))
        seq += size
        for at, value in draw(st.lists(st.tuples(st.integers(0, 65), st.integers(0, 255)), max_size=2)):
            frame[at] = value
        if draw(st.booleans()):
            frame[IP + 10 : IP + 12] = b"\0\0"
            frame[IP + 10 : IP + 12] = struct.pack("!H", w.checksum(bytes(frame[IP:TCP])))
        end = draw(st.sampled_from([0, 0, 0, 1, 6]))
        frames.append(bytes(frame) + bytes(end) if draw(st.booleans()) else bytes(frame[: len(frame) - end]))
    return frames


WITHOUT_HEADER = segment(0, b"x" * 40)[: TCP + 12] + b"\0" + segment(0, b"x" * 40)[TCP + 13 :]


@given(nearly_a_conversation(), offloads)
@example([WITHOUT_HEADER, WITHOUT_HEADER], (40, False))
@example([segment(i, b"x", frag=0, ident=77) for i in range(3)], (40, True))
@example([segment(i, b"x") + b"pad" for i in range(3)], (40, True))
@example([segment(i, b"x", csum=5) for i in range(3)], (40, True))
def test_what_a_device_makes_of_anybodys_frames_is_what_was_given(
    library: ctypes.CDLL, frames: list[bytes], device: tuple[int, bool]
) -> None:
    check(join(library, frames, *device), frames, *device)

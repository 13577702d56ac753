# SPDX-License-Identifier: Apache-2.0
"""Frames built and read byte by byte, from the RFCs and nothing of the stack: what tests send, expect and compare.

Builders take text for IP addresses, bytes for MAC addresses, host order for numbers, and return bytes. Lengths and
checksums are right unless an argument says otherwise. Readers assert what a right packet has.

    frame = eth(dst, src, ETH_IPV4, ipv4("192.0.2.2", "192.0.2.1", UDP, udp("192.0.2.2", "192.0.2.1", 9, 7, b"hello")))
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from functools import lru_cache

ETH_IPV4 = 0x0800
ETH_ARP = 0x0806
ICMP, TCP, UDP = 1, 6, 17
DF, MF = 0x4000, 0x2000
BROADCAST = b"\xff" * 6
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of some bytes, 0..65535, an odd one padded by zero."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@lru_cache(maxsize=4096)
def ip(text: str) -> bytes:
    """An address as it stands in a packet: 4 bytes of IPv4, 16 of IPv6."""
    return ipaddress.ip_address(text).packed


def eth(dst: bytes, src: bytes, kind: int, payload: bytes) -> bytes:
    """An Ethernet II frame without FCS; `kind`: the ethertype."""
    return dst + src + struct.pack("!H", kind) + payload


def arp(op: int, sha: bytes, spa: str, tha: bytes, tpa: str) -> bytes:
    """An ARP message for IPv4 over Ethernet, 28 bytes (RFC 826). op: 1 asks, 2 answers."""
    return struct.pack("!HHBBH", 1, ETH_IPV4, 6, 4, op) + sha + ip(spa) + tha + ip(tpa)


def ipv4(
    src: str,
    dst: str,
    proto: int,
    payload: bytes,
    *,
    ttl: int = 64,
    tos: int = 0,
    ident: int = 0,
    frag: int = DF,
    options: bytes = b"",
    total: int | None = None,
    version: int = 4,
    ihl: int | None = None,
    csum: int | None = None,
) -> bytes:
    """An IPv4 packet (RFC 791).

    Args:
        frag: the flags and offset word.
        options: a multiple of four bytes.
        total, version, ihl (32-bit words), csum: lies, where a test wants them.
    """
    assert len(options) % 4 == 0
    words = 5 + len(options) // 4 if ihl is None else ihl
    size = 20 + len(options) + len(payload) if total is None else total
    head = struct.pack("!BBHHHBBH", version << 4 | words, tos, size & 0xFFFF, ident, frag, ttl, proto, 0)
    head += ip(src) + ip(dst) + options
    value = checksum(head) if csum is None else csum
    return head[:10] + struct.pack("!H", value) + head[12:] + payload


def pseudo(src: str, dst: str, proto: int, n: int) -> bytes:
    """The pseudo header that the checksums of TCP and UDP cover, for n bytes of header and payload (RFC 9293 3.1)."""
    return ip(src) + ip(dst) + struct.pack("!BBH", 0, proto, n)


def udp(
    src: str,
    dst: str,
    sport: int,
    dport: int,
    data: bytes,
    *,
    size: int | None = None,
    csum: int | None = None,
) -> bytes:
    """A UDP header and its payload (RFC 768). size, csum: lies; csum 0: none was taken."""
    n = 8 + len(data)
    head = struct.pack("!HHHH", sport, dport, n if size is None else size, 0)
    value = checksum(pseudo(src, dst, UDP, n) + head + data) or 0xFFFF if csum is None else csum
    return head[:6] + struct.pack("!H", value) + data


def icmp(kind: int, code: int, rest: bytes, data: bytes = b"") -> bytes:
    """An ICMP message (RFC 792). rest: the four bytes behind the checksum."""
    body = struct.pack("!BBH", kind, code, 0) + rest + data
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def echo(kind: int, ident: int, number: int, data: bytes) -> bytes:
    """A ping: kind 8 asks, 0 answers."""
    return icmp(kind, 0, struct.pack("!HH", ident, number), data)


def tcp(
    src: str,
    dst: str,
    sport: int,
    dport: int,
    seq: int,
    ack: int,
    flags: int,
    window: int,
    data: bytes = b"",
    *,
    options: bytes = b"",
    urgent: int = 0,
    csum: int | None = None,
) -> bytes:
    """A TCP header and its payload (RFC 9293 3.1).

    Args:
        seq, ack: taken modulo 2^32.
        flags: FIN, SYN, ... of this module.
        window: as on the wire, not scaled.
        options: at most 40 bytes, padded to a multiple of four.
        csum: a lie.
    """
    options += b"\0" * (-len(options) % 4)
    offset = (5 + len(options) // 4) << 12
    seq &= 0xFFFFFFFF
    ack &= 0xFFFFFFFF
    head = struct.pack("!HHIIHHHH", sport, dport, seq, ack, offset | flags, window, 0, urgent) + options
    value = checksum(pseudo(src, dst, TCP, len(head) + len(data)) + head + data) if csum is None else csum
    return head[:16] + struct.pack("!H", value) + head[18:] + data


def fragments(packet: bytes, size: int, ident: int) -> list[bytes]:
    """An IPv4 packet without options, cut into pieces of `size` payload bytes (a multiple of 8)."""
    assert packet[0] == 0x45
    assert size % 8 == 0
    src, dst = str(ipaddress.ip_address(packet[12:16])), str(ipaddress.ip_address(packet[16:20]))
    payload = packet[20:]
    pieces = []
    for at in range(0, len(payload), size):
        more = MF if at + size < len(payload) else 0
        part = payload[at : at + size]
        pieces.append(ipv4(src, dst, packet[9], part, ident=ident, frag=more | at // 8, ttl=packet[8]))
    return pieces


def with_checksums(frame: bytes) -> bytes:
    """A frame with its IPv4 header checksum, and that of a whole TCP, UDP or ICMP message, made right for what stands
    there, whatever it is; other frames as they are."""
    bad = bytearray(frame)
    if len(bad) < 34 or bad[12:14] != b"\x08\x00":
        return frame
    start = 14 + (bad[14] & 15) * 4
    end = min(len(bad), 14 + int.from_bytes(bad[16:18], "big"))
    if start < 34 or start > len(bad):
        return frame
    bad[24:26] = b"\0\0"
    bad[24:26] = checksum(bytes(bad[14:start])).to_bytes(2, "big")
    whole = not int.from_bytes(bad[20:22], "big") & 0x3FFF
    proto = bad[23]
    at = {TCP: 16, UDP: 6, ICMP: 2}.get(proto)
    if at is None or not whole or start + at + 2 > end:
        return bytes(bad)
    bad[start + at : start + at + 2] = b"\0\0"
    head = b"" if proto == ICMP else bytes(bad[26:34]) + struct.pack("!BBH", 0, proto, end - start)
    value = checksum(head + bytes(bad[start:end])) or (0xFFFF if proto == UDP else 0)
    bad[start + at : start + at + 2] = value.to_bytes(2, "big")
    return bytes(bad)


# ---- Reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ip:
    """A received IPv4 packet whose header checksum holds."""

    src: str
    dst: str
    proto: int
    ttl: int
    tos: int
    ident: int
    df: bool
    mf: bool
    offset: int  # bytes
    payload: bytes


def parse_ip(packet: bytes) -> Ip:
    """Asserts that header, checksum and length are right."""
    ver_ihl, tos, total, ident, frag, ttl, proto, _ = struct.unpack("!BBHHHBBH", packet[:12])
    n = (ver_ihl & 15) * 4
    assert ver_ihl >> 4 == 4
    assert checksum(packet[:n]) == 0, "IPv4 header checksum"
    assert total == len(packet), "IPv4 total length"
    src, dst = str(ipaddress.ip_address(packet[12:16])), str(ipaddress.ip_address(packet[16:20]))
    df, mf, offset = bool(frag & DF), bool(frag & MF), (frag & 0x1FFF) * 8
    return Ip(src, dst, proto, ttl, tos, ident, df, mf, offset, packet[n:])


@dataclass(frozen=True)
class Udp:
    """A datagram: (address, port) of both ends, and its payload."""

    src: tuple[str, int]
    dst: tuple[str, int]
    data: bytes


def parse_udp(packet: Ip) -> Udp:
    """Of a whole datagram; asserts length and checksum."""
    assert packet.proto == UDP
    sport, dport, n, csum = struct.unpack("!HHHH", packet.payload[:8])
    assert n == len(packet.payload), "UDP length"
    if csum:
        assert checksum(pseudo(packet.src, packet.dst, UDP, n) + packet.payload) == 0, "UDP checksum"
    return Udp((packet.src, sport), (packet.dst, dport), packet.payload[8:])


def join(packets: list[Ip]) -> Ip:
    """Puts fragments of one datagram together, asserting that they are one and complete."""
    packets = sorted(packets, key=lambda p: p.offset)
    first = packets[0]
    data = b""
    for p in packets:
        assert (p.src, p.dst, p.proto, p.ident) == (first.src, first.dst, first.proto, first.ident)
        assert p.offset == len(data), "a gap or an overlap between fragments"
        assert not p.df
        assert p.mf == (p is not packets[-1])
        data += p.payload
    return Ip(first.src, first.dst, first.proto, first.ttl, first.tos, first.ident, False, False, 0, data)

# SPDX-License-Identifier: Apache-2.0
"""On which queue a received packet arrives: receive side scaling, as the driver says that it is set up.

    fields of the packet --Toeplitz, key--> hash --indirection table--> queue

What lives here: reading key, table and fields (ethtool's ioctls; pyroute2 has no words for them), and the hash. Nothing
is guessed: where the device does not tell, the answer says what is not known.

Sources: linux/ethtool.h; "Verifying the RSS hash calculation" and "RSS hashing functions" of Microsoft's driver
documentation; Documentation/networking/scaling.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from bypass.errors import DeviceError
from bypass.rules import TCP

__all__ = ["Queue", "Rss", "ask", "ask_by", "queue_of", "read", "toeplitz"]

SIOCETHTOOL = 0x8946
GRXFH, GRXCLSRLCNT, GRSSH = 0x29, 0x2E, 0x46
TCP_V4_FLOW, UDP_V4_FLOW = 1, 2
# What is hashed, RXH_*, in the order in which it stands in the hash's input.
IP_SRC, IP_DST, PORT_SRC, PORT_DST = 1 << 4, 1 << 5, 1 << 6, 1 << 7
HASHES = {1: "Toeplitz", 2: "XOR", 4: "CRC32"}  # ETH_RSS_HASH_*
_RXFH = struct.Struct(
    "=4I2B2xI"
)  # struct ethtool_rxfh: cmd, context, sizes of table and key, function, transformation
_RXNFC = struct.Struct("=2IQ168xI4x")  # struct ethtool_rxnfc: cmd, flow type, data, (a rule), how many rules

Endpoint = tuple[IPv4Address, int]


@dataclass(frozen=True, slots=True)
class Rss:
    """How a device spreads packets.

    Attributes:
        key, table: of the hash; queues by the hash's remainder. A device without a key has b"".
        function: `Toeplitz`, or another name.
        transformed: the fields are changed before they are hashed (symmetric hashing).
        tcp, udp: RXH_* bits of what is hashed over IPv4; None: the device does not tell.
        rules: rules of `ethtool -n`, which choose queues before the hash does.
    """

    key: bytes
    table: tuple[int, ...]
    function: str
    transformed: bool
    tcp: int | None
    udp: int | None
    rules: int


@dataclass(frozen=True, slots=True)
class Queue:
    """Where packets of a flow arrive. number None: it cannot be said; `why` has the reasons for either."""

    number: int | None
    why: str


def toeplitz(key: bytes, data: bytes) -> int:
    """The hash: for each bit of data that is set, the 32 bits of the key that begin at its place, XORed.

    Raises:
        ValueError: the key is shorter than data and 4 bytes.
    """
    if len(key) < len(data) + 4:
        raise ValueError(f"a key for {len(data)} bytes has {len(data) + 4} or more, not {len(key)}")
    whole, bits, result = int.from_bytes(key, "big"), 8 * len(key), 0
    for place in range(8 * len(data)):
        if data[place // 8] & 0x80 >> place % 8:
            result ^= whole >> bits - 32 - place & 0xFFFFFFFF
    return result


def queue_of(rss: Rss | None, proto: int, source: Endpoint, destination: Endpoint) -> Queue:
    """The queue of a flow's whole packets. rss: as read() gives it."""
    if rss is None or not rss.table:
        return Queue(None, "the device tells of no hash")
    if rss.rules:
        return Queue(None, f"{rss.rules} rules of `ethtool -n` choose queues before the hash does")
    if rss.function != "Toeplitz" or rss.transformed or not rss.key:
        how = f"{rss.function}, of changed fields" if rss.transformed else rss.function
        return Queue(None, f"the device's hash is not plain Toeplitz with a known key: {how or 'unknown'}")
    fields = rss.tcp if proto == TCP else rss.udp
    if fields is None:
        return Queue(None, "the device does not tell what it hashes")
    data = b"".join(
        part
        for field, part in (
            (IP_SRC, source[0].packed),
            (IP_DST, destination[0].packed),
            (PORT_SRC, source[1].to_bytes(2, "big")),
            (PORT_DST, destination[1].to_bytes(2, "big")),
        )
        if fields & field
    )
    value = toeplitz(rss.key, data)
    entry = value % len(rss.table)
    what = "addresses and ports" if fields & (PORT_SRC | PORT_DST) else "addresses"
    return Queue(
        rss.table[entry], f"Toeplitz hash {value:#010x} of its {what}, entry {entry} of {len(rss.table)}"
    )


def read(ifname: str) -> Rss | None:
    """Of an interface in the network namespace of the calling thread. None: it has no table (veth, loopback).

    Raises:
        DeviceError: there is no such interface, or it cannot be asked.
    """
    try:
        sizes = _RXFH.unpack(ask(ifname, _RXFH.pack(GRSSH, 0, 0, 0, 0, 0, 0)))
        entries, key_bytes = sizes[2:4]
        told = ask(
            ifname,
            _RXFH.pack(GRSSH, 0, entries, key_bytes, 0, 0, 0) + bytes(4 * entries + key_bytes),
        )
    except OSError as e:
        if e.errno == errno.EOPNOTSUPP:
            return None
        raise DeviceError(f"{ifname}: its receive hash cannot be read: {e.strerror}") from e
    function, transformation = _RXFH.unpack_from(told)[4:6]
    table = struct.unpack_from(f"={entries}I", told, _RXFH.size)
    key = told[_RXFH.size + 4 * entries :]
    return Rss(
        key=key if any(key) else b"",
        table=table,
        function=HASHES.get(function, ""),
        transformed=bool(transformation),
        tcp=_asked(ifname, GRXFH, TCP_V4_FLOW)[2],
        udp=_asked(ifname, GRXFH, UDP_V4_FLOW)[2],
        rules=_asked(ifname, GRXCLSRLCNT, 0)[3] or 0,
    )


def _asked(ifname: str, command: int, flow: int) -> tuple[int | None, ...]:
    """Fields of struct ethtool_rxnfc; Nones: the driver does not answer that."""
    try:
        return _RXNFC.unpack(ask(ifname, _RXNFC.pack(command, flow, 0, 0)))
    except OSError as e:
        if e.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return (None,) * 4
        raise DeviceError(f"{ifname}: its receive hash cannot be read: {e.strerror}") from e


def ask(ifname: str, question: bytes) -> bytes:
    """An ioctl of ethtool, in the calling thread's network namespace: the struct as the kernel left it. OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        return ask_by(s, ifname, question)


def ask_by(s: socket.socket, ifname: str, question: bytes) -> bytes:
    """ask() in the network namespace of a socket."""
    data = ctypes.create_string_buffer(question, len(question))
    request = struct.pack("16sP16x", ifname.encode(), ctypes.addressof(data))
    fcntl.ioctl(s, SIOCETHTOOL, request)
    return data.raw

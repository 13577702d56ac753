# SPDX-License-Identifier: Apache-2.0
"""On which queue a flow arrives: the hash against Microsoft's verification suite, and what drivers tell of theirs."""

from __future__ import annotations

import errno
import os
import struct
from ipaddress import IPv4Address

import pytest

from bypass import netns, rss
from bypass.broker import afxdp
from bypass.broker.direct import DirectSite
from bypass.cli.explain import queue_lines
from bypass.errors import DeviceError
from bypass.lab import SERVER_IFNAME, Lab
from bypass.rss import IP_DST, IP_SRC, PORT_DST, PORT_SRC, Queue, Rss, queue_of, toeplitz
from bypass.rules import TCP, UDP

KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)  # of "Verifying the RSS hash calculation", as the table that follows
VECTORS = [
    ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x323E8FC2, 0x51CCC178),
    ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xD718262A, 0xC626B0EA),
    ("12.22.207.184", 38024, "24.19.198.95", 12898, 0xD2D0A5DE, 0x5C2B394A),
    ("209.142.163.6", 2217, "38.27.205.30", 48228, 0x82989176, 0xAFC7327F),
    ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x5D1809C5, 0x10E828A2),
]
ADDRESSES = IP_SRC | IP_DST
FOUR = ADDRESSES | PORT_SRC | PORT_DST


def device(**changes: object) -> Rss:
    values = {
        "key": KEY,
        "table": tuple(range(64)) * 2,
        "function": "Toeplitz",
        "transformed": False,
        "tcp": FOUR,
        "udp": ADDRESSES,
        "rules": 0,
    }
    return Rss(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("to", "to_port", "by", "by_port", "two", "four"), VECTORS)
def test_the_hash_is_microsofts(to: str, to_port: int, by: str, by_port: int, two: int, four: int) -> None:
    addresses = IPv4Address(by).packed + IPv4Address(to).packed
    assert toeplitz(KEY, addresses) == two
    assert toeplitz(KEY, addresses + struct.pack(">HH", by_port, to_port)) == four
    source, destination = (IPv4Address(by), by_port), (IPv4Address(to), to_port)
    assert queue_of(device(), TCP, source, destination) == Queue(
        four % 64, f"Toeplitz hash {four:#010x} of its addresses and ports, entry {four % 128} of 128"
    )
    assert queue_of(device(), UDP, source, destination) == Queue(
        two % 64, f"Toeplitz hash {two:#010x} of its addresses, entry {two % 128} of 128"
    )


def test_a_key_that_is_too_short_is_refused() -> None:
    assert toeplitz(KEY, bytes(36)) == 0
    with pytest.raises(ValueError, match="41"):
        toeplitz(KEY, bytes(37))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (None, "tells of no hash"),
        (device(table=()), "tells of no hash"),
        (device(rules=2), "2 rules of `ethtool -n`"),
        (device(function="CRC32"), "not plain Toeplitz.*CRC32"),
        (device(function=""), "not plain Toeplitz.*unknown"),
        (device(transformed=True), "changed fields"),
        (device(key=b""), "known key"),
        (device(tcp=None), "does not tell what it hashes"),
    ],
)
def test_what_is_not_known_is_said(what: Rss | None, why: str) -> None:
    end = (IPv4Address("192.0.2.1"), 1)
    told = queue_of(what, TCP, end, end)
    assert told.number is None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(told.why)


def test_the_brokers_answer_is_of_packets_from_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    to, to_port, by, by_port, _, four = VECTORS[0]
    site = DirectSite.__new__(DirectSite)
    site.ifname = "eth1"
    flow = (TCP, (IPv4Address(to), to_port), (IPv4Address(by), by_port))
    monkeypatch.setattr(afxdp, "read_rss", lambda ifname: device())
    monkeypatch.setattr(afxdp, "driver_of", lambda ifname: "ice")
    monkeypatch.setattr(afxdp, "interface_queues", lambda ifname: 64)
    assert site.arrival(*flow).number == four % 64
    monkeypatch.setattr(afxdp, "interface_queues", lambda ifname: 1)
    assert site.arrival(*flow) == Queue(0, "the only one")


class Driver:
    """What the ioctls of one answer: struct ethtool_rxfh and struct ethtool_rxnfc, by linux/ethtool.h."""

    def __init__(self, fields: dict[int, int], rules: int | None) -> None:
        self.fields, self.rules = fields, rules

    def ask(self, ifname: str, question: bytes) -> bytes:
        command, second, entries, key_bytes = struct.unpack_from("=4I", question)
        if command == rss.GRSSH:
            if not entries:
                return struct.pack("=4I2B2xI", command, second, 128, len(KEY), 0, 0, 0)
            assert (entries, key_bytes, len(question)) == (128, 40, 24 + 4 * 128 + 40)
            head = struct.pack("=4I2B2xI", command, second, entries, key_bytes, 1, 0, 0)
            return head + struct.pack("=128I", *range(128)) + KEY
        assert len(question) == 192
        known = self.fields.get(second) if command == rss.GRXFH else self.rules
        if known is None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        data, count = (known, 0) if command == rss.GRXFH else (0, known)
        return struct.pack("=2IQ168xI4x", command, second, data, count)


def test_what_a_driver_tells_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rss, "ask", Driver({1: FOUR, 2: ADDRESSES}, 3).ask)
    assert rss.read("eth1") == device(table=tuple(range(128)), rules=3)
    monkeypatch.setattr(rss, "ask", Driver({}, None).ask)
    assert rss.read("eth1") == device(table=tuple(range(128)), tcp=None, udp=None)


@pytest.mark.netns
def test_a_veth_has_no_hash_and_one_that_is_not_there_is_an_error(lab: Lab) -> None:
    with netns.entered(lab.server_ns):
        assert rss.read(SERVER_IFNAME) is None
        with pytest.raises(DeviceError, match="nothere"):
            rss.read("nothere")


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        ({}, ["  queue        3: because"]),
        ({"app": 1}, ["  queue        3: because", "  socket       the application's own on that queue"]),
        (
            {"app": 1, "mode": "shared"},
            [
                "  queue        3: because",
                "  socket       bypass-fwd's, which passes it on to the application, on that queue",
            ],
        ),
        (
            {"app": 1, "queues": [0, 1]},
            [
                "  queue        3: because",
                "  socket       none on that queue: TCP is dropped, the rest is the kernel's",
            ],
        ),
        ({"app": 1, "action": "pass"}, ["  queue        3: because"]),
        ({"queue": None}, ["  queue        one of 0 1 2 3: because"]),
        ({"queue": None, "queues": []}, ["  queue        not known: because"]),
    ],
)
def test_the_queue_in_words(answer: dict[str, object], lines: list[str]) -> None:
    usual = {
        "queue": 3,
        "queue_why": "because",
        "queues": [0, 1, 2, 3],
        "mode": "direct",
        "action": "steer",
    }
    assert queue_lines(usual | answer) == lines

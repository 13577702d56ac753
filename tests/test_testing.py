# SPDX-License-Identifier: Apache-2.0
"""bypass.testing draws what it promises: right frames are right, segments land where they say, stories stay small."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import dpkt
import pytest
import yaml
from bypass._core import lib
from conversation import ALL, OUR_MAC, PEER_MAC, US, Conversation
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import examples
from tcp_talk import Talk

import bypass.testing as bt
from bypass.policy import parse_policy
from bypass.rules import Rule
from bypass.sim import DeviceFaults, Fate, Faults, Network
from bypass.testing.tcp import Near, Option, option_bytes
from bypass.testing.wire import ACK, SYN, checksum, parse_ip, tcp, with_checksums

NEAR = Near(
    (US, 9), (US, 7), rcv_nxt=2**32 - 5, rcv_wnd=1000, snd_una=2**32 - 10, snd_nxt=90, ts_val=1, ts_ecr=2
)


@settings(max_examples=examples(300))
@given(bt.frames(lies=False))
def test_right_frames_are_read_by_an_independent_parser(frame: bytes) -> None:
    parsed = dpkt.ethernet.Ethernet(frame)
    assert len(frame) <= 1514
    if isinstance(parsed.data, dpkt.arp.ARP):
        return
    packet = parse_ip(frame[14:])
    assert packet.dst == US
    assert with_checksums(frame) == frame or frame[23] == 17  # a UDP checksum may be left out


def test_most_frames_reach_a_protocol_of_the_stack() -> None:
    """A rain that is dropped at the door would test the door."""
    counted: Counter[str] = Counter()

    @settings(max_examples=800, database=None, derandomize=True)
    @given(bt.frames())
    def rain(frame: bytes) -> None:
        with Conversation(flags=ALL) as c:
            c.udp(7)
            c.inject(frame)
            counted.update(k for k in c.counted())
            c.sent()

    rain()
    for name in ("arp_in", "udp_in", "icmp_in_echo", "icmp_in_error", "tcp_in", "ip_frag"):
        assert sum(n for k, n in counted.items() if k.startswith(name)) >= 3, (name, counted)


@given(bt.mutated_frames())
def test_a_changed_frame_is_still_a_frame(frame: bytes) -> None:
    assert 14 <= len(frame) <= 1514


@given(st.binary(max_size=80), st.sampled_from([1, 6, 17]))
def test_checksums_are_made_right_for_whatever_stands_there(body: bytes, proto: int) -> None:
    from bypass.testing.wire import ETH_IPV4, eth, ipv4

    frame = with_checksums(eth(OUR_MAC, PEER_MAC, ETH_IPV4, ipv4("192.0.2.2", US, proto, body, csum=1)))
    assert checksum(frame[14:34]) == 0
    least = {1: 4, 6: 18, 17: 8}[proto]
    if len(body) >= least:
        pseudo = b"" if proto == 1 else frame[26:34] + bytes([0, proto]) + len(body).to_bytes(2, "big")
        assert checksum(pseudo + frame[34:]) == 0


# ---- TCP ----------------------------------------------------------------------------------------------------------


@given(bt.segments())
def test_a_segment_says_what_was_drawn(s: bt.Segment) -> None:
    packet = parse_ip(s.packet(NEAR))
    header = packet.payload
    assert int.from_bytes(header[4:8], "big") == s.seq_of(NEAR)
    assert int.from_bytes(header[8:12], "big") == s.ack_of(NEAR)
    assert header[13] == s.flags & 0xFF
    assert int.from_bytes(header[14:16], "big") == s.window
    if s.offset is None:
        assert len(header) - (header[12] >> 4) * 4 == s.size


def test_distances_count_from_the_connection_and_wrap() -> None:
    def numbers(**k: Any) -> tuple[int, int]:
        return bt.Segment(**k).seq_of(NEAR), bt.Segment(**k).ack_of(NEAR)

    assert numbers() == (2**32 - 5, 90)
    assert numbers(seq=5, ack_from="una", ack=10) == (0, 0)
    assert numbers(seq_from="edge", ack=-91) == (995, 2**32 - 1)
    assert numbers(seq_from="far", ack_from="far") == (2**31 - 5, 2**31 - 10)


@given(bt.options() | bt.options(syn=True))
def test_options_fit_into_a_header(items: tuple[Option, ...]) -> None:
    raw = option_bytes(items, NEAR)
    assert len(raw) <= 40
    assert len(tcp(US, US, 1, 2, 3, 4, ACK, 5, options=raw)) <= 60


def test_most_segments_are_taken_by_the_connection_that_they_are_near_to() -> None:
    verdicts: Counter[str] = Counter()

    @settings(max_examples=300, database=None, derandomize=True)
    @given(bt.segments(malformed=False))
    def one(s: bt.Segment) -> None:
        with Talk() as t:
            t.established()
            before = t.info
            t.inject_ip(s.packet(Near.of(before)))
            now = t.info if t.state() else None
            verdicts["ended" if now is None else "moved" if now.rcv_nxt != before.rcv_nxt else "same"] += 1
            t.sent()

    one()
    assert verdicts["moved"] >= 30, verdicts
    assert verdicts["ended"] >= 3, verdicts


def test_a_syn_for_a_listener_makes_a_connection() -> None:
    with Talk() as t:
        t.server()
        to = Near((t.address, t.peer_port), (US, t.our_port), 5000, 0, 0, 0)
        t.inject_ip(bt.Segment(flags=SYN, options=(("mss", (1000,)),)).packet(to))
        assert t.state() == "SYN_RECEIVED"
        t.sent()


# ---- Faults, exchanges --------------------------------------------------------------------------------------------


@given(bt.wire_faults(most=0.25), bt.wire_faults(most=0.01, slow=False), bt.device_faults())
def test_faults_are_within_what_was_asked_for(bad: Faults, mild: Faults, device: DeviceFaults) -> None:
    bad.c()
    device.c()
    assert max(mild.loss, mild.duplicate, mild.corrupt, mild.reorder) <= 0.01
    assert (mild.delay_ns, mild.rate_bps) == (0, 0)
    with pytest.raises(ValueError, match=r"0\.\.0\.25"):
        bt.wire_faults(most=0.3)


@given(bt.fates(max_size=10))
def test_fates_are_those_of_a_script(story: list[int]) -> None:
    assert len(story) <= 10
    assert set(story) <= {Fate.PASS, Fate.LOSE, Fate.DUPLICATE, Fate.CORRUPT, Fate.REORDER}


@given(bt.exchanges(most_bytes=5000))
def test_exchanges_are_as_large_as_asked_for(talk: bt.Exchange) -> None:
    assert max(len(talk.up), len(talk.down)) <= 5000
    assert min(*talk.writes, *talk.reads) > 0
    assert str(len(talk.up)) in repr(talk)


def test_a_lost_byte_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """play() compares: it would notice a stack that delivers something else."""
    with Network(1) as net:
        a, b = net.stack("10.0.0.1/24"), net.stack("10.0.0.2/24")
        talk = bt.Exchange(b"abc", b"")
        monkeypatch.setattr(b.core, "recv", lambda handle, n: b"")
        with pytest.raises(AssertionError, match="to the server differ"):
            bt.play(net, a, b, talk)


# ---- Policies -----------------------------------------------------------------------------------------------------


@given(bt.policy_documents())
def test_policy_documents_are_valid(document: dict[str, Any]) -> None:
    policy = parse_policy(yaml.safe_dump(document))
    assert policy.interface == document["interface"]


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(bt.rule_lists(), st.data())
def test_policy_frames_are_about_the_policy(rules: list[Rule], data: st.DataObject) -> None:
    assume(rules)
    frame = data.draw(bt.policy_frames(rules, OUR_MAC))
    assert len(frame) >= 14


def test_frames_that_a_rule_is_about_meet_it() -> None:
    hits: Counter[bool] = Counter()
    net = ipaddress.ip_network("192.0.2.10/32")
    rule = Rule(0, "r", 6, net, None, None, None, None, "steer", 1, 1)

    @settings(max_examples=200, database=None, derandomize=True)
    @given(bt.policy_frames([rule], OUR_MAC))
    def one(frame: bytes) -> None:
        hits[frame[12:14] == b"\x08\x00" and frame[30:34] == net.network_address.packed] += 1

    one()
    assert hits[True] > 60, hits


# ---- Without hypothesis --------------------------------------------------------------------------------------------


def test_without_hypothesis_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['hypothesis'] = None\nimport bypass.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: bypass.testing draws its examples with hypothesis" in done.stderr
    assert "pip install 'bypass[testing]'" in done.stderr


def test_only_the_testing_package_imports_hypothesis() -> None:
    root = Path(bt.__file__).parent.parent
    importing = ("import hypothesis", "from hypothesis")
    users = {
        p.relative_to(root).parts[0]
        for p in root.rglob("*.py")
        if any(line.lstrip().startswith(importing) for line in p.read_text().splitlines())
    }
    assert users == {"testing"}


def test_every_public_name_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs/testing.md").read_text()
    for name in bt.__all__:
        assert getattr(bt, name).__doc__, name
        assert f"`{name}" in page, name
    assert lib.BYPASS_STREAM

# SPDX-License-Identifier: Apache-2.0
"""hypothesis strategies for programs that use bypass, and for bypass itself.

    from hypothesis import given
    from bypass.sim import Network
    from bypass.testing import exchanges, play, wire_faults

    @given(exchanges(), wire_faults(), wire_faults())
    def test_my_server(talk, up, down): ...

What each strategy draws:

    packets.py   whole frames: Ethernet, ARP, IPv4, ICMP, UDP, TCP; right ones and ones with a lie in them
    tcp.py       segments relative to a live connection, options, SACK blocks; right, near and malformed
    streams.py   what two programs say to each other over a byte stream, and how they read and write it
    trouble.py   what a wire and a network device do to frames
    policies.py  rules and policy files (docs/policy.md)
    flows.py     frames that the rules of a policy are about, or just not about

wire.py builds and reads the frames that the others draw; it is plain code, without hypothesis. docs/testing.md has a
page with examples. `pip install bypass[testing]` brings hypothesis.
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis
except ImportError as error:
    raise ImportError(
        "bypass.testing draws its examples with hypothesis, which is not installed: pip install 'bypass[testing]'"
    ) from error

from bypass.testing.flows import policy_frames
from bypass.testing.packets import (
    arp_frames,
    frames,
    icmp_packets,
    ipv4_packets,
    mutated,
    mutated_frames,
    tcp_packets,
    udp_packets,
)
from bypass.testing.policies import policy_documents, rule_lists
from bypass.testing.streams import Exchange, exchanges, play
from bypass.testing.tcp import Near, Segment, options, segments
from bypass.testing.trouble import device_faults, fates, wire_faults

__all__ = [
    "Exchange",
    "Near",
    "Segment",
    "arp_frames",
    "device_faults",
    "exchanges",
    "fates",
    "frames",
    "icmp_packets",
    "ipv4_packets",
    "mutated",
    "mutated_frames",
    "options",
    "play",
    "policy_documents",
    "policy_frames",
    "rule_lists",
    "segments",
    "tcp_packets",
    "udp_packets",
    "wire_faults",
]

_ = _hypothesis  # only its presence matters here

# SPDX-License-Identifier: Apache-2.0
"""ICMP: echo, errors that arrive, errors that leave."""

from __future__ import annotations

from conversation import PEER, US, Conversation
from wire import ICMP, echo, ipv4


def test_an_echo_request_is_answered_with_its_own_bytes() -> None:
    with Conversation() as c:
        c.inject_ip(ipv4(PEER, US, ICMP, echo(8, 77, 3, b"hello"), tos=0x10))
        [reply] = c.sent_ip()
        assert (reply.src, reply.dst, reply.proto, reply.tos) == (US, PEER, ICMP, 0x10)
        assert reply.payload == echo(0, 77, 3, b"hello")
        assert c.counted() == {"icmp_in_echo": 1, "icmp_out_echo_reply": 1}

# SPDX-License-Identifier: Apache-2.0
"""TCP_INFO is truthful: the same conversation on the kernel's sockets and on ours tells the same, in
Linux' struct tcp_info.

Not compared: what depends on times, on buffers, and on when acknowledgments come.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from socket_worlds import Kernel, Ours, World, namespace

from bypass import sockopt
from bypass.sockopt import SOL, TCP

pytestmark = pytest.mark.netns

BYTES = {"state": 0, "ca_state": 1, "retransmits": 2, "probes": 3, "backoff": 4, "options": 5}
WORDS = {
    "snd_mss": 16,
    "unacked": 24,
    "sacked": 28,
    "lost": 32,
    "retrans": 36,
    "pmtu": 60,
    "snd_ssthresh": 76,
    "advmss": 84,
    "reordering": 88,
    "total_retrans": 100,
    "notsent_bytes": 144,
    "data_segs_in": 152,
    "data_segs_out": 156,
    "delivered": 192,
}
LONGS = {
    "max_pacing_rate": 112,
    "bytes_acked": 120,
    "bytes_received": 128,
    "bytes_sent": 200,
    "bytes_retrans": 208,
}
OF_A_LISTENER = {"state", "unacked", "sacked", "max_pacing_rate", "snd_mss", "advmss", "pmtu", "snd_ssthresh"}


def info(x: Any) -> dict[str, int]:
    raw: bytes = x.getsockopt(TCP, socket.TCP_INFO, 248)
    told = {name: raw[at] for name, at in BYTES.items()}
    told |= {name: struct.unpack_from("I", raw, at)[0] for name, at in WORDS.items()}
    return told | {name: struct.unpack_from("Q", raw, at)[0] for name, at in LONGS.items()}


def settled(world: World, *sockets: Any) -> list[dict[str, int]]:
    """What they tell once all is acknowledged: delayed acknowledgments come in their own time."""
    for _ in range(3000):
        world.rest()
        told = [info(x) for x in sockets]
        if not any(i["unacked"] or i["notsent_bytes"] for i in told):
            return told
        if not world.ours:
            time.sleep(0.001)
    raise AssertionError(f"never acknowledged: {told}")


def conversation(world: World) -> Iterator[tuple[str, list[dict[str, int]]]]:
    """Steps of a conversation, and what the sockets tell after each."""
    listener, client = world.socket(1), world.socket(0)
    listener.bind(world.address(1, 0))
    yield "fresh", [info(client)]
    listener.listen(7)
    client.setsockopt(SOL, sockopt.SO_MAX_PACING_RATE, 123_456_789)
    client.connect_ex(listener.getsockname())
    world.rest()
    yield "one waits", [{name: v for name, v in info(listener).items() if name in OF_A_LISTENER}]
    server, _ = listener.accept()
    pair = (client, server)
    yield "open", settled(world, *pair)
    client.send(bytes(100))
    yield "a request", settled(world, *pair)
    server.recv(1000)
    server.send(bytes(10))
    yield "a response", settled(world, *pair)
    client.recv(1000)
    client.send(bytes(10_000))
    yield "seven segments", settled(world, *pair)
    server.recv(20_000)
    client.shutdown(socket.SHUT_WR)
    yield "an end", settled(world, *pair)
    server.send(bytes(3000))
    yield "an answer to it", settled(world, *pair)
    for x in (listener, *pair):
        x.close()


def test_a_conversation_tells_what_it_tells_on_linux() -> None:
    with namespace() as name:
        kernel, ours = Kernel(name), Ours()
        try:
            steps = zip(conversation(kernel), conversation(ours), strict=True)
            for (step, theirs), (_, mine) in steps:
                for who, (told, wanted) in enumerate(zip(mine, theirs, strict=True)):
                    differ = {n: (told[n], wanted[n]) for n in wanted if told[n] != wanted[n]}
                    assert not differ, f"{step}, socket {who}: here and on Linux {differ}"
        finally:
            ours.close()

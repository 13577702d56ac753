# SPDX-License-Identifier: Apache-2.0
"""A property test of an echo server, in virtual time over wires that hypothesis makes bad; no privilege needed.

.venv/bin/python examples/property_test.py [EXAMPLES]

Whatever a client writes, in whatever pieces, over whatever wire: it gets back exactly that. When it does not,
hypothesis finds a small conversation and a simple wire that show it. Under pytest the same function is a test.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import Counter

from hypothesis import given, settings

from bypass import aio
from bypass.sim import Faults, Network
from bypass.testing import Exchange, exchanges, wire_faults

seen: Counter[str] = Counter()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The server under test."""
    while piece := await reader.read(4096):
        writer.write(piece)
        await writer.drain()
    writer.close()


async def conversation(net: Network, talk: Exchange, there: Faults, back: Faults) -> bytes:
    server, client = net.stack("10.0.0.1/24", faults=back), net.stack("10.0.0.2/24", faults=there)
    listening = await aio.start_server(server, echo, "10.0.0.1", 7)
    reader, writer = await aio.open_connection(client, "10.0.0.1", 7)
    at, got, sizes = 0, bytearray(), itertools.cycle(talk.writes)
    while at < len(talk.up):
        piece = talk.up[at : at + next(sizes)]
        writer.write(piece)
        await writer.drain()
        at += len(piece)
    writer.write_eof()
    for n in itertools.cycle(talk.reads):
        piece = await reader.read(n)
        if not piece:
            break
        got += piece
    writer.close()
    listening.close()
    return bytes(got)


@settings(max_examples=int(sys.argv[1]) if sys.argv[1:] and sys.argv[1].isdigit() else 100, deadline=None)
@given(exchanges(most_bytes=20_000), wire_faults(), wire_faults())
def test_what_is_written_comes_back(talk: Exchange, there: Faults, back: Faults) -> None:
    with Network(seed=1) as net:
        assert aio.run(conversation(net, talk, there, back), net) == talk.up
        seen["conversations"] += 1
        seen["bytes"] += len(talk.up)
        seen["frames lost"] += sum(port.stats().lost for port in net.ports)


if __name__ == "__main__":
    test_what_is_written_comes_back()
    print(", ".join(f"{n} {what}" for what, n in seen.items()))

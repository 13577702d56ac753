# SPDX-License-Identifier: Apache-2.0
"""Two stacks on a bad wire, in virtual time, the same at every run; no privilege needed.

.venv/bin/python examples/simulation.py
"""

from __future__ import annotations

import hashlib
import os

from bypass import aio
from bypass.sim import Faults, Network


async def transfer(network: Network, size: int) -> bool:
    server = network.stack("10.0.0.1/24", name="server")
    client = network.stack("10.0.0.2/24", name="client")
    body, got = os.urandom(size), bytearray()

    async def send_all(reader, writer) -> None:  # type: ignore[no-untyped-def]
        writer.write(body)
        await writer.drain()
        writer.close()

    listening = await aio.start_server(server, send_all, "10.0.0.1", 80)
    reader, writer = await aio.open_connection(client, "10.0.0.1", 80)
    while piece := await reader.read(1 << 16):
        got += piece
    writer.close()
    listening.close()
    return hashlib.sha256(got).digest() == hashlib.sha256(body).digest()


def main() -> None:
    bad = Faults(
        loss=0.02, reorder=0.02, duplicate=0.01, corrupt=0.01, delay_ns=5_000_000, rate_bps=100_000_000
    )
    with Network(seed=7) as network:
        network.wire(faults=bad)
        equal = aio.run(transfer(network, 1_000_000), network)
        seconds = network.now_ns() / 1e9
    print(f"1 MB through 2 % loss, 2 % reordering, 1 % duplicates, 1 % corruption: equal {equal}")
    print(f"{seconds:.3f} seconds of virtual time")
    assert equal


if __name__ == "__main__":
    main()

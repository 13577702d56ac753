# SPDX-License-Identifier: Apache-2.0
"""asyncio on a bypass stack: start_server, open_connection, datagram endpoints, on the ordinary event loop.

Streams are asyncio's own StreamReader and StreamWriter; any asyncio.Protocol works too. There is no thread: the
device's descriptor is in the loop's selector, the stack's deadline is a timer of the loop, and one poll of the stack
serves all its connections.

On a simulated wire there are two ways. On an ordinary loop give the network pace="real": its clock then follows the
computer's. Or run everything in virtual time:

    bypass.aio.run(main(), network)

There the loop's own clock is the network's: asyncio.sleep(60) takes no time, and a run is the same every time.
"""

from bypass.aio.datagrams import DatagramTransport, create_datagram_endpoint
from bypass.aio.loop import VirtualLoop, run
from bypass.aio.server import Server, create_server, start_server
from bypass.aio.streams import StreamTransport, create_connection, open_connection

__all__ = [
    "DatagramTransport",
    "Server",
    "StreamTransport",
    "VirtualLoop",
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "open_connection",
    "run",
    "start_server",
]

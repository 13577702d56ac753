# SPDX-License-Identifier: Apache-2.0
"""A bypass process for the tests that have Linux as the peer: a web server, a UDP echo and a client in one, driven by
JSON lines on standard input, answering with JSON lines.

    {"do": "listen", "port": 8080, "fastopen": 16}    web server (bypass.webserver); fastopen: TCP_FASTOPEN
    {"do": "echo", "port": 7}                UDP echo
    {"do": "fetch", "host": ..., "port": ..., "path": ...}    connects, GETs, {"sha256", "length"}
    {"do": "fastopen", "host": ..., "port": ..., "text": ...}    sendto() with MSG_FASTOPEN, {"text": the answer}
    {"do": "audit"}                          {"stack": ..., "frames": ..., "states": ..., "stats": ..., "reasons": ...}
    {"do": "unlisten", "port": 8080}
End of input ends it in order, with {"ended": the last audit}.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bypass._core import lib

import bypass
from bypass import aio
from bypass.webserver import WebServer

LOCAL = "192.0.2.10"


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class Peer:
    def __init__(self, stack: bypass.Stack, directory: Path) -> None:
        self.stack = stack
        self.web = WebServer(directory)
        self.open: dict[int, Any] = {}

    async def listen(self, port: int, fastopen: int = 0) -> dict[str, Any]:
        self.open[port] = await aio.start_server(self.stack, self.web.handle, LOCAL, port)
        if fastopen:
            self.stack.core.setopt(self.open[port].handle, lib.BYPASS_TCP_FASTOPEN, fastopen)
        return {"listening": port}

    async def unlisten(self, port: int) -> dict[str, Any]:
        server = self.open.pop(port)
        server.close()
        await server.wait_closed()
        return {"closed": port}

    async def echo(self, port: int) -> dict[str, Any]:
        transport, _ = await aio.create_datagram_endpoint(self.stack, Echo, local_addr=(LOCAL, port))
        self.open[port] = transport
        return {"listening": port}

    async def fetch(self, host: str, port: int, path: str) -> dict[str, Any]:
        reader, writer = await aio.open_connection(self.stack, host, port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        digest, length = hashlib.sha256(), 0
        while piece := await reader.read(1 << 20):
            digest.update(piece)
            length += len(piece)
        writer.close()
        await writer.wait_closed()
        return {"sha256": digest.hexdigest(), "length": length}

    async def fastopen(self, host: str, port: int, text: str) -> dict[str, Any]:
        return await asyncio.to_thread(self._fastopen, host, port, text)

    def _fastopen(self, host: str, port: int, text: str) -> dict[str, Any]:
        with self.stack.socket() as sock:
            sock.settimeout(10)
            sock.sendto(text.encode(), socket.MSG_FASTOPEN, (host, port))
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := sock.recv(4096):
                answer += piece
        return {"text": answer.decode()}

    async def audit(self) -> dict[str, Any]:
        driver: Any = self.stack.driver
        return {
            "stack": self.stack.audit(),
            "frames": dataclasses.asdict(driver.device.audit()),
            "states": Counter(c.state for c in self.stack.conns()),
            "stats": {k: v for k, v in self.stack.stats().items() if v},
            "reasons": {k: v.packets for k, v in driver.steering.reasons().items() if v.packets},
            "requests": self.web.requests,
        }


async def serve(stack: bypass.Stack, directory: Path) -> None:
    peer = Peer(stack, directory)
    commands = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(commands)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    while line := await commands.readline():
        command = json.loads(line)
        try:
            answer = await getattr(peer, command.pop("do"))(**command)
        except OSError as e:
            answer = {"error": str(e), "errno": e.errno}
        print(json.dumps(answer), flush=True)
    for server in peer.open.values():
        server.close()


def main() -> None:
    policy, directory = map(Path, sys.argv[1:3])
    with bypass.Stack.from_policy(policy) as stack:
        asyncio.run(serve(stack, directory))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The two ends of a transfer (bench.lossy). The server is one asyncio protocol, on a bypass stack or on kernel sockets;
the client is a kernel socket.

    python -m bench.lossy_ends serve bypass|kernel FILE CC       prints "ready"; its counters when its input ends
    python -m bench.lossy_ends up|down FILE CC                   one transfer; prints one JSON object

The client's first line says what is wanted: "up BYTES" (the server receives them, says k when it has all, and then
their SHA-256) or "down BYTES". Bytes are hashed after the clock has stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import mmap
import socket
import sys
import time
from pathlib import Path
from typing import Any

from bypass.lab import SERVER_IFNAME, SERVER_IP

PORT = 8080
PIECE = 1 << 20
PATIENCE_S = 600
TCP_CONGESTION = 13  # linux/tcp.h
POLICY = f"""\
version: 1
interface: {SERVER_IFNAME}
congestion: CC
backend: {{kind: afxdp, mode: auto, frames: 16384, ring_size: 4096}}
flows:
  - {{name: transfers, match: {{proto: tcp, local: {SERVER_IP}, local_port: {PORT}}}, action: steer}}
"""


def room(size: int) -> mmap.mmap:
    """Memory that is there already: no page fault costs time later."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def body(path: Path) -> mmap.mmap:
    with path.open("rb") as f:
        return mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE, prot=mmap.PROT_READ)


def waited_s() -> float:
    """How long this thread was ready and had no processor, seconds: what other programs cost."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


class Transfer(asyncio.BufferedProtocol):
    """The server's side of one connection."""

    waited_before = 0.0  # of the last

    def __init__(self, source: mmap.mmap, sink: mmap.mmap) -> None:
        self.source, self.sink = memoryview(source), memoryview(sink)
        self.line = bytearray(64)
        self.got = self.sent = 0
        self.want = -1  # bytes; -1: the first line is not complete
        self.paused = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> Any:
        return memoryview(self.line)[self.got :] if self.want < 0 else self.sink[self.got : self.got + PIECE]

    def buffer_updated(self, nbytes: int) -> None:
        self.got += nbytes
        if self.want < 0:
            self.first_line()
        elif self.got == self.want:
            self.transport.write(b"k")
            digest = hashlib.sha256(self.sink[: self.want]).hexdigest()
            self.transport.write(digest.encode())

    def first_line(self) -> None:
        """The client waits for the answer before it sends more."""
        text = bytes(self.line[: self.got])
        if not text.endswith(b"\n"):
            return
        what, size = text.split()
        self.want, self.got = int(size), 0
        Transfer.waited_before = waited_s()
        self.transport.write(b"k")
        if what == b"down":
            self.send()

    def send(self) -> None:
        while self.sent < self.want and not self.paused:
            piece = self.source[self.sent : min(self.sent + PIECE, self.want)]
            self.sent += len(piece)
            self.transport.write(piece)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.send()


async def until_input_ends() -> None:
    await asyncio.to_thread(sys.stdin.read)


def serve_kernel(path: Path, cc: str) -> dict[str, int]:
    source, sink = body(path), room(path.stat().st_size + PIECE)

    async def serve() -> None:
        listener = socket.create_server((SERVER_IP, PORT))
        listener.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, cc.encode())
        server = await asyncio.get_running_loop().create_server(lambda: Transfer(source, sink), sock=listener)
        print("ready", flush=True)
        await until_input_ends()
        server.close()

    asyncio.run(serve())
    return kernel_counters()


def serve_bypass(path: Path, cc: str) -> dict[str, int]:
    from bypass import Stack, aio

    source, sink = body(path), room(path.stat().st_size + PIECE)
    policy = path.with_name("policy.yaml")
    policy.write_text(POLICY.replace("CC", cc))

    async def serve(stack: Stack) -> None:
        server = await aio.create_server(stack, lambda: Transfer(source, sink), SERVER_IP, PORT)
        print("ready", flush=True)
        await until_input_ends()
        server.close()

    with Stack.from_policy(policy) as stack:
        asyncio.run(serve(stack))
        return {name: n for name, n in stack.stats().items() if n}


def kernel_counters() -> dict[str, int]:
    """Those of this namespace that are about TCP, by name (/proc/net/snmp, /proc/net/netstat)."""
    found: dict[str, int] = {}
    for name in ("snmp", "netstat"):
        lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            if names.startswith("Tcp"):
                found |= dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
    return {name: n for name, n in found.items() if n > 0}


def receive(s: socket.socket, into: memoryview, size: int) -> None:
    got = 0
    while got < size:
        n = s.recv_into(into[got : got + PIECE])
        if n == 0:
            raise ConnectionError(f"the stream ended after {got} of {size} bytes")
        got += n


def transfer(what: str, path: Path, cc: str) -> dict[str, Any]:
    """From the first byte to the last; the receiver tells what it hashed."""
    source = memoryview(body(path))
    size = len(source)
    sink = memoryview(room(size + PIECE))
    said = memoryview(bytearray(PIECE))
    with socket.socket() as s:
        s.settimeout(PATIENCE_S)
        s.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, cc.encode())
        s.connect((SERVER_IP, PORT))
        s.sendall(f"{what} {size}\n".encode())
        receive(s, said[:1], 1)
        began, waited = time.monotonic(), waited_s()
        if what == "up":
            s.sendall(source)
            receive(s, said[:1], 1)
        else:
            receive(s, sink, size)
        seconds, waited = time.monotonic() - began, waited_s() - waited
        if what == "up":
            receive(s, said[:64], 64)
            digest = bytes(said[:64]).decode()
        else:
            digest = hashlib.sha256(sink[:size]).hexdigest()
    return {"seconds": seconds, "bytes": size, "sha256": digest, "waited_s": waited}


def main() -> None:
    *what, file, cc = sys.argv[1:]
    if what[0] == "serve":
        serve = serve_bypass if what[1] == "bypass" else serve_kernel
        counters = serve(Path(file), cc)
        print(json.dumps({"counters": counters, "waited_s": waited_s() - Transfer.waited_before}))
    else:
        print(json.dumps(transfer(what[0], Path(file), cc)))


if __name__ == "__main__":
    main()

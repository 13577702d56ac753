# SPDX-License-Identifier: Apache-2.0
"""Python's own servers, by Debian's interpreter: http.server (a thread for each connection) and asyncio streams."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from bench.apps.app import ServerApp
from bench.apps.launch import Grant
from bench.apps.place import where
from bench.apps.web import LARGE, Reader, fetch, make_files
from bench.programs import BenchError
from bypass.lab import SERVER_IP

__all__ = ["AsyncioServer", "HttpServer"]

HTTP_PORT, ASYNCIO_PORT = 8000, 8001
CLIENTS = 8

# Echoes what comes until the client's end, then says how much it was, and closes.
SCRIPT = """
import asyncio, sys

async def serve(reader, writer):
    total = 0
    while data := await reader.read(65536):
        total += len(data)
        writer.write(data)
        await writer.drain()
    writer.write(b"%12d" % total)
    writer.close()
    await writer.wait_closed()

async def main():
    server = await asyncio.start_server(serve, sys.argv[1], int(sys.argv[2]), backlog=256)
    await server.serve_forever()

asyncio.run(main())
"""


class _Clients(ServerApp):
    def together(self, one: Any) -> float:
        """one(number) in CLIENTS threads; what they raise are problems. Seconds that it took."""
        trouble: list[str] = []

        def load(number: int) -> None:
            try:
                one(number)
            except (OSError, EOFError, BenchError) as e:
                trouble.append(f"client {number}: {e!r}")

        threads = [threading.Thread(target=load, args=(i,)) for i in range(CLIENTS)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.problems += trouble
        return time.monotonic() - began


class HttpServer(_Clients):
    name = "http.server"
    title = "python3 -m http.server"
    needs = ("python3", "curl")
    grants = (Grant(HTTP_PORT),)
    rated = ("per_s",)
    unit = "GET/s"

    def argv(self) -> list[str]:
        self.digests = make_files(self.place.folder / "www")
        return [
            where("python3"), "-m", "http.server", "--bind", SERVER_IP, "--directory",
            str(self.place.folder / "www"), str(HTTP_PORT),
        ]  # fmt: skip

    def exercise(self) -> dict[str, Any]:
        rounds = self.place.count(20, 1)

        def one(number: int) -> None:
            for _ in range(rounds):
                for name, sha256 in self.digests.items():
                    reader = Reader(self.place.connect(HTTP_PORT))
                    try:
                        fetch(reader, name, sha256, close=True)
                    finally:
                        reader.close()

        seconds = self.together(one)
        url = f"http://{SERVER_IP}:{HTTP_PORT}/{LARGE}.bin"
        said = self.attempt(
            "curl",
            self.place.client,
            ["/usr/bin/curl", "-sS", "-w", "%{size_download}", "-o", "/dev/null", url],
        )
        self.expect(said == str(LARGE), f"curl got {said} bytes of {LARGE}")
        asked = CLIENTS * rounds * len(self.digests)
        return {"requests": asked + 1, "per_s": round(asked / seconds)}


class AsyncioServer(_Clients):
    name = "asyncio"
    title = "Python asyncio server"
    needs = ("python3",)
    grants = (Grant(ASYNCIO_PORT),)
    rated = ("per_s",)
    unit = "talks/s"

    def argv(self) -> list[str]:
        script = self.place.folder / "server.py"
        script.write_text(SCRIPT)
        return [where("python3"), str(script), SERVER_IP, str(ASYNCIO_PORT)]

    def exercise(self) -> dict[str, Any]:
        rounds = self.place.count(50, 3)
        sizes = (0, 1, 1447, 1448, 1449, 100_000, 3_000_000)
        body = random.Random(2).randbytes(max(sizes))

        def one(number: int) -> None:
            rng = random.Random(number)
            for _ in range(rounds):
                self._echo(body[: rng.choice(sizes)])

        seconds = self.together(one)
        return {"conversations": CLIENTS * rounds, "per_s": round(CLIENTS * rounds / seconds, 1)}

    def _echo(self, body: bytes) -> None:
        """Sends and receives at once: an echo stops reading when nobody reads it."""
        with self.place.connect(ASYNCIO_PORT) as sock:
            sender = threading.Thread(target=_send_all, args=(sock, body))
            sender.start()
            got = bytearray()
            while data := sock.recv(1 << 18):
                got += data
            sender.join()
        if got != body + b"%12d" % len(body):
            raise BenchError(f"{len(got)} bytes came back of {len(body)} + 12, or others")


def _send_all(sock: socket.socket, body: bytes) -> None:
    """(Who receives tells when it fails.)"""
    with suppress(OSError):
        sock.sendall(body)
        sock.shutdown(socket.SHUT_WR)

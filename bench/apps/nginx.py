# SPDX-License-Identifier: Apache-2.0
"""nginx with two workers: small files by wrk, a large one by sendfile(), keepalive, reload under load without a lost
request; and many short connections with flat memory."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from typing import Any, ClassVar

from bench.apps.app import ServerApp, memory_bytes
from bench.apps.launch import Grant
from bench.apps.place import where
from bench.apps.web import LARGE, Lost, Reader, ended, fetch, make_files
from bench.programs import BenchError
from bypass.lab import SERVER_IP

__all__ = ["Nginx", "NginxShort"]

PORT = 8080
CONF = """
daemon off;
worker_processes {workers};
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{ listen {address}:{port} backlog=4096; root {folder}/www; }}
}}
"""
GROWTH_BYTES = 4 << 20


class Nginx(ServerApp):
    name = "nginx"
    title = "nginx, 2 workers"
    needs: ClassVar[tuple[str, ...]] = ("nginx", "wrk")
    grants = (Grant(PORT),)
    rated: ClassVar[tuple[str, ...]] = ("requests_per_s",)
    unit = "GET/s"
    worker_processes: ClassVar[int] = 2

    def argv(self) -> list[str]:
        folder = self.place.folder
        self.digests = make_files(folder / "www")
        conf = CONF.format(workers=self.worker_processes, folder=folder, address=SERVER_IP, port=PORT)
        (folder / "nginx.conf").write_text(conf)
        return [where("nginx"), *self.options()]

    def options(self) -> list[str]:
        return ["-e", f"{self.place.folder}/error.log", "-c", f"{self.place.folder}/nginx.conf"]

    def workers(self) -> list[int]:
        """Every nginx but the master, which is the first."""
        return self.server.pids("nginx")[1:]

    def reader(self) -> Reader:
        return Reader(self.place.connect(PORT))

    def exercise(self) -> dict[str, Any]:
        self._wait_new_workers(set())  # the port takes connections before they are there
        figures: dict[str, Any] = {"workers": len(self.workers())}
        wanted = self.worker_processes
        self.expect(len(self.workers()) == wanted, f"{len(self.workers())} workers, not {wanted}")
        figures["requests_per_s"] = self.attempt("wrk", self._wrk)
        figures["keepalive"] = self.attempt("keepalive", self._keepalive)
        figures["large_mb_per_s"] = self.attempt("10 MB", self._large)
        figures["reload"] = self.attempt("reload under load", self._reload)
        said = (self.place.folder / "error.log").read_text()
        wrong = [line for line in said.splitlines() if re.search(r"\[(error|crit|alert|emerg)\]", line)]
        self.expect(not wrong, f"its error log: {wrong[:3]}")
        return figures

    def _wrk(self) -> float:
        seconds = self.place.count(5)
        url = f"http://{SERVER_IP}:{PORT}/500.bin"
        said = self.place.client([where("wrk"), "-t", "1", "-c", "32", "-d", f"{seconds}s", url])
        for trouble in ("Socket errors", "Non-2xx"):
            self.expect(trouble not in said, f"wrk: {said}")
        match = re.search(r"Requests/sec:\s+([\d.]+)", said)
        if not match or float(match[1]) <= 0:
            raise BenchError(f"no rate: {said}")
        return float(match[1])

    def _keepalive(self) -> int:
        """All files many times over one connection, in one order and the other."""
        reader, asked = self.reader(), 0
        names = [*self.digests, *reversed(self.digests)]
        try:
            for _ in range(self.place.count(20, 2)):
                for name in names:
                    fetch(reader, name, self.digests[name])
                    asked += 1
            self.expect(reader.open, "the server ended a keepalive connection")
        finally:
            reader.close()
        return asked

    def _large(self) -> float:
        """On several connections at once."""
        times, bytes_got = self.place.count(10, 2), Counter[int]()
        trouble: list[str] = []

        def load(number: int) -> None:
            try:
                for _ in range(times):
                    reader = self.reader()
                    bytes_got[number] += fetch(
                        reader, f"{LARGE}.bin", self.digests[f"{LARGE}.bin"], close=True
                    )
                    self.expect(ended(reader), "no end after the answer")
                    reader.close()
            except (OSError, BenchError) as e:
                trouble.append(repr(e))

        began = time.monotonic()
        _together(load, 4)
        self.problems += trouble[:3]
        return round(sum(bytes_got.values()) / 1e6 / (time.monotonic() - began), 1)

    def _reload(self) -> dict[str, int]:
        """Reloads while short and kept connections ask all the time. Lost is a request of a new connection without its
        answer, and one of a kept connection whose answer had begun; a kept one that is closed between two answers asks
        again, as every client does."""
        counts, stop = Counter[str](), threading.Event()
        trouble: list[str] = []

        def short() -> None:
            reader = self.reader()
            try:
                fetch(reader, "20000.bin", self.digests["20000.bin"], close=True)
                counts["short"] += 1
            finally:
                reader.close()

        def kept(readers: list[Reader]) -> None:
            if not readers:
                readers.append(self.reader())
            try:
                fetch(readers[0], "65536.bin", self.digests["65536.bin"])
                counts["kept"] += 1
            except ConnectionError:
                readers[0].open = False
                counts["asked again"] += 1
            if not readers[0].open:
                readers.pop().close()

        def load(number: int) -> None:
            readers: list[Reader] = []
            while not stop.is_set() and len(trouble) < 10:
                try:
                    short() if number % 2 else kept(readers)
                except (OSError, BenchError) as e:
                    trouble.append(f"{'short' if number % 2 else 'kept'}: {e!r}")
                    readers.clear()
            for reader in readers:
                reader.close()

        threads = [threading.Thread(target=load, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(self.place.count(5, 2)):
                before = set(self.workers())
                time.sleep(0.2)
                self.place.server([where("nginx"), *self.options(), "-s", "reload"])
                self._wait_new_workers(before)
                counts["reloads"] += 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        self.expect(not trouble, f"{len(trouble)} requests were lost, as {trouble[:3]}")
        self.expect(counts["short"] > 0 and counts["kept"] > 0, f"too little load: {dict(counts)}")
        return dict(counts)

    def _wait_new_workers(self, before: set[int]) -> None:
        deadline = time.monotonic() + 20
        while len(set(self.workers()) - before) < self.worker_processes or set(self.workers()) & before:
            if time.monotonic() > deadline:
                raise BenchError(f"workers {sorted(before)} became {self.workers()}: {self.server.said()}")
            time.sleep(0.02)


class NginxShort(Nginx):
    """Connections that ask once; the server closes. Its memory and its relatives' stays what it was."""

    name = "nginx-short"
    title = "nginx, 50,000 short connections"
    needs: ClassVar[tuple[str, ...]] = ("nginx",)
    rated: ClassVar[tuple[str, ...]] = ("per_s",)
    unit = "opened/s"

    def exercise(self) -> dict[str, Any]:
        total, parts = self.place.count(50_000, 1000), 5
        samples: list[int] = []
        began = time.monotonic()
        for _ in range(parts):
            self._many(total // parts)
            samples.append(memory_bytes(list(self.server.family())))
        seconds = time.monotonic() - began
        growth = samples[-1] - samples[parts // 2]  # pools find their size in the first half
        self.expect(growth <= GROWTH_BYTES, f"memory grew by {growth:,} bytes: {samples}")
        return {
            "connections": total,
            "per_s": round(total / seconds),
            "memory_mb": [n >> 20 for n in samples],
        }

    def _many(self, count: int) -> None:
        trouble: list[str] = []

        def load(number: int) -> None:
            for _ in range(count // 4):
                try:
                    reader = self.reader()
                    fetch(reader, "500.bin", self.digests["500.bin"], close=True)
                    if not ended(reader):
                        raise Lost("no end after the answer")
                    reader.close()
                except (OSError, BenchError) as e:
                    trouble.append(repr(e))
                    if len(trouble) > 10:
                        return

        _together(load, 4)
        self.expect(not trouble, f"{len(trouble)} connections failed, as {trouble[:3]}")


def _together(load: Any, threads: int) -> None:
    running = [threading.Thread(target=load, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()

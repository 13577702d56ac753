# SPDX-License-Identifier: Apache-2.0
"""curl as a client: its server is the kernel's, in the other namespace."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.apps.app import App
from bench.apps.launch import Grant
from bench.apps.place import where
from bench.apps.web import make_files
from bench.programs import BenchError
from bypass.lab import CLIENT_IP

__all__ = ["Curl"]

PORT = 8000


class Curl(App):
    name = "curl"
    title = "curl"
    needs = ("curl", "python3")
    grants = (Grant(PORT, remote=True), Grant(PORT + 1, remote=True))
    rated = ("files_per_s",)
    unit = "files/s"

    @contextmanager
    def session(self) -> Iterator[None]:
        self.digests = make_files(self.place.folder / "www")
        server = self.place.background(
            [
                where("python3"), "-m", "http.server", "--bind", CLIENT_IP, "--directory",
                str(self.place.folder / "www"), str(PORT),
            ]
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    self.place.connect(PORT, CLIENT_IP).close()
                    break
                except ConnectionRefusedError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise BenchError("curl's server did not start") from None
                    time.sleep(0.02)
            yield
        finally:
            server.terminate()
            server.communicate(timeout=20)

    def exercise(self) -> dict[str, Any]:
        """One file by itself, then all of them at once, many times."""
        names = list(self.digests)
        asked, began = 0, time.monotonic()
        for options, wanted in (
            ([], names[-1:]),
            ([], names),
            (["--parallel"], names * self.place.count(5, 1)),
        ):
            self.attempt(
                f"curl {' '.join(options)} of {len(wanted)} files",
                self._get,
                options,
                wanted,
            )
            asked += len(wanted)
        seconds = time.monotonic() - began
        self.attempt("curl to a closed port", self._refused)
        return {"files": asked, "files_per_s": round(asked / seconds, 1)}

    def _get(self, options: list[str], names: list[str]) -> None:
        out = self.place.folder
        argv = [where("curl"), "-sS", "--max-time", "60", *options]
        for i, name in enumerate(names):
            argv += ["-o", f"{out}/got.{i}", f"http://{CLIENT_IP}:{PORT}/{name}"]
        curl = self.launcher.start(argv)
        code = curl.process.wait(90)
        curl.end()
        if code != 0:
            raise BenchError(f"exit code {code}: {curl.said()}")
        for i, name in enumerate(names):
            got = out / f"got.{i}"
            if hashlib.sha256(got.read_bytes()).hexdigest() != self.digests[name]:
                raise BenchError(f"{name}: {got.stat().st_size} bytes with the wrong hash")
            got.unlink()

    def _refused(self) -> None:
        """What is refused fails as it does on the kernel: curl's exit code 7."""
        curl = self.launcher.start(
            [where("curl"), "-sS", "--max-time", "10", f"http://{CLIENT_IP}:{PORT + 1}/"]
        )
        code = curl.process.wait(60)
        if code != 7:
            raise BenchError(f"exit code {code}, not 7: {curl.said()}")

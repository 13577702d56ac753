# SPDX-License-Identifier: Apache-2.0
"""Call chains of processes, by perf, from when it says that it records: on a busy machine it takes long to begin, and
what it is asked to end before has no data.

Source: perf-record(1), --control.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from bench.programs import BenchError

__all__ = ["CannotRecord", "Recording"]

FREQUENCY_HZ = 4999
END_S = 30


class CannotRecord(BenchError):
    """perf may not, or cannot, on this machine."""


class Recording:
    """perf, while it records, from when it says so; stop() gives what `perf script` makes of it."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bypass-perf-")
        self._data = Path(self._folder.name) / "perf.data"
        orders, self._give = os.pipe()  # closed when perf has ended: it would end with it
        hear, answers = os.pipe()
        try:
            self._perf = subprocess.Popen(
                [
                    "perf", "record", "-q", "-e", "cpu-clock", "-F", str(FREQUENCY_HZ), "-g", "-p",
                    ",".join(map(str, pids)), "-o", str(self._data),
                    "--delay=-1", f"--control=fd:{orders},{answers}",
                ],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=(orders, answers),
            )  # fmt: skip
        except BaseException:
            os.close(hear)
            os.close(self._give)
            raise
        finally:
            os.close(orders)
            os.close(answers)
        with os.fdopen(hear) as answered:
            with suppress(BrokenPipeError):
                os.write(self._give, b"enable\n")
            answered.read(1)  # of "ack"; nothing: it has ended, and stop() says why

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if self._give >= 0:
                self._end()
        finally:
            self._folder.cleanup()

    def _end(self) -> str:
        """What it had to say."""
        self._perf.terminate()
        try:
            return self._perf.communicate(timeout=END_S)[1]
        except subprocess.TimeoutExpired:
            self._perf.kill()
            self._perf.communicate()
            raise BenchError(f"perf did not end within {END_S} s") from None
        finally:
            os.close(self._give)
            self._give = -1

    def stop(self) -> list[str]:
        err = self._end()
        if not self._data.exists():
            raise CannotRecord(f"perf cannot record here: {err.strip()}")
        done = subprocess.run(
            ["perf", "script", "-i", str(self._data), "-F", "ip,sym,dso"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise BenchError(f"perf script: {done.stderr.strip()}")
        return done.stdout.splitlines()

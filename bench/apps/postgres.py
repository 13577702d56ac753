# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: a parent that accepts and a child by fork for every connection; pgbench, and its books must balance."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

from bench.apps.app import ServerApp
from bench.apps.launch import Grant
from bench.apps.place import USER, where
from bench.programs import BenchError
from bypass.lab import CLIENT_NET, SERVER_IP

__all__ = ["Postgres"]

PORT = 5432
BALANCES = (
    "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), "
    "(select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history)"
)


class Postgres(ServerApp):
    name = "postgres"
    title = "PostgreSQL"
    needs = ("postgres", "initdb", "pgbench", "psql")
    grants = (Grant(PORT),)
    rated = ("select only, prepared",)
    unit = "select/s"
    end_by = signal.SIGINT  # fast: it does not wait for clients

    @classmethod
    def missing(cls) -> list[str]:
        writable = os.stat(os.devnull).st_mode & 0o002
        return super().missing() + (
            [] if writable else [f"{os.devnull} that others may write to (chmod 666)"]
        )

    def argv(self) -> list[str]:
        data = self.place.folder / "data"
        self.place.server(
            [where("initdb"), "-D", str(data), "-A", "trust", "--no-sync", "--no-locale", "-E", "UTF8"]
        )
        hba = self.place.folder / "hba.conf"
        hba.write_text(
            f"local all all trust\nhost all all 192.0.2.0/24 trust\nhost all all {CLIENT_NET} trust\n"
        )
        return [
            where("postgres"), "-D", str(data), "-h", SERVER_IP, "-p", str(PORT), "-k", str(self.place.folder),
            "-c", f"hba_file={hba}", "-c", "fsync=off", "-c", "shared_buffers=32MB", "-c", "max_connections=60",
        ]  # fmt: skip

    def _tool(self, name: str, *options: str) -> list[str]:
        return [where(name), "-h", SERVER_IP, "-p", str(PORT), "-U", USER, *options, "postgres"]

    def exercise(self) -> dict[str, Any]:
        seconds = self.place.count(10)
        figures: dict[str, Any] = {}
        self.attempt("pgbench -i", self.place.client, self._tool("pgbench", "-i", "-q", "-s", "2"))
        for title, options in (
            ("tpcb", ("-c", "10", "-j", "2")),
            ("select only, prepared", ("-c", "10", "-S", "-M", "prepared")),
            ("a connection for each", ("-c", "4", "-C")),
        ):
            argv = self._tool("pgbench", "-n", "-T", str(seconds), *options)
            said = self.attempt(f"pgbench, {title}", self.place.client, argv)
            figures[title] = self._judged(title, said or "")
        self.attempt("balances", self._balance)
        self.attempt("a large answer", self._large)
        return figures

    def _judged(self, title: str, said: str) -> float:
        """Transactions per second; failed ones are a problem."""
        failed = re.search(r"number of failed transactions: (\d+)", said)
        tps = re.search(r"tps = ([\d.]+)", said)
        if not failed or not tps:
            self.problems.append(f"pgbench, {title}: no figures: {said[-300:]}")
            return 0.0
        self.expect(int(failed[1]) == 0, f"pgbench, {title}: {failed[0]}")
        return float(tps[1])

    def _balance(self) -> None:
        said = self.place.client(self._tool("psql", "-At", "-F", " ", "-c", BALANCES))
        sums = set(said.split())
        if len(sums) != 1:
            raise BenchError(f"accounts, branches, tellers and history differ: {said}")

    def _large(self) -> None:
        said = self.place.client(self._tool("psql", "-At", "-c", "select repeat('x', 20000000)"))
        if said.strip() != "x" * 20_000_000:
            raise BenchError(f"{len(said)} characters came")

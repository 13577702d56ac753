# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.defence`: what a flood of SYNs costs those who are connected, and what connections that come and go
leave behind.

How a request is priced under a flood: callgrind counts the instructions of the server's stack in three runs, with
requests only, with the flood only, and with both, the same ones. What a request costs during the flood is the
difference of the last two over the number of requests: whatever the flood makes dearer for it is in there.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.instructions import missing
from bench.programs import BenchError, program, run_json

SYNS = 100  # forged ones for each request
FLOOD_BUDGET = 1.1  # a request's instructions during the flood, over those without


def _counted(*args: int) -> tuple[int, dict[str, Any]]:
    """Instructions of the server's stack in one run of synflood, and what it printed."""
    with tempfile.TemporaryDirectory(prefix="bypass-bench-") as folder:
        out = Path(folder) / "callgrind.out"
        argv = [
            "valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}",
            program("synflood"), *map(str, args),
        ]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"{' '.join(map(str, argv))}: {done.stderr.strip()}")
        totals = next(line for line in out.read_text().splitlines() if line.startswith("totals:"))
        return int(totals.split()[1]), json.loads(done.stdout)


def flood(
    requests: int = 10_000, newcomers: int = 100, *, step: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """A flood of SYNS forged SYNs for each request; at the full size a million of them.

    Returns:
        `quiet` and `flooded`: instructions of a request without and with the flood; `syn`: of a forged SYN; `ratio`;
        `newcomers`: clients that connected, asked and left during it; `resident`: bytes of the server's arena after a
        tenth of the flood, a half, and at its end.
    """
    if missing():
        raise BenchError(f"missing: {missing()}")
    step("requests without a flood of SYNs")
    quiet, alone = _counted(requests, 0, 1, 0)
    step("a flood of SYNs without requests")
    syns, _ = _counted(requests, SYNS, 0, 0)
    step("requests in a flood of SYNs")
    both, found = _counted(requests, SYNS, 1, 0)
    step("newcomers in a flood of SYNs")
    joined = run_json([program("synflood"), str(requests), str(SYNS), "1", str(newcomers)])
    if alone["requests"] != requests or found["requests"] != requests:
        raise BenchError("requests were not answered")
    return {
        "requests": requests,
        "syns": found["syns"],
        "cookies": found["cookies"],
        "quiet": quiet / requests,
        "flooded": (both - syns) / requests,
        "syn": syns / found["syns"],
        "ratio": (both - syns) / quiet,
        "budget": FLOOD_BUDGET,
        "newcomers": joined["newcomers"],
        "resident": joined["resident"],
    }


def churn(conns: int = 1_000_000, *, step: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Connections opened, used and closed one after another: `per_cpu_s` of both ends together, and in `memory`
    what is resident and in use after a tenth of them, a half, and at the end."""
    step("connections that come and go")
    found = run_json([program("churn"), str(conns)])
    return found | {"per_cpu_s": found["conns"] / found["cpu_s"]}


@click.command()
@click.argument("what", type=click.Choice(("flood", "churn")))
@click.option(
    "--count",
    type=click.IntRange(100),
    help="Requests of `flood`, 10,000; connections of `churn`, 1,000,000.",
)
def main(what: str, count: int | None) -> None:
    """Prints one JSON object."""
    measure = flood if what == "flood" else churn
    try:
        found = measure(count) if count is not None else measure()
    except BenchError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""`make test-vm`: real drivers, in a machine in QEMU. Root; nothing of this machine is changed.

    python tests/vm

Exit code: 0; 1: something did not hold, or the machine hung at each try; 2: it cannot be run here.
"""

from __future__ import annotations

import argparse
import compileall
import os
import sys
import tempfile
import time
from pathlib import Path

import machine
from machine import ROOT, VM, MachineError
from outcome import Outcome
from rich.console import Console

from bypass.bpf import build
from bypass.policy import load_policy

TRIES = 2  # of a machine that hangs
LIMIT_S = 480.0  # a try takes a minute or two; three where all processors are busy with other things
SILENT_S = 120.0  # without a line of the guest
BUILD = ROOT / "build" / "vm"


def prepare() -> None:
    """What the guest finds: an initramfs, bytecode of Python and of the steering program."""
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "initramfs").write_bytes(machine.initramfs(VM, ROOT))
    compileall.compile_dir(ROOT / "bypass", quiet=2)
    policies = [load_policy(path) for path in sorted(machine.HERE.glob("afxdp*.yaml"))]
    machine.write_programs(BUILD / "programs.json", [build.defines(p.compiled) for p in policies])


def attempt(number: int, console: Console, qmp: Path, only: str) -> Outcome | str:
    """One try: what the guest said, or why the machine was ended."""
    outcome = Outcome()
    begin = time.monotonic()

    def line(text: str) -> None:
        said = outcome.hear(text)
        if said:
            console.print(f"{time.monotonic() - begin:6.1f} s  {said}", markup=False, soft_wrap=True)
        if outcome.unplug:
            machine.unplug(qmp, outcome.unplug)
            outcome.unplug = ""

    options = f"bypass.only={only}" if only else ""
    argv, env = machine.command(VM, BUILD / "initramfs", BUILD / "console.log", qmp=qmp, options=options)
    console.print(
        f"vm: try {number}: {argv[0]}, {machine.CPUS} processors, no KVM; at most {LIMIT_S:.0f} s",
        markup=False,
    )
    with machine.network(machine.NICS) as namespace:
        why = machine.run(argv, env, namespace, LIMIT_S, SILENT_S, line)
    (BUILD / "guest.log").write_text("".join(text + "\n" for text in outcome.lines))
    if why is None and not outcome.ended:
        why = "it ended before its test did"
    return outcome if why is None else why


def show_log(console: Console) -> None:
    """What the guest's kernel said at the end; what its test said was shown when it said it."""
    path = BUILD / "console.log"
    lines = path.read_text(errors="replace").splitlines()[-60:] if path.exists() else []
    console.print(f"vm: the end of {path.relative_to(ROOT)}:", *lines, sep="\n", markup=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Real drivers, in a machine in QEMU.")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="parts in whose name this is found (no spaces)"
    )
    only = parser.parse_args().only
    console = Console(highlight=False, emoji=False, width=140)
    try:
        if os.geteuid() != 0:
            raise MachineError("not root: the machine's network is made of taps in a namespace of its own")
        prepare()
        for number in range(1, TRIES + 1):
            with tempfile.TemporaryDirectory(prefix="bypass-vm-") as folder:
                outcome = attempt(number, console, Path(folder) / "qmp", only)
            if isinstance(outcome, Outcome):
                break
            console.print(f"vm: try {number}: {outcome}", markup=False)
            show_log(console)
        else:
            return 1
    except (MachineError, FileNotFoundError) as e:
        print(f"vm: {e}", file=sys.stderr)
        return 2
    if outcome.failed:
        show_log(console)
    console.print(outcome.table())
    for text in outcome.failed:
        console.print(f"vm: failed: {text}", markup=False)
    console.print(
        f"vm: {len(outcome.checks) - len(outcome.failed)} of {len(outcome.checks)} checks held", markup=False
    )
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())

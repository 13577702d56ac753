# SPDX-License-Identifier: Apache-2.0
"""Shared mode inside the machine: bypass-fwd has a real driver's port below a broker, on hugepages, with the
privileges that it keeps; an unmodified program serves the kernel peer.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inside import (
    ADDRESSES,
    HTTP,
    WAIT_S,
    WWW,
    CheckError,
    appearance,
    ask_kernel,
    check,
    check_back,
    faults,
    fetch,
    lines,
    pci_address,
    pci_driver,
    ping,
    run_bypass,
    tell,
)  # fmt: skip

SOCKET = "/run/bypass-vm.sock"
PROGRAM = ("/usr/bin/python3", "-S", "-m", "http.server", str(HTTP), "--directory", str(WWW))


def processes(name: str) -> list[int]:
    """By the name that the kernel has of them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if path.read_text().strip() == name:
                found.append(int(path.parent.name))
    return found


def forwarder() -> int:
    (pid,) = processes("bypass-fwd")
    return pid


def wait_for(what: str, condition: Any) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise CheckError(f"{what}: not within {WAIT_S:.0f} s")
        time.sleep(0.05)


@contextmanager
def program(address: str) -> Iterator[None]:
    """`bypass run` with Debian's Python and its HTTP server, as it is."""
    sys_out = os.open("/run/program.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    child = os.fork()
    if child == 0:
        from bypass.cli import main as bypass_command

        os.dup2(sys_out, 1)
        os.dup2(sys_out, 2)
        bypass_command(["run", "--socket", SOCKET, "--", *PROGRAM, "--bind", address])
        os._exit(1)
    os.close(sys_out)
    try:
        wait_for(f"a program that listens at {address}", lambda: listens(child))
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def listens(child: int) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        raise CheckError(f"the program ended ({status}): {Path('/run/program.log').read_text()[-600:]}")
    return "tcp" in run_bypass("ps", "--socket", SOCKET)


def up(policy: Path) -> None:
    begin = time.monotonic()
    said = run_bypass("up", "-c", str(policy), "--socket", SOCKET)
    check(forwarder() > 0, f"after {time.monotonic() - begin:.1f} s: {said!r}")


def hugepages_in_use() -> int:
    found = dict(
        line.split(":") for line in Path("/proc/meminfo").read_text().splitlines() if "HugePages" in line
    )
    return int(found["HugePages_Total"]) - int(found["HugePages_Free"])


def shared_mode(ifname: str, policy: Path) -> None:
    """Twice: ended in order, and by a SIGKILL of bypass-fwd. The device was the kernel's and is so again."""
    address, device, before = ADDRESSES[ifname], pci_address(ifname), appearance(ifname)
    drivers = [pci_driver(device)]
    up(policy)
    drivers.append(pci_driver(device))
    check(drivers[1] == "vfio-pci", f"{device} was taken: {drivers[1]}")
    check(hugepages_in_use() > 0, f"{hugepages_in_use()} hugepages are in bypass-fwd's hands")
    with program(address):
        rate, answers = fetch(address), ping(address)
        ask_kernel(address)
        stats = run_bypass("stats")
        check(
            "woken by interrupts" in stats, f"{next(line for line in stats.splitlines() if 'woken' in line)}"
        )
        os.kill(forwarder(), signal.SIGKILL)
        wait_for("the broker's end after bypass-fwd's", lambda: not Path(SOCKET).exists())
    wait_for("the kernel's driver", lambda: pci_driver(device) == drivers[0])
    drivers.append(pci_driver(device))
    check_back(ifname, device, drivers, before)
    check(not faults(), f"the IOMMU had nothing to keep the device from{lines(faults())}")
    up(policy)
    said = run_bypass("down", "--socket", SOCKET)
    drivers.append(pci_driver(device))
    check_back(ifname, device, drivers, before)
    check(hugepages_in_use() == 0 and not processes("bypass-fwd"), f"nothing is left: {said!r}")
    tell(row={
        "device": ifname, "driver": " > ".join(drivers), "path": "bypass-fwd, DPDK on hugepages",
        "http": rate, "ping": answers,
    })  # fmt: skip

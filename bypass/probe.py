# SPDX-License-Identifier: Apache-2.0
"""What this process may do on this machine, found by trying: loading a program, AF_XDP sockets, namespaces,
native XDP on a veth. Nothing is left behind, and no interface that exists is touched.

What to do about a shortage is the business of bypass.doctor.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

from bypass import libbpf, netns
from bypass.errors import BypassError

# linux/capability.h: the ones that matter here
CAPABILITIES = {
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
KERNEL_NEEDED = (6, 6)  # tcx links: the guard against kernel resets
AF_XDP = 44
PROGRAM_NAME = "bypass_probe"
# { mov r0, XDP_PASS; exit }
PASS_PROGRAM = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)


def kernel_version() -> tuple[int, int]:
    """(major, minor) of the running kernel."""
    m = re.match(r"(\d+)\.(\d+)", platform.release())
    if m is None:
        raise BypassError(f"kernel release {platform.release()!r} does not begin with a version")
    return int(m.group(1)), int(m.group(2))


def capabilities() -> frozenset[str]:
    """The names from CAPABILITIES that are effective in the calling thread (capabilities(7))."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            bits = int(line.split()[1], 16)
            return frozenset(name for name, bit in CAPABILITIES.items() if bits >> bit & 1)
    raise BypassError("/proc/thread-self/status has no CapEff line")


def load_pass_program() -> libbpf.Prog:
    """Loads an XDP program that passes everything. The caller closes it."""
    return libbpf.Prog(libbpf.PROG_XDP, PROGRAM_NAME, PASS_PROGRAM, libbpf.ATTACH_XDP, [])


def attach_native(prog: libbpf.Prog, ifindex: int) -> libbpf.Link:
    """Attaches an XDP program in driver mode by a link; closing the link detaches it."""
    return libbpf.Link(prog, ifindex, libbpf.ATTACH_XDP, libbpf.XDP_DRV_MODE)


def vulnerabilities(folder: Path = Path("/sys/devices/system/cpu/vulnerabilities")) -> dict[str, str]:
    """What the kernel says of each one that it knows; empty where it does not say."""
    found = {}
    for file in sorted(folder.glob("*")):
        with suppress(OSError):
            found[file.name] = file.read_text().strip()
    return found


# ---- Attempts: None, or what is missing, as words ----------------------------------------------------------------
def try_bcc() -> str | None:
    try:
        import bcc  # noqa: F401
    except ImportError as e:
        return f"bcc cannot be imported ({e}): install python3-bpfcc, and make .venv by `make setup`"
    return None


def try_core() -> str | None:
    try:
        from bypass import _core  # noqa: F401
    except ImportError as e:
        return f"the C core cannot be imported ({e}): make setup"
    return None


def try_program_load() -> str | None:
    try:
        load_pass_program().close()
    except OSError as e:
        return _why(e)
    return None


def is_jited() -> bool | None:
    """Whether the kernel compiled the program that it was given to machine code; None: it takes none from us."""
    try:
        prog = load_pass_program()
    except OSError:
        return None
    try:
        text = Path(f"/proc/self/fdinfo/{prog.fd}").read_text()
    finally:
        prog.close()
    return re.search(r"^prog_jited:\s*1$", text, re.MULTILINE) is not None


def try_xsk() -> str | None:
    try:
        socket.socket(AF_XDP, socket.SOCK_RAW, 0).close()
    except OSError as e:
        return f"socket(AF_XDP): {_why(e)}"
    return None


def _why(e: OSError) -> str:
    return e.strerror or str(e)  # a library that is not there has no errno


@cache
def try_native_xdp() -> str | None:
    """Native XDP on a veth, in a namespace made for it. The answer is kept for the life of the process."""
    name = f"bypass-{os.getpid()}-probe"
    try:
        netns.create(name)
    except OSError as e:
        return f"a network namespace cannot be made: {_why(e)}"
    try:
        return netns.run(name, _attach_to_veth)
    finally:
        with suppress(FileNotFoundError):
            netns.remove(name)


def _attach_to_veth() -> str | None:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as ip:
        try:
            ip.link("add", ifname="probe0", kind="veth", peer={"ifname": "probe1"})
        except NetlinkError as e:
            return f"a veth pair cannot be made: {os.strerror(abs(e.code))}"
        try:
            prog = load_pass_program()
        except OSError as e:
            return _why(e)
        try:
            attach_native(prog, ip.link_lookup(ifname="probe0")[0]).close()
        except OSError as e:
            return f"in native mode on a veth: {_why(e)}"
        finally:
            prog.close()
    return None


def missing_for_xdp() -> list[str]:
    """What is missing to steer packets of a veth into AF_XDP here; empty: nothing.

    The demo and the tests ask this: with something missing, the one runs on the simulated wire, the others skip.
    """
    caps = capabilities()
    if os.geteuid() != 0:
        return ["root"]
    missing = [c for c in ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_NET_RAW") if c not in caps]
    if "CAP_BPF" not in caps and "CAP_SYS_ADMIN" not in caps:
        missing.append("CAP_BPF")
    if kernel_version() < KERNEL_NEEDED:
        missing.append(
            f"kernel {KERNEL_NEEDED[0]}.{KERNEL_NEEDED[1]} or later (this is {platform.release()})"
        )
    for attempt in (try_bcc, try_xsk):
        problem = attempt()
        if problem:
            missing.append(problem)
    if not missing:
        problem = try_native_xdp()
        if problem:
            missing.append(problem)
    return missing

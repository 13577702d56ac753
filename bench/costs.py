# SPDX-License-Identifier: Apache-2.0
"""Where the time of the stack's server goes: profiles by perf of `bypass-sleep`.

Samples are taken of the server process, in user and kernel mode, with the kernel's call chains, and put into groups
by what they are for: the first group that knows a function of the chain takes the sample.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import network
from bench.recording import CannotRecord, Recording
from bypass.lab import Lab

VARIANT = "bypass-sleep"
TESTS = ("tcp_rr_32", "bulk_to_server", "bulk_to_client")
TOP = 12

# Kernel functions, looked for from the innermost to the outermost of each group, groups in this order: what the
# peer's stack does in a softirq happens inside of the call that sends.
KERNEL_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "softirq: the peer's end of the veth and its TCP/IP stack, run by whoever sends",
        ("net_rx_action", "__do_softirq", "handle_softirqs", "do_softirq", "__napi_poll", "veth_poll"),
    ),
    (
        "AF_XDP transmission: a socket buffer for each frame, and its way into the veth",
        ("__xsk_generic_xmit", "xsk_generic_xmit", "xsk_sendmsg", "xsk_build_skb", "__dev_direct_xmit"),
    ),
    (
        "sleeping and waking: ppoll(), the scheduler",
        ("do_sys_poll", "__x64_sys_ppoll", "__se_sys_ppoll", "do_poll", "schedule", "__schedule", "ep_poll"),
    ),
    (
        "system call entry and exit",
        ("entry_SYSCALL_64_after_hwframe", "entry_SYSCALL_64", "syscall_return_via_sysret", "do_syscall_64"),
    ),
)
BPF = "the steering program"
OTHER_KERNEL = "other kernel work: interrupts, faults"
USER_GROUPS = (
    ("libbypass.so", "the stack itself: protocol, checksums, copies"),
    ("_core", "AF_XDP rings on the user's side"),
    ("libserver.so", "the server program"),
)
OTHER_USER = "C library and clock"
GROUPS = (*(title for title, _ in KERNEL_GROUPS), BPF, OTHER_KERNEL, *(t for _, t in USER_GROUPS), OTHER_USER)


def missing() -> str:
    return "" if shutil.which("perf") else "perf (apt-get install linux-perf)"


def run(lab: Lab, *, seconds: float = 2.0, step: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Profiles the tests of TESTS. The result is `costs` of bench.json."""
    if missing():
        return {"missing": missing()}
    found: dict[str, Any] = {"variant": VARIANT, "tests": {}}
    for test in network.TESTS:
        if test.name in TESTS:
            step(f"profile of the server: {test.title}")
            found["tests"][test.name] = _profile(lab, test, seconds)
    return found


def _profile(lab: Lab, test: network.Test, seconds: float) -> dict[str, Any]:
    with network.start(lab, VARIANT) as server, Recording([server.pid]) as recording:
        network.measure(lab, server, test, 0, int(seconds * 1000))
        try:
            lines = recording.stop()
        except CannotRecord as e:
            return {"missing": str(e)}
    return summary(samples(lines)) | {"title": test.title}


Frame = tuple[str, str]  # function, file name of its object


def samples(lines: Iterable[str]) -> Iterator[list[Frame]]:
    """Call chains, innermost first, from `perf script -F ip,sym,dso`."""
    chain: list[Frame] = []
    for line in lines:
        if not line.strip():
            if chain:
                yield chain
            chain = []
            continue
        _, _, rest = line.strip().partition(" ")
        symbol, _, dso = rest.rpartition(" ")
        chain.append((symbol.partition("+")[0], Path(dso.strip("()")).name))
    if chain:
        yield chain


def group_of(chain: list[Frame]) -> str:
    """By what the innermost function belongs to, and for the kernel by whom it was called."""
    _, dso = chain[0]
    if not dso.startswith(("[kernel", "[unknown", "[guest", "bpf_prog_")):
        return next((title for part, title in USER_GROUPS if part in dso), OTHER_USER)
    if dso.startswith("bpf_prog_"):
        return BPF
    functions = {name for name, _ in chain}
    return next((title for title, names in KERNEL_GROUPS if functions.intersection(names)), OTHER_KERNEL)


def summary(chains: Iterable[list[Frame]]) -> dict[str, Any]:
    groups: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    total = 0
    for chain in chains:
        total += 1
        groups[group_of(chain)] += 1
        functions[f"{chain[0][0]} ({chain[0][1]})"] += 1
    if total == 0:
        return {"missing": "perf took no samples"}
    return {
        "samples": total,
        "groups": {name: n / total for name, n in groups.most_common()},
        "functions": {name: n / total for name, n in functions.most_common(TOP)},
    }

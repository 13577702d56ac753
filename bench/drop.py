# SPDX-License-Identifier: Apache-2.0
"""`action: drop` in XDP against the kernel's own ways to drop, under the same flood of UDP datagrams.

    xdp      the steering program with one rule `action: drop`
    nft      a rule in nftables' raw table: prerouting, priority -300, before connection tracking
    closed   no rule: a port without socket; the kernel looks the socket up, and answers some by ICMP

By two senders, both on the client's core, which on a veth does the receiver's work as well:

    frames   XDP frames without socket buffers (bench/inject.c), as a NIC's driver has them: a socket buffer is made
             only for what XDP does not drop
    sockets  a kernel UDP socket (bench/blast.c): its buffers exist already, and veth copies each for XDP
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from bench.figures import ratios, spread
from bench.programs import CLIENT_CORE, BenchError, ksoftirqd_pids, pinned, program, run_json
from bypass import netns
from bypass.lab import CLIENT_IFNAME, CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab
from bypass.policy import parse_policy
from bypass.steering import Steering

PORT = 9
SIZE = 64
POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: copy, queues: all}}
flows:
  - name: flood
    match: {{proto: udp, local: {SERVER_IP}, local_port: {PORT}}}
    action: drop
"""
TABLE = "bypass_bench"
RULES = f"""
table ip {TABLE} {{
  chain raw {{
    type filter hook prerouting priority raw; policy accept;
    ip daddr {SERVER_IP} udp dport {PORT} counter drop
  }}
}}
"""

Dropped = Callable[[], int]


@contextmanager
def by_xdp(lab: Lab) -> Iterator[Dropped]:
    with netns.entered(lab.server_ns), Steering(parse_policy(POLICY), SERVER_IFNAME, queues=1) as steering:
        steering.set_locals([SERVER_IP])
        yield lambda: steering.rules()["flood"].packets


@contextmanager
def by_nft(lab: Lab) -> Iterator[Dropped]:
    def nft(*args: str, rules: str | None = None) -> str:
        argv = ["ip", "netns", "exec", lab.server_ns, "nft", *args]
        done = subprocess.run(argv, input=rules, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    def dropped() -> int:
        for item in json.loads(nft("-j", "list", "table", "ip", TABLE))["nftables"]:
            for part in item.get("rule", {}).get("expr", ()):
                if "counter" in part:
                    return int(part["counter"]["packets"])
        raise BenchError("nft lists no counter")

    nft("-f", "-", rules=RULES)
    try:
        yield dropped
    finally:
        nft("delete", "table", "ip", TABLE)


@contextmanager
def by_closed_port(lab: Lab) -> Iterator[Dropped]:
    def no_ports() -> int:
        with netns.entered(lab.server_ns), open("/proc/thread-self/net/snmp") as f:
            names, values = (line.split() for line in f if line.startswith("Udp:"))
        return int(values[names.index("NoPorts")])

    before = no_ports()
    yield lambda: no_ports() - before


WAYS: dict[str, tuple[str, Callable[[Lab], AbstractContextManager[Dropped]]]] = {
    "xdp": ("XDP, `action: drop`", by_xdp),
    "nft": ("nftables, raw table", by_nft),
    "closed": ("no rule: a port without socket", by_closed_port),
}
SENDERS = {"frames": "XDP frames, as from a NIC's driver", "sockets": "a kernel UDP socket"}


def missing() -> dict[str, str]:
    """Ways that cannot be measured here: name -> what is missing."""
    return {} if shutil.which("nft") else {"nft": "nft (apt-get install nftables)"}


def set_gro(lab: Lab, on: bool) -> None:
    """GRO on the server's end: without XDP, a veth takes XDP frames only with it."""
    netns.run(lab.server_ns, _set_gro, on)


def _set_gro(on: bool) -> None:
    from pyroute2.ethtool.ioctl import IoctlEthtool

    ethtool = IoctlEthtool(SERVER_IFNAME)
    try:
        features = ethtool.get_features()
        features["rx-gro"] = on
        ethtool.set_features(features)
    finally:
        ethtool.close()


def run(
    lab: Lab, *, rounds: int, warmup_ms: int, measure_ms: int, step: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Interleaved rounds. The result is `drop` of bench.json."""
    ways = [w for w in WAYS if w not in missing()]
    runs: dict[str, dict[str, list[dict[str, float]]]] = {s: {w: [] for w in ways} for s in SENDERS}
    for number in range(rounds):
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:
            for sender in SENDERS:
                step(f"round {number + 1}: drop by {WAYS[way][0]}: {SENDERS[sender]}")
                set_gro(lab, sender == "frames")
                try:
                    runs[sender][way].append(_one(lab, way, sender, warmup_ms, measure_ms))
                finally:
                    set_gro(lab, False)
    return {
        "size_bytes": SIZE,
        "missing": missing(),
        "senders": {sender: _summary(SENDERS[sender], by_way) for sender, by_way in runs.items()},
    }


def _summary(title: str, by_way: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    def rates(way: str) -> list[float]:
        return [r["packets_per_s"] for r in by_way[way]]

    return {
        "title": title,
        "ways": {
            way: {"title": WAYS[way][0]} | {key: spread([r[key] for r in results]) for key in results[0]}
            for way, results in by_way.items()
        },
        "ratios": {f"xdp/{way}": ratios(rates("xdp"), rates(way)) for way in by_way if way != "xdp"},
    }


def _one(lab: Lab, way: str, sender: str, warmup_ms: int, measure_ms: int) -> dict[str, float]:
    sides = lab.sides()
    assert sides is not None
    timing = [str(PORT), str(SIZE), str(warmup_ms), str(measure_ms), ",".join(map(str, ksoftirqd_pids()))]
    if sender == "frames":
        argv = [program("inject"), CLIENT_IFNAME, sides[0].mac, CLIENT_IP, SERVER_IP, *timing]
    else:
        argv = [program("blast"), SERVER_IP, *timing]
    with WAYS[way][1](lab) as dropped:
        raw = run_json(["ip", "netns", "exec", lab.client_ns, *pinned(CLIENT_CORE, argv)])
        # On its way a packet may be lost where rings overflow: only what arrived was dropped.
        share = dropped() / raw["sent_in_all"]
    arrived = raw["ops"] * share
    return {
        "packets_per_s": arrived / raw["seconds"],
        "cpu_s_per_million": raw["task_cpu_s"] / arrived * 1e6,
        "arrived_share": share,
    }

# SPDX-License-Identifier: Apache-2.0
"""Who served? Told by the kernel of the server's namespace, which has no reason to flatter bypass.

    connections   TcpActiveOpens and TcpPassiveOpens of /proc/net/snmp: of connections that bypass has, the kernel knows
                  nothing
    packets       those that the interface received (/proc/net/dev; XDP does not hide them from it), less those that the
                  kernel's IP received (IpExtIn*Pkts of /proc/net/netstat, which count the segments of joined packets
                  one by one), less the loopback's. Of a port for DPDK: those that the wire's end received, less those
                  that the TAP gave to the kernel; the kernel's IP counts, and drops, what AF_PACKET had copied

The steering program's own counters are compared with it where there are some (`bypass stats`).

Source: RFC 4022, RFC 4293, proc(5).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bypass import netns, status
from bypass.errors import BypassError
from bypass.lab import SERVER_IFNAME, WIRE_IFNAME, Lab

__all__ = ["SHARE", "Evidence", "Snapshot", "snapshot"]

SHARE = 0.99  # of the interface's packets, steered
IP_PACKETS = ("InNoECTPkts", "InECT1Pkts", "InECT0Pkts", "InCEPkts")


@dataclass(frozen=True)
class Snapshot:
    """Counters of the server's namespace. `steered`, `passed`: the steering program's; None: there is none."""

    active_opens: int
    passive_opens: int
    received: int
    ip_received: int
    loopback: int
    retransmitted: int
    steered: int | None = None
    passed: int | None = None


@dataclass(frozen=True)
class Evidence:
    """What happened between two snapshots."""

    before: Snapshot
    after: Snapshot

    def _grew(self, name: str) -> int:
        return int(getattr(self.after, name)) - int(getattr(self.before, name))

    @property
    def packets(self) -> int:
        return self._grew("received")

    @property
    def kernel_packets(self) -> int:
        return max(0, self._grew("ip_received") - self._grew("loopback"))

    @property
    def share(self) -> float:
        """Of the interface's packets, those that the kernel's IP never saw. 0 when there were none."""
        return max(0.0, 1 - self.kernel_packets / self.packets) if self.packets > 0 else 0.0

    @property
    def steered_share(self) -> float | None:
        """The same by the steering program's counters."""
        if self.before.steered is None or self.after.steered is None:
            return None
        steered, passed = self._grew("steered"), self._grew("passed")
        return steered / (steered + passed) if steered + passed else 0.0

    def problems(self, active: int = 0, passive: int = 0) -> list[str]:
        """Why this was not served by bypass; empty: it was.

        Args:
            active, passive: connections that the kernel is expected to have had, as of a program that also talks to
                itself.
        """
        found = []
        for name, allowed in (("active_opens", active), ("passive_opens", passive)):
            if self._grew(name) > allowed:
                found.append(f"the kernel counted {self._grew(name)} {name}, {allowed} are expected")
        if self.packets <= 0:
            found.append("the interface received nothing")
        elif self.share <= SHARE:
            found.append(
                f"{self.share:.2%} of {self.packets} packets were steered: the kernel's IP took {self.kernel_packets}"
            )
        if self.steered_share is not None and self.steered_share <= SHARE:
            found.append(f"the steering program says {self.steered_share:.2%}")
        return found

    def figures(self) -> dict[str, Any]:
        return {
            "packets": self.packets,
            "steered": round(self.share, 6),
            "steered_by_program": self.steered_share,
            "active_opens": self._grew("active_opens"),
            "passive_opens": self._grew("passive_opens"),
            "kernel_retransmitted": self._grew("retransmitted"),
        }


def _table(path: Path, group: str) -> dict[str, int]:
    """A group of /proc/net/snmp or netstat: a line of names, a line of numbers."""
    lines = [line.split()[1:] for line in path.read_text().splitlines() if line.startswith(f"{group}:")]
    names, values = lines
    return dict(zip(names, map(int, values), strict=True))


def _received(path: Path) -> dict[str, int]:
    """Packets received, by interface."""
    found = {}
    for line in path.read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        found[name.strip()] = int(numbers.split()[1])
    return found


def parse(proc_net: Path, steering: tuple[int, int] | None = None, ifname: str = SERVER_IFNAME) -> Snapshot:
    """From the files of one /proc/net."""
    tcp, ip = _table(proc_net / "snmp", "Tcp"), _table(proc_net / "netstat", "IpExt")
    received = _received(proc_net / "dev")
    loopback, kernel = received["lo"], sum(ip[name] for name in IP_PACKETS)
    if WIRE_IFNAME in received and ifname == SERVER_IFNAME:
        ifname, kernel = WIRE_IFNAME, received.get(SERVER_IFNAME, 0) + loopback
    return Snapshot(
        active_opens=tcp["ActiveOpens"],
        passive_opens=tcp["PassiveOpens"],
        retransmitted=tcp["RetransSegs"],
        received=received[ifname],
        ip_received=kernel,
        loopback=loopback,
        steered=steering[0] if steering else None,
        passed=steering[1] if steering else None,
    )


def _steering() -> tuple[int, int] | None:
    """Packets that the steering programs of this namespace redirected, and that they passed; None: nobody tells."""
    totals = {"REDIRECT": 0, "PASS": 0, "DROP": 0}
    there = status.instances(SERVER_IFNAME)
    for instance in there:
        try:
            for reason in status.ask(instance, "stats")["reasons"]:
                totals[str(reason["verdict"]).upper()] += int(reason["packets"])
        except BypassError:
            return None  # it went away between the list and the question
    return (totals["REDIRECT"], totals["PASS"]) if there else None


def snapshot(lab: Lab) -> Snapshot:
    """Of the lab's server."""

    def look() -> Snapshot:
        return parse(Path("/proc/thread-self/net"), _steering())

    return netns.run(lab.server_ns, look)

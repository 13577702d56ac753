# SPDX-License-Identifier: Apache-2.0
"""A lab: two network namespaces joined by a multi-queue veth, made and removed as one thing.

    bypass-server                               bypass-client
    bypass0  192.0.2.10/24  ---- veth ----  192.0.2.20/24  bypass1
    (the machine under test)                198.51.100.1/24 on lo: every address of that network is the client's,
    198.51.100.0/24 via 192.0.2.20          for many peers, and for a next hop that is a gateway

Neither side offloads transmit checksums: a veth peer that does delivers packets whose TCP checksum is only the
pseudo-header's sum, which no receiver but the kernel can judge. Neither strips VLAN tags: XDP does not see a
stripped one. There are no IPv6 link-local addresses, so that an idle lab is silent.

With `wire` the server's end is a port for the DPDK backend: `bypass0w`, without addresses, so that the kernel does not
answer beside the backend. Its TAP device is called `bypass0` then, and has the addresses that the policy gives it
(dpdk_policy()).

Several labs may exist, by name: the namespaces of lab `x` are `bypass-x-server` and `bypass-x-client`.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bypass import netns
from bypass.errors import LabError

SERVER_IP = "192.0.2.10"
CLIENT_IP = "192.0.2.20"
PREFIX_LEN = 24
CLIENT_NET = "198.51.100.0/24"
CLIENT_NET_IP = "198.51.100.1"
SERVER_IFNAME = "bypass0"
CLIENT_IFNAME = "bypass1"
WIRE_IFNAME = "bypass0w"
"""The server's end where DPDK has it."""
MAX_QUEUES = 64


@dataclass(frozen=True)
class Side:
    """One end of the lab. `address` is a host address, empty for a DPDK port's; `mac` is written with colons."""

    namespace: str
    interface: str
    address: str
    prefix_len: int
    mac: str
    queues: int
    mtu: int


class Lab:
    """The two namespaces of one lab; `up()` makes them, `down()` removes them. A context manager for both.

    Args:
        name: distinguishes labs; "" is the default lab.
        queues: receive and transmit queues of each side, 1..64.
        mtu: of both sides, bytes.
        wire: the server's end is for DPDK.
    """

    def __init__(self, name: str = "", *, queues: int = 2, mtu: int = 1500, wire: bool = False) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,48}", name):
            raise LabError(f"lab name {name!r}: letters, digits, '.', '_' and '-', at most 48 of them")
        if not 1 <= queues <= MAX_QUEUES:
            raise LabError(f"{queues} queues: a lab has 1 to {MAX_QUEUES}")
        if not 68 <= mtu <= 65535:
            raise LabError(f"mtu {mtu}: a veth takes 68 to 65535 bytes")
        self.name = name
        self.queues = queues
        self.mtu = mtu
        self.wire = wire
        self.server_ifname = WIRE_IFNAME if wire else SERVER_IFNAME
        infix = f"{name}-" if name else ""
        self.server_ns = f"bypass-{infix}server"
        self.client_ns = f"bypass-{infix}client"

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    @property
    def namespaces(self) -> tuple[str, str]:
        return self.server_ns, self.client_ns

    # ---- Making ------------------------------------------------------------------------------------------------
    def up(self) -> bool:
        """Makes the lab. True: made now; False: it was there already, as asked for.

        Raises:
            LabError: no privilege, or a lab of this name is there with other queues or another MTU.
        """
        require_root()
        sides = self.sides()
        if sides is not None:
            have = {(s.queues, s.mtu) for s in sides}
            if sides[0].interface != self.server_ifname:
                what = "has its address itself" if self.wire else "is a port for DPDK"
                raise LabError(
                    f"{self.server_ns} is up, and its interface {what}: take the lab down first "
                    f"(bypass lab down{self._option()})"
                )
            if have != {(self.queues, self.mtu)}:
                queues, mtu = sides[0].queues, sides[0].mtu
                raise LabError(
                    f"{self.server_ns} and {self.client_ns} are up with {queues} queues and MTU {mtu}, not "
                    f"{self.queues} and {self.mtu}: take them down first (bypass lab down{self._option()})"
                )
            return False
        self._remove_half_built()
        try:
            for ns in self.namespaces:
                netns.create(ns)
            self._join()
        except PermissionError as e:
            self.down()
            raise LabError(f"the lab needs CAP_SYS_ADMIN and CAP_NET_ADMIN: {e}") from e
        except BaseException:
            self.down()
            raise
        return True

    def _option(self) -> str:
        return f" --name {self.name}" if self.name else ""

    def _remove_half_built(self) -> None:
        """What an interrupted up() or down() left. Namespaces in use by somebody are not ours to remove."""
        for ns in self.namespaces:
            used = netns.processes(ns)
            if used:
                raise LabError(
                    f"namespace {ns} exists, is no complete lab, and is in use by {_who(used)}: "
                    f"end them or run: bypass lab down{self._option()}"
                )
        self.down()

    def _join(self) -> None:
        from pyroute2 import IPRoute

        counts = {"num_tx_queues": self.queues, "num_rx_queues": self.queues, "mtu": self.mtu}
        peer_fd = os.open(netns.RUN_DIR / self.client_ns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with IPRoute(netns=self.server_ns) as ip:
                peer = {"ifname": CLIENT_IFNAME, "net_ns_fd": peer_fd, **counts}
                ip.link("add", ifname=self.server_ifname, kind="veth", peer=peer, **counts)
        finally:
            os.close(peer_fd)
        for ns, ifname in zip(self.namespaces, (self.server_ifname, CLIENT_IFNAME), strict=True):
            netns.run(ns, _quieten, ifname)
        if self.wire:
            netns.run(self.server_ns, _deafen, self.server_ifname)
        with IPRoute(netns=self.server_ns) as server, IPRoute(netns=self.client_ns) as client:
            s, c = _raise(server, self.server_ifname), _raise(client, CLIENT_IFNAME)
            client.addr("add", index=c, address=CLIENT_IP, prefixlen=PREFIX_LEN)
            client.addr("add", index=1, address=CLIENT_NET_IP, prefixlen=PREFIX_LEN)
            if not self.wire:
                server.addr("add", index=s, address=SERVER_IP, prefixlen=PREFIX_LEN)
                server.route("add", dst=CLIENT_NET, gateway=CLIENT_IP)
            wait_for(lambda: _is_up(server, s) and _is_up(client, c), 5, "the lab's veth to come up")

    # ---- Looking -----------------------------------------------------------------------------------------------
    def sides(self) -> tuple[Side, Side] | None:
        """(server, client), or None when the lab is not there or not complete."""
        if not all(netns.exists(ns) for ns in self.namespaces):
            return None
        server = _side(self.server_ns, SERVER_IFNAME, SERVER_IP) or _side(self.server_ns, WIRE_IFNAME, "")
        client = _side(self.client_ns, CLIENT_IFNAME, CLIENT_IP)
        return (server, client) if server and client else None

    def describe(self) -> dict[str, Any]:
        """For --json: {"name", "up", "server": {...}, "client": {...}}, the sides as in Side."""
        sides = self.sides()
        about: dict[str, Any] = {"name": self.name, "up": sides is not None}
        if sides:
            about |= {"server": asdict(sides[0]), "client": asdict(sides[1])}
        return about

    # ---- Using -------------------------------------------------------------------------------------------------
    def command(self, side: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs argv on one side ("server" or "client"), in a mount namespace of its own
        with this side's /sys and a BPF file system."""
        ns = {"server": self.server_ns, "client": self.client_ns}.get(side)
        if ns is None:
            raise LabError(f"side {side!r}: it is 'server' or 'client'")
        if not netns.exists(ns):
            raise LabError(f"namespace {ns} is not there: bypass lab up{self._option()}")
        mount = "mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf || exit 126"
        return ["ip", "netns", "exec", ns, "sh", "-c", f'{mount}; exec "$@"', "sh", *argv]

    # ---- Removing ----------------------------------------------------------------------------------------------
    def down(self) -> dict[int, str]:
        """Removes the lab, ending the processes inside it first: SIGTERM, and SIGKILL after 2 s.

        Returns:
            The processes that were ended, pid -> name.

        Raises:
            LabError: no privilege, or it is called from inside the lab.
        """
        require_root()
        inside: dict[int, str] = {}
        for ns in self.namespaces:
            inside |= netns.processes(ns)
        if os.getpid() in inside:
            raise LabError("a lab cannot be taken down from inside: leave its namespace first")
        _end(inside)
        for ns in self.namespaces:
            with suppress(FileNotFoundError):
                if netns.exists(ns):
                    _delete_links(ns)  # at once, also when a dying socket keeps the namespace
                    netns.remove(ns)
        return inside


def dpdk_policy(text: str, ifname: str = WIRE_IFNAME) -> str:
    """A policy for the lab's interface as one for its DPDK port: same rules; the lab's addresses and routes.

    Args:
        text: a policy of `kind: afxdp`; its `mode`, queues and sizes go.
        ifname: the kernel's device below the port.
    """
    import yaml

    policy = yaml.safe_load(text)
    policy.pop("mode", None)
    return yaml.safe_dump(
        policy
        | {
            "backend": {
                "kind": "dpdk",
                "device": f"net_af_packet0,iface={ifname}",
                "eal": {"hugepages": False, "memory": "64M"},
                "exception_rate": 50000,
            },
            "addresses": [f"{SERVER_IP}/{PREFIX_LEN}"],
            "routes": [{"to": CLIENT_NET, "via": CLIENT_IP}],
        },
        sort_keys=False,
    )


def labs() -> list[Lab]:
    """Every lab of which at least one namespace exists."""
    found = set()
    for ns in netns.names("bypass-"):
        m = re.fullmatch(r"bypass-(?:(.+)-)?(?:server|client)", ns)
        if m:
            found.add(m.group(1) or "")
    return [Lab(name) for name in sorted(found)]


def require_root() -> None:
    if os.geteuid() != 0:
        raise LabError("a lab needs root (it makes network namespaces): run it with sudo")


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Returns when condition() is true; LabError after `seconds`, naming `what` was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"waited {seconds:g} s for {what}")
        time.sleep(0.005)


def _who(processes: dict[int, str]) -> str:
    return ", ".join(f"{name} ({pid})" for pid, name in sorted(processes.items()))


def _deafen(ifname: str) -> None:
    """The kernel does nothing with what arrives there. AF_PACKET gives DPDK a copy of each frame, and the TAP's
    addresses are the kernel's by whatever interface they are asked for (the weak host model): it would answer ARP and
    ping a second time, and reset TCP that is not its own. Source: Documentation/networking/ip-sysctl.rst."""
    conf = Path("/proc/sys/net/ipv4/conf")
    (conf / "all" / "rp_filter").write_text("0")  # the larger of both counts, and 2 asks for less than 1
    (conf / ifname / "rp_filter").write_text("1")  # the way back is by the TAP: dropped
    (conf / ifname / "arp_ignore").write_text("8")  # answers nobody
    ipv6 = Path(f"/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6")
    if ipv6.exists():
        ipv6.write_text("1")


def _quieten(ifname: str) -> None:
    """Settings that have to be made inside the namespace, before the interface is up."""
    from pyroute2.ethtool.ioctl import IoctlEthtool

    ipv6 = Path(f"/proc/sys/net/ipv6/conf/{ifname}/addr_gen_mode")
    if ipv6.exists():
        ipv6.write_text("1")  # none: no link-local address, hence no router or listener reports
    ethtool = IoctlEthtool(ifname)
    try:
        features = ethtool.get_features()
        for feature in (
            "tx-checksum-ip-generic",
            "tx-checksum-sctp",
            "tx-vlan-hw-insert",
            "tx-vlan-stag-hw-insert",
        ):
            if feature in features and features.is_available(feature):
                features[feature] = False
        ethtool.set_features(features)
    finally:
        ethtool.close()


def _raise(ip: Any, ifname: str) -> int:
    index = int(ip.link_lookup(ifname=ifname)[0])
    ip.link("set", index=1, state="up")
    ip.link("set", index=index, state="up")
    return index


def _is_up(ip: Any, index: int) -> bool:
    return bool(ip.link("get", index=index)[0].get("operstate") == "UP")


def _side(ns: str, ifname: str, address: str) -> Side | None:
    from pyroute2 import IPRoute

    with IPRoute(netns=ns) as ip:
        found = ip.link_lookup(ifname=ifname)
        if not found:
            return None
        link = ip.link("get", index=found[0])[0]
        if link.get("operstate") != "UP":
            return None
        if address and address not in {a.get("address") for a in ip.get_addr(index=found[0])}:
            return None
    return Side(
        ns, ifname, address, PREFIX_LEN, link.get("address"), link.get("num_rx_queues"), link.get("mtu")
    )


def _delete_links(ns: str) -> None:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute(netns=ns) as ip:
        for ifname in (SERVER_IFNAME, WIRE_IFNAME, CLIENT_IFNAME):
            for index in ip.link_lookup(ifname=ifname):
                try:
                    ip.link("del", index=index)
                except NetlinkError as e:
                    if e.code != errno.ENODEV:  # the other end took it along
                        raise


def _end(processes: dict[int, str]) -> None:
    """SIGTERM to each, SIGKILL after 2 s, and waits until they are gone."""
    fds = []
    for pid in processes:
        with suppress(ProcessLookupError):
            fds.append(os.pidfd_open(pid))
    try:
        for sig, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
            for fd in fds:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, sig)
            if _ended(fds, seconds):
                return
        raise LabError(f"these processes in the lab do not end: {_who(processes)}")
    finally:
        for fd in fds:
            os.close(fd)


def _ended(fds: list[int], seconds: float) -> bool:
    """Whether every process ended within `seconds`: a pidfd is readable then, also for somebody else's child."""
    import select

    waiting = set(fds)
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + seconds
    while waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        for fd, _ in poll.poll(left * 1000):
            poll.unregister(fd)
            waiting.discard(fd)
    return True

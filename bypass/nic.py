# SPDX-License-Identifier: Apache-2.0
"""The facts of one network interface that decide what can be done with it, read once: driver, queues, offloads,
what is attached, what depends on it. For events and for addresses see bypass.netlink.

Sources: rtnetlink(7); Documentation/netlink/specs/netdev.yaml (XDP features, kernel 6.3); ethtool's ioctls.
Everything is read in the network namespace of the calling thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import ipaddress
import os
import re
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bypass import libbpf, netns, procfs
from bypass.errors import BypassError, DeviceError
from bypass.offloop import off_loop

# linux/netdev.h: bits of xdp-features
XDP_BASIC, XDP_REDIRECT, XDP_ZEROCOPY, XDP_RX_SG = 1, 2, 8, 32
NETDEV_CMD_DEV_GET = 1
SIOCETHTOOL, ETHTOOL_GDRVINFO = 0x8946, 0x3
IFNAME_MAX = 15
UTMP, USER_PROCESS = struct.Struct("=h74x256s52x"), 7  # struct utmp of utmp(5): ut_type, ut_host
OUR_PROGRAMS = "bypass_"  # how the names begin under which our programs are loaded


@dataclass(frozen=True)
class Feature:
    """One offload. `changeable`: somebody may switch it."""

    active: bool
    changeable: bool


@dataclass(frozen=True)
class XdpProgram:
    """The XDP program of an interface. `mode`: native, skb or offload. `holders`: processes, pid -> name, that hold
    it or its link; none is known without root."""

    prog_id: int
    name: str
    mode: str
    holders: dict[int, str]

    @property
    def ours(self) -> bool:
        return self.name.startswith(OUR_PROGRAMS)

    def whose(self) -> str:
        """For messages: name, number and holders."""
        holders = ", ".join(f"{name} ({pid})" for pid, name in sorted(self.holders.items()))
        held = f"held by {holders}" if holders else "held by no process that is visible (netlink, or pinned)"
        return f"{self.name or 'without a name'} (program {self.prog_id}, {self.mode}), {held}"


@dataclass(frozen=True)
class Peer:
    """The other end of a veth. `namespace`: "" is this one, None: not among the named ones."""

    name: str
    namespace: str | None
    features: dict[str, Feature]
    tx_queues: int


@dataclass(frozen=True)
class Nic:
    """Facts of an interface. Queue counts are those in use; `max_queues` is None where the driver cannot say.
    `xdp_features` is None on kernels before 6.3. `rp_filter`: of ip-sysctl.rst, None when it cannot be read;
    `default_elsewhere`: another interface that carries a default route; `manager`: who configures it, "" when nobody
    is known to."""

    name: str
    index: int
    kind: str
    driver: str
    mac: str
    mtu: int
    state: str
    rx_queues: int
    tx_queues: int
    max_queues: int | None
    features: dict[str, Feature]
    xdp_features: int | None
    program: XdpProgram | None
    default_route: bool
    login: str
    rps: tuple[str, ...] | None = field(default=None)
    peer: Peer | None = field(default=None)
    rp_filter: int | None = field(default=None)
    default_elsewhere: str = field(default="")
    manager: str = field(default="")

    def is_active(self, feature: str) -> bool:
        return feature in self.features and self.features[feature].active


def names() -> list[str]:
    """The interfaces of this namespace."""
    return sorted(name for _, name in socket.if_nameindex())


@off_loop
def read(ifname: str, *, around: bool = True) -> Nic:
    """Reads the facts of `ifname`. `around`: also what takes a look at other processes and namespaces, `program` and
    `peer`; without it both are None.

    Raises:
        DeviceError: there is no such interface; the message lists those that there are.
    """
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        found = ip.link_lookup(ifname=ifname) if 0 < len(ifname) <= IFNAME_MAX else ()
        if not found:
            raise DeviceError(f"no interface {ifname!r} here; there are: {', '.join(names())}")
        index = int(found[0])
        link = ip.link("get", index=index)[0]
        kind = link.get(("linkinfo", "kind")) or ("loopback" if link["ifi_type"] == 772 else "device")
        rx, tx, most = _queues(ifname, link)
        defaults = _default_route_devices(ip)
        return Nic(
            name=ifname,
            index=index,
            kind=kind,
            driver=driver_of(ifname),
            mac=link.get("address") or "",
            mtu=link.get("mtu"),
            state=(link.get("operstate") or "unknown").lower(),
            rx_queues=rx,
            tx_queues=tx,
            max_queues=most,
            features=_features(ifname),
            xdp_features=xdp_features(index),
            program=_program(index) if around else None,
            default_route=index in _carriers(ip, defaults),
            login=_login(ip, index),
            rps=_rps(ifname, link),
            peer=_peer(ip, link) if around and kind == "veth" else None,
            rp_filter=_rp_filter(ifname),
            default_elsewhere=", ".join(sorted(socket.if_indextoname(d) for d in defaults - {index})),
            manager=_manager(index),
        )


# ---- Driver, queues, offloads --------------------------------------------------------------------------------------
def driver_of(ifname: str) -> str:
    """What ethtool calls the driver; "" where there is none (loopback)."""
    info = ctypes.create_string_buffer(196)  # struct ethtool_drvinfo
    struct.pack_into("=I", info, 0, ETHTOOL_GDRVINFO)
    request = struct.pack("16sP16x", ifname.encode(), ctypes.addressof(info))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            fcntl.ioctl(s, SIOCETHTOOL, request)
        except OSError as e:
            if e.errno in (errno.EOPNOTSUPP, errno.EPERM):
                return ""
            raise
    return info.raw[4:36].split(b"\0")[0].decode()


def _queues(ifname: str, link: Any) -> tuple[int, int, int | None]:
    """(receive, transmit, most that can be set). From the channels; without them all that the device has is used."""
    from pyroute2.ethtool.ioctl import IoctlEthtool, NotSupportedError

    ethtool = IoctlEthtool(ifname)
    try:
        c = dict(ethtool.get_channels().items())
    except (NotSupportedError, OSError):
        return link.get("num_rx_queues"), link.get("num_tx_queues"), None
    finally:
        ethtool.close()
    combined = c["combined_count"]
    return c["rx_count"] + combined, c["tx_count"] + combined, max(c["max_combined"], c["max_rx"])


def _features(ifname: str) -> dict[str, Feature]:
    from pyroute2.ethtool.ioctl import IoctlEthtool, NotSupportedError

    ethtool = IoctlEthtool(ifname)
    try:
        f = ethtool.get_features()
        return {
            name: Feature(
                bool(f.is_active(name)), bool(f.is_available(name)) and not f.is_never_changed(name)
            )
            for name in f.keys()  # noqa: SIM118 - iterating it gives tuples
            if name
        }
    except NotSupportedError:
        return {}
    finally:
        ethtool.close()


def xdp_features(index: int) -> int | None:
    """The XDP_* bits of the interface, asked of the netdev family; None before kernel 6.3, which cannot say."""
    from pyroute2.netlink import NLM_F_REQUEST, genlmsg
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic import GenericNetlinkSocket

    class dev_msg(genlmsg):  # type: ignore[misc]
        nla_map = (
            ("NETDEV_A_DEV_UNSPEC", "none"),
            ("NETDEV_A_DEV_IFINDEX", "uint32"),
            ("NETDEV_A_DEV_PAD", "none"),
            ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
        )

    with GenericNetlinkSocket() as genl:
        try:
            genl.bind("netdev", dev_msg)
            msg = dev_msg()
            msg["cmd"], msg["version"] = NETDEV_CMD_DEV_GET, 1
            msg["attrs"] = [("NETDEV_A_DEV_IFINDEX", index)]
            answer = genl.nlm_request(msg, msg_type=genl.prid, msg_flags=NLM_F_REQUEST)
            bits = next(iter(answer)).get_attr("NETDEV_A_DEV_XDP_FEATURES")
        except NetlinkError as e:
            if e.code == errno.ENOENT:  # no such family
                return None
            raise
    return None if bits is None else int(bits)


def _rps(ifname: str, link: Any) -> tuple[str, ...] | None:
    """The CPU masks of receive packet steering, one a queue. None: this mount namespace's /sys shows other devices."""
    folder = Path("/sys/class/net") / ifname
    try:
        if (folder / "address").read_text().strip() != link.get("address"):
            return None
        return tuple(
            q.read_text().strip()
            for q in sorted(folder.glob("queues/rx-*/rps_cpus"), key=lambda p: (len(str(p)), p))
        )
    except OSError:
        return None


def _rp_filter(ifname: str, conf: Path = Path("/proc/sys/net/ipv4/conf")) -> int | None:
    """What is in force: the greater of the interface's and everybody's (ip-sysctl.rst)."""
    try:
        return max(int((conf / name / "rp_filter").read_text()) for name in ("all", ifname))
    except (OSError, ValueError):
        return None


def _manager(index: int, run: Path = Path("/run")) -> str:
    """NetworkManager keeps a file for each device that it knows, in the first network namespace only."""
    with suppress(OSError):
        if os.readlink("/proc/thread-self/ns/net") != os.readlink("/proc/1/ns/net"):
            return ""
    try:
        text = (run / "NetworkManager/devices" / str(index)).read_text()
    except OSError:
        return ""
    return "NetworkManager" if re.search(r"^managed=(true|1)$", text, re.MULTILINE) else ""


# ---- What is attached ----------------------------------------------------------------------------------------------
def _program(index: int) -> XdpProgram | None:
    there = libbpf.xdp_attached(index)
    if there is None:
        return None
    return XdpProgram(
        there.prog_id, there.name, there.mode, {pid: procfs.name_of(pid) or "ended" for pid in there.pids}
    )


# ---- What depends on it --------------------------------------------------------------------------------------------
def _default_route_devices(ip: Any) -> set[int]:
    devices: set[int] = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for route in ip.get_routes(family=family, table=254):
            if route["dst_len"] == 0 and route.get("dst") is None:
                if route.get("oif"):
                    devices.add(route.get("oif"))
                devices |= {hop["oif"] for hop in route.get("multipath") or ()}
    return devices


def _carriers(ip: Any, devices: set[int]) -> set[int]:
    """`devices` and what lies below them: members of a bond or bridge, the device below a VLAN or macvlan."""
    links = {link["index"]: link for link in ip.get_links()}
    found: set[int] = set()
    todo = [d for d in devices if d in links]
    while todo:
        index = todo.pop()
        if index in found:
            continue
        found.add(index)
        todo += [i for i, link in links.items() if link.get("master") == index]
        lower, link = links[index].get("link"), links[index]
        if lower in links and link.get("link_netnsid") is None and link.get(("linkinfo", "kind")) != "veth":
            todo.append(lower)
    return found


def _login(ip: Any, index: int) -> str:
    """The address from which somebody is logged in through this interface, "" when nobody is known to be."""
    from pyroute2.netlink.exceptions import NetlinkError

    client, server = _ssh_ends()
    if server and any(a.get("address") == server for a in ip.get_addr(index=index)):
        return client
    for remote in [client, *logins()]:
        try:
            oif = ip.route("get", dst=remote)[0].get("oif") if remote else None
        except NetlinkError:
            continue  # no route from this namespace
        if oif is not None and index in _carriers(ip, {oif}):
            return remote
    return ""


def ssh_client() -> str:
    """The peer's address of the ssh session that this process belongs to, "" without one."""
    return _ssh_ends()[0]


def _ssh_ends() -> tuple[str, str]:
    """(peer's address, ours) of the ssh session that this process belongs to, "" without one.

    sudo takes SSH_CONNECTION away, so the parents' environments are asked too.
    """
    text = os.environ.get("SSH_CONNECTION", "")
    pid = os.getppid()
    while not text and pid > 1:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"SSH_CONNECTION="):
                    text = entry.partition(b"=")[2].decode(errors="replace")
        fields = procfs.stat_of(pid)
        pid = int(fields[1]) if fields else 0
    words = [word.partition("%")[0] for word in text.split()]
    return (words[0] if words else ""), (words[2] if len(words) > 2 else "")


def logins(run: Path = Path("/run")) -> list[str]:
    """The remote addresses of all logins that utmp(5) and logind know of, loopback's left out."""
    found = set()
    with suppress(OSError):
        data = (run / "utmp").read_bytes()
        for kind, host in UTMP.iter_unpack(data[: len(data) // UTMP.size * UTMP.size]):
            if kind == USER_PROCESS:
                found.add(host.partition(b"\0")[0].decode(errors="replace"))
    for file in (run / "systemd/sessions").glob("*"):
        with suppress(OSError):
            found.update(re.findall(r"^REMOTE_HOST=(.*)$", file.read_text(errors="replace"), re.MULTILINE))
    return sorted({host.partition("%")[0] for host in found if _is_remote(host.partition("%")[0])})


def _is_remote(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name, a display, nothing
    return not address.is_loopback and not address.is_unspecified


# ---- The other end of a veth ---------------------------------------------------------------------------------------
def _peer(ip: Any, link: Any) -> Peer | None:
    """None: it is in a namespace without a name, or we may not look."""
    nsid, index = link.get("link_netnsid"), link.get("link")
    if nsid is None:
        return _peer_here("", index)
    for name in netns.names():
        if _nsid(ip, name) == nsid:
            try:
                return netns.run(name, _peer_here, name, index)
            except (OSError, BypassError):
                return None  # entering it needs CAP_SYS_ADMIN; or it is gone by now
    return None


def _nsid(ip: Any, name: str) -> int | None:
    """The number by which this namespace knows the one called `name`, if it does."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        fd = os.open(netns.RUN_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return int(ip.get_netnsid(fd=fd)["nsid"])
    except NetlinkError as e:
        if e.code == errno.EINVAL:  # a name that is being made or removed just now: not a namespace
            return None
        raise
    finally:
        os.close(fd)


def _peer_here(namespace: str, index: int) -> Peer | None:
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        links = [link for link in ip.get_links() if link["index"] == index]
        if not links:
            return None
        name = links[0].get("ifname")
        return Peer(name, namespace, _features(name), _queues(name, links[0])[1])

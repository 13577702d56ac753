# SPDX-License-Identifier: Apache-2.0
"""The fields of a policy: how each is read, what is said when it is wrong, and its JSON Schema.

What lives here: one pydantic model for each mapping of the file, whose types read plain data into the types of
`rules.py`, and the schema made from the same models. What does not: checks across fields (`policy.py`), places in
the file (`policy_yaml.py`).
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from bypass.policy_yaml import MAX_TEXT, Path
from bypass.profiles import Profile
from bypass.rules import PROTOCOLS, Action, Address, Network, PortRange

MAX_QUEUES = 256
MAX_DPDK_QUEUES = 16
MAX_RULES = 1 << 20
MAX_CPUS = 8192
MAX_ID = (1 << 32) - 1  # of users and groups; the last one means "no change" to the kernel
MAX_BYTES = 1 << 40

Mode = Literal["auto", "zerocopy", "copy", "skb"]
CONGESTION = ("cubic", "reno", "dctcp", "bbr")
"""What the stack has built in (`CoreStack.cc_names`; a test compares): known here without the C core."""

_DPDK_DEVICE = r"[0-9A-Za-z_][0-9A-Za-z_.:-]{0,62}(,[!-~]{1,500})?"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_INTERFACE = r"[^\s/:\x00-\x1f\x7f]{1,15}"
_ACCOUNT = r"[A-Za-z_][A-Za-z0-9_.-]{0,30}\$?"
_BYTES = r"([1-9][0-9]{0,9})([KMG])"
_PORT = r"(0|[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_V4 = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_V4_NET = rf"{_V4}(\.{_V4}){{3}}(/([0-9]|[12][0-9]|3[0-2]))?"
_V6_NET = r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(/([0-9]|[1-9][0-9]|1[01][0-9]|12[0-8]))?"


class _Text(NamedTuple):
    """What an error says about a field: `VALUE {wrong}: {right}`."""

    wrong: str
    right: str


TEXTS: dict[tuple[str, str], _Text] = {
    ("", "version"): _Text("is not a version of the policy language", "1"),
    ("", "interface"): _Text(
        "is not an interface name", "1 to 15 characters without spaces, `/` and `:`, such as eth1"
    ),
    ("", "profile"): _Text("is not a profile", "latency, throughput or connections"),
    ("", "stack"): _Text(
        "is not a mapping of the stack's options", "a mapping such as {rcvbuf: 65536, delack_ms: 10}"
    ),
    ("", "congestion"): _Text(
        "is not a congestion control", ", ".join(CONGESTION[:-1]) + f" or {CONGESTION[-1]}"
    ),
    ("", "backend"): _Text("is not a backend", "a mapping such as {kind: afxdp, mode: auto, queues: all}"),
    ("", "flows"): _Text("is not a list of flows", "a list, each with name, match and action"),
    ("", "mode"): _Text("is not a way to use an interface", "direct or shared"),
    ("", "addresses"): _Text(
        "is not an address with its prefix length", "a list of addresses such as [192.0.2.10/24]"
    ),
    ("", "routes"): _Text("is not a list of routes", "a list such as [{to: 0.0.0.0/0, via: 192.0.2.1}]"),
    ("route", ""): _Text("is not a route", "a mapping such as {to: 0.0.0.0/0, via: 192.0.2.1}"),
    ("route", "to"): _Text("is not an address or prefix", "such as 198.51.100.0/24, or 0.0.0.0/0 for all"),
    ("route", "via"): _Text("is not an address", "the gateway's, such as 192.0.2.1"),
    ("", "quota"): _Text("is not a mapping of limits", "a mapping such as {conns: 10000, memory: 256M}"),
    ("", "cpus"): _Text("is not a list of CPUs", "a list of numbers such as [2, 3]"),
    ("", "numa"): _Text("is not a NUMA node", "0 to 1023"),
    ("backend", "kind"): _Text("is not a backend", "afxdp or dpdk"),
    ("backend", "mode"): _Text("is not a mode", "auto, zerocopy, copy or skb"),
    ("backend", "queues"): _Text("is not a choice of queues", "all, or a list of numbers such as [0, 1]"),
    ("backend", "ring_size"): _Text("is not a ring size", "a power of two from 64 to 32768"),
    ("backend", "frames"): _Text("is not a number of frames", "128 to 4194304"),
    ("backend", "frame_size"): _Text("is not a frame size", "2048 or 4096"),
    ("dpdk", "kind"): _Text("is not a backend", "afxdp or dpdk"),
    ("dpdk", "device"): _Text(
        "is not a DPDK device",
        "a PCI address such as 0000:03:00.0, or a virtual one: net_af_packet0,iface=eth1",
    ),
    ("dpdk", "queues"): _Text("is not a number of queues", f"1 to {MAX_DPDK_QUEUES}"),
    ("dpdk", "ring_size"): _Text("is not a ring size", "a power of two from 64 to 32768"),
    ("dpdk", "frames"): _Text("is not a number of frames", "128 to 4194304"),
    ("dpdk", "frame_size"): _Text("is not a frame size", "2048, 4096, 8192 or 16384"),
    ("dpdk", "mtu"): _Text("is not an MTU", "576 to 9702 bytes"),
    ("dpdk", "vlan"): _Text("is not a VLAN identifier", "1 to 4094"),
    ("dpdk", "offloads"): _Text("is not a choice of offloads", "auto or none"),
    ("dpdk", "idle_us"): _Text("is not a time in microseconds", "1 to 1000000"),
    ("dpdk", "link_poll_ms"): _Text("is not a time in milliseconds", "10 to 60000"),
    ("dpdk", "eal"): _Text(
        "is not a mapping of EAL's options", "a mapping such as {lcores: [2], memory: 256M, hugepages: false}"
    ),
    ("dpdk", "exception"): _Text("is not an exception path", "tap or none"),
    ("dpdk", "exception_rate"): _Text("is not a number of packets a second", "1 to 10000000"),
    ("eal", "lcores"): _Text("is not a list of CPUs", "a list of numbers such as [2, 3]"),
    ("eal", "memory"): _Text("is not a size of memory", "bytes, or a number with K, M or G, such as 256M"),
    ("eal", "hugepages"): _Text("is neither true nor false", "true, or false to do without them"),
    ("eal", "drivers"): _Text(
        "is not an absolute path", "a folder of DPDK drivers, such as /usr/lib/dpdk-pmds"
    ),
    ("eal", "devices"): _Text("is not a list of DPDK devices", "a list such as [0000:03:00.0, 0000:03:00.1]"),
    ("flow", ""): _Text("is not a flow", "a mapping with name, match and action"),
    ("flow", "name"): _Text(
        "is not a flow name", "1 to 64 letters, digits, `.`, `_` and `-`, starting with a letter or digit"
    ),
    ("flow", "match"): _Text(
        "is not a match", "a mapping such as {proto: tcp, local: 192.0.2.10, local_port: 8080}"
    ),
    ("flow", "action"): _Text("is not an action", "steer, pass or drop"),
    ("flow", "allow"): _Text(
        "is not a mapping of who may use the rule", "a mapping such as {user: redis, ports: [6379]}"
    ),
    ("allow", "user"): _Text("is not a user", "a name or a number, or a list of these"),
    ("allow", "group"): _Text("is not a group", "a name or a number, or a list of these"),
    ("allow", "ports"): _Text("is not a list of ports", "ports and ranges, such as [6379, 8000-8010]"),
    ("allow", "quota"): _Text("is not a mapping of limits", "a mapping such as {conns: 10000, memory: 256M}"),
    ("quota", "conns"): _Text("is not a number of connections", "1 to 16777216"),
    ("quota", "memory"): _Text("is not a size of memory", "bytes, or a number with K, M or G, such as 256M"),
    ("quota", "frames"): _Text("is not a number of frames", "128 to 4194304"),
    ("quota", "rate"): _Text("is not a rate", "bytes a second, or a number with K, M or G, such as 100M"),
    ("quota", "apps"): _Text("is not a number of applications", "1 to 256"),
    ("match", "proto"): _Text("is not a protocol", "tcp, udp, icmp, icmpv6, sctp, or a number from 0 to 255"),
    ("match", "local"): _Text(
        "is not an address or prefix", "such as 192.0.2.10, 192.0.2.0/24 or 2001:db8::/32"
    ),
    ("match", "remote"): _Text(
        "is not an address or prefix", "such as 198.51.100.7, 198.51.100.0/24 or 2001:db8::/32"
    ),
    ("match", "local_port"): _Text("is not a port", "1 to 65535, or a range such as 8000-8080"),
    ("match", "remote_port"): _Text("is not a port", "1 to 65535, or a range such as 8000-8080"),
    ("match", "vlan"): _Text("is not a VLAN identifier", "1 to 4094"),
}


_SIZES = {  # of the stack: first, last, what it is
    "conns": (1, 1 << 24, "number of connections"),
    "socks": (1, 1 << 24, "number of sockets"),
    "chunks": (1, 1 << 24, "number of chunks"),
    "dsts": (1, 1 << 24, "number of destinations"),
    "syn_backlog": (1, 1 << 24, "number of half-open connections"),
    "time_wait": (1, 1 << 24, "number of connections in TIME_WAIT"),
    "sndbuf": (4096, 1 << 30, "buffer size in bytes"),
    "rcvbuf": (4096, 1 << 30, "buffer size in bytes"),
    "sndbuf_max": (4096, 1 << 30, "buffer size in bytes"),
    "rcvbuf_max": (4096, 1 << 30, "buffer size in bytes"),
    "delack_ms": (1, 500, "delay in milliseconds"),
    "spin_us": (0, 1_000_000, "time in microseconds"),
    "batch": (1, 4096, "number of frames"),
}
TEXTS |= {
    ("stack", name): _Text(f"is not a {what}", f"{first} to {last}")
    for name, (first, last, what) in _SIZES.items()
}


@dataclass(slots=True)
class Wrong:
    """A problem whose place is not known yet."""

    path: Path
    wrong: str  # follows the value as written; the whole message when `whole`
    right: str = ""
    whole: bool = False
    at_key: bool = False  # it is the key that is wrong


def _refuse(wrong: str = "", right: str = "", at: int | None = None) -> PydanticCustomError:
    """An error of a field; empty texts: the field's own of TEXTS. `at`: the item of a list that is wrong."""
    return PydanticCustomError("policy", "{wrong}: {right}", {"wrong": wrong, "right": right, "at": at})


def _one_of(*choices: str | int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) not in (str, int) or value not in choices:
            raise _refuse(right=_did_you_mean(value, [str(c) for c in choices]))
        return value

    return check


def _did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """A hint, or nothing when no choice is near."""
    near = difflib.get_close_matches(value[:MAX_TEXT].lower(), choices, 1) if type(value) is str else ()
    return f"did you mean {near[0]}?" if near else ""


def _matching(pattern: str) -> Callable[[Any], str]:
    full = re.compile(pattern)

    def check(value: Any) -> str:
        if type(value) is not str or not full.fullmatch(value):
            raise _refuse()
        return value

    return check


def _number(first: int, last: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not first <= value <= last:
            raise _refuse()
        return value

    return check


def _interface(value: Any) -> str:
    if type(value) is not str or not re.fullmatch(_INTERFACE, value) or value in (".", ".."):
        raise _refuse()
    if len(value.encode()) > 15:
        raise _refuse("is longer than 15 bytes", "the kernel's names of interfaces are at most 15")
    return value


def _queues(value: Any) -> tuple[int, ...] | None:
    if value == "all" and type(value) is str:
        return None
    if type(value) is not list:
        raise _refuse()
    if not value:
        raise _refuse("is an empty list of queues")
    for at, queue in enumerate(value):
        if type(queue) is not int or not 0 <= queue < MAX_QUEUES:
            raise _refuse("is not a queue", f"0 to {MAX_QUEUES - 1}", at)
        if queue in value[:at]:
            raise _refuse("is in the list twice", "each queue once", at)
    return tuple(sorted(value))


def _protocol(value: Any) -> int:
    if type(value) is int and 0 <= value <= 255:
        return value
    if type(value) is not str:
        raise _refuse()
    if value not in PROTOCOLS:
        raise _refuse(right=_did_you_mean(value, PROTOCOLS))
    return PROTOCOLS[value]


@lru_cache(1 << 16)
def _ports_text(value: str) -> PortRange:
    found = re.fullmatch("([0-9]{1,6})-([0-9]{1,6})", value)
    if found is None:
        if re.fullmatch(_PORT, value) and value != "0":
            raise _refuse("is text, not a number", "write the port without quotes")
        raise _refuse()
    first, last = int(found[1]), int(found[2])
    if not (re.fullmatch(_PORT, found[1]) and re.fullmatch(_PORT, found[2]) and first >= 1 and last >= 1):
        raise _refuse("is not a range of ports", "ports are 1 to 65535, as in 8000-8080")
    if first > last:
        raise _refuse("is a range that ends before it begins", f"{last}-{first}")
    return PortRange(first, last)


@lru_cache(1 << 16)
def _port(value: int) -> PortRange:
    return PortRange(value, value)


def _ports(value: Any) -> PortRange:
    if type(value) is str:
        return _ports_text(value)
    if type(value) is not int or not 1 <= value <= 65535:
        raise _refuse()
    return _port(value)


@lru_cache(1 << 16)
def _network_of(value: str) -> Network:
    address, slash, length = value.partition("/")
    if (slash and not re.fullmatch("0|[1-9][0-9]{0,2}", length)) or "%" in value:
        raise _refuse()
    try:
        host = ipaddress.ip_address(address)
        net = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise _refuse() from None
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None:
        prefix = f"/{net.prefixlen - 96}" if 96 <= net.prefixlen < 128 else ""
        raise _refuse("is IPv4 inside IPv6", f"write {host.ipv4_mapped}{prefix}")
    if host.is_unspecified and net.prefixlen == net.max_prefixlen:
        raise _refuse("is no address that a packet has", "leave the field out to match any address")
    if host != net.network_address:
        raise _refuse("has bits set behind its prefix", f"{net} for the prefix, {host} for the host alone")
    return net


def _network(value: Any) -> Network:
    if type(value) is not str:
        raise _refuse()
    return _network_of(value)


def _interface_address(value: Any) -> IPv4Interface | IPv6Interface:
    """An address of this host and the prefix it is in: host bits are what it is about."""
    if type(value) is not str or "%" in value or not re.fullmatch(f"{_V4_NET}|{_V6_NET}", value):
        raise _refuse()
    try:
        found = ipaddress.ip_interface(value)
    except ValueError:
        raise _refuse() from None
    if "/" not in value:
        raise _refuse("has no prefix length", f"{value}/{24 if found.version == 4 else 64}, say")
    host = found.ip
    if host.is_unspecified or host.is_multicast or host.is_loopback:
        raise _refuse("is not an address that a port may have", "a unicast address such as 192.0.2.10/24")
    if isinstance(host, IPv6Address) and host.ipv4_mapped is not None:
        raise _refuse("is IPv4 inside IPv6", f"write it as IPv4: {host.ipv4_mapped}/24, say")
    if found.version == 4 and found.network.prefixlen < 31:
        for name, other in (
            ("network", found.network.network_address),
            ("broadcast", found.network.broadcast_address),
        ):
            if host == other:
                raise _refuse(f"is the {name} address of {found.network}", "an address of a host")
    return found


def _addresses(value: Any) -> tuple[IPv4Interface | IPv6Interface, ...]:
    if type(value) is not list:
        raise _refuse("is not a list of addresses")
    found: list[IPv4Interface | IPv6Interface] = []
    for at, item in enumerate(value):
        try:
            address = _interface_address(item)
        except PydanticCustomError as e:
            context = e.context or {}
            raise _refuse(context.get("wrong") or "", context.get("right") or "", at) from None
        if any(address.ip == other.ip for other in found):
            raise _refuse("is in the list twice", "each address once", at)
        found.append(address)
    return tuple(found)


def _gateway(value: Any) -> Address:
    if type(value) is not str or not re.fullmatch(
        f"{_V4}(\\.{_V4}){{3}}|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", value
    ):
        raise _refuse()
    try:
        found = ipaddress.ip_address(value)
    except ValueError:
        raise _refuse() from None
    if found.is_unspecified or found.is_multicast or found.is_loopback:
        raise _refuse("is no gateway's address", "a unicast address such as 192.0.2.1")
    return found


def _yes_or_no(value: Any) -> bool:
    if type(value) is not bool:
        raise _refuse()
    return value


def _dpdk_devices(value: Any) -> tuple[str, ...]:
    if type(value) is not list:
        raise _refuse()
    for at, item in enumerate(value):
        if type(item) is not str or not re.fullmatch(_DPDK_DEVICE, item):
            raise _refuse(*TEXTS["dpdk", "device"], at)
        if item in value[:at]:
            raise _refuse("is in the list twice", "each device once", at)
    return tuple(value)


def _accounts(value: Any) -> tuple[str | int, ...]:
    names = value if type(value) is list else [value]
    if not names:
        raise _refuse("is an empty list")
    for at, name in enumerate(names):
        number = type(name) is int and 0 <= name < MAX_ID
        if not number and not (type(name) is str and re.fullmatch(_ACCOUNT, name)):
            raise _refuse("is neither a name nor a number", at=at if type(value) is list else None)
    return tuple(names)


def _port_list(value: Any) -> tuple[PortRange, ...]:
    if type(value) is not list:
        return (_ports(value),)
    if not value:
        raise _refuse("is an empty list")
    found = []
    for at, item in enumerate(value):
        try:
            found.append(_ports(item))
        except PydanticCustomError as e:
            context = e.context or {}
            wrong, right = context.get("wrong") or "is not a port", context.get("right")
            raise _refuse(wrong, right or "1 to 65535, or a range such as 8000-8080", at) from None
    return tuple(found)


def _bytes(value: Any) -> int:
    if type(value) is int:
        number = value
    elif type(value) is str and (found := re.fullmatch(_BYTES, value)):
        number = int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]]
    else:
        raise _refuse()
    if not 4096 <= number <= MAX_BYTES:
        raise _refuse("is out of range", "4K to 1024G")
    return number


def _cpus(value: Any) -> tuple[int, ...]:
    if type(value) is not list or not value:
        raise _refuse()
    for at, cpu in enumerate(value):
        if type(cpu) is not int or not 0 <= cpu < MAX_CPUS:
            raise _refuse("is not a CPU", f"0 to {MAX_CPUS - 1}", at)
        if cpu in value[:at]:
            raise _refuse("is in the list twice", "each CPU once", at)
    return tuple(sorted(value))


def _whole(pattern: str) -> str:
    return f"^({pattern})$"


_PORT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": 65535},
        {"type": "string", "pattern": _whole(f"{_PORT}-{_PORT}".replace("(0|", "("))},
    ]
}
_NETWORK_SCHEMA = {"type": "string", "anyOf": [{"pattern": _whole(_V4_NET)}, {"pattern": _whole(_V6_NET)}]}

_INTERFACE_SCHEMA = {"type": "string", "pattern": _whole(_INTERFACE), "not": {"enum": [".", ".."]}}
_PROTOCOL_SCHEMA = {
    "anyOf": [{"enum": sorted(PROTOCOLS)}, {"type": "integer", "minimum": 0, "maximum": 255}],
}
_QUEUE_SCHEMA = {"type": "integer", "minimum": 0, "maximum": MAX_QUEUES - 1}
_QUEUES_SCHEMA = {
    "anyOf": [
        {"const": "all"},
        {"type": "array", "items": _QUEUE_SCHEMA, "minItems": 1, "uniqueItems": True},
    ],
}

_ACCOUNT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_ID - 1},
        {"type": "string", "pattern": _whole(_ACCOUNT)},
    ]
}
_ACCOUNTS_SCHEMA = {
    "anyOf": [*_ACCOUNT_SCHEMA["anyOf"], {"type": "array", "items": _ACCOUNT_SCHEMA, "minItems": 1}]
}
_PORT_LIST_SCHEMA = {
    "anyOf": [*_PORT_SCHEMA["anyOf"], {"type": "array", "items": _PORT_SCHEMA, "minItems": 1}]
}
_BYTES_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 4096, "maximum": MAX_BYTES},
        {"type": "string", "pattern": _whole(_BYTES)},
    ]
}
_CPUS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_CPUS - 1},
    "minItems": 1,
    "uniqueItems": True,
}

_ADDRESS_SCHEMA = {
    "type": "string",
    "anyOf": [{"pattern": _whole(_V4_NET.removesuffix("?"))}, {"pattern": _whole(_V6_NET.removesuffix("?"))}],
}
_ADDRESSES_SCHEMA = {"type": "array", "items": _ADDRESS_SCHEMA, "uniqueItems": True}
_GATEWAY_SCHEMA = {
    "type": "string",
    "anyOf": [
        {"pattern": _whole(rf"{_V4}(\.{_V4}){{3}}")},
        {"pattern": _whole("[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")},
    ],
}
_DPDK_DEVICES_SCHEMA = {
    "type": "array",
    "items": {"type": "string", "pattern": _whole(_DPDK_DEVICE)},
    "uniqueItems": True,
}

Accounts = Annotated[tuple[str | int, ...], PlainValidator(_accounts), WithJsonSchema(_ACCOUNTS_SCHEMA)]
PortList = Annotated[
    tuple[PortRange, ...] | None, PlainValidator(_port_list), WithJsonSchema(_PORT_LIST_SCHEMA)
]
Bytes = Annotated[int | None, PlainValidator(_bytes), WithJsonSchema(_BYTES_SCHEMA)]
Cpus = Annotated[tuple[int, ...] | None, PlainValidator(_cpus), WithJsonSchema(_CPUS_SCHEMA)]
Addresses = Annotated[
    tuple[IPv4Interface | IPv6Interface, ...], PlainValidator(_addresses), WithJsonSchema(_ADDRESSES_SCHEMA)
]
Gateway = Annotated[Address, PlainValidator(_gateway), WithJsonSchema(_GATEWAY_SCHEMA)]
YesOrNo = Annotated[bool, PlainValidator(_yes_or_no), WithJsonSchema({"type": "boolean"})]
DpdkDevices = Annotated[tuple[str, ...], PlainValidator(_dpdk_devices), WithJsonSchema(_DPDK_DEVICES_SCHEMA)]
Ports = Annotated[PortRange | None, PlainValidator(_ports), WithJsonSchema(_PORT_SCHEMA)]
Prefix = Annotated[Network | None, PlainValidator(_network), WithJsonSchema(_NETWORK_SCHEMA)]
Protocol = Annotated[int | None, PlainValidator(_protocol), WithJsonSchema(_PROTOCOL_SCHEMA)]
Queues = Annotated[tuple[int, ...] | None, PlainValidator(_queues), WithJsonSchema(_QUEUES_SCHEMA)]


def _choice(*choices: str | int) -> tuple[PlainValidator, WithJsonSchema]:
    return PlainValidator(_one_of(*choices)), WithJsonSchema({"enum": list(choices)})


def _count(first: int, last: int) -> tuple[PlainValidator, WithJsonSchema]:
    schema = {"type": "integer", "minimum": first, "maximum": last}
    return PlainValidator(_number(first, last)), WithJsonSchema(schema)


def _text(pattern: str) -> tuple[PlainValidator, WithJsonSchema]:
    return PlainValidator(_matching(pattern)), WithJsonSchema({"type": "string", "pattern": _whole(pattern)})


_RING_SIZES = tuple(1 << n for n in range(6, 16))


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _kind(kind: str) -> tuple[PlainValidator, WithJsonSchema]:
    """Of one backend; what is wrong is said as if any of them were right."""

    def check(value: Any) -> Any:
        if value != kind or type(value) is not str:
            raise _refuse(right=_did_you_mean(value, BACKENDS))
        return value

    return PlainValidator(check), WithJsonSchema({"enum": [kind]})


class AfxdpModel(_Model):
    """AF_XDP sockets beside the kernel, which keeps the interface."""

    kind: Annotated[Literal["afxdp"], *_kind("afxdp")] = Field(
        description="afxdp: AF_XDP sockets beside the kernel, which keeps the interface."
    )
    mode: Annotated[Mode, *_choice("auto", "zerocopy", "copy", "skb")] = Field(
        "auto",
        description="auto chooses zerocopy or copy; skb is the kernel's generic XDP, slow and everywhere.",
    )
    queues: Queues = Field(None, description="all, or the receive queues to bind. Default: all.")
    ring_size: Annotated[int, *_choice(*_RING_SIZES)] = Field(
        2048, description="Descriptors of each of a queue's rings, a power of two."
    )
    frames: Annotated[int | None, *_count(128, 1 << 22)] = Field(
        None, description="Frames of packet memory, all queues together. Default: four for each descriptor."
    )
    frame_size: Annotated[int, *_choice(2048, 4096)] = Field(2048, description="Bytes of a frame.")


class EalModel(_Model):
    """How DPDK's environment abstraction layer (EAL) is started, once a process."""

    lcores: Cpus = Field(None, description="CPUs that EAL may use. Default: where the process runs.")
    memory: Bytes = Field(
        None, description="Bytes that EAL may use; K, M, G as well. Default: what frames need."
    )
    hugepages: YesOrNo = Field(True, description="false: ordinary pages, for virtual devices.")
    drivers: Annotated[str | None, *_text("/[^\\x00]*")] = Field(
        None, description="Folder of the drivers to load. Default: the system's, all of them."
    )
    devices: DpdkDevices = Field(
        (), description="Devices that are there before the port is opened, such as the members of a bond."
    )


class DpdkModel(_Model):
    """A whole port driven by DPDK; the kernel is reached through an exception path."""

    kind: Annotated[Literal["dpdk"], *_kind("dpdk")] = Field(
        description="dpdk: a poll-mode driver has the whole port; the kernel is reached through a TAP device."
    )
    device: Annotated[str, *_text(_DPDK_DEVICE)] = Field(
        description="PCI address, or a virtual device with its arguments."
    )
    queues: Annotated[int, *_count(1, MAX_DPDK_QUEUES)] = Field(
        1, description="Receive queues, and as many to send."
    )
    ring_size: Annotated[int, *_choice(*_RING_SIZES)] = Field(
        1024, description="Descriptors of each of a queue's rings, a power of two."
    )
    frames: Annotated[int | None, *_count(128, 1 << 22)] = Field(
        None, description="Frames of packet memory, all queues together. Default: four for each descriptor."
    )
    frame_size: Annotated[int, *_choice(2048, 4096, 8192, 16384)] = Field(
        2048, description="Bytes of a packet that a frame holds, headroom not included."
    )
    mtu: Annotated[int | None, *_count(576, 9702)] = Field(
        None, description="Largest IP packet. Default: the port's."
    )
    vlan: Annotated[int | None, *_count(1, 4094)] = Field(
        None, description="802.1Q tag of everything that the stack receives and sends. Default: untagged."
    )
    offloads: Annotated[Literal["auto", "none"], *_choice("auto", "none")] = Field(
        "auto", description="auto: what the port offers of checksums and segmentation."
    )
    idle_us: Annotated[int, *_count(1, 1_000_000)] = Field(
        100, description="How long a program sleeps when nothing has come, microseconds."
    )
    link_poll_ms: Annotated[int, *_count(10, 60_000)] = Field(
        100, description="How often the port's link is looked at, milliseconds."
    )
    eal: EalModel = Field(
        default_factory=lambda: EalModel.model_validate({}), description="How EAL is started, once a process."
    )
    exception: Annotated[Literal["tap", "none"], *_choice("tap", "none")] = Field(
        "tap",
        description="tap: what no rule steers goes to the kernel. none: there is no kernel on this port.",
    )
    exception_rate: Annotated[int, *_count(1, 10_000_000)] = Field(
        10_000, description="Packets a second that the kernel is given at most."
    )


BACKENDS: dict[str, type[AfxdpModel] | type[DpdkModel]] = {"afxdp": AfxdpModel, "dpdk": DpdkModel}


def backend_kind(value: Any) -> str:
    """Whose model reads the mapping. Where `kind` is wrong or missing, what else it says tells what was meant."""
    if not isinstance(value, dict):
        return "afxdp"
    kind = value.get("kind")
    if isinstance(kind, str) and kind in BACKENDS:
        return kind
    return "dpdk" if "device" in value else "afxdp"


BackendModel = Annotated[
    Annotated[AfxdpModel, Tag("afxdp")] | Annotated[DpdkModel, Tag("dpdk")], Discriminator(backend_kind)
]


class RouteModel(_Model):
    """A route of the port."""

    to: Annotated[Network, PlainValidator(_network), WithJsonSchema(_NETWORK_SCHEMA)] = Field(
        description="The destinations, a prefix; 0.0.0.0/0: all."
    )
    via: Gateway = Field(description="The gateway, in a prefix of `addresses`.")


def _size(name: str) -> tuple[PlainValidator, WithJsonSchema]:
    return _count(*_SIZES[name][:2])


class StackModel(_Model):
    """Sizes and times of the stack. What is left out is the profile's, or the stack's own default."""

    conns: Annotated[int | None, *_size("conns")] = Field(None, description="TCP connections in all states.")
    socks: Annotated[int | None, *_size("socks")] = Field(
        None, description="Listeners, UDP sockets, and connections that a program holds."
    )
    chunks: Annotated[int | None, *_size("chunks")] = Field(
        None, description="512-byte pieces for received data that is copied out of frames."
    )
    dsts: Annotated[int | None, *_size("dsts")] = Field(
        None, description="Destinations in the cache of next hops."
    )
    syn_backlog: Annotated[int | None, *_size("syn_backlog")] = Field(
        None, description="Half-open connections of all listeners together."
    )
    time_wait: Annotated[int | None, *_size("time_wait")] = Field(
        None, description="Connections in TIME_WAIT; of more the oldest ends early."
    )
    sndbuf: Annotated[int | None, *_size("sndbuf")] = Field(
        None, description="Send buffer of a new socket, bytes."
    )
    rcvbuf: Annotated[int | None, *_size("rcvbuf")] = Field(
        None, description="Receive buffer of a new socket, bytes."
    )
    sndbuf_max: Annotated[int | None, *_size("sndbuf_max")] = Field(
        None, description="What a TCP send buffer grows to, bytes."
    )
    rcvbuf_max: Annotated[int | None, *_size("rcvbuf_max")] = Field(
        None, description="What a TCP receive buffer grows to, bytes."
    )
    delack_ms: Annotated[int | None, *_size("delack_ms")] = Field(
        None, description="Longest delay of an acknowledgment, milliseconds."
    )
    spin_us: Annotated[int | None, *_size("spin_us")] = Field(
        None, description="How long a blocking call polls before it sleeps, microseconds."
    )
    batch: Annotated[int | None, *_size("batch")] = Field(
        None, description="Frames that are received before the program gets its turn."
    )


class MatchModel(_Model):
    """Which packets, as they arrive at this host. A field that is left out matches anything."""

    proto: Protocol = Field(None, description="A protocol by name, or by its IP protocol number.")
    local: Prefix = Field(None, description="This host's address, or a prefix of its addresses.")
    local_port: Ports = Field(None, description="This host's port, or a range such as 8000-8080.")
    remote: Prefix = Field(None, description="The peer's address, or a prefix such as 198.51.100.0/24.")
    remote_port: Ports = Field(None, description="The peer's port, or a range such as 1024-65535.")
    vlan: Annotated[int | None, *_count(1, 4094)] = Field(
        None, description="VLAN of the outermost 802.1Q tag."
    )


class QuotaModel(_Model):
    """What one application may have at most."""

    conns: Annotated[int | None, *_count(1, 1 << 24)] = Field(
        None, description="TCP connections in all states."
    )
    memory: Bytes = Field(None, description="Bytes of its memory: stack, rings and frames; K, M, G as well.")
    frames: Annotated[int | None, *_count(128, 1 << 22)] = Field(
        None, description="Frames of packet memory, all queues together."
    )
    rate: Bytes = Field(
        None, description="Bytes a second that it may send, where applications share an interface."
    )
    apps: Annotated[int | None, *_count(1, 256)] = Field(
        None, description="Applications of a user at a time."
    )


NO_QUOTA_MODEL = QuotaModel.model_validate({})


class AllowModel(_Model):
    """Who may use a rule, beside root and the user who runs the broker."""

    user: Accounts = Field((), description="Users by name or number.")
    group: Accounts = Field((), description="Groups by name or number.")
    ports: PortList = Field(
        None, description="Local ports of the rule that they may use. Default: all of them."
    )
    quota: QuotaModel = Field(
        default_factory=lambda: NO_QUOTA_MODEL, description="Limits of their applications."
    )


NO_ALLOW_MODEL = AllowModel.model_validate({})


class FlowModel(_Model):
    """One rule."""

    name: Annotated[str, *_text(_NAME)] = Field(description="Unique; appears in counters and errors.")
    match: MatchModel
    action: Annotated[Action, *_choice("steer", "pass", "drop")] = Field(
        description="steer: applications may take these flows. pass: the kernel keeps them. drop: nobody sees them."
    )
    allow: AllowModel = Field(
        default_factory=lambda: NO_ALLOW_MODEL,
        description="Who may use a steer rule by a broker. Default: root, and the user who runs the broker.",
    )


class HeadModel(_Model):
    """Which flows of an interface are served in user space, by which backend."""

    version: Annotated[Literal[1], *_choice(1)] = Field(description="Of this language.")
    interface: Annotated[str, PlainValidator(_interface), WithJsonSchema(_INTERFACE_SCHEMA)] = Field(
        description="The network interface, as `ip link` names it."
    )
    profile: Annotated[Profile | None, *_choice("latency", "throughput", "connections")] = Field(
        None, description="What the stack is tuned for. Keys of `stack` and `backend` override it."
    )
    stack: StackModel = Field(
        default_factory=lambda: StackModel.model_validate({}), description="Sizes and times of the stack."
    )
    congestion: Annotated[str | None, *_choice(*CONGESTION)] = Field(
        None, description="Congestion control of sockets that do not choose one. Default: the stack's."
    )
    mode: Annotated[Literal["direct", "shared"] | None, *_choice("direct", "shared")] = Field(
        None,
        description="direct: one application at a time uses the interface. shared: several do. "
        "Default: direct; with dpdk shared, the only one there.",
    )
    addresses: Addresses = Field(
        (), description="Addresses that the port gets, with prefix lengths. With dpdk only."
    )
    routes: list[RouteModel] = Field([], description="Routes that the port gets. With dpdk only.")
    quota: QuotaModel = Field(
        default_factory=lambda: NO_QUOTA_MODEL, description="What one application may have at most."
    )
    cpus: Cpus = Field(None, description="CPUs that applications run on. Default: as they are started.")
    numa: Annotated[int | None, *_count(0, 1023)] = Field(
        None, description="NUMA node of the applications' memory. Default: where it is first used."
    )
    backend: BackendModel = Field(description="How frames reach the stack, by `kind`.")
    flows: list[Any] = Field(min_length=1, max_length=MAX_RULES)


class PolicyModel(HeadModel):
    """Which flows of an interface are served in user space, by which backend."""

    flows: list[FlowModel] = Field(
        min_length=1,
        description="Rules. The most specific one that matches a packet decides, wherever it stands.",
    )


# What the models cannot say field by field. policy.py checks the same with better words.
_PORTS_NEED = {
    "required": ["proto"],
    "properties": {"proto": {"enum": ["tcp", "udp", PROTOCOLS["tcp"], PROTOCOLS["udp"]]}},
}
_STEER_NEEDS = {
    "properties": {
        "match": {
            "properties": {
                "proto": {"enum": ["tcp", "udp", PROTOCOLS["tcp"], PROTOCOLS["udp"]]},
                "local": {"not": {"pattern": ":"}},
                "remote": {"not": {"pattern": ":"}},
                "vlan": False,
            }
        }
    }
}


def policy_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a policy file, for editors.

    It refuses only what `parse_policy` refuses. It lets pass what a schema cannot see: host bits in a prefix, a
    range that ends before it begins, equal names, rules that contradict each other, too many masks.
    """
    schema = PolicyModel.model_json_schema()
    flow, match = schema["$defs"]["FlowModel"], schema["$defs"]["MatchModel"]
    match["minProperties"] = 1
    match["dependentSchemas"] = {"local_port": _PORTS_NEED, "remote_port": _PORTS_NEED}
    flow["if"] = {"properties": {"action": {"const": "steer"}}, "required": ["action"]}
    flow["then"] = _STEER_NEEDS
    flow["else"] = {"properties": {"allow": False}}
    schema["if"] = {"properties": {"backend": {"properties": {"kind": {"const": "dpdk"}}}}}
    schema["then"] = {"properties": {"mode": {"const": "shared"}}}
    schema["else"] = {"properties": {"addresses": False, "routes": False}}
    schema["$defs"]["AllowModel"]["anyOf"] = [{"required": ["user"]}, {"required": ["group"]}]
    for part in (schema, *schema["$defs"].values()):
        part.pop("title", None)
        for field in part["properties"].values():
            field.pop("title", None)
            if "default" in field and field["default"] in (None, []):
                del field["default"]  # means "left out"; null itself is refused
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bypass policy",
        **schema,
    }

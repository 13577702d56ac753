# SPDX-License-Identifier: Apache-2.0
"""The values of a policy: how each kind is read from plain data, and its JSON Schema.

What lives here: readers that turn what YAML gave into the types of `rules.py` or refuse it, and the annotated types
made of them. What does not: which field holds what, and what is said when it is wrong (`policy_fields.py`).
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from bypass.policy_yaml import MAX_TEXT
from bypass.rules import PROTOCOLS, Address, Network, PortRange

MAX_QUEUES = 256
MAX_DPDK_QUEUES = 16
MAX_RULES = 1 << 20
MAX_CPUS = 8192
MAX_ID = (1 << 32) - 1  # of users and groups; the last one means "no change" to the kernel
MAX_BYTES = 1 << 40

DPDK_DEVICE = r"[0-9A-Za-z_][0-9A-Za-z_.:-]{0,62}(,[!-~]{1,500})?"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_INTERFACE = r"[^\s/:%\x00-\x1f\x7f]{1,15}"  # `tap%d` is a template, of which the kernel makes tap0
_ACCOUNT = r"[A-Za-z_][A-Za-z0-9_.-]{0,30}\$?"
_BYTES = r"([1-9][0-9]{0,9})([KMG])"
_PORT = r"(0|[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_V4 = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_V4_NET = rf"{_V4}(\.{_V4}){{3}}(/([0-9]|[12][0-9]|3[0-2]))?"
_V6_NET = r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(/([0-9]|[1-9][0-9]|1[01][0-9]|12[0-8]))?"


def refuse(wrong: str = "", right: str = "", at: int | None = None) -> PydanticCustomError:
    """An error of a field; empty texts: the field's own of TEXTS. `at`: the item of a list that is wrong."""
    return PydanticCustomError("policy", "{wrong}: {right}", {"wrong": wrong, "right": right, "at": at})


def _one_of(*choices: str | int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) not in (str, int) or value not in choices:
            raise refuse(right=did_you_mean(value, [str(c) for c in choices]))
        return value

    return check


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """A hint, or nothing when no choice is near."""
    near = difflib.get_close_matches(value[:MAX_TEXT].lower(), choices, 1) if type(value) is str else ()
    return f"did you mean {near[0]}?" if near else ""


def _matching(pattern: str) -> Callable[[Any], str]:
    full = re.compile(pattern)

    def check(value: Any) -> str:
        if type(value) is not str or not full.fullmatch(value):
            raise refuse()
        return value

    return check


def _number(first: int, last: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not first <= value <= last:
            raise refuse()
        return value

    return check


def read_interface(value: Any) -> str:
    if type(value) is not str or not re.fullmatch(_INTERFACE, value) or value in (".", ".."):
        raise refuse()
    if len(value.encode()) > 15:
        raise refuse("is longer than 15 bytes", "the kernel's names of interfaces are at most 15")
    return value


def _queues(value: Any) -> tuple[int, ...] | None:
    if value == "all" and type(value) is str:
        return None
    if type(value) is not list:
        raise refuse()
    if not value:
        raise refuse("is an empty list of queues")
    for at, queue in enumerate(value):
        if type(queue) is not int or not 0 <= queue < MAX_QUEUES:
            raise refuse("is not a queue", f"0 to {MAX_QUEUES - 1}", at)
        if queue in value[:at]:
            raise refuse("is in the list twice", "each queue once", at)
    return tuple(sorted(value))


def _protocol(value: Any) -> int:
    if type(value) is int and 0 <= value <= 255:
        return value
    if type(value) is not str:
        raise refuse()
    if value not in PROTOCOLS:
        raise refuse(right=did_you_mean(value, PROTOCOLS))
    return PROTOCOLS[value]


@lru_cache(1 << 16)
def _ports_text(value: str) -> PortRange:
    found = re.fullmatch("([0-9]{1,6})-([0-9]{1,6})", value)
    if found is None:
        if re.fullmatch(_PORT, value) and value != "0":
            raise refuse("is text, not a number", "write the port without quotes")
        raise refuse()
    first, last = int(found[1]), int(found[2])
    if not (re.fullmatch(_PORT, found[1]) and re.fullmatch(_PORT, found[2]) and first >= 1 and last >= 1):
        raise refuse("is not a range of ports", "ports are 1 to 65535, as in 8000-8080")
    if first > last:
        raise refuse("is a range that ends before it begins", f"{last}-{first}")
    return PortRange(first, last)


@lru_cache(1 << 16)
def _port(value: int) -> PortRange:
    return PortRange(value, value)


def _ports(value: Any) -> PortRange:
    if type(value) is str:
        return _ports_text(value)
    if type(value) is not int or not 1 <= value <= 65535:
        raise refuse()
    return _port(value)


@lru_cache(1 << 16)
def _network_of(value: str) -> Network:
    address, slash, length = value.partition("/")
    if (slash and not re.fullmatch("0|[1-9][0-9]{0,2}", length)) or "%" in value:
        raise refuse()
    try:
        host = ipaddress.ip_address(address)
        net = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise refuse() from None
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped is not None:
        prefix = f"/{net.prefixlen - 96}" if 96 <= net.prefixlen < 128 else ""
        raise refuse("is IPv4 inside IPv6", f"write {host.ipv4_mapped}{prefix}")
    if host.is_unspecified and net.prefixlen == net.max_prefixlen:
        raise refuse("is no address that a packet has", "leave the field out to match any address")
    if host != net.network_address:
        raise refuse("has bits set behind its prefix", f"{net} for the prefix, {host} for the host alone")
    return net


def read_network(value: Any) -> Network:
    if type(value) is not str:
        raise refuse()
    return _network_of(value)


def _interface_address(value: Any) -> IPv4Interface | IPv6Interface:
    """An address of this host and the prefix it is in: host bits are what it is about."""
    if type(value) is not str or "%" in value or not re.fullmatch(f"{_V4_NET}|{_V6_NET}", value):
        raise refuse()
    try:
        found = ipaddress.ip_interface(value)
    except ValueError:
        raise refuse() from None
    if "/" not in value:
        raise refuse("has no prefix length", f"{value}/{24 if found.version == 4 else 64}, say")
    host = found.ip
    if host.is_unspecified or host.is_multicast or host.is_loopback:
        raise refuse("is not an address that a port may have", "a unicast address such as 192.0.2.10/24")
    if isinstance(host, IPv6Address) and host.ipv4_mapped is not None:
        raise refuse("is IPv4 inside IPv6", f"write it as IPv4: {host.ipv4_mapped}/24, say")
    if found.version == 4 and found.network.prefixlen < 31:
        for name, other in (
            ("network", found.network.network_address),
            ("broadcast", found.network.broadcast_address),
        ):
            if host == other:
                raise refuse(f"is the {name} address of {found.network}", "an address of a host")
    return found


def _addresses(value: Any) -> tuple[IPv4Interface | IPv6Interface, ...]:
    if type(value) is not list:
        raise refuse("is not a list of addresses")
    found: list[IPv4Interface | IPv6Interface] = []
    for at, item in enumerate(value):
        try:
            address = _interface_address(item)
        except PydanticCustomError as e:
            context = e.context or {}
            raise refuse(context.get("wrong") or "", context.get("right") or "", at) from None
        if any(address.ip == other.ip for other in found):
            raise refuse("is in the list twice", "each address once", at)
        found.append(address)
    return tuple(found)


def _gateway(value: Any) -> Address:
    if type(value) is not str or not re.fullmatch(
        f"{_V4}(\\.{_V4}){{3}}|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", value
    ):
        raise refuse()
    try:
        found = ipaddress.ip_address(value)
    except ValueError:
        raise refuse() from None
    if found.is_unspecified or found.is_multicast or found.is_loopback:
        raise refuse("is no gateway's address", "a unicast address such as 192.0.2.1")
    return found


def _yes_or_no(value: Any) -> bool:
    if type(value) is not bool:
        raise refuse()
    return value


def _dpdk_devices(value: Any) -> tuple[str, ...]:
    if type(value) is not list:
        raise refuse()
    for at, item in enumerate(value):
        if type(item) is not str or not re.fullmatch(DPDK_DEVICE, item):
            raise refuse(
                "is not a DPDK device",
                "a PCI address such as 0000:03:00.0, or a name such as net_null0",
                at,
            )
        if item in value[:at]:
            raise refuse("is in the list twice", "each device once", at)
    return tuple(value)


def _accounts(value: Any) -> tuple[str | int, ...]:
    names = value if type(value) is list else [value]
    if not names:
        raise refuse("is an empty list")
    for at, name in enumerate(names):
        number = type(name) is int and 0 <= name < MAX_ID
        if not number and not (type(name) is str and re.fullmatch(_ACCOUNT, name)):
            raise refuse("is neither a name nor a number", at=at if type(value) is list else None)
    return tuple(names)


def _port_list(value: Any) -> tuple[PortRange, ...]:
    if type(value) is not list:
        return (_ports(value),)
    if not value:
        raise refuse("is an empty list")
    found = []
    for at, item in enumerate(value):
        try:
            found.append(_ports(item))
        except PydanticCustomError as e:
            context = e.context or {}
            wrong, right = context.get("wrong") or "is not a port", context.get("right")
            raise refuse(wrong, right or "1 to 65535, or a range such as 8000-8080", at) from None
    return tuple(found)


def _bytes(value: Any) -> int:
    if type(value) is int:
        number = value
    elif type(value) is str and (found := re.fullmatch(_BYTES, value)):
        number = int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]]
    else:
        raise refuse()
    if not 4096 <= number <= MAX_BYTES:
        raise refuse("is out of range", "4K to 1024G")
    return number


def _cpus(value: Any) -> tuple[int, ...]:
    if type(value) is not list or not value:
        raise refuse()
    for at, cpu in enumerate(value):
        if type(cpu) is not int or not 0 <= cpu < MAX_CPUS:
            raise refuse("is not a CPU", f"0 to {MAX_CPUS - 1}", at)
        if cpu in value[:at]:
            raise refuse("is in the list twice", "each CPU once", at)
    return tuple(sorted(value))


def whole(pattern: str) -> str:
    return f"^({pattern})$"


_PORT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": 65535},
        {"type": "string", "pattern": whole(f"{_PORT}-{_PORT}".replace("(0|", "("))},
    ]
}
NETWORK_SCHEMA = {"type": "string", "anyOf": [{"pattern": whole(_V4_NET)}, {"pattern": whole(_V6_NET)}]}

INTERFACE_SCHEMA = {"type": "string", "pattern": whole(_INTERFACE), "not": {"enum": [".", ".."]}}
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
        {"type": "string", "pattern": whole(_ACCOUNT)},
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
        {"type": "string", "pattern": whole(_BYTES)},
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
    "anyOf": [{"pattern": whole(_V4_NET.removesuffix("?"))}, {"pattern": whole(_V6_NET.removesuffix("?"))}],
}
_ADDRESSES_SCHEMA = {"type": "array", "items": _ADDRESS_SCHEMA, "uniqueItems": True}
_GATEWAY_SCHEMA = {
    "type": "string",
    "anyOf": [
        {"pattern": whole(rf"{_V4}(\.{_V4}){{3}}")},
        {"pattern": whole("[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")},
    ],
}
_DPDK_DEVICES_SCHEMA = {
    "type": "array",
    "items": {"type": "string", "pattern": whole(DPDK_DEVICE)},
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
Prefix = Annotated[Network | None, PlainValidator(read_network), WithJsonSchema(NETWORK_SCHEMA)]
Protocol = Annotated[int | None, PlainValidator(_protocol), WithJsonSchema(_PROTOCOL_SCHEMA)]
Queues = Annotated[tuple[int, ...] | None, PlainValidator(_queues), WithJsonSchema(_QUEUES_SCHEMA)]


def choice(*choices: str | int) -> tuple[PlainValidator, WithJsonSchema]:
    return PlainValidator(_one_of(*choices)), WithJsonSchema({"enum": list(choices)})


def count(first: int, last: int) -> tuple[PlainValidator, WithJsonSchema]:
    schema = {"type": "integer", "minimum": first, "maximum": last}
    return PlainValidator(_number(first, last)), WithJsonSchema(schema)


def text(pattern: str) -> tuple[PlainValidator, WithJsonSchema]:
    return PlainValidator(_matching(pattern)), WithJsonSchema({"type": "string", "pattern": whole(pattern)})


RING_SIZES = tuple(1 << n for n in range(6, 16))

# SPDX-License-Identifier: Apache-2.0
"""The fields of a policy: what each holds, what is said when it is wrong, and the JSON Schema of the whole.

What lives here: one pydantic model for each mapping of the file, and the schema made from the same models. What does
not: how values are read (`policy_values.py`), checks across fields (`policy_backend.py`, `policy_flows.py`),
what errors say (`policy_errors.py`), places in the file (`policy_yaml.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from bypass.policy_values import (
    DPDK_DEVICE,
    INTERFACE_SCHEMA,
    MAX_DPDK_QUEUES,
    MAX_RULES,
    NAME,
    NETWORK_SCHEMA,
    RING_SIZES,
    Accounts,
    Addresses,
    Bytes,
    Cpus,
    DpdkDevices,
    Gateway,
    PortList,
    Ports,
    Prefix,
    Protocol,
    Queues,
    YesOrNo,
    choice,
    count,
    did_you_mean,
    read_interface,
    read_network,
    refuse,
    text,
)
from bypass.policy_yaml import Path
from bypass.profiles import Profile
from bypass.rules import PROTOCOLS, Action, Network

Mode = Literal["auto", "zerocopy", "copy", "skb"]
HardwareRules = Literal["none", "auto", "required"]
CONGESTION = ("cubic", "reno", "dctcp", "bbr")
"""What the stack has built in (`CoreStack.cc_names`; a test compares): known here without the C core."""


class _Text(NamedTuple):
    """What an error says about a field: `VALUE {wrong}: {right}`."""

    wrong: str
    right: str


TEXTS: dict[tuple[str, str], _Text] = {
    ("", "version"): _Text("is not a version of the policy language", "1"),
    ("", "interface"): _Text(
        "is not an interface name", "1 to 15 characters without spaces, `/`, `:` and `%`, such as eth1"
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
    ("backend", "hardware_rules"): _Text(
        "is not a use of the interface's own rules", "none, auto or required"
    ),
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
    ("dpdk", "hardware_rules"): _Text("is not a use of the port's own rules", "none, auto or required"),
    ("dpdk", "idle_us"): _Text("is not a time in microseconds", "1 to 1000000"),
    ("dpdk", "rx_interrupts"): _Text("is not a choice of interrupts", "auto, required or none"),
    ("dpdk", "link_poll_ms"): _Text("is not a time in milliseconds", "10 to 60000"),
    ("dpdk", "eal"): _Text(
        "is not a mapping of EAL's options", "a mapping such as {lcores: [2], memory: 256M, hugepages: false}"
    ),
    ("dpdk", "exception"): _Text("is not an exception path", "tap or none"),
    ("dpdk", "exception_rate"): _Text("is not a number of packets a second", "1 to 10000000"),
    ("eal", "lcores"): _Text("is not a list of CPUs", "a list of numbers such as [2, 3]"),
    ("eal", "memory"): _Text("is not a size of memory", "bytes, or a number with K, M or G, such as 256M"),
    ("eal", "hugepages"): _Text("is neither true nor false", "true, or false to do without them"),
    ("eal", "vfio_intr"): _Text("is not a kind of interrupt", "msix, msi or legacy"),
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


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _kind(kind: str) -> tuple[PlainValidator, WithJsonSchema]:
    """Of one backend; what is wrong is said as if any of them were right."""

    def check(value: Any) -> Any:
        if value != kind or type(value) is not str:
            raise refuse(right=did_you_mean(value, BACKENDS))
        return value

    return PlainValidator(check), WithJsonSchema({"enum": [kind]})


class AfxdpModel(_Model):
    """AF_XDP sockets beside the kernel, which keeps the interface."""

    kind: Annotated[Literal["afxdp"], *_kind("afxdp")] = Field(
        description="afxdp: AF_XDP sockets beside the kernel, which keeps the interface."
    )
    mode: Annotated[Mode, *choice("auto", "zerocopy", "copy", "skb")] = Field(
        "auto",
        description="auto chooses zerocopy or copy; skb is the kernel's generic XDP, slow and everywhere.",
    )
    queues: Queues = Field(None, description="all, or the receive queues to bind. Default: all.")
    ring_size: Annotated[int, *choice(*RING_SIZES)] = Field(
        2048, description="Descriptors of each of a queue's rings, a power of two."
    )
    frames: Annotated[int | None, *count(128, 1 << 22)] = Field(
        None, description="Frames of packet memory, all queues together. Default: four for each descriptor."
    )
    frame_size: Annotated[int, *choice(2048, 4096)] = Field(2048, description="Bytes of a frame.")
    hardware_rules: Annotated[HardwareRules, *choice("none", "auto", "required")] = Field(
        "none",
        description="auto: the interface keeps all but steered flows off `queues` by rules of its own (ethtool) "
        "where it can; else all queues are bound. required: or it is not used.",
    )


class EalModel(_Model):
    """How DPDK's environment abstraction layer (EAL) is started, once a process."""

    lcores: Cpus = Field(None, description="CPUs that EAL may use. Default: where the process runs.")
    memory: Bytes = Field(
        None, description="Bytes that EAL may use; K, M, G as well. Default: what frames need."
    )
    hugepages: YesOrNo = Field(True, description="false: ordinary pages, for virtual devices.")
    drivers: Annotated[str | None, *text("/[^\\x00]*")] = Field(
        None, description="Folder of the drivers to load. Default: the system's, all of them."
    )
    vfio_intr: Annotated[Literal["msix", "msi", "legacy"] | None, *choice("msix", "msi", "legacy")] = Field(
        None,
        description="Interrupts that vfio-pci is asked for. Default: the first that the device has, MSI-X before all.",
    )
    devices: DpdkDevices = Field(
        (), description="Devices that are there before the port is opened, such as the members of a bond."
    )


class DpdkModel(_Model):
    """A whole port driven by DPDK; the kernel is reached through an exception path."""

    kind: Annotated[Literal["dpdk"], *_kind("dpdk")] = Field(
        description="dpdk: a poll-mode driver has the whole port; the kernel is reached through a TAP device."
    )
    device: Annotated[str, *text(DPDK_DEVICE)] = Field(
        description="PCI address, or a virtual device with its arguments."
    )
    queues: Annotated[int, *count(1, MAX_DPDK_QUEUES)] = Field(
        1, description="Receive queues, and as many to send."
    )
    ring_size: Annotated[int, *choice(*RING_SIZES)] = Field(
        1024, description="Descriptors of each of a queue's rings, a power of two."
    )
    frames: Annotated[int | None, *count(128, 1 << 22)] = Field(
        None, description="Frames of packet memory, all queues together. Default: four for each descriptor."
    )
    frame_size: Annotated[int, *choice(2048, 4096, 8192, 16384)] = Field(
        2048, description="Bytes of a packet that a frame holds, headroom not included."
    )
    mtu: Annotated[int | None, *count(576, 9702)] = Field(
        None, description="Largest IP packet. Default: the port's."
    )
    vlan: Annotated[int | None, *count(1, 4094)] = Field(
        None, description="802.1Q tag of everything that the stack receives and sends. Default: untagged."
    )
    offloads: Annotated[Literal["auto", "none"], *choice("auto", "none")] = Field(
        "auto", description="auto: what the port offers of checksums and segmentation."
    )
    hardware_rules: Annotated[HardwareRules, *choice("none", "auto", "required")] = Field(
        "none",
        description="auto: the port drops packets and chooses their queue by rules of its own (rte_flow) where it can. "
        "required: or it is not opened.",
    )
    idle_us: Annotated[int, *count(1, 1_000_000)] = Field(
        100,
        description="How long a program sleeps when nothing has come, microseconds, where a timer wakes it.",
    )
    rx_interrupts: Annotated[Literal["auto", "required", "none"], *choice("auto", "required", "none")] = (
        Field(
            "auto",
            description="auto: what arrives wakes a program where the driver can tell, else a timer. "
            "required: nothing but that. none: a timer.",
        )
    )
    link_poll_ms: Annotated[int, *count(10, 60_000)] = Field(
        100, description="How often the port's link is looked at, milliseconds."
    )
    eal: EalModel = Field(
        default_factory=lambda: EalModel.model_validate({}), description="How EAL is started, once a process."
    )
    exception: Annotated[Literal["tap", "none"], *choice("tap", "none")] = Field(
        "tap",
        description="tap: what no rule steers goes to the kernel. none: there is no kernel on this port.",
    )
    exception_rate: Annotated[int, *count(1, 10_000_000)] = Field(
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

    to: Annotated[Network, PlainValidator(read_network), WithJsonSchema(NETWORK_SCHEMA)] = Field(
        description="The destinations, a prefix; 0.0.0.0/0: all."
    )
    via: Gateway = Field(description="The gateway, in a prefix of `addresses`.")


def _size(name: str) -> tuple[PlainValidator, WithJsonSchema]:
    return count(*_SIZES[name][:2])


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
    vlan: Annotated[int | None, *count(1, 4094)] = Field(
        None, description="VLAN of the outermost 802.1Q tag."
    )


class QuotaModel(_Model):
    """What one application may have at most."""

    conns: Annotated[int | None, *count(1, 1 << 24)] = Field(
        None, description="TCP connections in all states."
    )
    memory: Bytes = Field(None, description="Bytes of its memory: stack, rings and frames; K, M, G as well.")
    frames: Annotated[int | None, *count(128, 1 << 22)] = Field(
        None, description="Frames of packet memory, all queues together."
    )
    rate: Bytes = Field(
        None, description="Bytes a second that it may send, where applications share an interface."
    )
    apps: Annotated[int | None, *count(1, 256)] = Field(None, description="Applications of a user at a time.")


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

    name: Annotated[str, *text(NAME)] = Field(description="Unique; appears in counters and errors.")
    match: MatchModel
    action: Annotated[Action, *choice("steer", "pass", "drop")] = Field(
        description="steer: applications may take these flows. pass: the kernel keeps them. drop: nobody sees them."
    )
    allow: AllowModel = Field(
        default_factory=lambda: NO_ALLOW_MODEL,
        description="Who may use a steer rule by a broker. Default: root, and the user who runs the broker.",
    )


class HeadModel(_Model):
    """Which flows of an interface are served in user space, by which backend."""

    version: Annotated[Literal[1], *choice(1)] = Field(description="Of this language.")
    interface: Annotated[str, PlainValidator(read_interface), WithJsonSchema(INTERFACE_SCHEMA)] = Field(
        description="The network interface, as `ip link` names it."
    )
    profile: Annotated[Profile | None, *choice("latency", "throughput", "connections")] = Field(
        None, description="What the stack is tuned for. Keys of `stack` and `backend` override it."
    )
    stack: StackModel = Field(
        default_factory=lambda: StackModel.model_validate({}), description="Sizes and times of the stack."
    )
    congestion: Annotated[str | None, *choice(*CONGESTION)] = Field(
        None, description="Congestion control of sockets that do not choose one. Default: the stack's."
    )
    mode: Annotated[Literal["direct", "shared"] | None, *choice("direct", "shared")] = Field(
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
    numa: Annotated[int | None, *count(0, 1023)] = Field(
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


# What the models cannot say field by field. policy_flows.py checks the same with better words.
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

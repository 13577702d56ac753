# SPDX-License-Identifier: Apache-2.0
"""Rules for ethtool: the text is what ethtool(8) understands, the bytes are what it makes of it, and what is put on an
interface is taken off again, whatever the device refuses."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_hwflow_rules import WEB, policy

from bypass import netns
from bypass.errors import DeviceError
from bypass.hwflow import Plan, plan, translate
from bypass.hwflow import apply as module
from bypass.hwflow.apply import applied

FLOWS = (
    WEB,
    "range: proto: tcp, local: 192.0.2.10, local_port: 8000-8018 -> steer",
    "not: proto: tcp, local_port: 8008, remote: 198.51.100.0/24 -> pass",
    "ssh: proto: tcp, local_port: 22 -> pass",
    "all: local: 192.0.2.10 -> steer",
    "one: proto: udp, local: 192.0.2.10, local_port: 53, remote: 198.51.100.7, remote_port: 1024-2047 -> steer",
    "bad: proto: sctp, local: 192.0.2.11, vlan: 7 -> drop",
    "bad6: local: '2001:db8::1', remote: '2001:db8:1::/48' -> drop",
    "gre6: proto: 47, local: '2001:db8::1' -> drop",
)


def planned(
    *flows: str, stack: tuple[int, ...] = (3,), kernel: tuple[int, ...] = (0, 1, 2), vf: int | None = None
) -> Plan:
    return plan(translate(policy(*(flows or FLOWS))), "eth1", stack=stack, kernel=kernel, vf=vf)


# ---- Text ----------------------------------------------------------------------------------------------------------
def test_the_commands_of_a_policy() -> None:
    first, *rules, last = planned().commands()
    assert (first, last) == ("ethtool -K eth1 ntuple on", "ethtool -X eth1 weight 1 1 1 0")
    far = "src-ip 2001:db8:1:: m ::ffff:ffff:ffff:ffff:ffff"
    assert [r.removeprefix("ethtool -N eth1 flow-type ") for r in rules] == [
        "udp4 src-ip 198.51.100.7 dst-ip 192.0.2.10 src-port 1024 m 1023 dst-port 53 action 3 loc 0",
        "tcp4 dst-ip 192.0.2.10 dst-port 80 action 3 loc 1",
        "tcp4 src-ip 198.51.100.0 m 0.0.0.255 dst-port 8008 action 0 loc 2",
        "tcp4 dst-port 22 action 1 loc 3",
        "tcp6 dst-port 22 action 2 loc 4",
        "tcp4 dst-ip 192.0.2.10 dst-port 8016 m 1 action 3 loc 5",
        "tcp4 dst-ip 192.0.2.10 dst-port 8018 action 3 loc 6",
        f"udp6 {far} dst-ip 2001:db8::1 action -1 loc 7",
        "ip6 dst-ip 2001:db8::1 l4proto 47 action -1 loc 8",
        "ip4 dst-ip 192.0.2.11 l4proto 132 vlan 7 m 0xf000 action -1 loc 9",
        "udp4 dst-ip 192.0.2.10 action 3 loc 10",
        "tcp4 dst-ip 192.0.2.10 dst-port 8000 m 15 action 3 loc 11",
        f"tcp6 {far} dst-ip 2001:db8::1 action -1 loc 12",
        "tcp4 dst-ip 192.0.2.10 action 3 loc 13",
    ]


def test_the_target_is_a_queue_queues_or_a_virtual_function() -> None:
    flows = ("most: proto: tcp, local: 192.0.2.10 -> steer", "ssh: proto: tcp, local_port: 22 -> pass")
    assert planned(*flows, stack=(2, 3), kernel=(0, 1)).commands(first=40, context=5)[1:] == [
        "ethtool -X eth1 context new weight 0 0 1 1",
        "ethtool -N eth1 flow-type tcp4 dst-port 22 context 0 loc 40",
        "ethtool -N eth1 flow-type tcp4 dst-ip 192.0.2.10 context 5 loc 41",
        "ethtool -X eth1 weight 1 1 0 0",
    ]
    assert planned(*flows, stack=(1,), kernel=(0, 1), vf=4).commands()[1:] == [
        "ethtool -N eth1 flow-type tcp4 dst-port 22 action 0 loc 0",
        "ethtool -N eth1 flow-type tcp4 dst-ip 192.0.2.10 vf 4 queue 1 loc 1",
    ]


def test_what_is_put_on_is_taken_off_in_the_other_order() -> None:
    assert planned(WEB, stack=(2, 3), kernel=(0, 1)).undo_commands(first=7, context=5) == [
        "ethtool -X eth1 default",
        "ethtool -N eth1 delete 7",
        "ethtool -X eth1 context 5 delete",
    ]


@pytest.mark.parametrize(
    ("stack", "kernel", "says"),
    [
        ((1,), (0, 1), "queue 1 cannot be the stack's and the kernel's"),
        ((1,), (), "no queue is left to the kernel"),
        ((), (0,), "no queue is the stack's"),
    ],
)
def test_queues_are_shared_out_or_it_is_refused(
    stack: tuple[int, ...], kernel: tuple[int, ...], says: str
) -> None:
    with pytest.raises(DeviceError, match=says):
        planned(WEB, stack=stack, kernel=kernel)


# ---- Text and bytes ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ethtool(8) would give to the kernel, printed."""
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).parent / "c/ethtool_shim.c"
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.mark.parametrize(
    "made",
    [planned(), planned(stack=(2, 3), kernel=(0, 1)), planned(stack=(1,), kernel=(0,), vf=4)],
    ids=["queue", "context", "vf"],
)
def test_ethtool_makes_the_same_bytes_of_the_text_as_we_do(shim: Path, made: Plan) -> None:
    env = {**os.environ, "LD_PRELOAD": str(shim)}
    for at, rule in enumerate(made.rules):
        command = ["ethtool", "-N", "eth1", *rule.text(at, 5).split()]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        theirs = bytes.fromhex(done.stdout.splitlines()[0])
        flow, context = struct.unpack_from("=I", theirs, 16)[0], struct.unpack_from("=I", theirs, 184)[0]
        ours = rule.pack(at)
        assert theirs[16 : 16 + 148] == ours[:148], command  # flow type, fields and masks; then padding
        assert theirs[16 + 152 : 16 + 164] == ours[152:164], command  # where to, location
        assert rule.spreads() == bool(flow & 0x20000000)
        if rule.spreads():
            assert context == (5 if rule.target is not None and rule.target.queues else 0)


# ---- On an interface -----------------------------------------------------------------------------------------------
class FakeNic:
    """A device with a rule table, a hash table of 8 entries and RSS contexts, as the ioctls show it. `fails`: the how
    manieth change is refused."""

    name = "eth1"

    def __init__(self, rings: int = 4, room: int = 64, *, special: bool = False, ntuple: bool = True) -> None:
        self.rings, self.room, self.special, self.ntuple = rings, room, special, ntuple
        self.flags = 0
        self.table = [i % rings for i in range(8)]
        self.rules: dict[int, bytes] = {1: b"of somebody else"}
        self.contexts: dict[int, list[int]] = {}
        self.used: list[int] = []
        self.changes = 0
        self.fails: dict[int, int] = {}
        self.lacks: set[int] = set()

    def state(self) -> Any:
        return self.flags, list(self.table), dict(self.rules), dict(self.contexts)

    def ask(self, ifname: str, question: bytes) -> bytes:
        assert ifname == self.name
        (command,) = struct.unpack_from("=I", question)
        if command in self.lacks:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        if command in (module.SFLAGS, module.SRSSH, module.SRXCLSRLINS, module.SRXCLSRLDEL):
            self.changes += 1
            if self.changes in self.fails:
                raise OSError(self.fails[self.changes], "refused")
        return {
            module.GFLAGS: self.get_flags,
            module.SFLAGS: self.set_flags,
            module.GRXRINGS: self.get_rings,
            module.GRXCLSRLCNT: self.count,
            module.GRXCLSRLALL: self.every,
            module.SRXCLSRLINS: self.insert,
            module.SRXCLSRLDEL: self.delete,
            module.GRSSH: self.get_table,
            module.SRSSH: self.set_table,
        }[command](question)

    def get_flags(self, q: bytes) -> bytes:
        return struct.pack("=II", module.GFLAGS, self.flags)

    def set_flags(self, q: bytes) -> bytes:
        self.flags = struct.unpack("=II", q)[1] & (module.FLAG_NTUPLE if self.ntuple else 0)
        return q

    def get_rings(self, q: bytes) -> bytes:
        return q[:8] + struct.pack("=Q", self.rings) + q[16:]

    def count(self, q: bytes) -> bytes:
        special = module.LOCATION_SPECIAL if self.special else 0
        return (
            q[:8]
            + struct.pack("=Q", self.room | special)
            + q[16:184]
            + struct.pack("=I", len(self.rules))
            + q[188:]
        )

    def every(self, q: bytes) -> bytes:
        assert struct.unpack_from("=I", q, 184)[0] == len(self.rules)
        body = (
            q[:8]
            + struct.pack("=Q", self.room)
            + q[16:188]
            + struct.pack(f"={len(self.rules)}I", *self.rules)
        )
        return body.ljust(len(q), b"\0")

    def insert(self, q: bytes) -> bytes:
        spec = bytearray(q[16:184])
        (at,) = struct.unpack_from("=I", spec, 160)
        if at == module.LOCATION_LAST:
            assert self.special
            at = max(self.rules) + 1
        assert at not in self.rules
        assert at < self.room
        (flow,), (context,) = struct.unpack_from("=I", spec), struct.unpack_from("=I", q, 184)
        if flow & 0x20000000:
            assert context == 0 or context in self.contexts
            self.used.append(context)
        struct.pack_into("=I", spec, 160, at)
        self.rules[at] = bytes(spec)
        return q[:16] + bytes(spec) + q[184:]

    def delete(self, q: bytes) -> bytes:
        del self.rules[struct.unpack_from("=I", q, 16 + 160)[0]]
        return q

    def get_table(self, q: bytes) -> bytes:
        _, context, entries, key = struct.unpack_from("=4I", q)
        assert context == 0
        head = struct.pack("=4I2B2xI", module.GRSSH, 0, 8, 40, 1, 0, 0)
        if not entries:
            return head
        assert (entries, key) == (8, 40)
        return head + struct.pack("=8I", *self.table) + bytes(40)

    def set_table(self, q: bytes) -> bytes:
        _, context, entries, key, function, transformation, _ = struct.unpack_from("=4I2B2xI", q)
        assert (key, function, transformation) == (0, 0, 0)
        values = list(struct.unpack_from(f"={entries}I", q, 24))
        if any(v >= self.rings for v in values):
            raise OSError(errno.EINVAL, "Invalid argument")
        if context == module.CONTEXT_NEW:
            context = max(self.contexts, default=2) + 1
            self.contexts[context] = values
        elif context:
            assert not values
            del self.contexts[context]
        else:
            self.table = values
        return q[:4] + struct.pack("=I", context) + q[8:]


TWO = (WEB, "ssh: proto: tcp, local_port: 22 -> pass", "all: local: 192.0.2.10 -> steer")


def test_a_plan_is_on_the_interface_within_the_block_and_nothing_after() -> None:
    device = FakeNic()
    before = device.state()
    made = planned(*TWO)
    with applied(made, device.ask) as put:
        assert put.locations == (0, 2, 3, 4)[: len(made.rules)]  # 1 is somebody else's
        assert put.context is None
        assert device.flags == module.FLAG_NTUPLE
        assert set(device.table) == {0, 1, 2}
        assert [device.rules[at] for at in put.locations] == [
            r.pack(at) for r, at in zip(made.rules, put.locations, strict=True)
        ]
    assert device.state() == before
    with pytest.raises(RuntimeError), applied(made, device.ask):
        raise RuntimeError
    assert device.state() == before


def test_several_queues_share_by_a_context_of_their_own() -> None:
    device = FakeNic()
    before = device.state()
    with applied(planned(*TWO, stack=(2, 3), kernel=(0, 1)), device.ask) as put:
        assert put.context == 3
        assert device.contexts == {3: [2, 3] * 4}
        assert sorted(device.used) == [0, 3, 3, 3]  # a pass rule has the kernel's
        assert set(device.table) == {0, 1}
    assert device.state() == before


def test_a_virtual_function_leaves_the_hash_table_alone() -> None:
    device = FakeNic()
    with applied(planned(*TWO, stack=(0,), kernel=(0, 1), vf=2), device.ask):
        assert device.table == [0, 1, 2, 3] * 2
        assert len(device.rules) > 1
    assert device.rules == {1: b"of somebody else"}


def test_a_driver_that_places_rules_itself_gets_them_in_order() -> None:
    device = FakeNic(special=True)
    before = device.state()
    with applied(planned(*TWO), device.ask) as put:
        assert list(put.locations) == sorted(put.locations)
    assert device.state() == before


def changes(stack: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """How many things a plan changes on its way in."""
    device = FakeNic()
    with applied(planned(*TWO, stack=stack, kernel=kernel), device.ask):
        return device.changes


@pytest.mark.parametrize(("stack", "kernel"), [((3,), (0, 1, 2)), ((2, 3), (0, 1))], ids=["queue", "context"])
def test_whatever_the_device_refuses_all_before_is_undone(
    stack: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    total = changes(stack, kernel)
    assert total >= 5
    for step in range(1, total + 1):
        device = FakeNic()
        before = device.state()
        device.fails = {step: errno.ENOSPC}
        with pytest.raises(DeviceError, match=r"eth1: .*No space left on device"):
            applied(planned(*TWO, stack=stack, kernel=kernel), device.ask).__enter__()
        assert device.state() == before, step


def test_a_refused_rule_is_named_with_its_line() -> None:
    device = FakeNic()
    device.fails = {3: errno.EINVAL}
    with pytest.raises(DeviceError, match=r"eth1: p.yaml:6: 'ssh' is refused: Invalid argument"):
        applied(planned(*TWO), device.ask).__enter__()


def test_what_cannot_be_undone_is_told_and_the_rest_is_undone() -> None:
    device = FakeNic()
    made = planned(*TWO)
    with (
        pytest.raises(DeviceError, match=r"eth1: not undone: rule \d \('all'\): Input/output error"),
        applied(made, device.ask),
    ):
        device.fails = {device.changes + 2: errno.EIO}
    assert device.table == [0, 1, 2, 3] * 2
    assert len(device.rules) == 2
    device = FakeNic()
    with applied(made, device.ask):
        device.fails = {device.changes + n: errno.ENODEV for n in range(1, 20)}  # unplugged


@pytest.mark.parametrize(
    ("device", "plans", "says"),
    [
        (FakeNic(ntuple=False), {}, "eth1 cannot filter: its driver has no ntuple filters"),
        (FakeNic(room=3), {}, "eth1 has room for 2 rules, 4 are needed"),
        (FakeNic(rings=2), {}, "eth1 has 2 receive queues: there is no queue 3"),
        (
            FakeNic(rings=2),
            {"stack": (2, 3), "kernel": (0, 1)},
            "eth1 has 2 receive queues: there is no queue 2",
        ),
    ],
)
def test_what_the_device_is_too_small_for_is_said_and_nothing_stays(
    device: FakeNic, plans: Any, says: str
) -> None:
    before = device.state()
    with pytest.raises(DeviceError, match=says):
        applied(planned(*TWO, **plans), device.ask).__enter__()
    assert device.state() == before


def test_a_device_without_contexts_gives_the_stack_one_queue() -> None:
    device = FakeNic()
    device.fails = {2: errno.EOPNOTSUPP}
    before = device.state()
    with pytest.raises(
        DeviceError, match="eth1: has no RSS contexts: give the stack one queue: the driver has no"
    ):
        applied(planned(*TWO, stack=(2, 3), kernel=(0, 1)), device.ask).__enter__()
    assert device.state() == before


@pytest.mark.parametrize("lacks", [module.GRXCLSRLCNT, module.SRXCLSRLINS, module.GRSSH])
def test_what_the_driver_does_not_have_is_said(lacks: int) -> None:
    device = FakeNic()
    before = device.state()
    device.lacks = {lacks}
    with pytest.raises(DeviceError, match=r"eth1: .*: the driver has no such thing"):
        applied(planned(*TWO), device.ask).__enter__()
    assert device.state() == before


@pytest.mark.netns
def test_a_device_without_such_tables_says_so(namespace: str) -> None:
    """veth, by the kernel's own ioctls."""
    subprocess.run(
        ["ip", "-n", namespace, "link", "add", "eth1", "type", "veth", "peer", "name", "far1"], check=True
    )
    with netns.entered(namespace), pytest.raises(DeviceError, match="eth1"):
        applied(planned(WEB)).__enter__()
    with netns.entered(namespace), pytest.raises(DeviceError, match="there is no such interface"):
        applied(plan(translate(policy(WEB)), "eth9", stack=(1,), kernel=(0,))).__enter__()

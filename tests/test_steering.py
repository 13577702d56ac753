# SPDX-License-Identifier: Apache-2.0
"""Steering from Python: endpoints and their grants, addresses, counters, exchange of the policy, and what each error
says. Programs are loaded and test-run, not attached."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wire
from steering_rules import policy_of

from bypass.bpf import build
from bypass.errors import BypassError, GrantError, PrivilegeError, SteeringError
from bypass.rules import PortRange, Rule
from bypass.steering import MAX_ENTRIES, MAX_LOCALS, REASONS, Steering

pytestmark = pytest.mark.netns

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
HOST, PEER = "192.0.2.10", "198.51.100.1"
AF_XDP = 44


def rule(
    index: int, action: str, port: int | None = 80, *, name: str = "", remote: str | None = None
) -> Rule:
    ports = None if port is None else PortRange(port, port)
    net = None if remote is None else ipaddress.ip_network(remote)
    return Rule(index, name or f"r{index}", None, None, ports, net, None, None, action)  # type: ignore[arg-type]


def load(*rules: Rule, **options: object) -> Steering:
    return Steering(policy_of(list(rules)), "lo", queues=1, attach=False, **options)  # type: ignore[arg-type]


@pytest.fixture
def steering() -> Iterator[Steering]:
    """Port 80 may be taken; one address, one AF_XDP socket. The loopback's MAC address is zero."""
    with load(rule(0, "steer", name="web")) as it, socket.socket(AF_XDP, socket.SOCK_RAW) as xsk:
        it.set_locals([HOST])
        it.set_socket(0, 0, xsk.fileno())
        yield it


def frame(
    port: int = 80, sport: int = 5000, proto: int = TCP, host: str = HOST, *, mac: bytes = bytes(6)
) -> bytes:
    if proto == TCP:
        l4 = wire.tcp(PEER, host, sport, port, 1, 2, wire.ACK, 100)
    else:
        l4 = wire.udp(PEER, host, sport, port, b"data")
    return wire.eth(mac, b"\2\0\0\0\0\1", wire.ETH_IPV4, wire.ipv4(PEER, host, proto, l4))


def reason(s: Steering, data: bytes) -> str:
    return s.test_run(data).reason


# ---- Endpoints ---------------------------------------------------------------------------------------------------
def test_the_most_specific_endpoint_gets_the_packet(steering: Steering) -> None:
    any_ = steering.add_endpoint(TCP, None, 80)
    bound = steering.add_endpoint(TCP, HOST, 80)
    connected = steering.add_endpoint(TCP, HOST, 80, PEER, 5000)

    def entry() -> int:
        verdict = steering.test_run(frame()).verdict
        assert verdict is not None
        return verdict.entry

    for expected in (connected, bound, any_):
        assert entry() == expected
        steering.remove_endpoint(expected)
    assert reason(steering, frame()) == "no_endpoint"
    steering.remove_endpoint(any_)  # once more is nothing


def test_the_unspecified_address_means_any(steering: Steering) -> None:
    entry = steering.add_endpoint(UDP, "0.0.0.0", 80)
    assert steering.entries()[entry][0].laddr is None
    assert reason(steering, frame(proto=UDP)) == "steered"


def test_one_flow_one_hash(steering: Steering) -> None:
    steering.add_endpoint(TCP, None, 80)
    hashes = [steering.test_run(frame(sport=p)).verdict for p in (5000, 5000, 5001)]
    assert all(hashes)
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_an_endpoint_needs_a_grant(steering: Steering) -> None:
    with pytest.raises(GrantError, match=r"no rule of the policy grants tcp \*:81 on lo"):
        steering.add_endpoint(TCP, None, 81)
    with pytest.raises(GrantError, match="2001:db8::10: only IPv4 is steered"):
        steering.add_endpoint(TCP, "2001:db8::10", 80)
    assert steering.entries() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, None, 80), "TCP or UDP"),
        ((TCP, None, 0), "1 to 65535"),
        ((TCP, None, 65536), "1 to 65535"),
        ((TCP, HOST, 80, PEER, None), "address and port"),
        ((TCP, None, 80, PEER, 5000), "needs a local address"),
    ],
)
def test_an_endpoint_that_makes_no_sense_is_refused(
    steering: Steering, arguments: tuple[int, str | None, int], message: str
) -> None:
    with pytest.raises(SteeringError, match=message):
        steering.add_endpoint(*arguments)
    assert steering.entries() == {}


def test_an_endpoint_exists_once(steering: Steering) -> None:
    steering.add_endpoint(TCP, HOST, 80)
    with pytest.raises(SteeringError, match=rf"tcp {HOST}:80 is live already"):
        steering.add_endpoint(TCP, HOST, 80)
    with pytest.raises(SteeringError, match="owner 1 of 1"):
        steering.add_endpoint(UDP, HOST, 80, owner=1)
    assert len(steering.entries()) == 1


def test_numbers_are_used_again_as_late_as_possible_and_count_from_zero(steering: Steering) -> None:
    first = steering.add_endpoint(TCP, None, 80)
    steering.test_run(frame())
    assert steering.entries()[first][1].packets == 1
    steering.remove_endpoint(first)
    for port in range(1, MAX_ENTRIES):
        number = steering.add_endpoint(UDP, HOST, 80, PEER, port)
        assert number != first
    again = steering.add_endpoint(TCP, None, 80)
    assert again == first
    assert steering.entries()[again][1].packets == 0
    with pytest.raises(SteeringError, match="65536 endpoints are live"):
        steering.add_endpoint(UDP, None, 80)


# ---- Blocks of local ports ---------------------------------------------------------------------------------------
@pytest.fixture
def open_policy() -> Iterator[Steering]:
    """Everything may be taken."""
    with load(rule(0, "steer", None)) as it, socket.socket(AF_XDP, socket.SOCK_RAW) as xsk:
        it.set_locals([HOST, "192.0.2.11"])
        it.set_socket(0, 0, xsk.fileno())
        yield it


def entry_of(s: Steering, data: bytes) -> int | None:
    verdict = s.test_run(data).verdict
    return None if verdict is None else verdict.entry


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_a_block_takes_its_256_ports_of_its_address_from_every_peer(
    open_policy: Steering, proto: int
) -> None:
    block = open_policy.add_endpoint(proto, HOST, 0x8100, block=True)
    for port in (0x8100, 0x8101, 0x817F, 0x8180, 0x81FF):
        for sport in (1, 443, 65535):
            assert entry_of(open_policy, frame(port, sport, proto)) == block
    outside = [
        frame(0x80FF, proto=proto),
        frame(0x8200, proto=proto),
        frame(0x0081, proto=proto),
        frame(0x8100, proto=proto, host="192.0.2.11"),
        frame(0x8100, proto=UDP if proto == TCP else TCP),
    ]
    assert [reason(open_policy, data) for data in outside] == ["no_endpoint"] * 5
    assert open_policy.entries()[block][1].packets == 15
    assert str(open_policy.entries()[block][0]).endswith(f" {HOST}:33024-33279")
    open_policy.remove_endpoint(block)
    assert reason(open_policy, frame(0x8100, proto=proto)) == "no_endpoint"


def test_a_block_comes_behind_connections_and_before_what_is_bound(open_policy: Steering) -> None:
    """On its first port too, where the keys of a block and of a bound socket differ by a bit."""
    for port in (0x8100, 0x8105):
        any_ = open_policy.add_endpoint(TCP, None, port)
        bound = open_policy.add_endpoint(TCP, HOST, port)
        block = open_policy.add_endpoint(TCP, HOST, 0x8100, block=True)
        connected = open_policy.add_endpoint(TCP, HOST, port, PEER, 5000)
        for expected in (connected, block, bound, any_):
            assert entry_of(open_policy, frame(port)) == expected
            open_policy.remove_endpoint(expected)
        assert reason(open_policy, frame(port)) == "no_endpoint"


def test_a_block_is_looked_for_only_while_there_is_one(open_policy: Steering) -> None:
    def kinds() -> int:
        config = open_policy._map("config").get(bytes(4))
        assert config is not None
        return int.from_bytes(config[6:], "little")

    open_policy.add_endpoint(TCP, HOST, 80)
    before = kinds()
    blocks = [open_policy.add_endpoint(TCP, HOST, first, block=True) for first in (0x8100, 0x8200)]
    assert kinds() == before | 8
    for block in blocks:
        open_policy.remove_endpoint(block)
    assert kinds() == before


def test_each_port_of_a_block_needs_a_grant() -> None:
    ports = Rule(0, "out", TCP, ipaddress.ip_network(HOST), PortRange(1000, 1999), None, None, None, "steer")
    kernels = Rule(1, "kernels", None, None, PortRange(1300, 1300), None, None, None, "pass")
    with load(ports, kernels) as s:
        s.add_endpoint(TCP, HOST, 1024, block=True)
        s.add_endpoint(TCP, HOST, 1536, block=True)
        for first in (768, 1280, 1792, 32768):
            with pytest.raises(GrantError, match=f"grants every port of tcp {HOST}:{first}-{first + 255} on"):
                s.add_endpoint(TCP, HOST, first, block=True)
        with pytest.raises(GrantError):
            s.add_endpoint(UDP, HOST, 1024, block=True)
        assert len(s.entries()) == 2


def test_a_swap_names_a_block_of_which_nothing_is_granted_any_more(open_policy: Steering) -> None:
    """What a rule still grants is still taken, and a rule of higher rank takes its port out."""
    block = open_policy.add_endpoint(TCP, HOST, 0x8100, block=True)
    one = rule(1, "pass", 0x8101)
    assert open_policy.swap(policy_of([rule(0, "steer", None), one])) == []
    assert reason(open_policy, frame(0x8101)) == "rule_pass"
    assert entry_of(open_policy, frame(0x8102)) == block
    assert [e.entry for e in open_policy.swap(policy_of([rule(0, "steer", 80), one]))] == [block]
    assert reason(open_policy, frame(0x8102)) == "no_rule"


@pytest.mark.parametrize(
    ("laddr", "first", "peer"),
    [(HOST, 0x8101, ()), (HOST, 80, ()), (None, 0x8100, ()), (HOST, 0x8100, (PEER, 443)), (HOST, 0, ())],
)
def test_a_block_that_makes_no_sense_is_refused(
    open_policy: Steering, laddr: str | None, first: int, peer: tuple[str, int] | tuple[()]
) -> None:
    with pytest.raises(SteeringError, match=r"a block begins at a multiple of 256|1 to 65535"):
        open_policy.add_endpoint(TCP, laddr, first, *peer, block=True)
    assert open_policy.entries() == {}


def test_a_block_exists_once_beside_what_else_is_on_its_ports(open_policy: Steering) -> None:
    open_policy.add_endpoint(TCP, HOST, 0x8100, block=True)
    with pytest.raises(SteeringError, match=rf"tcp {HOST}:33024-33279 is live already"):
        open_policy.add_endpoint(TCP, HOST, 0x8100, block=True)
    open_policy.add_endpoint(TCP, HOST, 0x8100)
    open_policy.add_endpoint(UDP, HOST, 0x8100, block=True)
    assert len(open_policy.entries()) == 3


# ---- Addresses, sockets, counters --------------------------------------------------------------------------------
def test_nothing_is_taken_before_addresses_are_known() -> None:
    with load(rule(0, "drop")) as s:
        assert reason(s, frame()) == "not_local"
        s.set_locals([HOST])
        assert reason(s, frame()) == "rule_drop"
        s.set_locals(["192.0.2.11", "2001:db8::1"])
        assert reason(s, frame()) == "not_local"
        assert reason(s, frame(host="192.0.2.11")) == "rule_drop"
        s.set_mac(bytes.fromhex("020000000009"))
        assert reason(s, frame(host="192.0.2.11")) == "other_mac"


def test_a_closed_socket_leaves_its_slot(steering: Steering) -> None:
    steering.add_endpoint(TCP, None, 80)
    with socket.socket(AF_XDP, socket.SOCK_RAW) as other:
        steering.set_socket(0, 0, other.fileno())
        assert reason(steering, frame()) == "steered"
    assert reason(steering, frame()) == "tcp_no_socket"
    steering.clear_socket(0, 0)  # an empty slot is nothing
    with pytest.raises(SteeringError, match="no slot for owner 0, queue 256"):
        steering.clear_socket(0, 256)


def test_what_does_not_fit_is_refused_and_changes_nothing(steering: Steering) -> None:
    steering.add_endpoint(TCP, None, 80)
    with (
        pytest.raises(SteeringError, match=r"lo, queue 0: descriptor \d+ is no AF_XDP socket"),
        open("/dev/null") as f,
    ):
        steering.set_socket(0, 0, f.fileno())
    many = [ipaddress.IPv4Address(n) for n in range(1 << 24, (1 << 24) + MAX_LOCALS + 1)]
    with pytest.raises(SteeringError, match="4097 IPv4 addresses"):
        steering.set_locals(many)
    assert reason(steering, frame()) == "steered"
    steering.set_locals(many[1:])
    assert reason(steering, frame()) == "not_local"
    steering.set_locals([HOST])
    assert reason(steering, frame()) == "steered"


def test_packets_and_bytes_are_counted_in_one_place_of_each_kind(steering: Steering) -> None:
    entry = steering.add_endpoint(UDP, None, 80)
    data = frame(proto=UDP)
    for _ in range(3):
        steering.test_run(data)
    steering.test_run(frame(port=81))
    want = (3, 3 * len(data))
    assert steering.rules()["web"] == want
    assert steering.entries()[entry][1] == want
    counted = {name: c for name, c in steering.reasons().items() if c.packets}
    assert counted == {"steered": want, "no_rule": (1, len(frame(port=81)))}
    assert list(steering.reasons()) == [r.name for r in REASONS]


def test_a_swap_keeps_endpoints_sockets_and_counters(steering: Steering) -> None:
    entry = steering.add_endpoint(TCP, HOST, 80)
    steering.test_run(frame())
    assert steering.swap(policy_of([rule(0, "drop", 22), rule(1, "steer", None, name="web")])) == []
    assert reason(steering, frame()) == "steered"
    assert steering.rules()["web"].packets == 2
    assert list(steering.rules()) == ["r0", "web"]
    kernels = Rule(1, "kernels", TCP, ipaddress.ip_network(HOST), PortRange(80, 80), None, None, None, "pass")
    vanished = steering.swap(policy_of([rule(0, "steer", 80, name="web"), kernels]))
    assert [e.entry for e in vanished] == [entry]
    assert reason(steering, frame()) == "rule_pass"
    assert steering.rules()["web"].packets == 2


def test_a_swap_that_fails_changes_nothing(steering: Steering) -> None:
    steering.add_endpoint(TCP, HOST, 80)
    steering._text = "int nonsense"
    with pytest.raises(SteeringError, match="cannot compile"):
        steering.swap(policy_of([rule(0, "steer", None, name="web")]))
    remove_logs()
    assert reason(steering, frame()) == "steered"
    assert list(steering.rules()) == ["web"]


# ---- Errors ------------------------------------------------------------------------------------------------------
def remove_logs() -> list[str]:
    texts = []
    for path in Path("/tmp").glob("bypass-*.log"):
        texts.append(path.read_text())
        path.unlink()
    return texts


def test_a_compile_error_names_its_first_message_and_a_file_with_all() -> None:
    with pytest.raises(SteeringError, match=r"error: .*; all messages are in (/tmp/bypass-bcc-.*\.log)") as e:
        load(rule(0, "steer"), text=build.source().replace("u32 zero = 0;", "u32 zero = ;"))
    found = re.search(r"all messages are in (\S+)", str(e.value))
    assert found
    assert "steer.h" in Path(found[1]).read_text(), "messages name file and line of the source"
    Path(found[1]).unlink()


def test_a_program_that_the_verifier_refuses_leaves_its_log() -> None:
    check = "(void *)(_h + 1) > (void *)(long)ctx->data_end"
    assert check in build.source()
    with pytest.raises(
        SteeringError, match=r"the kernel refuses xdp_steer: .*log is in /tmp/bypass-verifier-"
    ) as e:
        load(rule(0, "steer"), text=build.source().replace(check, "0"))
    path = Path(str(e.value).split()[-1])
    assert "invalid access to packet" in path.read_text()
    path.unlink()


def test_what_one_process_compiled_others_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = build.defines(policy_of([rule(0, "steer")]).compiled)
    monkeypatch.delenv("BYPASS_BPF_CACHE")
    build.compile_programs.cache_clear()
    compiled = build.compile_programs(flags)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("BYPASS_BPF_CACHE", str(tmp_path))
    build.compile_programs.cache_clear()
    assert build.compile_programs(flags) == compiled
    [kept] = tmp_path.iterdir()
    build.compile_programs.cache_clear()
    with monkeypatch.context() as m:
        m.setattr(build, "_compile", None)
        assert build.compile_programs(flags) == compiled
        with pytest.raises(TypeError):
            build.compile_programs((*flags, "-DOTHER"))
    kept.write_text("{}")
    assert build.compile_programs(flags, build.source()) == compiled, (
        "a text of its own is not asked for there"
    )
    build.compile_programs.cache_clear()


def test_a_missing_bcc_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    build.compile_programs.cache_clear()
    with pytest.raises(PrivilegeError, match="python3-bpfcc"):
        load(rule(0, "steer"))


def test_a_missing_interface_and_too_many_queues_are_named() -> None:
    with pytest.raises(SteeringError, match="no interface nowhere0"):
        Steering(policy_of([rule(0, "steer")]), "nowhere0", queues=1)
    with pytest.raises(SteeringError, match="257 queues; steering serves 1 to 256"):
        Steering(policy_of([rule(0, "steer")]), "lo", queues=257)


def test_without_privilege_the_error_says_what_is_missing() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # a child that has given up root
        os.setuid(65534)
        try:
            load(rule(0, "steer"))
            text = "it loaded"
        except BypassError as e:
            text = f"{type(e).__name__}: {e}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader) as f:
        text = f.read()
    assert text.startswith("PrivilegeError"), text
    assert "root" in text


def test_what_is_closed_says_so() -> None:
    s = load(rule(0, "steer"))
    s.close()
    with pytest.raises(SteeringError, match="steering is closed"):
        s.rules()
    with pytest.raises(SteeringError, match="steering is closed"):
        s.add_endpoint(TCP, None, 80)


def test_nothing_is_left_open_by_a_failed_or_closed_steering() -> None:
    def open_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    load(rule(0, "steer")).close()
    before = open_fds()
    for _ in range(3):
        load(rule(0, "steer")).close()
        with pytest.raises(SteeringError):
            load(rule(0, "steer"), text="int nonsense")
    remove_logs()
    assert open_fds() == before


def test_the_largest_program_is_accepted() -> None:
    """16 masks, addresses of both families, VLANs: what the verifier has most work with."""
    rules = []
    for i in range(16):
        net = f"2001:db8::/{64 + i}" if i % 2 else f"192.0.2.0/{16 + i}"
        local = ipaddress.ip_network(net, strict=False)
        remote_port = PortRange(9, 9) if i % 4 == 0 else None
        proto, vlan = (TCP if i % 3 else None), (5 if i % 5 == 0 else None)
        rules.append(Rule(i, f"r{i}", proto, local, PortRange(80, 80), None, remote_port, vlan, "drop"))
    compiled = policy_of(rules).compiled
    assert (len(compiled.masks), compiled.key_v6, compiled.vlan_depth) == (16, True, 1)
    with load(*rules) as s:
        s.set_locals([HOST])
        assert reason(s, frame()) == "rule_drop"

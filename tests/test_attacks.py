# SPDX-License-Identifier: Apache-2.0
"""Two Redis on one interface (mode: shared), of two users and of one, under load by kernel clients; a third application
(tests/attacker.py), with a port of its own, tries to take, send as, read and drown the first one."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from attacker import Attacking
from backends import policy_for
from broker_support import DGRAM, RunningBroker, running
from conftest import missing

from bench.apps.place import environment, lacking, where
from bench.apps.redis import Resp
from bench.programs import ROOT
from bypass import netns
from bypass.broker.ports import BURSTS_PER_SECOND, LEAST_BURST
from bypass.broker.shared import site_of
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab, wait_for
from bypass.policy import parse_policy

pytestmark = [pytest.mark.netns, pytest.mark.backends(asked=True)]

PORTS = {"first": 6379, "second": 6380}
OWN, OTHER, SINK = 7000, 7001, 7002  # the attacker's port, one that is not, and the client's for floods
RATE = 1 << 20
BURST = max(RATE // BURSTS_PER_SECOND, LEAST_BURST)
LOAD_PAUSE_S, FLOOD_S = 0.002, 2.0
NOBODY, DAEMON, THIRD = 65534, 1, 65533
NAMES = {NOBODY: "nobody", DAEMON: "daemon"}
USERS = {"two users": (NOBODY, DAEMON, THIRD), "one user": (NOBODY, NOBODY, NOBODY)}
FIN, RST, ACK = 1, 4, 16
REFUSED = (errno.EACCES, errno.EPERM)


def policy(users: tuple[int, int, int]) -> str:
    rules = [("first", "tcp", 6379, users[0]), ("second", "tcp", 6380, users[1])]
    rules += [(f"own-{proto}", proto, OWN, users[2]) for proto in ("tcp", "udp")]
    flows = "".join(
        f"  - {{name: {name}, match: {{proto: {proto}, local: {SERVER_IP}, local_port: {port}}}, action: steer, "
        f"allow: {{user: {uid}{', quota: {rate: 1M}' if port == OWN else ''}}}}}\n"
        for name, proto, port, uid in rules
    )
    backend = "backend: {kind: afxdp, mode: copy, ring_size: 256}"
    return f"version: 1\ninterface: {SERVER_IFNAME}\nmode: shared\n{backend}\nflows:\n{flows}"


# ---- Redis and its clients -----------------------------------------------------------------------------------------
class Redis:
    """`bypass run -- redis-server`, and a kernel client that asks it all the time, each answer compared."""

    def __init__(self, broker: RunningBroker, lab: Lab, name: str, uid: int, more: Mapping[str, str]) -> None:
        self.port, self.name, self.uid = PORTS[name], name, uid
        self.answers, self.failed = 0, ""
        self._stop = threading.Event()
        argv = [sys.executable, "-m", "bypass", "run", "--socket", broker.name, "--user", NAMES[uid]]
        argv += [
            "--procname",
            name,
            "--",
            where("redis-server"),
            "--bind",
            SERVER_IP,
            "--port",
            str(self.port),
        ]
        argv += ["--protected-mode", "no", "--save", "", "--appendonly", "no", "--dir", "/"]
        env = environment(Path("/")) | {"PYTHONPATH": str(ROOT)} | dict(more)
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env)
        try:
            broker.wait(lambda: self.live(broker), f"redis at port {self.port} to be on the stack")
            self.app = next(a for a in broker.server.broker.apps.values() if a.name == name)
            sock = netns.run(lab.client_ns, socket.create_connection, (SERVER_IP, self.port), 20)
            self.client = sock.getsockname()[1]
            self.thread = threading.Thread(target=self._ask, args=(sock,))
            self.thread.start()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def live(self, broker: RunningBroker) -> bool:
        assert self.process.poll() is None
        return f"tcp {SERVER_IP}:{self.port}" in endpoints(broker)

    def _ask(self, sock: socket.socket) -> None:
        """On one connection from beginning to end: a reset of it would be seen."""
        try:
            with Resp(sock) as client:
                while not self._stop.wait(LOAD_PAUSE_S):
                    value = b"%s %d" % (self.name.encode(), self.answers)
                    assert client.call("SET", "key", value) == b"OK"
                    assert client.call("GET", "key") == value
                    self.answers += 2
        except BaseException as e:  # noqa: BLE001 (told by fine())
            self.failed = repr(e)

    def fine(self) -> None:
        """The connection lives, and is answered on."""
        before = self.answers
        wait_for(lambda: bool(self.failed) or self.answers > before + 20, 20, f"answers of {self.name}")
        assert self.failed == ""

    def end(self) -> None:
        self._stop.set()
        self.thread.join()
        self.process.terminate()
        assert self.process.wait(20) == 0


class World:
    """Both Redis, the attacker, and what bypass-fwd counts of it."""

    def __init__(
        self, broker: RunningBroker, lab: Lab, users: tuple[int, int, int], stack: ExitStack, **env: str
    ):
        self.broker, self.lab = broker, lab
        self.attacker = stack.enter_context(Attacking(broker.name, users[2], lab.server_ns))
        self.number = self.attacker.do("hello")["app"]
        self.early = self.attacker.do("prepare", local=[SERVER_IP, PORTS["first"]])
        self.redis: list[Redis] = []
        for name, uid in zip(PORTS, users, strict=False):
            self.redis.append(Redis(broker, lab, name, uid, env))
            stack.callback(self.redis[-1].end)
        self.victim = self.redis[0]

    def stats(self) -> Any:
        return self.broker.inside(lambda: self.broker.site.forwarder.port_stats(self.number))

    def fine(self) -> None:
        for redis in self.redis:
            redis.fine()


@contextmanager
def world_of(lab: Lab, users: tuple[int, int, int], **env: str) -> Iterator[World]:
    if lack := lacking(["redis-server"]):
        missing(lack)
    with (
        netns.entered(lab.server_ns),
        running(lambda: site_of(parse_policy(policy_for(lab, policy(users)))), lab.server_ns) as broker,
        ExitStack() as stack,
    ):
        yield World(broker, lab, users, stack, **env)


@pytest.fixture(params=sorted(USERS))
def world(lab: Lab, request: pytest.FixtureRequest) -> Iterator[World]:
    with world_of(lab, USERS[request.param]) as it:
        yield it


def endpoints(broker: RunningBroker) -> list[str]:
    return sorted(str(endpoint) for endpoint, _ in broker.site.steering.entries().values())


# ---- 1. The broker -------------------------------------------------------------------------------------------------
def test_another_ones_port_cannot_be_steered(world: World) -> None:
    do, victim = world.attacker.do, world.victim
    there = endpoints(world.broker)
    one_user = victim.uid == USERS["one user"][2] and world.redis[1].uid == victim.uid
    refused = errno.EADDRINUSE if one_user else errno.EACCES
    local, peer = [SERVER_IP, victim.port], [CLIENT_IP, victim.client]
    elsewhere = [CLIENT_IP, 5000]
    assert world.early == {}, "SO_REUSEADDR: it has a kernel socket of that port since before Redis listened"
    for remote in (["::", 0], peer, elsewhere):
        got = do("take", local=local, remote=remote, how="kept")
        assert got["error"] == refused
        assert not got["text"].startswith("the kernel"), "it has the socket: the broker refuses"
        not_held = errno.EINVAL if one_user else errno.EACCES
        for how in ("unbound", "mine"):
            assert do("take", local=local, remote=remote, how=how)["error"] == not_held
        for how in ("bound", "reuse"):
            assert do("take", local=local, remote=remote, how=how)["error"] == errno.EADDRINUSE
    for flags in (1, 3):
        assert do("take", local=["::", 0], remote=peer, flags=flags)["error"] == errno.EACCES, "a block"
    assert do("forged", app=victim.app.number, local=local)["error"] in (errno.EINVAL, errno.EACCES)
    for lease in victim.app.leases:
        assert do("release", lease=lease)["error"] == errno.ENOENT
    for token in (bytes(16), os.urandom(16)):
        assert do("join", app=victim.app.number, token=token.hex())["error"] == errno.EACCES
    assert endpoints(world.broker) == there
    world.fine()


def test_one_connection_of_another_ones_block_cannot_be_steered(lab: Lab) -> None:
    """No kernel socket holds a port of a block: who binds it by name asks the broker for it, and is refused."""
    rule = f"match: {{proto: tcp, local: {SERVER_IP}, remote: {CLIENT_IP}}}, action: steer, allow: {{user: {THIRD}}}"
    head = policy(USERS["one user"]).partition("flows:")[0]
    with (
        netns.entered(lab.server_ns),
        running(
            lambda: site_of(parse_policy(policy_for(lab, f"{head}flows:\n  - {{name: x, {rule}}}\n"))),
            lab.server_ns,
        ) as broker,
        Attacking(broker.name, THIRD, lab.server_ns) as victim,
        Attacking(broker.name, THIRD, lab.server_ns) as attacker,
    ):
        victim.do("hello")
        attacker.do("hello")
        peer = [CLIENT_IP, SINK]
        block = victim.do("take", local=["::", 0], remote=peer, flags=1)
        assert block["flags"] == 1
        there = endpoints(broker)
        local = [SERVER_IP, block["local"][1] + 3]
        for remote in (peer, [CLIENT_IP, OTHER]):
            got = attacker.do("take", local=local, remote=remote, how="bound")
            assert (got["error"], "another application has it" in got["text"]) == (errno.EADDRINUSE, True)
        assert endpoints(broker) == there
        assert victim.do("take", local=local, remote=peer, how="bound")["lease"], "it is its own"


# ---- 2. Frames -----------------------------------------------------------------------------------------------------
def packed_sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def ip(
    proto: int, payload: bytes, src: str = SERVER_IP, dst: str = CLIENT_IP, frag: int = 0, opt: bytes = b""
) -> bytes:
    words = (0x45 + len(opt) // 4, 0, 20 + len(opt) + len(payload), 1, frag, 64, proto)
    addresses = socket.inet_aton(src) + socket.inet_aton(dst) + opt
    head = struct.pack("!BBHHHBB", *words)
    return head + struct.pack("!H", packed_sum(head + bytes(2) + addresses)) + addresses + payload


def tcp(sport: int, dport: int, flags: int, data: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 5 << 4, flags, 1000, 0, 0) + data


def udp(sport: int, dport: int, data: bytes) -> bytes:
    return struct.pack("!HHHH", sport, dport, 8 + len(data), 0) + data


def forgeries(world: World) -> list[tuple[bytes, str]]:
    """Frames, and why each must not be sent."""
    sides = world.lab.sides()
    assert sides is not None
    ours, peer = (bytes.fromhex(side.mac.replace(":", "")) for side in sides)
    victim, theirs = world.victim.port, world.victim.client
    mine = ip(6, tcp(OWN, theirs, ACK))
    answer = ip(6, tcp(theirs, victim, ACK), CLIENT_IP, SERVER_IP)  # as the client would have sent it
    quote = struct.pack("!BBHI", 3, 3, 0, 0) + answer[:28]
    packets = [
        *((ip(6, tcp(victim, theirs, flags, data)), "lease")
          for flags, data in ((RST, b""), (RST | ACK, b""), (FIN | ACK, b""), (ACK, b"+FALSE\r\n"))),
        (ip(6, tcp(OTHER, theirs, RST)), "lease"),
        (ip(17, udp(OTHER, theirs, b"x")), "lease"),
        (ip(6, tcp(OWN, theirs, ACK), src="192.0.2.99"), "source"),
        (ip(6, tcp(theirs, victim, RST), CLIENT_IP, SERVER_IP), "source"),
        (ip(6, tcp(OWN, theirs, ACK), dst="192.0.2.255"), "destination"),
        (ip(6, tcp(victim, theirs, RST), frag=0x2000), "fragment"),
        (ip(6, tcp(victim, theirs, RST), frag=1), "fragment"),
        (ip(17, udp(victim, theirs, b"x"), frag=1), "fragment"),
        (ip(1, quote), "icmp"),
        (ip(6, tcp(OWN, theirs, ACK), opt=bytes([1] * 4)), "options"),
        (ip(47, bytes(20)), "protocol"),
    ]  # fmt: skip
    link = peer + ours
    frames = [(link + b"\x08\x00" + packet, why) for packet, why in packets]
    return [
        *frames,
        (peer + peer + b"\x08\x00" + mine, "source_mac"),
        (b"\xff" * 6 + ours + b"\x08\x00" + mine, "group_mac"),
        (link + b"\x81\x00\x00\x05\x08\x00" + mine, "vlan"),
        (link + b"\x08\x06" + bytes(46), "not_ipv4"),
    ]


def test_nothing_leaves_in_anothers_name(world: World) -> None:
    world.attacker.do("listen", host=SERVER_IP, port=OWN)
    world.attacker.do("open")
    frames = forgeries(world)
    world.attacker.do("frames", data=[frame.hex() for frame, _ in frames])
    wait_for(lambda: world.stats()["tx_packets"] == len(frames), 20, "bypass-fwd to look at all of them")
    stats = world.stats()
    print(f"{len(frames)} forged frames refused:", stats["refused"])
    assert stats["refused"] == Counter(why for _, why in frames)
    assert (stats["tx_sent"], stats["cut"]) == (0, 0)
    world.fine()


# ---- 3. Memory -----------------------------------------------------------------------------------------------------
def tried(world: World) -> dict[str, int]:
    pid = world.victim.process.pid
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    memory = next(line for line in maps if "/memfd:bypass-app" in line)
    got: dict[str, int] = world.attacker.do("memory", pid=pid, address=int(memory.split("-")[0], 16))
    print({way: errno.errorcode.get(code, "possible") for way, code in got.items()})
    return got


def test_anothers_memory_cannot_be_reached(world: World) -> None:
    got = tried(world)
    assert got.pop("own descriptors") == errno.ENOENT
    assert {way: code for way, code in got.items() if code not in REFUSED} == {}
    world.fine()


def test_a_program_that_stays_dumpable_is_open_to_its_own_user(lab: Lab) -> None:
    with world_of(lab, USERS["one user"], BYPASS_DUMPABLE="1") as world:
        got = tried(world)
        assert got["/proc/PID/fd"] == 0
        assert got["own descriptors"] == errno.ENOENT


SAY = "import ctypes; print(ctypes.CDLL(None).prctl(3), flush=True)"  # PR_GET_DUMPABLE
STARTS = f"""
import socket, subprocess
{SAY}
s = socket.create_server(("{SERVER_IP}", {OWN}))
{SAY}
subprocess.run(["/usr/bin/python3", "-c", {SAY!r}])
"""


@pytest.mark.parametrize(("more", "said"), [({}, "1 0 0"), ({"BYPASS_DUMPABLE": "1"}, "1 1 1")])
def test_programs_that_a_program_starts_are_as_it_is(
    lab: Lab, mode: str, more: dict[str, str], said: str
) -> None:
    """Its relatives have the token in their environment from their first moment. Direct mode changes nothing."""
    text = policy(USERS["one user"]).replace("mode: shared", f"mode: {mode}")
    text = policy_for(lab, text)
    with netns.entered(lab.server_ns), running(lambda: site_of(parse_policy(text)), lab.server_ns) as broker:
        argv = [sys.executable, "-m", "bypass", "run", "--socket", broker.name, "--user", "nobody", "--"]
        env = environment(Path("/")) | {"PYTHONPATH": str(ROOT)} | more
        done = subprocess.run(
            [*argv, "/usr/bin/python3", "-c", STARTS],
            capture_output=True,
            text=True,
            env=env,
            timeout=30,
            check=True,
        )
    assert done.stdout.split() == (said if mode == "shared" else "1 1 1").split()


# ---- 4. The rate ---------------------------------------------------------------------------------------------------
class Sink:
    """The client's kernel counts what arrives."""

    def __init__(self, lab: Lab) -> None:
        self.bytes = 0
        self.sock = netns.run(lab.client_ns, socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.sock.bind((CLIENT_IP, SINK))
        self.sock.settimeout(0.5)
        self.thread = threading.Thread(target=self._count)
        self.thread.start()

    def _count(self) -> None:
        begun = False
        while True:
            try:
                self.bytes += 42 + len(self.sock.recv(2048))  # with the headers, as bypass-fwd counts
                begun = True
            except TimeoutError:
                if begun:
                    return

    def end(self) -> int:
        self.thread.join()
        self.sock.close()
        return self.bytes


def test_the_rate_holds_and_costs_the_others_nothing(world: World) -> None:
    sides = world.lab.sides()
    assert sides is not None
    ours, peer = (bytes.fromhex(side.mac.replace(":", "")) for side in sides)
    world.attacker.do("listen", host=SERVER_IP, port=OWN, kind=DGRAM)
    world.attacker.do("open")
    frame = peer + ours + b"\x08\x00" + ip(17, udp(OWN, SINK, bytes(1400)))
    sink, answers = Sink(world.lab), [redis.answers for redis in world.redis]
    begin = time.monotonic()
    said = world.attacker.do("flood", frame=frame.hex(), seconds=FLOOD_S)
    stats = world.stats()
    elapsed = (
        time.monotonic() - begin
    )  # by bypass-fwd's clock, CLOCK_MONOTONIC; at least what it has counted for
    arrived = sink.end()
    served = [redis.answers - n for redis, n in zip(world.redis, answers, strict=True)]
    most = int(BURST + RATE * elapsed) + len(frame)
    print(
        f"{arrived} bytes arrived, {stats['tx_bytes']} passed in {elapsed:.3f} s, at most {most} were allowed; "
        f"{stats['tx_limited']} waits; answers: {served}"
    )
    assert stats["tx_bytes"] <= most
    assert min(served) > 0
    assert stats["tx_limited"] > 0
    assert said["full"] > 0, "it would have sent more"
    assert stats["refused"] == {}
    assert 0 < arrived <= world.stats()["tx_bytes"], "and what waited in the port when it stopped"
    world.fine()

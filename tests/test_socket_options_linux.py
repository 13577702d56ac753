# SPDX-License-Identifier: Apache-2.0
"""Every socket option on the kernel's sockets and on ours: the same values are good, and the same come back.

The same table is what docs/sockets.md says: a row an option, checked here against both.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bypass._core import lib
from socket_worlds import DGRAM, STREAM, Kernel, Ours, World, namespace, outcome

from bypass import sockets, sockopt, zerocopy
from bypass.sockopt import IP, SOL, TCP

pytestmark = pytest.mark.netns

INT_MAX = 2**31 - 1
VALUES: list[Any] = [0, 1, 2, 3, 7, 100, 255, 256, 4096, 32768, 40000, -1, INT_MAX]
VALUES += [
    b"",
    b"\1",
    b"\1\0\0\0",
    b"\1\0\0\0\0\0\0\0",
    struct.pack("ii", 1, 5),
    struct.pack("ll", 1, 500_000),
]
ALSO: dict[str, list[Any]] = {"TCP_CONGESTION": [b"reno", b"reno\0cubic", b"nosuch"]}
STRUCTS = {"SO_LINGER": 8, "SO_RCVTIMEO": 16, "SO_SNDTIMEO": 16, "TCP_CONGESTION": 16}

NUMBERS: dict[str, tuple[int, int]] = {
    **{
        n: (SOL, getattr(socket, n))
        for n in dir(socket)
        if n.startswith("SO_") and n[3:6] not in ("J19", "VM_")
    },
    **{n: (TCP, getattr(socket, n)) for n in dir(socket) if n.startswith("TCP_")},
    **{
        n: (IP, getattr(socket, n))
        for n in dir(socket)
        if n.startswith("IP_") and n[3:6] not in ("DEF", "MAX")
    },
    "SO_MAX_PACING_RATE": (SOL, sockopt.SO_MAX_PACING_RATE),
    "SO_ZEROCOPY": (SOL, 60),
    "IP_MTU": (IP, sockopt.IP_MTU),
    "IP_MTU_DISCOVER": (IP, sockopt.IP_MTU_DISCOVER),
    "TCP_ECN": (TCP, sockopt.TCP_ECN),
    "TCP_FASTOPEN_CONNECT": (TCP, sockopt.TCP_FASTOPEN_CONNECT),
    "TCP_KEEP_FRAMES": (TCP, zerocopy.TCP_KEEP_FRAMES),
}
NAMES = {key: name for name, key in NUMBERS.items()}
SMALL = {0, 1, 2, 3, 7, 100, 255, 256, b"\1\0\0\0", b"\1\0\0\0\0\0\0\0"}
SIZES = {"default", *SMALL, -1, INT_MAX, struct.pack("ii", 1, 5), struct.pack("ll", 1, 500_000)}
# What is not as on Linux: the kinds of socket, why (in docs/sockets.md), and the values that differ in some state.
DIFFERENT: dict[str, tuple[tuple[int, ...], set[Any]]] = {
    "SO_RCVBUF": ((STREAM, DGRAM), SIZES),
    "SO_SNDBUF": ((STREAM, DGRAM), SIZES),
    "SO_RCVLOWAT": ((STREAM,), {-1, INT_MAX}),
    "SO_MAX_PACING_RATE": ((STREAM,), {0}),
    "TCP_FASTOPEN": ((STREAM,), {32768, 40000, INT_MAX}),
    "IP_MTU_DISCOVER": ((STREAM,), {0, 3, b""}),
}
# An option and a state in which it differs whatever the value.
DIFFERENT_WHEN = {("TCP_FASTOPEN", "reset")}
# Options that one kind of socket has here, and on Linux both.
MISSING: dict[str, int] = {"SO_MAX_PACING_RATE": DGRAM}
OWN = {"TCP_ECN", "TCP_KEEP_FRAMES"}  # not Linux'
TABLE = re.compile(r"^\| `(\w+)` \| (\S+) \| (yes|no) \| (yes|no) \| (.*?) \| (.*?) \|$", re.MULTILINE)
DOCS = (Path(__file__).parents[1] / "docs/sockets.md").read_text()

of_core = [n for n, key in NUMBERS.items() if key in sockopt.OPTIONS]
SUPPORTED = sorted(
    {*of_core, *STRUCTS, "SO_ERROR", "SO_TYPE", "SO_DOMAIN", "SO_PROTOCOL", "SO_SNDLOWAT", "TCP_INFO"}
)


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with namespace() as name:
        yield name


def states(world: World, kind: int) -> dict[str, Any]:
    """Sockets in every state that a program's options may meet."""
    made = {"fresh": world.socket(0, kind), "bound": world.socket(0, kind)}
    made["bound"].bind(world.address(0, 5000))
    if kind == DGRAM:
        made["connected"] = world.socket(0, kind)
        made["connected"].connect(world.address(1, 6000))
        return made
    made["listening"] = world.socket(1)
    made["listening"].bind(world.address(1, 0))
    made["listening"].listen(5)
    for client, server in (("connected", "accepted"), ("reset", "gone")):
        made[client] = world.socket(0)
        made[client].connect_ex(made["listening"].getsockname())
        world.rest()
        made[server], _ = made["listening"].accept()
    end(made.pop("gone"))
    world.rest()
    return made


def end(x: Any) -> None:
    x.setsockopt(SOL, socket.SO_LINGER, struct.pack("ii", 1, 0))
    x.close()


@pytest.fixture(scope="module", params=[STREAM, DGRAM], ids=["stream", "datagram"])
def pairs(request: pytest.FixtureRequest, host: str) -> Iterator[tuple[int, dict[str, tuple[Any, Any]]]]:
    """kind, and by state the kernel's socket and ours."""
    worlds: list[World] = [Kernel(host), Ours()]
    made = [states(w, request.param) for w in worlds]
    yield request.param, {name: (made[0][name], made[1][name]) for name in made[0]}
    for world in made:
        for x in world.values():
            end(x)
    for w in worlds:
        w.close()


def answers(x: Any, name: str, value: Any) -> tuple[Any, Any]:
    """What setting gives ("default": nothing is set), and what is read then."""
    key, room = NUMBERS[name], STRUCTS.get(name, 0)
    done = None if value == "default" else outcome(lambda: x.setsockopt(*key, value))
    return done, outcome(lambda: x.getsockopt(*key, room) if room else x.getsockopt(*key))


@pytest.mark.parametrize("name", [n for n in SUPPORTED if n not in OWN and n != "TCP_INFO"])
def test_an_option_takes_and_tells_the_same_values_in_every_state(name: str, pairs: Any) -> None:
    kind, sockets_of = pairs
    kinds, excused = DIFFERENT.get(name, ((), set()))
    if kind not in kinds:
        excused = set()
    if MISSING.get(name) == kind:
        return  # the next test's
    differed: set[Any] = set()
    for state, (kernel, ours) in sockets_of.items():
        if (name, state) in DIFFERENT_WHEN:
            assert answers(kernel, name, 7) != answers(ours, name, 7)
            continue
        if name == "TCP_CONGESTION":  # the default is a matter of the host
            for x in (kernel, ours):
                outcome(lambda x=x: x.setsockopt(TCP, socket.TCP_CONGESTION, b"reno"))
        for value in ["default", *VALUES, *ALSO.get(name, [])]:
            if name == "TCP_MAXSEG" and state == "reset" and isinstance(value, int) and value > 1:
                continue  # a value that is not good leaves what the others left
            theirs, mine = answers(kernel, name, value), answers(ours, name, value)
            if value not in excused:
                assert mine == theirs, f"{state}, {value!r}: {mine} here, {theirs} on Linux"
            elif mine != theirs:
                differed.add(value)
                for x in (kernel, ours):
                    outcome(lambda x=x: x.setsockopt(*NUMBERS[name], 40000 if name.endswith("BUF") else 1))
    assert differed == excused, "values that are as on Linux now"


@pytest.mark.parametrize("name", MISSING)
def test_an_option_that_is_missing_for_a_kind_of_socket_says_so(name: str, pairs: Any) -> None:
    kind, sockets_of = pairs
    kernel, ours = sockets_of["fresh"]
    there = MISSING[name] != kind
    assert (answers(ours, name, 7) != ("ENOPROTOOPT", "ENOPROTOOPT")) == there
    assert "ENOPROTOOPT" not in answers(kernel, name, 7)


def test_levels_that_nobody_has(pairs: Any) -> None:
    for kernel, ours in pairs[1].values():
        for level in (2, 17 if pairs[0] == STREAM else TCP, 12345):
            assert outcome(lambda x=ours, n=level: x.setsockopt(n, 1, 1)) == "ENOPROTOOPT"
            for x in (kernel, ours):
                assert outcome(lambda x=x, n=level: x.getsockopt(n, 1)) == "ENOTSUP"


# ---- docs/sockets.md
def rows() -> dict[str, tuple[str, ...]]:
    return {m[1]: m.groups()[1:] for m in TABLE.finditer(DOCS.partition("## Flags")[0])}


def test_the_documentation_has_a_row_for_each_option_and_no_other() -> None:
    assert sorted(rows()) == SUPPORTED
    named = {n.strip("`") for n, *_ in rows().values() if n != "-"}
    of_c = {n for n in dir(lib) if n.startswith(("BYPASS_SO_", "BYPASS_IP_", "BYPASS_TCP_"))}
    assert named == of_c, "each option of the C core has its row"
    for name, (constant, *_) in rows().items():
        key = NUMBERS[name]
        if key in sockopt.OPTIONS:
            assert sockopt.OPTIONS[key] == getattr(lib, constant.strip("`"))


def test_the_documentation_says_for_which_sockets_an_option_is(pairs: Any) -> None:
    kind, sockets_of = pairs
    for name, (_, tcp, udp, _, difference) in rows().items():
        there = not {"ENOPROTOOPT", "ENOTSUP"} & {
            outcome(lambda n=name: sockets_of["fresh"][1].getsockopt(*NUMBERS[n]))
        }
        assert there == ((tcp if kind == STREAM else udp) == "yes"), name
        differs = name in DIFFERENT or name in MISSING or name in OWN or name in OTHERWISE
        assert (difference != "-") == differs, f"{name}: {difference}"


# What differs, but not in values: tests/test_socket_options.py, tests/test_tcp_info.py and others hold it.
OTHERWISE = {"TCP_INFO", "TCP_CONGESTION"}


@pytest.mark.parametrize("name", re.findall(r"`((?:SO|TCP|IP|UDP)_\w+)`", DOCS.partition("## Not there")[2]))
def test_options_that_are_said_not_to_be_there_are_not(name: str, pairs: Any) -> None:
    if name not in NUMBERS:
        return  # Python has no name for it
    assert NUMBERS[name] not in sockopt.OPTIONS
    assert outcome(lambda: pairs[1]["fresh"][1].setsockopt(*NUMBERS[name], 1)) == "ENOPROTOOPT"


FLAGS = re.compile(r"^\| `MSG_(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)


@pytest.mark.parametrize("row", FLAGS.findall(DOCS), ids=lambda row: row[0])
def test_the_documentation_tells_which_calls_have_a_flag(row: tuple[str, ...], pairs: Any) -> None:
    """A call that has it may say anything but that it has not."""
    kind, sockets_of = pairs
    ours = sockets_of["connected"][1]
    flag = getattr(socket, f"MSG_{row[0]}")
    send, recv = row[1:3] if kind == STREAM else row[3:5]
    if row[0] == "FASTOPEN":
        sent = outcome(lambda: ours.sendto(b"", flag, ("10.0.0.2", 6000)))
    else:
        sent = outcome(lambda: ours.send(b"", flag))
    assert (sent != "ENOTSUP") == (send == "yes")
    assert (outcome(lambda: ours.recv(1, flag)) != "ENOTSUP") == (recv == "yes")


def test_every_flag_has_a_row() -> None:
    known = {
        *sockets.RECV_FLAGS,
        *sockets.SEND_FLAGS,
        *sockets.OOB_FLAGS,
        sockets.DONTWAIT,
        sockets.WAITALL,
        sockets.FASTOPEN,
    }
    assert {getattr(socket, f"MSG_{row[0]}") for row in FLAGS.findall(DOCS)} == known

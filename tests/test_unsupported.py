# SPDX-License-Identifier: Apache-2.0
"""docs/unsupported.md has every reason and every option that there is, and `bypass conns` says each reason."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bypass._core import ffi, lib
from preloaded import environment

from bypass import observe

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/unsupported.md").read_text()
NAME = f"reasons-{os.getpid()}"
# Each opens one socket of its kind and keeps it: the reason, and what follows it.
USES = {
    "ipv6": ("s = tcp(socket.AF_INET6); s.bind(('::1', 0)); s.listen()", "IPv6"),
    "raw": (
        "s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
        "a protocol that the stack does not speak: type 3, protocol 1",
    ),
    "option": (
        "s = udp(); s.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)",
        "an option that the stack does not have: IP_PKTINFO",
    ),
    "unknown option": (
        "s = tcp(); s.setsockopt(socket.IPPROTO_IP, 49, 0); s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)",
        "an option that the stack does not have: SO_MARK",
    ),
    "pmtu": (
        "s = tcp(); s.setsockopt(socket.IPPROTO_IP, 10, 0)",
        "an option that the stack does not have: IP_MTU_DISCOVER",
    ),
    "signals": (
        "s = tcp(); fcntl.fcntl(s, fcntl.F_SETFL, os.O_ASYNC)",
        "an option that the stack does not have: O_ASYNC",
    ),
    "owner": (
        "s = tcp(); fcntl.fcntl(s, fcntl.F_SETOWN, os.getpid())",
        "an option that the stack does not have: F_SETOWN",
    ),
    "group": (
        "s = udp(); s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, bytes([239, 1, 2, 3, 127, 0, 0, 1]))",
        "multicast or broadcast: IP_ADD_MEMBERSHIP",
    ),
    "nobody": (
        "s = tcp(); s.connect(('127.0.0.1', int(sys.argv[3])))",
        "nobody listens there on the stack",
    ),
    "elsewhere": (
        "s = tcp(); s.setblocking(False); s.connect_ex(('192.0.2.1', 9))",
        "no rule of the policy grants it",
    ),
    "not connected": (
        "s = udp(); refused(s.sendto, b'x', ('192.0.2.1', 9))",
        "datagrams sent without bind() or connect()",
    ),
    "from the kernel": (
        "l = tcp(); l.bind(('127.0.0.1', 0)); l.listen(); keep.append(l); other(l.getsockname()); s = l.accept()[0]",
        "it is local: loopback traffic is the kernel's",
    ),
    "inherited": ("s = inherited", "opened before the library was there, or by another program"),
    "received": (
        "s = received()",
        "opened before the library was there, or by another program",
    ),
    "no room": (
        "all = [tcp() for _ in range(8300)]; s = all.pop(-40); [each.close() for each in all]",
        "the stack has no room: Too many open files in system",
    ),
    # the last one: it holds for all sockets after it
    "io_uring": (
        "ring = libc.syscall(425, 4, ctypes.create_string_buffer(120)); assert ring >= 0; s = tcp();"
        " s.bind(('127.0.0.1', 0)); s.listen()",
        "io_uring is used",
    ),
}
# Without a network and a broker these cannot be: test_broker_*.py have them.
ELSEWHERE = {"", "the broker refused", "the port is a relative's or another socket's on the stack"}
PROGRAM = """
import array, ctypes, fcntl, json, os, resource, socket, subprocess, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (12000, 12000))
libc, keep, IP_PKTINFO = ctypes.CDLL(None), [], 8
inherited = socket.socket(fileno=int(sys.argv[1]))
PLAIN = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "BYPASS_LOOPBACK")}
def tcp(family=socket.AF_INET):
    return socket.socket(family, socket.SOCK_STREAM)
def udp():
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def refused(call, *args):
    try:
        call(*args)
    except OSError:
        pass
def other(name, code="s.connect((sys.argv[1], int(sys.argv[2])))", *args, **more):
    code = "import socket, sys; s = socket.socket(); " + code + "; sys.stdin.read()"
    command = [sys.executable, "-c", code, *map(str, name)]
    keep.append(subprocess.Popen(command, env=PLAIN, stdin=subprocess.PIPE, **more))
def received():
    a, b = socket.socketpair()
    send = "socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b'x'], [s.fileno()])"
    other((b.fileno(),), send, pass_fds=[b.fileno()])
    return socket.socket(fileno=socket.recv_fds(a, 1, 1)[1][0])
fds = {}
for name, use in json.loads(sys.argv[2]).items():
    exec(use)
    keep.append(s)
    fds[name] = s.fileno()
print(json.dumps(fds), flush=True)
sys.stdin.read()
for k in keep:
    if isinstance(k, subprocess.Popen):
        k.communicate()
"""


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, dict[str, Any]]]:
    """What `bypass conns` says of the sockets of USES, in a program that has all of them."""
    import socket

    uses = json.dumps({name: use for name, (use, _) in USES.items()})
    env = environment("stack", BYPASS_PROCNAME=NAME)
    with socket.socket() as given, socket.create_server(("127.0.0.1", 0)) as kernels:
        command = [sys.executable, "-c", PROGRAM, str(given.fileno()), uses, str(kernels.getsockname()[1])]
        program = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[given.fileno()],
        )
        with program:
            assert program.stdout
            fds = json.loads(program.stdout.readline())
            command = [sys.executable, "-m", "bypass", "conns", "--json", "--app", NAME]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            [application] = json.loads(done.stdout)["applications"]
            by_fd = {s["fd"]: s for s in application["sockets"] if s["pid"] == program.pid}
            yield {name: by_fd[fd] for name, fd in fds.items()}
            program.communicate()
        assert program.returncode == 0


@pytest.mark.parametrize("use", USES)
def test_conns_says_why(told: dict[str, dict[str, Any]], use: str) -> None:
    assert (told[use]["place"], told[use]["why"]) == ("kernel", USES[use][1])


def test_a_ring_that_was_made_past_the_library_is_found() -> None:
    """By a system call of the program's own, here by somebody else's."""
    ring = ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120))  # io_uring_setup(2)
    assert ring >= 0, "this kernel has no io_uring"
    code = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(1, flush=True); sys.stdin.read()"
    env = environment("stack", BYPASS_PROCNAME=f"{NAME}-ring")
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True, pass_fds=[ring]) as program:
        os.close(ring)
        assert program.stdout
        program.stdout.readline()
        [application] = [observe.look(m) for m in observe.memories() if program.pid in m.holders]
        assert [(s.state, s.place, s.why) for s in application.sockets] == [
            ("LISTEN", "kernel", "io_uring is used")
        ]
        program.communicate()


def reasons() -> list[str]:
    texts = []
    for i in range(256):
        if (text := lib.app_reason(i)) != ffi.NULL:
            texts.append(ffi.string(text).decode())
    return texts


def test_every_reason_is_documented_and_tried() -> None:
    rows = re.findall(r"^\| (.*?) \| ", PAGE.split("## Options")[0], re.MULTILINE)
    assert set(rows[1:]) == set(reasons()) - {""}
    tried = {text for text in reasons() for _, why in USES.values() if text and why.startswith(text)}
    assert tried | ELSEWHERE == set(reasons())


@pytest.mark.parametrize(("kind", "least"), [("KEPT", 12), ("LOST", 60), ("MULTI", 10)])
def test_every_option_that_the_stack_lacks_is_documented(kind: str, least: int) -> None:
    table = (ROOT / "bypass/preload/opt_rows.c").read_text()
    names = set(re.findall(rf"^    {kind}\((\w+)\)", table, re.MULTILINE))
    names |= set(re.findall(rf'{kind}, (?:NUMBER, 0, )?"(\w+)"', table))
    assert len(names) >= least
    options = PAGE.split("## Options")[1].split("## Calls")[0]
    documented = set(re.findall(r"`(\w+)`", options))
    assert names - documented == set()
    kept, others = options.split("What they ask for only the kernel has.")
    part = kept if kind == "KEPT" else others
    assert names <= set(re.findall(r"`(\w+)`", part))


def test_what_the_page_names_is_there() -> None:
    table = (ROOT / "bypass/preload/opt_rows.c").read_text()
    lists = PAGE.split("## Options")[1].split("An option that Linux has")[0]
    unknown = {n for n in re.findall(r"`(\w+)`", lists) if not re.search(rf"\b{n}\b", table)}
    assert unknown - {"bypass"} == set()
    assert (ROOT / "docs/sockets.md").exists()


def test_places_are_those_of_the_library() -> None:
    header = (ROOT / "bypass/preload/group.h").read_text()
    places = re.findall(r"^    PLACE_(\w+),", header, re.MULTILINE)
    assert tuple(p.lower() for p in places) == observe.PLACES

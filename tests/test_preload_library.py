# SPDX-License-Identifier: Apache-2.0
"""What the preload library adds to a program: descriptors of its own that the program cannot reach, and at the end a
line about how many sockets were on the stack (BYPASS_TRACE_SHARE)."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

from preloaded import Ended, environment, read_share, run

LIMIT_S = 40
START = """
import errno, os, socket, sys, threading
def fails(call, *args):
    try:
        result = call(*args)
    except OSError as e:
        return errno.errorcode[e.errno]
    return result
def pair():
    with socket.create_server(("127.0.0.1", 0)) as l:
        a = socket.create_connection(l.getsockname())
        return a, l.accept()[0]
"""


def program(code: str, share: Path | None = None, **env: str) -> Ended:
    return run([sys.executable, "-c", START + code], environment("stack", share, **env), LIMIT_S)


def printed(code: str) -> Any:
    ended = program(code)
    assert (ended.status, ended.err) == (0, "")
    return json.loads(ended.out)


def test_the_librarys_descriptors_cannot_be_reached() -> None:
    got = printed("""
import fcntl, json
a, b = pair()
hidden = [int(n) for n in os.listdir("/proc/self/fd") if int(n) >= 100 and os.path.exists(f"/proc/self/fd/{n}")]
calls = [(os.close,), (os.dup,), (os.dup2, 0), (lambda fd: os.dup2(0, fd),), (os.get_blocking,),
         (lambda fd: fcntl.fcntl(fd, fcntl.F_GETFL),), (lambda fd: fcntl.fcntl(fd, fcntl.F_DUPFD, 3),)]
results = {fails(call[0], fd, *call[1:]) for fd in hidden for call in calls}
a.sendall(b"still there")
print(json.dumps([len(hidden), sorted(map(str, results)), b.recv(100).decode()]))
""")
    assert got[0] >= 3
    assert got[1:] == [["EBADF"], "still there"]


def test_a_table_of_descriptors_of_ones_own_is_refused_to_programs_with_threads() -> None:
    got = printed("""
import ctypes, json, time
libc = ctypes.CDLL(None, use_errno=True)
a, b = pair()
alone = libc.close_range(700, 800, 2), ctypes.get_errno()
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
ctypes.set_errno(0)
shared = libc.close_range(700, 800, 2), errno.errorcode.get(ctypes.get_errno())
stop.set()
thread.join()
a.sendall(b"still there")
print(json.dumps([alone, shared, b.recv(100).decode()]))
""")
    assert got == [[0, 0], [-1, "EINVAL"], "still there"]


def test_signals_for_io_are_refused_where_the_stack_has_the_socket() -> None:
    got = printed("""
import fcntl, json
a, b = pair()
print(json.dumps([fails(fcntl.fcntl, a, fcntl.F_SETFL, os.O_ASYNC), fails(fcntl.fcntl, a, fcntl.F_SETOWN, os.getpid()),
                  fcntl.fcntl(a, fcntl.F_GETFL) == os.O_RDWR, fails(fcntl.fcntl, a, fcntl.F_SETOWN, 0)]))
""")
    assert got == ["EINVAL", "EINVAL", True, 0]


# ---- BYPASS_TRACE_SHARE -------------------------------------------------------------------------------------------
def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_process_tells_where_its_sockets_were(tmp_path: Path) -> None:
    share = tmp_path / "share"
    with socket.create_server(("127.0.0.1", 0)) as kernels:
        ended = program(
            f"""
a, b = pair()
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.setsockopt(socket.IPPROTO_IP, 8, 1)
s = socket.create_connection(("127.0.0.1", {kernels.getsockname()[1]}))
unused = socket.socket()
print(os.getpid())
""",
            share,
        )
    assert ended.status == 0
    [line] = lines(share)
    assert line["pid"] == int(ended.out)
    assert line["program"].startswith("python")
    assert line["reasons"] == {
        "an option that the stack does not have": 1,
        "nobody listens there on the stack": 1,
    }
    assert [line[n] for n in ("tcp_stack", "tcp_kernel", "udp_stack", "udp_kernel")] == [3, 1, 0, 1]


def test_children_tell_of_their_own(tmp_path: Path) -> None:
    share = tmp_path / "share"
    ended = program(
        """
kept = pair()
for _ in range(3):
    if os.fork() == 0:
        mine = pair()
        os._exit(0)
for _ in range(3):
    os.wait()
""",
        share,
    )
    assert (ended.status, ended.err) == (0, "")
    told = read_share(share)
    assert told.processes == 4
    assert (told.tcp_stack, told.tcp_kernel) == (12, 0), "three of each: listener, client, server"
    assert len({line["pid"] for line in lines(share)}) == 4


def test_a_program_that_clears_its_environment_tells_all_the_same(tmp_path: Path) -> None:
    share = tmp_path / "share"
    assert program("a, b = pair(); os.environ.clear()", share).status == 0
    assert read_share(share).tcp_stack == 3


def test_a_process_without_sockets_tells_nothing(tmp_path: Path) -> None:
    share = tmp_path / "share"
    assert program("print(1)", share).status == 0
    assert not share.exists()


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    ended = program("a, b = pair()", tmp_path / "no" / "such" / "folder")
    assert ended.status == 0
    assert "bypass: BYPASS_TRACE_SHARE" in ended.err
    assert "No such file or directory" in ended.err


def test_a_process_that_was_refused_says_so(tmp_path: Path) -> None:
    share = tmp_path / "share"
    env = environment("stack", share) | {"BYPASS_SOCKET": f"{tmp_path}/nobody"}
    ended = run([sys.executable, "-c", START + "a, b = pair()"], env, LIMIT_S)
    assert ended.status == 0
    [line] = lines(share)
    assert "no broker" in line["refused"]
    assert "no broker" in ended.err


def test_broken_receiving_is_noticed() -> None:
    """The control of the suites that run on the stack: with BYPASS_BREAK=recv the last byte of each read is lost."""
    code = "a, b = pair(); a.sendall(b'hello'); print(b.recv(100).decode())"
    assert program(code, BYPASS_BREAK="recv").out == "hell\n"
    assert program(code).out == "hello\n"

# SPDX-License-Identifier: Apache-2.0
"""Each registered difference between Linux' sockets and ours is one, and is what docs/sockets.md says."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from socket_worlds import DGRAM, DIFFERENCES, MS, Kernel, Ours, World, namespace, outcome, readiness

pytestmark = pytest.mark.netns

DOCS = (Path(__file__).parents[1] / "docs/sockets.md").read_text()


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with namespace() as name:
        yield name


def pair(w: World) -> tuple[Any, Any, Any]:
    """A listener, a client and the accepted connection."""
    listener, client = w.socket(1), w.socket(0)
    listener.bind(w.address(1, 0))
    listener.listen(5)
    client.connect_ex(listener.getsockname())
    w.rest()
    return listener, client, listener.accept()[0]


def shutdown_early(w: World) -> Any:
    with w.socket(0) as x:
        return outcome(lambda: x.shutdown(socket.SHUT_RD)), readiness(x) & 1


def bind_again(w: World) -> Any:
    listener, client, server = pair(w)
    with listener, client:
        server.close()
        w.rest()
        client.shutdown(socket.SHUT_WR)
        w.rest()
        return outcome(lambda: client.bind(w.address(0, 0)))


def port_after_failure(w: World) -> Any:
    with w.socket(0) as x:
        x.connect_ex(w.address(1, 9))
        w.rest()
        return outcome(lambda: x.connect(w.address(1, 9))), x.getsockname()[1] != 0


def port_of_ended(w: World) -> Any:
    listener, client = w.socket(1), w.socket(0)
    listener.bind(w.address(1, 0))
    listener.listen(5)
    client.bind(w.address(0, 7001))
    client.connect_ex(listener.getsockname())
    w.rest()
    server = listener.accept()[0]
    client.shutdown(socket.SHUT_WR)
    w.rest()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.close()  # a reset: no TIME_WAIT
    w.rest()
    with listener, client, w.socket(0) as other:
        return outcome(lambda: other.bind(client.getsockname()))


def connect_to_any(w: World) -> Any:
    with w.socket(0) as x:
        return outcome(lambda: x.connect(("0.0.0.0", 9)))


def connect_to_port_0(w: World) -> Any:
    with w.socket(0) as x:
        return outcome(lambda: x.connect(w.address(1, 0)))


def unknown_flags(w: World) -> Any:
    listener, client, server = pair(w)
    with listener, client, server:
        return outcome(lambda: client.send(b"x", 0x1000000))


def more_datagrams(w: World) -> Any:
    with w.socket(0, DGRAM) as x:
        return outcome(lambda: x.sendto(b"x", socket.MSG_MORE, w.address(1, 9)))


def port_of_an_attempt(w: World) -> Any:
    with w.socket(0, DGRAM) as x:
        return outcome(lambda: x.send(b"x")), x.getsockname()[1] != 0


CASES: dict[str, tuple[Callable[[World], Any], Any, Any]] = {  # what is done, Linux' answer, ours
    "shutdown of a stream before there is a connection": (shutdown_early, ("ENOTCONN", 1), ("ENOTCONN", 0)),
    "bind after the connection has ended": (bind_again, None, "EINVAL"),
    "the port after a connection attempt failed": (
        port_after_failure,
        ("ECONNREFUSED", True),
        ("ECONNREFUSED", False),
    ),
    "the port of a socket whose connection has ended": (port_of_ended, "EADDRINUSE", None),
    "connect to 0.0.0.0": (connect_to_any, "EINPROGRESS", "ECONNREFUSED"),
    "connect to port 0": (connect_to_port_0, "EINPROGRESS", "ECONNREFUSED"),
    "unknown flags": (unknown_flags, 1, "ENOTSUP"),
    "the port of a datagram socket that could not send": (
        port_of_an_attempt,
        ("EDESTADDRREQ", True),
        ("EDESTADDRREQ", False),
    ),
    "datagrams of several calls": (more_datagrams, 1, "ENOTSUP"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_difference_is_still_one(name: str, host: str) -> None:
    call, theirs, mine = CASES[name]
    kernel, ours = Kernel(host), Ours()
    try:
        assert call(kernel) == theirs, "Linux does something else now: mend what is written of it"
        assert call(ours) == mine, "the difference is another, or gone: mend or remove its entry"
    finally:
        ours.net.run(duration_ns=MS)
        ours.close()


def test_the_list_is_complete_and_so_is_the_documentation() -> None:
    assert set(CASES) == set(DIFFERENCES)
    said = dict(
        re.findall(r"^\| (.*?) \| (.*?) \|$", DOCS.partition("## Not as on Linux")[2], re.MULTILINE)[1:]
    )
    assert said == DIFFERENCES

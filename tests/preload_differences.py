# SPDX-License-Identifier: Apache-2.0
"""What a preloaded program sees otherwise than on Linux, each with the calls that show it.

The machine (tests/test_preload_machine.py) keeps out of the way of these and of nothing else; each is proved to be
still there by test_each_difference_is_one. One that is gone is to be removed here: then the machine tries it.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preload_machine import Both

STREAM = "socket 2 2049 0"  # AF_INET, SOCK_STREAM | SOCK_NONBLOCK
PAIR = (STREAM, "listen 3 5", STREAM, "connect 4 0 @3", "accept4 3 2048")  # 3 listens, 4 and 5 are connected
LISTEN = "10"


@dataclass(frozen=True)
class Difference:
    why: str
    calls: tuple[str, ...]  # of process 0 where no number says another; the last one is where it shows
    linux: str  # its answer
    here: str
    avoids: Callable[[Both, int, Sequence[str]], bool]  # would this command of process n show it?


def seen(worlds: Both, n: int, words: Sequence[str]) -> dict[str, str]:
    """What is known of the descriptor that a command names first."""
    return worlds.tables.get(n, {}).get(int(words[1]), {}) if len(words) > 1 and words[1].isdigit() else {}


def empty_message(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "recvmsg" and words[2] == "0"


def bind_of_connected(worlds: Both, n: int, words: Sequence[str]) -> bool:
    it = seen(worlds, n, words)
    ended = int(it.get("ready", "0"), 16) & select.POLLRDHUP
    return words[0] == "bind" and ("peer" in it or it.get("state") == LISTEN or bool(ended))


def empty_vector(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] in ("readv", "writev") and words[2] == "0" and seen(worlds, n, words).get("type") == "2"


def message_of_nothing(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "sendmsg" and words[2] == "0"


def datagrams_to_itself(worlds: Both, n: int, words: Sequence[str]) -> bool:
    """One that is connected to itself takes no other datagram: the sender hears of that on Linux alone."""
    it = seen(worlds, n, words)
    return words[0] == "connect" and it.get("type") == "2" and it.get("name", "").endswith(f":{words[3]}")


def listen_of_datagrams(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "listen" and seen(worlds, n, words).get("type") == "2"


def epoll_of_relatives(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "epoll_ctl" and len(worlds.tables) > 1


def sendfile_from_socket(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "sendfile" and worlds.tables[n].get(int(words[2]), {}).get("kind") != "f"


def splice_of_nothing(worlds: Both, n: int, words: Sequence[str]) -> bool:
    """Where both the socket and the pipe have something to say against it."""
    if words[0] != "splice":
        return False
    ends = [worlds.tables[n].get(int(w), {}) for w in words[1:3]]
    modes = [int(end.get("flags", "3"), 16) & 3 for end in ends]
    against = modes[0] == 1 or modes[1] == 0  # O_WRONLY to read from, O_RDONLY to write to
    return against or ("type" in ends[0] and ends[0].get("queued", "-1") in ("0", "-1"))


def exec_with_epoll(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "exec" and any(" epoll_ctl " in line for line in worlds.log)


DIFFERENCES = {
    "a message without room": Difference(
        "recvmsg() that has room for no byte returns 0; Linux looks first whether there is a byte",
        (*PAIR, "recvmsg 4 0 64"),
        "-1 11 0",
        "0 0 0 from=none flags=0 control=0",
        empty_message,
    ),
    "bind() of a connected socket": Difference(
        "succeeds where the port is free; EINVAL on Linux",
        (*PAIR, "bind 5 0 0"),
        "-1 22 0",
        "0 0 0",
        bind_of_connected,
    ),
    "sendfile() from what is no file": Difference(
        "EINVAL; on Linux, with an offset, ESPIPE",
        (*PAIR, "sendfile 5 4 100 1"),
        "-1 29 0 at=100",
        "-1 22 0 at=100",
        sendfile_from_socket,
    ),
    "splice() that neither end allows": Difference(
        "says what is wrong with the socket; on Linux what is wrong with the pipe comes first",
        (*PAIR, "pipe 0", "splice 3 6 1"),
        "-1 9 0",
        "-1 107 0",
        splice_of_nothing,
    ),
    "a set of epoll after exec": Difference(
        "forgets its sockets of the stack; on Linux they are in it still",
        (*PAIR, "epoll_create 0", "epoll_ctl 6 1 4 1", "exec", "epoll_ctl 6 1 4 1"),
        "-1 17 0",
        "0 0 0",
        exec_with_epoll,
    ),
    "a vector without bytes": Difference(
        "writev() of no byte sends an empty datagram; on Linux it does nothing",
        (
            "socket 2 2050 0",
            "bind 3 0 5001",
            "socket 2 2050 0",
            "connect 4 0 5001",
            "writev 4 0 1",
            "poll 3 1 200",
        ),
        "0 0 0",
        "1 0 0 1",
        empty_vector,
    ),
    "listen() of a datagram socket": Difference(
        "fails with EOPNOTSUPP as on Linux, but gives the socket a port",
        ("socket 2 2050 0", "listen 3 5", "getsockname 3"),
        "0 0 0 name=0.0.0.0:0",
        "0 0 0 name=0.0.0.0:chosen",
        listen_of_datagrams,
    ),
    "a socket that a relative adds to a set": Difference(
        "makes the set readable in the process that added it only; on Linux the set is one",
        (*PAIR, "epoll_create 0", "fork 1", "1 epoll_ctl 6 1 5 4", "poll 6 1 200"),
        "1 0 0 1",
        "0 0 0",
        epoll_of_relatives,
    ),
    "a message without bytes": Difference(
        "sendmsg() of no byte succeeds on a listener; EPIPE on Linux",
        (STREAM, "listen 3 5", "sendmsg 3 0 0x4000 0"),
        "-1 32 0",
        "0 0 0",
        message_of_nothing,
    ),
}

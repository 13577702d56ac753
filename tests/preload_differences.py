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
CLOSED = "7"
PAIR = (STREAM, "listen 3 5", STREAM, "connect 4 0 @3", "accept4 3 2048")  # 3 listens, 4 and 5 are connected


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


def bind_of_ended(worlds: Both, n: int, words: Sequence[str]) -> bool:
    ended = int(seen(worlds, n, words).get("ready", "0"), 16) & select.POLLRDHUP
    return words[0] == "bind" and bool(ended)


def shutdown_of_closed(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "shutdown" and seen(worlds, n, words).get("state") == CLOSED


def epoll_of_relatives(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "epoll_ctl" and len(worlds.tables) > 1


def exec_with_messages(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "exec" and any(" sendfd " in line for line in worlds.log)


DIFFERENCES = {
    "bind() of a connection that is over": Difference(
        "EINVAL; on Linux it gets another name, and can do nothing with it before connect() to AF_UNSPEC",
        (*PAIR, "linger 4 1 0", "close 4", "poll 5 1 200", "bind 5 0 0"),
        "0 0 0",
        "-1 22 0",
        bind_of_ended,
    ),
    "shutdown() of a closed connection": Difference(
        "ENOTCONN, and that is all; on Linux it is shut down all the same",
        (
            *PAIR,
            "close 3",
            "linger 5 1 0",
            "close 5",
            "poll 4 1 200",
            "recv 4 1 0",
            "connect 4 0 5001",
            "shutdown 4 0",
            "poll 4 0x2000 0",
        ),
        "1 0 0 2010",
        "1 0 0 10",
        shutdown_of_closed,
    ),
    "a message with a descriptor, and exec": Difference(
        "holds the socket that it carries when it is lost after its sender became another program; Linux lets go of it",
        (*PAIR, "unixpair 1", "sendfd 6 5", "exec", "close_range 5 7 0", "poll 4 0x2000 1000"),
        "1 0 0 2000",
        "0 0 0",
        exec_with_messages,
    ),
    "a socket that a relative adds to a set": Difference(
        "makes the set readable in the process that added it only; on Linux the set is one",
        (*PAIR, "epoll_create 0", "fork 1", "1 epoll_ctl 6 1 5 4", "poll 6 1 200"),
        "1 0 0 1",
        "0 0 0",
        epoll_of_relatives,
    ),
}

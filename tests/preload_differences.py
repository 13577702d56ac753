# SPDX-License-Identifier: Apache-2.0
"""What a preloaded program sees otherwise than on Linux, each with the calls that show it.

The machine (tests/test_preload_machine.py) keeps out of the way of these and of nothing else; each is proved to be
still there by test_each_difference_is_one. One that is gone is to be removed here: then the machine tries it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from preload_machine import Both

STREAM = "socket 2 2049 0"  # AF_INET, SOCK_STREAM | SOCK_NONBLOCK
PAIR = (STREAM, "listen 3 5", STREAM, "connect 4 0 @3", "accept4 3 2048")  # 3 listens, 4 and 5 are connected
LISTEN = "10"


@dataclass(frozen=True)
class Difference:
    why: str
    calls: tuple[str, ...]  # of the first process; the last one is where it shows
    linux: str  # its answer
    here: str
    avoids: Callable[[Both, int, Sequence[str]], bool]  # would this command of process n show it?


def seen(worlds: Both, n: int, words: Sequence[str]) -> dict[str, str]:
    """What is known of the descriptor that a command names first."""
    return worlds.tables.get(n, {}).get(int(words[1]), {}) if len(words) > 1 and words[1].isdigit() else {}


def empty_message(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "recvmsg" and words[2] == "0"


def bind_of_connected(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "bind" and (
        "peer" in seen(worlds, n, words) or seen(worlds, n, words).get("state") == LISTEN
    )


def sendfile_from_socket(worlds: Both, n: int, words: Sequence[str]) -> bool:
    return words[0] == "sendfile" and worlds.tables[n].get(int(words[2]), {}).get("kind") != "f"


def splice_against_the_pipe(worlds: Both, n: int, words: Sequence[str]) -> bool:
    if words[0] != "splice":
        return False
    modes = [int(worlds.tables[n].get(int(w), {}).get("flags", "3"), 16) & 3 for w in words[1:3]]
    return modes[0] == 1 or modes[1] == 0  # O_WRONLY to read from, O_RDONLY to write to


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
    "splice() into the wrong end of a pipe": Difference(
        "says what is wrong with the socket; on Linux EBADF for the pipe comes first",
        (*PAIR, "pipe 0", "splice 3 6 1"),
        "-1 9 0",
        "-1 107 0",
        splice_against_the_pipe,
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""Socket options of unmodified programs: what tests/c/options.c prints on the stack is what it prints on the kernel.

Each difference is registered here with its reason (docs/sockets.md has those of the stack); one that is not, fails,
and so does a registered one that is not there.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from c_programs import CFLAGS
from c_programs import run as build
from preloaded import Share, environment, read_share, run

LIMIT_S = 120
ON_STACK = r"tcp-(listener|connected|accepted)|tcp6-connected"
INHERITED = r"tcp-(accepted|inherited)"
CONNECTED = r"tcp-(connected|accepted|carried|inherited)|tcp6-connected"


@dataclass(frozen=True)
class Difference:
    """Regular expressions that match whole words of a line. host: it depends on the host whether it is there."""

    options: str
    states: str
    calls: str
    why: str
    host: bool = False

    def of(self, line: tuple[str, str, str]) -> bool:
        state, option, call = line
        name = option.split("/")[0]
        return bool(
            re.fullmatch(self.options, name)
            and re.fullmatch(self.states, state)
            and re.fullmatch(self.calls, call)
        )


LOST = "SO_(DONTROUTE|MARK|RXQ_OVFL|TIMESTAMP|ZEROCOPY)|IP_(PKTINFO|RECVERR|RECVTOS)|TCP_INQ|IPV6_RECVPKTINFO"
DIFFERENCES = (
    Difference(LOST, ON_STACK, r"set[1-5]\(1\)(#2)?(,get4(#2)?)?", "only the kernel has it: ENOPROTOOPT"),
    Difference(
        f"{LOST}|UDP_CORK|IP_MTU_DISCOVER|SO_MAX_PACING_RATE",
        "udp-connected",
        r"set[1-9]\((1|5|f4240|12a05f200|ffffffff)\)(#2)?(,get[48](#2)?)?",
        "ENOPROTOOPT where the stack talks to itself: its peer would not find it on the kernel",
    ),
    Difference(
        "SO_(SND|RCV)BUF", ON_STACK + "|tcp-(carried|inherited)|udp-(bound|connected)", ".*", "limits"
    ),
    Difference("SO_RCVLOWAT", ON_STACK, r"set4\((-1|-2147483648|2147483647)\),get4", "any int is taken"),
    Difference("SO_LINGER", ON_STACK + "|udp-(bound|connected)", "set8 again,get8", "off has no time"),
    Difference("SO_MAX_PACING_RATE", ON_STACK, r"set[89]\(ffffffff\),get8", "kept in steps of 256"),
    Difference("IP_MTU", CONNECTED + "|udp-connected", ".*", "the path's, which is no kernel's loopback"),
    Difference(
        "IP_MTU_DISCOVER", ON_STACK, r"set(0\(1\)|4\([035]\))(,get4)?", "TCP keeps to the path's size always"
    ),
    Difference("IP_MTU_DISCOVER", "tcp-inherited", r"set4\(0\),.*", "TCP keeps to the path's size always"),
    Difference("IP_MULTICAST_TTL|SO_NO_CHECK", INHERITED, ".*", "a shadow's options are not inherited"),
    Difference("TCP_CONGESTION", ON_STACK, r"get\d+", "the default is the configuration's", host=True),
    Difference("TCP_INFO", ON_STACK, "get300", "as of Linux 6.7", host=True),
    Difference("TCP_MAXSEG", CONNECTED, ".*", "a segment is as large as the device takes"),
    Difference("TCP_WINDOW_CLAMP", CONNECTED, r"get\d+|set4\(0\)(,get4)?", "kept without effect"),
)
Lines = dict[tuple[str, str, str], str]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("options") / "options"
    build("gcc", *CFLAGS, "-O1", "-pthread", "tests/c/options.c", "-o", out)
    return out


def printed(program: Path, env: dict[str, str]) -> Lines:
    """Results by state, option and call; a call that comes again is numbered."""
    ended = run([program], env, LIMIT_S)
    assert (ended.status, ended.err) == (0, ""), ended
    lines: Lines = {}
    seen: Counter[str] = Counter()
    for line in ended.out.splitlines():
        call, result = line.split(" -> ")
        seen[call] += 1
        state, option, what = call.split(" ", 2)
        lines[state, option, what + (f"#{seen[call]}" if seen[call] > 1 else "")] = result
    return lines


@pytest.fixture(scope="session")
def both(program: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lines, Lines, Share]:
    share = tmp_path_factory.mktemp("share") / "share"
    kernel = printed(program, environment("kernel"))
    stack = printed(program, environment("stack", share))
    return kernel, stack, read_share(share)


def test_every_option_in_every_state_as_on_the_kernel(both: tuple[Lines, Lines, Share]) -> None:
    kernel, stack, _ = both
    wrong, used = [], set()
    for line in sorted(kernel.keys() | stack.keys()):
        if kernel.get(line) == stack.get(line):
            continue
        known = [d for d in DIFFERENCES if d.of(line)]
        used.update(known)
        if not known:
            wrong.append(f"{' '.join(line)}: kernel {kernel.get(line)}, stack {stack.get(line)}")
    assert not wrong, "\n".join([f"{len(wrong)} differences:", *wrong[:50]])
    assert not [d for d in DIFFERENCES if d not in used and not d.host], "registered, and not there"


def test_much_is_compared(both: tuple[Lines, Lines, Share]) -> None:
    kernel, _, _ = both
    options, states = {option for _, option, _ in kernel}, {state for state, _, _ in kernel}
    assert len(options) >= 70
    assert len(states) == 11
    assert len(kernel) > 20_000


def test_what_was_compared_was_on_the_stack(both: tuple[Lines, Lines, Share]) -> None:
    share = both[2]
    assert share.tcp_stack > 1000
    assert share.udp_stack > 150
    assert share.reasons["an option that the stack does not have"] >= 25

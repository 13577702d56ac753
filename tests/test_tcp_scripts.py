# SPDX-License-Identifier: Apache-2.0
"""Conversations as data on our stack, and the language they are written in (docs/scripts.md).

Each file of tests/scripts is a test. Those that Linux passes and our stack does not yet are listed in
tests/scripts/pending.yaml with what is missing: they are expected to fail, and one that passes has to leave the list.
"""

from __future__ import annotations

import re
from pathlib import Path

import oracle
import pytest
from scripting import infos
from scripting import play as player
from scripting.lang import Call, Icmp, ScriptError, Segment, load, parse
from scripting.play import Verdict

PENDING = oracle.pending()
OPENED = """\
0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
+0 bind(3, ..., ...) = 0
+0 listen(3, 1) = 0
+0 < S 0:0(0) win 32792 <mss 1000>
+0 > S. 0:0(0) ack 1 <...>
+.1 < . 1:1(0) ack 1 win 32792
+0 accept(3, ..., ...) = 4
"""


def scripts() -> list[object]:
    found: list[object] = []
    for path in oracle.all_scripts():
        name = oracle.name_of(path)
        marks = [pytest.mark.xfail(reason=PENDING[name], strict=True)] if name in PENDING else []
        found.append(pytest.param(path, id=name, marks=marks))
    return found


@pytest.mark.parametrize("path", scripts())
def test_the_stack_does_what_the_script_says(path: Path) -> None:
    verdict = oracle.play_ours(load(path))
    assert verdict.ok, f"{path.name}: {verdict}"


def test_each_script_says_what_it_promises() -> None:
    for path in oracle.all_scripts():
        assert len(load(path).promise) > 20, path


def test_only_scripts_that_are_there_are_pending() -> None:
    assert set(PENDING) <= {oracle.name_of(p) for p in oracle.all_scripts()}


# ---- The language: what is understood ------------------------------------------------------------------------------
def test_times_are_absolute_relative_ranges_or_any() -> None:
    script = parse(
        "0.5 close(3) = 0\n+.25 close(3) = 0\n+0.2~+0.25 > . 1:1(0) ack 1\n* > . 1:1(0) ack 1\n1...1.5 close(3) = 0"
    )
    times = [e.time for e in script.events]
    assert (times[0].lo, times[0].relative) == (500_000_000, False)
    assert (times[1].lo, times[1].relative) == (250_000_000, True)
    assert (times[2].lo, times[2].hi, times[2].relative) == (200_000_000, 250_000_000, True)
    assert times[3].lo is None
    assert (times[4].lo, times[4].end) == (1_000_000_000, 1_500_000_000)


def test_comments_and_directives_are_of_three_kinds() -> None:
    text = "// It promises.\n# kernel: net.ipv4.tcp_sack=0\n# tolerance: 10ms\n\n"
    text += "0 close(3) = 0 // so\n/* a\n b */ +0 close(4) = 0"
    script = parse(text)
    assert script.promise == "It promises."
    assert script.directives["kernel"] == ["net.ipv4.tcp_sack=0"]
    assert script.tolerance == 10_000_000
    assert [e.line for e in script.events] == [5, 7]


def test_a_segment_has_marks_flags_range_window_and_options() -> None:
    text = "+0 < [ce] SEW 0:0(0) win 100 <mss 1000,sackOK,TS val 7 ecr 0,nop,wscale 7,FO abcd,sack 1:3 5:7>"
    [event] = parse(text).events
    s = event.what
    assert isinstance(s, Segment)
    assert (s.ecn, s.flags, s.seq, s.end, s.ack, s.win) == ("ce", "SEW", 0, 0, None, 100)
    assert s.options is not None
    assert [o.kind for o in s.options] == ["mss", "sackOK", "TS", "nop", "wscale", "FO", "sack"]
    assert s.options[-1].value == ((1, 3), (5, 7))


def test_an_icmp_error_quotes_a_range() -> None:
    [event] = parse("+0 < icmp unreachable frag_needed mtu 1200 [1:1001(1000)]").events
    assert event.what == Icmp("unreachable", "frag_needed", 1200, 1, 1001)


def test_a_call_has_arguments_and_a_result() -> None:
    [event] = parse(
        "+0 setsockopt(3, SOL_SOCKET, SO_LINGER, {onoff=1, linger=0}, 8) = -1 EINVAL (Invalid argument)"
    ).events
    call = event.what
    assert isinstance(call, Call)
    assert call.args[3] == {"onoff": 1, "linger": 0}
    assert (call.result, call.errno) == (-1, "EINVAL")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("+0 < S 0:0(0) win 5 <mss 1000,sackOKAY>", "1:31: no option"),
        ("0 close(3) = 0\n\n+0 > Q 1:1(0) ack 1", "3:6: the flags"),
        ("+0 > . 1:3(1) ack 1", "1:8: 1:3 are 2 bytes"),
        ("+0 > . 1:1(0)", "1:14: the flag . and"),
        ("+0 close(3)", "1:12: '=' expected"),
        ("+0 close(3) = 0 now", "1:17: the end of the line"),
        ("now close(3) = 0", "1:1: a time in seconds"),
        ("+.3~.2 > . 1:1(0) ack 1", "the range ends before"),
        ("+0~+1 close(3) = 0", "1:1: a range or any time"),
        ("+0 < icmp unreachable frog [1:1(0)]", "1:23: no code of unreachable"),
        ("+0 < . 1:1(0) ack 1 <...>", "1:25: a segment that arrives"),
        ("+0 %{ assert 1\n", "1:4: the block has no end"),
        ("+0 < [moist] . 1:1(0) ack 1", "1:7: ect0, ect1"),
        ("// nothing", "1:1: no event"),
    ],
)
def test_what_is_not_understood_is_an_error_with_file_line_and_column(text: str, where: str) -> None:
    with pytest.raises(ScriptError, match=r"^talk\.pkt:") as e:
        parse(text, "talk.pkt")
    assert where in str(e.value)


# ---- Assertions ----------------------------------------------------------------------------------------------------
def value(name: str) -> int:
    return {"tcpi_snd_cwnd": 10, "tcpi_state": 1}[name]


@pytest.mark.parametrize(
    "code",
    [
        "assert tcpi_snd_cwnd == 10",
        "assert tcpi_snd_cwnd == 10, tcpi_snd_cwnd",
        "assert 5 < tcpi_snd_cwnd <= 10 and tcpi_state == TCP_ESTABLISHED",
        "was = tcpi_snd_cwnd\n  assert was * 2 == 20; assert not was == 3",
        "assert max(tcpi_snd_cwnd, 3) == (10 if tcpi_state else 0)",
    ],
)
def test_assertions_that_hold(code: str) -> None:
    assert infos.run(code, value, {}) == ""


def test_an_assertion_that_does_not_hold_shows_its_values() -> None:
    assert (
        infos.run("assert tcpi_snd_cwnd == 11", value, {}) == "assert tcpi_snd_cwnd == 11: tcpi_snd_cwnd = 10"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import os", "assert __import__('os')", "assert ().__class__", "assert [1][0]", "print(1)", "assert open('x')",
        "assert cwnd == 10", "assert 'a' == 'a'", "assert (",
    ],
)  # fmt: skip
def test_blocks_hold_nothing_else(code: str) -> None:
    with pytest.raises(infos.CodeError):
        infos.run(code, value, {})


# ---- The judge -----------------------------------------------------------------------------------------------------
def play(text: str) -> Verdict:
    return oracle.play_ours(parse(text))


def test_a_conversation_as_it_should_be() -> None:
    assert play(OPENED + "+0 write(4, ..., 500) = 500\n+0 > P. 1:501(500) ack 1\n").ok


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("+0 > . 1:1(0) ack 1", "nothing left until"),
        ("+0 write(4, ..., 500) = 400", r"write\(\) = 500"),
        ("+0 write(4, ..., 500) = 500\n+0 > . 1:501(500) ack 1", "flags P."),
        ("+0 write(4, ..., 500) = 500\n+0 > P. 1:502(501) ack 1", r"1:501\(500\)"),
        ("+0 write(4, ..., 500) = 500\n+0 > P. 1:501(500) ack 2", "ack 1"),
        ("+0 write(4, ..., 500) = 500\n+0 > P. 1:501(500) ack 1 win 5", "win 65"),
        ("+0 write(4, ..., 500) = 500\n+0 > P. 1:501(500) ack 1 <TS val 1 ecr 2>", "what left: <>"),
        ("+0 write(4, ..., 500) = 500\n+0 > [ect0] P. 1:501(500) ack 1", r"\[noecn\]"),
        ("+0 write(4, ..., 500) = 500\n+.1 > P. 1:501(500) ack 1", "it left at 0.1"),
        ("+0 write(4, ..., 500) = 500\n+.01 close(4) = 0", "a segment left that was not expected"),
        ("+0 write(4, ..., 500) = 500", "a segment left that was not expected"),
        ("+0 read(4, ..., 10) = 0", "the call blocks"),
        ("+0...+.2 read(4, ..., 10) = 0", "has not returned until 0.3"),
        ("+0 fcntl(4, F_SETFL, O_NONBLOCK) = 0\n+0 read(4, ..., 10) = 0", r"read\(\) = -1 EAGAIN"),
        ("+0 close(7) = 0", "no such descriptor"),
        ("+0 sing(4) = 0", "no such call"),
        ("+0 %{ assert tcpi_state == TCP_CLOSE }%", "tcpi_state = 1"),
        ("+0 setsockopt(4, SOL_TCP, TCP_NODELAY, [TCP_NOTHING], 4) = 0", "no such constant"),
    ],
)
def test_what_differs_is_named(more: str, why: str) -> None:
    verdict = play(OPENED + more)
    assert not verdict.ok
    assert re.search(why, verdict.why), verdict.why


def test_a_timer_is_exact_to_the_wheels_tick() -> None:
    sent = OPENED + "+0 write(4, ..., 500) = 500\n+0 > P. 1:501(500) ack 1\n"
    assert play(sent + "+.3 > P. 1:501(500) ack 1").ok
    assert not play(sent + "+.298 > P. 1:501(500) ack 1").ok
    assert not play(sent + "+.301 > P. 1:501(500) ack 1").ok
    assert play("// tolerance: 3ms\n" + sent + "+.298 > P. 1:501(500) ack 1").ok


def test_bytes_read_are_compared_with_those_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        OPENED + "+0 < P. 1:1001(1000) ack 1 win 32792\n+0 > . 1:1(0) ack 1001\n+0 read(4, ..., 1000) = 1000"
    )
    assert play(text).ok
    monkeypatch.setattr(player, "stream", lambda first, end: b"\0" * (end - first))
    assert "not those the peer sent" in play(text).why

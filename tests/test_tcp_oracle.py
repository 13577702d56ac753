# SPDX-License-Identifier: Apache-2.0
"""Linux as the oracle of the scripts: the register of differences, and the backend on this machine's kernel.

`make test-oracle` runs all scripts; here a few run, and what is judged is the judge.
"""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
from oracle import Difference, RegisterError, complaints
from scripting.play import Verdict

OK = Verdict(True)
BAD = Verdict(False, 7, "+0 > . 1:1(0) ack 1", "flags P.")
OPENED = """\
// A connection.
# cc: cubic

0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
+0 bind(3, ..., ...) = 0
+0 listen(3, 1) = 0
+0 < S 0:0(0) win 32792 <mss 1000>
+0 > S. 0:0(0) ack 1 <...>
+.1 < . 1:1(0) ack 1 win 32792
+0 accept(3, ..., ...) = 4
"""


# ---- The register --------------------------------------------------------------------------------------------------
def test_agreement_needs_no_register() -> None:
    assert complaints({"a/b": OK}, {}, whole=True) == []


def test_a_difference_has_to_be_registered() -> None:
    [said] = complaints({"a/b": BAD}, {}, whole=True)
    assert "a/b: differs and is not registered: line 7: flags P." in said


def test_a_registered_difference_is_none() -> None:
    many = {f"a/{i}": OK for i in range(30)} | {"a/b": BAD}
    assert complaints(many, {"a/b": Difference("a/b", 7, "RFC")}, whole=True) == []


def test_a_difference_that_is_gone_has_to_leave_the_register() -> None:
    [said] = complaints({"a/b": OK}, {"a/b": Difference("a/b", 7, "RFC")}, whole=False)
    assert "Linux does what it says" in said


def test_a_difference_elsewhere_in_the_script_is_another_one() -> None:
    [said] = complaints({"a/b": BAD}, {"a/b": Difference("a/b", 9, "RFC")}, whole=False)
    assert "differs at line 7, registered for line 9" in said


def test_the_register_names_scripts_that_are_there() -> None:
    many = {f"a/{i}": OK for i in range(30)}
    [said] = complaints(many, {"a/b": Difference("a/b", 9, "RFC")}, whole=True)
    assert "no such script" in said


def test_not_more_than_one_in_twenty_is_registered() -> None:
    verdicts = {f"a/{i}": BAD if i < 3 else OK for i in range(40)}
    registered = {f"a/{i}": Difference(f"a/{i}", 7, "RFC") for i in range(3)}
    [said] = complaints(verdicts, registered, whole=True)
    assert "3 of 40 scripts are registered" in said


@pytest.mark.parametrize(
    "text",
    [
        "script: a",
        "- {script: a/b, line: 3}",
        "- {script: a/b, line: 3, why: ''}",
        "- {script: a/b, line: 3, why: x}\n- {script: a/b, line: 4, why: y}",
    ],
)
def test_a_register_without_reasons_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "differences.yaml"
    path.write_text(text)
    with pytest.raises(RegisterError):
        oracle.differences(path)


def test_what_is_registered_is_there_and_agrees_with_our_stack() -> None:
    """A difference of Linux is no excuse for us: the script says what we do."""
    names = {oracle.name_of(p) for p in oracle.all_scripts()}
    registered = oracle.differences()
    assert set(registered) <= names
    assert len(registered) <= oracle.MOST * len(names)
    assert not set(registered) & set(oracle.pending())


def test_a_script_that_cannot_be_read_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.pkt"
    path.write_text("// It promises.\n0 close(3) = 0 now\n")
    assert oracle.main([str(path)]) == 2
    assert f"oracle: {path}:2:16: the end of the line" in capsys.readouterr().err


def test_where_it_cannot_run_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(oracle.all_scripts()[0])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert oracle.main([path]) == 2
    assert "needs root" in capsys.readouterr().err
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert oracle.main([path]) == 2
    assert "/dev/net/tun" in capsys.readouterr().err
    assert oracle.main(["--ours", path]) == 0


def test_the_table_counts_by_topic() -> None:
    ours, theirs = {"a_b/c": True, "a_b/d": True, "e/f": True}, {"a_b/c": True, "a_b/d": False, "e/f": True}
    registered = {"a_b/d": Difference("a_b/d", 7, "RFC")}
    said = oracle.table({"ours": ours, "Linux": theirs}, registered).splitlines()
    assert [line.split() for line in said] == [
        ["topic", "scripts", "ours", "Linux", "registered", "differences"],
        ["a", "b", "2", "2", "1", "1"],
        ["e", "1", "1", "1", "0"],
        ["all", "3", "3", "2", "1"],
    ]


# ---- Linux ---------------------------------------------------------------------------------------------------------
def linux(tmp_path: Path, more: str, retries: int = 4) -> Verdict:
    path = tmp_path / "talk.pkt"
    path.write_text(OPENED + more)
    done = oracle.run_linux([path], expected={}, retries=retries, report=lambda *_: None)
    return done[oracle.name_of(path)]


@pytest.mark.netns
def test_linux_plays_a_script(tmp_path: Path) -> None:
    more = (
        "+0 write(4, ..., 500) = 500\n+0 > P. 1:501(500) ack 1\n+0...+.1 read(4, ..., 2000) = 1000\n"
        "+.1 < P. 1:1001(1000) ack 501 win 32792\n+0 > . 501:501(0) ack 1001\n+0 %{ assert tcpi_snd_mss == 1000 }%\n"
        '+0 getsockopt(4, IPPROTO_TCP, TCP_CONGESTION, "cubic", [6]) = 0\n'
    )
    verdict = linux(tmp_path, more)
    assert verdict.ok, verdict


@pytest.mark.netns
@pytest.mark.parametrize(
    ("more", "line", "why"),
    [
        ("+.05 > . 1:1(0) ack 1", 11, "nothing left until"),
        ("+0 write(4, ..., 500) = 500\n+0 > P. 1:501(500) ack 2", 12, "ack 1"),
        ("+0 write(4, ..., 500) = 500\n+.1 %{ assert 1 }%", 12, "a segment left that was not expected"),
        (
            "+0 write(4, ..., 500) = 500\n+0 > P. 1:501(500) ack 1\n+1 > P. 1:501(500) ack 1",
            13,
            "it left at 0.4",
        ),
        ("+0 read(4, ..., 500) = 0", 11, "the call blocks"),
        ("+0...+.1 read(4, ..., 500) = 0\n", 11, "has not returned"),
        ("+0 %{ assert tcpi_snd_mss == 999 }%", 11, "tcpi_snd_mss = 1000"),
    ],
)
def test_linux_that_differs_is_noticed(more: str, line: int, why: str, tmp_path: Path) -> None:
    verdict = linux(tmp_path, more, retries=0)
    assert not verdict.ok
    assert verdict.line == line
    assert why in verdict.why


@pytest.mark.netns
def test_nothing_of_the_machine_is_touched(tmp_path: Path) -> None:
    before = Path("/proc/sys/net/ipv4/tcp_sack").read_text(), Path("/proc/net/dev").read_text().count(":")
    path = tmp_path / "talk.pkt"
    path.write_text("# kernel: net.ipv4.tcp_sack=0\n" + OPENED)
    done = oracle.run_linux([path], expected={}, report=lambda *_: None)
    assert done[oracle.name_of(path)].ok
    after = Path("/proc/sys/net/ipv4/tcp_sack").read_text(), Path("/proc/net/dev").read_text().count(":")
    assert after == before

# SPDX-License-Identifier: Apache-2.0
"""Programs in C that call what POSIX has for sockets (tests/c/posix_*.c): on the kernel and on the stack the same.

Each case is a process of its own that checks itself, prints "ok NAME" and exits with 0. What the cases demand is what
Linux does: on the kernel's sockets all of them have to pass as well.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
from c_programs import CFLAGS, ROOT
from c_programs import run as build
from preloaded import SURFACES, environment, read_share, run

FOLDER = ROOT / "tests/c"
LIMIT_S = 40  # a case takes less than a second; this is for a busy machine
PLAIN = ("-O1",)
FORTIFIED = ("-O2", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2")
PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{path.stem: (path.stem, PLAIN) for path in sorted(FOLDER.glob("posix_*.c"))},
    "posix_fortify": ("posix_fortify", FORTIFIED),
    "posix_streams64": ("posix_streams", (*PLAIN, "-D_FILE_OFFSET_BITS=64")),
}
CHECKED = {
    "read",
    "recv",
    "recvfrom",
    "poll",
    "ppoll",
    "fdelt",
    "dprintf",
    "vdprintf",
    "fgets",
    "fread",
    "pread",
}

# On the stack these end otherwise, with this in what they say.
REFUSED = {
    "where_a_datagram_was_sent_to": "must succeed: got -1, errno 92",  # IP_PKTINFO of a socket that talks: ENOPROTOOPT
}


def cases_of(source: str) -> list[str]:
    return re.findall(r"^CASE\((\w+)\)", (FOLDER / f"{source}.c").read_text(), re.MULTILINE)


CASES = [(program, case) for program, (source, _) in PROGRAMS.items() for case in cases_of(source)]


@lru_cache
def built(program: str, folder: Path) -> Path:
    source, flags = PROGRAMS[program]
    out = folder / program
    build("gcc", *CFLAGS, *flags, "-pthread", f"tests/c/{source}.c", "-o", out)
    return out


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("posix")


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(("program", "case"), CASES, ids=[f"{p}-{c}" for p, c in CASES])
def test_as_posix_and_linux_say(surface: str, program: str, case: str, folder: Path, tmp_path: Path) -> None:
    share = tmp_path / "share"
    ended = run([built(program, folder), case], environment(surface, share), LIMIT_S)
    if surface == "stack" and case in REFUSED:
        assert ended.status == 1
        assert REFUSED[case] in ended.err
        return
    told = f"status {ended.status}, stdout {ended.out!r}, stderr:\n{ended.err}"
    assert (ended.status, ended.out, ended.err) == (0, f"ok {case}\n", ""), told
    if surface == "stack":
        assert read_share(share).stack > 0, f"all of it was the kernel's: {read_share(share)}"


@pytest.mark.parametrize("says", ["links", "list", "stat"])
def test_what_proc_says_in_the_middle_of_exec_ends_no_connection(
    says: str, folder: Path, tmp_path: Path
) -> None:
    """Of a process in which another thread than the first calls it: for some microseconds the first one has ended."""
    shim, said = tmp_path / "shim.so", tmp_path / "said"
    build("gcc", *CFLAGS, "-shared", "-fPIC", "tests/c/proc_shim.c", "-o", shim)
    env = environment("stack", PROC_SAYS=says, PROC_SAID=str(said))
    env["LD_PRELOAD"] += f" {shim}"
    case = "another_thread_calls_exec"
    ended = run([built("posix_relatives", folder), case], env, LIMIT_S)
    assert (ended.status, ended.out, ended.err) == (0, f"ok {case}\n", "")
    assert said.exists(), "nobody has looked"


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_have_the_cases_that_their_sources_name(program: str, folder: Path) -> None:
    ended = run([built(program, folder)], environment("kernel"), LIMIT_S)
    assert sorted(ended.out.split()) == sorted(cases_of(PROGRAMS[program][0]))
    assert run([built(program, folder), "no_such_case"], environment("kernel"), LIMIT_S).status == 2


def test_the_programs_import_what_they_are_to_try(folder: Path) -> None:
    def imported(program: str) -> set[str]:
        return set(re.findall(r" U (\w+)", build("nm", "-D", built(program, folder))))

    assert {f"__{name}_chk" for name in CHECKED} <= imported("posix_fortify")
    assert {"sendfile64", "fcntl64", "mkstemp64", "lseek64"} <= imported("posix_streams64")


def test_a_case_that_fails_or_hangs_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.c").write_text(
        '#include "posix.h"\n'
        "CASE(fails) { FAILS(EBADF, close(dup(0))); }\n"
        "CASE(differs) { EQ(1 + 1, 3); }\n"
        "CASE(hangs) { int p[2]; MUST(pipe(p)); char c; MUST(read(p[0], &c, 1)); }\n"
        "int main(int argc, char **argv) { return posix_main(argc, argv); }\n"
    )
    bad = tmp_path / "bad"
    build("gcc", *CFLAGS, *PLAIN, "-Itests/c", "-pthread", tmp_path / "bad.c", "-o", bad)
    ended = run([bad, "fails"], environment("kernel"), LIMIT_S)
    assert (ended.status, ended.out) == (1, "")
    assert "close(dup(0)) must fail with EBADF: got 0" in ended.err
    ended = run([bad, "differs"], environment("kernel"), LIMIT_S)
    assert ended.status == 1
    assert "1 + 1 must be 3: got 2" in ended.err
    ended = run([bad, "hangs"], environment("kernel"), 0.5)
    assert ended.status is None
    assert "hangs:" in ended.err

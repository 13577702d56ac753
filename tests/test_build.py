# SPDX-License-Identifier: Apache-2.0
"""What set-up and build promise: one repetition costs nothing, the library exports its contract and no more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from c_programs import ROOT, make

SAN = "san" in os.environ.get("BYPASS_BUILD", "")
LIB = ROOT / ("build/san" if SAN else "build") / "libbypass.so"


def only(wanted: bool) -> Callable[[Callable[..., None]], Callable[..., None] | None]:
    """A test of one variant of the build: in the others it does not exist, rather than being skipped."""
    return lambda test: test if wanted else None


def declared() -> set[str]:
    """The functions that the public header declares."""
    text = (ROOT / "bypass/include/bypass.h").read_text()
    return set(re.findall(r"^BYPASS_API [^;(]*?\*?(bypass_\w+)\(", text, re.MULTILINE))


def symbols(path: Path, *options: str) -> list[list[str]]:
    done = subprocess.run(["nm", "--dynamic", *options, path], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_help_names_every_target() -> None:
    listed = set(re.findall(r"^  make ([\w-]+) ", make("help"), re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert listed == set(phony.group(1).split())


def test_a_second_set_up_has_nothing_to_do() -> None:
    make("setup")
    again = make("setup")
    assert "setup:" not in again
    assert "gcc" not in again


def test_the_library_exports_its_contract_and_nothing_else() -> None:
    exported = {s[-1] for s in symbols(LIB, "--defined-only", "--extern-only")}
    assert len(declared()) > 30
    assert exported == declared()


@only(not SAN)
def test_the_library_needs_memory_and_string_functions_only() -> None:
    """No allocation, clock, thread or system call: the core is without I/O."""
    harmless = r"(memcpy|memset|memmove|memcmp|strcmp|strlen|v?snprintf|__v?snprintf_chk|__mem\w+_chk|__stack_chk_fail)"
    weak = r"(__cxa_finalize|__gmon_start__|_ITM_\w+)"
    needed = {s[-1].partition("@")[0] for s in symbols(LIB, "--undefined-only")}
    assert {n for n in needed if not re.fullmatch(f"{harmless}|{weak}", n)} == set()


def test_every_declared_function_is_there_for_python() -> None:
    from bypass import _core

    assert {n for n in declared() if not hasattr(_core.lib, n)} == set()
    assert _core.lib.BYPASS_ABI >= 1


def test_the_clock_is_pythons_and_secrets_differ() -> None:
    from bypass._core import ffi, lib

    before = time.monotonic_ns()
    now = lib.host_now_ns()
    assert before <= now <= time.monotonic_ns()
    a, b = ffi.new("uint8_t[1000]"), ffi.new("uint8_t[1000]")
    assert lib.host_random(ffi.NULL, a, 1000) == 0
    assert lib.host_random(ffi.NULL, b, 1000) == 0
    assert bytes(a) != bytes(b)
    assert bytes(a)[990:] != bytes(10)


def test_import_is_lazy_and_complete() -> None:
    """`import bypass` and the command load neither the core nor netlink nor bcc; the names are there."""
    script = (
        "import sys, bypass; from bypass.cli import cli\n"
        "heavy = {'pyroute2', 'bcc', 'cffi', '_cffi_backend', 'bypass._core', 'pydantic', 'yaml', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print([n for n in bypass.__all__ if not hasattr(bypass, n)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from bypass import nonsense")


def test_every_command_has_help_and_an_example() -> None:
    from click.testing import CliRunner

    from bypass.cli import COMMANDS, cli

    for name in COMMANDS:
        result = CliRunner().invoke(cli, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert "Example" in result.output, name


def test_bad_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    from bypass.cli import main

    assert main(["nonsense"]) == 2
    assert "No such command 'nonsense'" in capsys.readouterr().err
    assert main(["lab", "up", "--queues", "zero"]) == 2


@only(not SAN)
def test_the_sources_of_every_variant_are_the_same() -> None:
    """A dry run of each variant compiles the same files: nothing is left out of the sanitizers' build."""
    compiled = {}
    for variant in ("release", "san", "debug"):
        options = {"san": ["SAN=1"], "debug": ["BYPASS_DEBUG=1"]}.get(variant, [])
        out = make("-n", "-B", "-o", ".venv/.stamp", "build", *options)
        compiled[variant] = set(re.findall(r"-c (bypass/\S+\.c) ", out))
    assert compiled["release"] == compiled["san"] == compiled["debug"]
    assert "bypass/host.c" in compiled["release"]
    assert len(compiled["release"]) > 20


def set_up_with(tmp_path: Path, path: str, **commands: str) -> subprocess.CompletedProcess[str]:
    """scripts/setup alone in an empty repository, with these commands in front of PATH."""
    bin_dir, copy = tmp_path / "bin", tmp_path / "repo"
    bin_dir.mkdir()
    for name, body in commands.items():
        (bin_dir / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_dir / name).chmod(0o755)
    (copy / "scripts").mkdir(parents=True)
    (copy / "scripts/setup").write_text((ROOT / "scripts/setup").read_text())
    env = {"PATH": f"{bin_dir}:{path}"}
    done = subprocess.run(["/bin/sh", copy / "scripts/setup"], env=env, capture_output=True, text=True)
    assert not (copy / ".venv").exists()
    return done


@only(SAN)
def test_the_sanitizers_are_awake() -> None:
    """A write past the end of eight bytes, by the core, ends the process with a report."""
    script = (
        "import ctypes; from bypass._core import ffi, lib; libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "lib.host_random(ffi.NULL, ffi.cast('void *', libc.malloc(8)), 4096)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_set_up_without_root_names_the_packages_and_the_command(tmp_path: Path) -> None:
    done = set_up_with(
        tmp_path,
        "/usr/bin:/bin",
        **{
            "id": "echo 1000",
            "apt-get": "echo apt-get was called >&2; exit 1",
            "dpkg-query": 'case "$*" in *valgrind*) exit 1;; esac; echo installed',
        },
    )
    assert done.returncode == 2
    assert "Debian packages to install: valgrind\n" in done.stdout
    assert "sudo apt-get install -y --no-install-recommends valgrind\n" in done.stderr
    assert "apt-get was called" not in done.stderr


def test_set_up_on_another_system_names_what_is_needed(tmp_path: Path) -> None:
    done = set_up_with(tmp_path, "", dirname='echo "${1%/*}"')  # a system with nothing but the shell
    assert done.returncode == 2
    assert "not Debian: install gcc" in done.stderr
    assert "python3-bpfcc" in done.stderr


def test_requirements_are_pinned_and_no_line_is_twice() -> None:
    seen: dict[str, str] = {}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            m = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)", line)
            assert m is not None, line
            assert m.group(1).lower() not in seen
            seen[m.group(1).lower()] = m.group(2)
    from importlib.metadata import version

    assert {name: version(name) for name in seen} == seen


@only(not SAN)
def test_what_is_installed_can_be_linked_against(tmp_path: Path) -> None:
    """Both libraries by pkg-config; the second serves a program that was linked with it as if it were preloaded."""
    make("install", f"DESTDIR={tmp_path}", "PREFIX=/opt/bypass")
    root = tmp_path / "opt/bypass"
    installed = {p.name for p in (root / "lib/bypass").iterdir()}
    assert installed - {"bypass-dpdk.so"} == {"bypass-fwd", "bypass-linger"}
    assert ("bypass-dpdk.so" in installed) == (
        subprocess.run(["pkg-config", "--exists", "libdpdk >= 22.11"]).returncode == 0
    )
    env = os.environ | {
        "PKG_CONFIG_PATH": str(root / "lib/pkgconfig"),
        "PKG_CONFIG_SYSROOT_DIR": str(tmp_path),
        "LD_LIBRARY_PATH": str(root / "lib"),
    }

    def built(source: str, package: str) -> str:
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", package], env=env, capture_output=True, text=True, check=True
        )
        program = tmp_path / package
        (tmp_path / "it.c").write_text(source)
        subprocess.run(["gcc", "-o", program, tmp_path / "it.c", *flags.stdout.split()], check=True)
        done = subprocess.run(
            [program], env=env | {"BYPASS_LOOPBACK": "1"}, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert int(built(COUNTS, "bypass")) > 50
    assert built(TALKS_TO_ITSELF, "bypass-posix") == "hello, kernel connections: 0\n"


COUNTS = """
#include <bypass.h>
#include <stdio.h>
int main(void) { return printf("%d", bypass_stat_count()) < 0; }
"""

# The peer of a connection of the stack is unknown to the kernel: /proc/net/tcp has no line of its port in state 01.
TALKS_TO_ITSELF = r"""
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    char buf[16] = "", line[256], needle[16];
    int l = socket(AF_INET, SOCK_STREAM, 0), c = socket(AF_INET, SOCK_STREAM, 0), s, n = 0;
    if (bind(l, (void *)&a, len) || listen(l, 1) || getsockname(l, (void *)&a, &len))
        return 1;
    if (connect(c, (void *)&a, len) || (s = accept(l, 0, 0)) < 0 || write(c, "hello", 5) != 5)
        return 2;
    if (read(s, buf, sizeof buf) != 5)
        return 3;
    sprintf(needle, ":%04X ", ntohs(a.sin_port));
    FILE *f = fopen("/proc/net/tcp", "r");
    while (f && fgets(line, sizeof line, f))
        n += strstr(line, needle) && strstr(line, " 01 ");
    return printf("%s, kernel connections: %d\n", buf, f ? n : -1) < 0;
}
"""

# SPDX-License-Identifier: Apache-2.0
"""From the sources of the steering program to its bytecode: bcc as the compiler, and nothing else of it.

What lives here: the constants that a policy compiles into the program, the run of bcc without kernel headers, and
the list of reasons. What does not: maps, loading and attaching (`steering.py`, over `libbpf.py`).

bcc creates a set of small maps while it compiles. They are thrown away: the bytecode is taken out with the places
where it refers to a map, so that it can be loaded over maps that already exist. That is how a program is exchanged
under traffic, and why a policy with the same masks as the one before costs no compilation.

BYPASS_BPF_CACHE in the environment names a folder that keeps what was compiled, for other processes: the tests start
hundreds that would compile the same. Who sets it trusts what is in the folder, as with BYPASS_BUILD.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import re
import struct
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bypass.errors import PrivilegeError, SteeringError
from bypass.rules import CompiledRules, Mask

FOLDER = Path(__file__).parent
SOURCES = ("xdp_steer.c", "tc_guard.c")
XDP, GUARD = "xdp_steer", "tc_guard"

_LD_IMM64, _PSEUDO_MAP_FD = 0x18, 1  # linux/bpf.h: BPF_LD | BPF_IMM | BPF_DW; BPF_PSEUDO_MAP_FD in src_reg
_INSN = struct.Struct("=BBhi")  # struct bpf_insn: code, registers, offset, immediate
_compiling = threading.Lock()  # BCC_KERNEL_SOURCE and file descriptor 2 belong to the process


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a packet got its verdict; `reasons.h` is where they are listed and ordered."""

    name: str
    verdict: Literal["PASS", "DROP", "REDIRECT"]
    text: str


@dataclass(frozen=True, slots=True)
class Program:
    """Bytecode that is not loaded yet.

    Attributes:
        name: the C function.
        code: instructions of 8 bytes, map references unset.
        maps: (number of the instruction, name of the map it refers to).
    """

    name: str
    code: bytes
    maps: tuple[tuple[int, str], ...]

    def linked(self, fds: dict[str, int]) -> bytes:
        """The instructions with file descriptors for the names of maps."""
        code = bytearray(self.code)
        for number, name in self.maps:
            struct.pack_into("=i", code, number * 8 + 4, fds[name])
        return bytes(code)


def reasons(header: str | None = None, macro: str = "STEER_REASONS") -> tuple[Reason, ...]:
    """All reasons of a list of `reasons.h`, in its order: STEER_REASONS, by number, or CLASSIFY_REASONS."""
    text = header if header is not None else (FOLDER / "reasons.h").read_text()
    listed = re.search(rf"^#define {macro}\(R\)((?:.*\\\n)*.*)", text, re.MULTILINE)
    found = re.findall(
        r'^ *R\((\w+), (PASS|DROP|REDIRECT), "([^"]*)"\)', listed[1] if listed else "", re.MULTILINE
    )
    return tuple(Reason(name.lower(), verdict, what) for name, verdict, what in found)


def source(folder: Path = FOLDER) -> str:
    """Both programs as one text, local includes put in place.

    bcc rewrites map accesses in its main file only, so what accesses maps has to be in it.
    """
    seen: set[str] = set()

    def text_of(name: str) -> Iterator[str]:
        if name in seen:
            return
        seen.add(name)
        yield f'#line 1 "{name}"\n'
        for number, line in enumerate((folder / name).read_text().splitlines(keepends=True), 1):
            include = re.match(r'#include "([\w.]+)"', line)
            if include:
                yield from text_of(include[1])
                yield f'#line {number + 1} "{name}"\n'
            else:
                yield line

    return "".join(part for name in SOURCES for part in text_of(name))


def defines(rules: CompiledRules) -> tuple[str, ...]:
    """The compiler flags that hold what is constant for these rules."""
    masks = " ".join(f"M({i}, {_mask_constants(m, rules.key_v6)})" for i, m in enumerate(rules.masks))
    return (
        f"-DKEY_V6={int(rules.key_v6)}",
        f"-DWITH_V6={int(rules.uses_v6)}",
        f"-DVLAN_DEPTH={rules.vlan_depth}",
        f"-DMASKS(M)={masks}",
    )


def _mask_constants(mask: Mask, key_v6: bool) -> str:
    """The arguments of match_mask() in steer.h that follow the mask's number."""
    size = 16 if key_v6 else 4
    words: list[int] = []
    for length in (mask.local_plen, mask.remote_plen):
        bits = (1 << size * 8) - (1 << size * 8 - length)
        words += struct.unpack("=4I", bits.to_bytes(size, "big").rjust(16, b"\0"))
    ports = struct.unpack("=2H", struct.pack(">2H", mask.local_port_mask, mask.remote_port_mask))
    numbers = [
        0xF if mask.family else 0,
        *words,
        *ports,
        0xFFF if mask.vlan else 0,
        0xFF if mask.proto else 0,
    ]
    return ", ".join(f"{n:#x}" for n in numbers)


@functools.lru_cache(maxsize=64)
def compile_programs(flags: tuple[str, ...], text: str | None = None) -> dict[str, Program]:
    """Compiles both programs with bcc. Takes about half a second, none when flags and text were seen before.

    The program as it is (no `text`) is taken from BYPASS_BPF_CACHE, and kept there, where that is set.

    Args:
        flags: of `defines()`.
        text: of `source()`, or a variant of it.

    Returns:
        By function name.

    Raises:
        PrivilegeError: bcc is not installed, or its maps may not be created.
        SteeringError: bcc refuses the source; the compiler's messages are in the file that the error names.
    """
    bpf = _import_bcc()
    kept = _kept(flags) if text is None else None
    if kept is not None and (found := _read(kept)) is not None:
        return found
    programs = _compile(bpf, flags, text or source())
    if kept is not None and os.access(kept.parent, os.W_OK):
        _write(kept, programs)
    return programs


def _kept(flags: tuple[str, ...]) -> Path | None:
    """Where the program with these flags is kept between processes, if that is asked for."""
    folder = os.environ.get("BYPASS_BPF_CACHE")
    if not folder:
        return None
    return Path(folder, hashlib.sha256(repr((flags, source())).encode()).hexdigest())


def _read(path: Path) -> dict[str, Program] | None:
    try:
        kept = json.loads(path.read_bytes())
    except (FileNotFoundError, PermissionError):  # another user's folder is none
        return None
    return {
        name: Program(name, bytes.fromhex(code), tuple((number, of) for number, of in maps))
        for name, (code, maps) in kept.items()
    }


def _write(path: Path, programs: dict[str, Program]) -> None:
    """Whole or not at all: others read meanwhile."""
    handle, part = tempfile.mkstemp(dir=path.parent)
    with open(handle, "w") as f:
        json.dump({p.name: (p.code.hex(), p.maps) for p in programs.values()}, f)
    os.replace(part, path)


def _compile(bpf: Any, flags: tuple[str, ...], text: str) -> dict[str, Program]:
    include = FOLDER / "include"
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    cflags = [*flags, f"-I/usr/include/{multiarch}", "-I/usr/include", "-Wno-unused-value"]
    with _compiling, _environment("BCC_KERNEL_SOURCE", str(include)), tempfile.TemporaryFile() as log:
        try:
            with _stderr_to(log.fileno()):
                module = bpf(text=text.encode(), cflags=cflags)
        except Exception as e:  # bcc raises nothing narrower
            log.seek(0)
            raise _refused(log.read().decode(errors="replace"), str(e)) from e
        log.seek(0)
        # Warnings, and what other threads said meanwhile.
        sys.stderr.write(log.read().decode(errors="replace"))
        try:
            return {name: _take(module, name) for name in (XDP, GUARD)}
        finally:
            module.cleanup()


def _import_bcc() -> Any:
    try:
        from bcc import BPF
    except ImportError as e:
        raise PrivilegeError(
            f"bcc is not importable by {sys.executable} ({e}): install Debian's python3-bpfcc and use a venv made "
            "by `/usr/bin/python3 -m venv --system-site-packages` (`make setup` does both)"
        ) from e
    return BPF


def _refused(log: str, error: str) -> SteeringError | PrivilegeError:
    if os.geteuid() != 0 and "error:" not in log:
        return PrivilegeError("loading the steering program needs root (CAP_BPF and CAP_NET_ADMIN)")
    handle, path = tempfile.mkstemp(prefix="bypass-bcc-", suffix=".log")
    with open(handle, "w") as f:
        f.write(log or error)
    first = next((line for line in log.splitlines() if "error" in line), error)
    return SteeringError(f"bcc cannot compile the steering program: {first}; all messages are in {path}")


def _take(module: Any, name: str) -> Program:
    """A function's bytecode out of a bcc module, with its map references by name."""
    from bcc import lib

    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong]
    lib.bpf_num_tables.restype = ctypes.c_ulonglong
    lib.bpf_num_tables.argtypes = [ctypes.c_void_p]
    names = [lib.bpf_table_name(module.module, i) for i in range(lib.bpf_num_tables(module.module))]
    by_fd = {lib.bpf_table_fd(module.module, n): n.decode() for n in names}
    start = lib.bpf_function_start(module.module, name.encode())
    code = bytearray(ctypes.string_at(start, lib.bpf_function_size(module.module, name.encode())))
    maps = []
    for number in range(len(code) // 8):
        opcode, registers, _, value = _INSN.unpack_from(code, number * 8)
        if opcode == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            maps.append((number, by_fd[value]))
            struct.pack_into("=i", code, number * 8 + 4, 0)
    return Program(name, bytes(code), tuple(maps))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _stderr_to(fd: int) -> Iterator[None]:
    """bcc's compiler writes its messages to file descriptor 2."""
    kept = os.dup(2)
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

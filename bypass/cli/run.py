# SPDX-License-Identifier: Apache-2.0
"""`bypass run`."""

from __future__ import annotations

import errno
import mmap
import os
import pwd
import shutil
import socket
import stat
import struct
from collections.abc import Mapping

import click

from bypass.errors import BypassError, PrivilegeError

DEFAULT_POLICY = "/etc/bypass/policy.yaml"
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell's


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "-c", "--policy", metavar="POLICY", help="A broker of the program's own with this policy (root)."
)
@click.option("--user", metavar="USER", help="Run the program as this user (root).")
@click.option(
    "--loopback", is_flag=True, help="No network: the program talks to itself on the stack. No privilege."
)
@click.option("--procname", metavar="NAME", help="How the application is called in `bypass ps`.")
@click.option(
    "--socket", "socket_name", metavar="SOCKET", help="The broker's socket; @NAME is an abstract one."
)
@click.argument("program", metavar="PROGRAM [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    policy: str | None,
    user: str | None,
    loopback: bool,
    procname: str | None,
    socket_name: str | None,
    program: tuple[str, ...],
) -> None:
    """Run an unmodified program on the stack: its granted sockets, the rest stays the kernel's.

    The broker is the one at SOCKET (default: BYPASS_SOCKET, else /run/bypass/broker.sock). Where none runs, and with
    --policy or --loopback, the program gets one of its own, which ends with it; its policy is POLICY (default:
    BYPASS_POLICY, else /etc/bypass/policy.yaml), and every rule is granted to the user that the program runs as.

    The program replaces this command: it has its process number, and its exit code and signals are the program's own.

    \b
    Examples:
      bypass run -- redis-server --port 6379
      bypass run -c policy.yaml --user www-data -- python3 -m http.server 8080
      bypass run --loopback -- python3 -m test test_socket
    """
    from bypass.app import preload_library
    from bypass.broker.protocol import socket_name as default_socket

    account = _account(user)
    library = preload_library()
    name = socket_name or default_socket()
    if policy is not None or loopback or not answers(name):
        name = _private(policy, loopback, account.pw_uid, name)
    environ = environment(library, name, procname)
    if user is not None:
        become(account)
    if not os.access(library, os.R_OK):
        # The loader would only say so, and start the program on the kernel.
        raise BypassError(
            f"user {account.pw_name} cannot read {library}: open the folders above it, or install it (`make install`)"
        )
    if reason := beyond_reach(program[0], environ):
        click.echo(f"bypass: {program[0]} {reason}: all its sockets are the kernel's", err=True)
    try:
        os.execvpe(program[0], list(program), environ)
    except OSError as e:
        click.echo(f"bypass: {program[0]}: {e.strerror}", err=True)
        code = NOT_FOUND if e.errno == errno.ENOENT else NOT_EXECUTABLE
        raise click.exceptions.Exit(code) from e


def _account(user: str | None) -> pwd.struct_passwd:
    try:
        if user is None:
            try:
                return pwd.getpwuid(os.getuid())
            except KeyError:
                return pwd.struct_passwd((str(os.getuid()), "x", os.getuid(), os.getgid(), "", "/", ""))
        account = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise BypassError(f"no user {user!r} here (`getent passwd`)") from None
    if os.geteuid() != 0 and account.pw_uid != os.geteuid():
        raise PrivilegeError("--user takes root")
    return account


def become(account: pwd.struct_passwd) -> None:
    """Gives the privileges of root up for those of a user."""
    if os.geteuid() == 0:
        os.initgroups(account.pw_name, account.pw_gid)
        os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
        os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)


def environment(library: os.PathLike[str], name: str, procname: str | None) -> dict[str, str]:
    """The program's environment."""
    environ = dict(os.environ)
    environ.pop("BYPASS_APP", None)  # whose relative this command is, if it runs inside of one
    others = [p for p in environ.get("LD_PRELOAD", "").replace(" ", ":").split(":") if p]
    environ["LD_PRELOAD"] = ":".join([os.fspath(library), *others])
    environ["BYPASS_SOCKET"] = name
    if procname is not None:
        environ["BYPASS_PROCNAME"] = procname
    return environ


ELF_HEAD = struct.Struct("<4sBBB9xHHIQQQIHHHHHH")  # elf(5): of 64-bit little-endian files
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
PT_INTERP = 3
GO_MARK = b"\xff Go buildinf:"  # cmd/go: debug/buildinfo finds it the same way


def beyond_reach(program: str, environ: Mapping[str, str]) -> str:
    """Why the library will have no effect in a program that can be read; empty: it may have, or nothing is known."""
    path = shutil.which(program, path=environ.get("PATH"))
    if path is None:
        return ""
    try:
        with open(path, "rb") as f:
            about = os.fstat(f.fileno())
            head = f.read(ELF_HEAD.size)
            if len(head) < ELF_HEAD.size or not head.startswith(b"\x7fELF\x02\x01"):
                return ""  # a script, or for another machine
            _, _, _, _, _, _, _, _, at, _, _, _, size, count, *_ = ELF_HEAD.unpack(head)
            f.seek(at)
            table = f.read(size * count)
            f.seek(0)
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
                go = text.find(GO_MARK) >= 0
    except (OSError, ValueError):
        return ""
    kinds = {
        PROGRAM_HEADER.unpack_from(table, i * size)[0] for i in range(count) if size >= PROGRAM_HEADER.size
    }
    if go:
        return "is written in Go, whose programs make their system calls without the C library"
    if PT_INTERP not in kinds:
        return "is linked statically, without the C library that bypass takes calls from"
    if (about.st_mode & stat.S_ISUID and about.st_uid != os.geteuid()) or (
        about.st_mode & stat.S_ISGID and about.st_gid != os.getegid()
    ):
        return "becomes another user or group, for which the loader takes no libraries from the environment"
    return ""


def answers(name: str) -> bool:
    """Somebody listens at the broker's socket."""
    from bypass.broker.protocol import socket_address

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(socket_address(name))
    return code in (0, errno.EAGAIN)  # EAGAIN: it is busy


def _private(policy: str | None, loopback: bool, uid: int, tried: str) -> str:
    from bypass.broker.private import start_private
    from bypass.broker.shared import site_of
    from bypass.broker.site import LoopSite, Site
    from bypass.policy import load_policy
    from bypass.profiles import NO_OPTIONS

    if loopback:
        options = load_policy(policy).stack if policy is not None else NO_OPTIONS
        return start_private(lambda: LoopSite(options), uid)
    path = policy or os.environ.get("BYPASS_POLICY") or DEFAULT_POLICY
    if policy is None and not os.path.exists(path):
        raise BypassError(
            f"no broker runs at {tried}, and there is no policy {path}: `bypass up -c POLICY`, or name one: -c"
        )
    loaded = load_policy(path)
    if os.geteuid() != 0:
        raise PrivilegeError(f"no broker runs at {tried}: have root start one (`bypass up -c {path}`)")

    def make() -> Site:
        return site_of(loaded)

    return start_private(make, uid)

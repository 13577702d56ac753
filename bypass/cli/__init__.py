# SPDX-License-Identifier: Apache-2.0
"""The `bypass` command. Each subcommand lives in a module of this package, imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from bypass import __version__
from bypass.errors import BypassError

# command -> (module, attribute, one line of help: the module is not imported to list it)
COMMANDS = {
    "conns": ("bypass.cli.conns", "conns", "Sockets of programs on bypass, and why some are the kernel's."),
    "up": (
        "bypass.cli.broker",
        "up",
        "Start a broker: programs of several users take flows of an interface.",
    ),
    "down": ("bypass.cli.broker", "down", "End a broker, at once or when its connections have ended."),
    "reload": ("bypass.cli.broker", "reload", "Put a changed policy in force under traffic."),
    "ps": ("bypass.cli.ps", "ps", "Applications: who, how, which leases, how much CPU."),
    "explain": (
        "bypass.cli.explain",
        "explain",
        "Which rule, which application and which queue a flow meets.",
    ),
    "doctor": ("bypass.cli.doctor", "doctor", "Check this machine and an interface, and say what to mend."),
    "flows": ("bypass.cli.flows", "flows", "Rules and live entries, with packets and bytes."),
    "lab": (
        "bypass.cli.lab",
        "lab",
        "Two network namespaces joined by a multi-queue veth, to try things in.",
    ),
    "nic": ("bypass.cli.nic", "nic", "Devices for DPDK: drivers, virtual functions, hugepages."),
    "policy": ("bypass.cli.policy", "policy", "Check a policy file; print the schema."),
    "run": ("bypass.cli.run", "run", "Run an unmodified program on the stack."),
    "stats": ("bypass.cli.stats", "stats", "Counters of the program, the rings and the stack."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Every command takes --help; those that print tables take --json.",
)
@click.version_option(__version__, prog_name="bypass")
def cli() -> None:
    """Chosen flows of a shared NIC, served by a TCP/IP stack in user space; the kernel keeps the rest."""


def main(args: Sequence[str] | None = None, **extra: Any) -> int:
    """Entry point. A BypassError becomes one message on stderr and its exit code (2 unless it says otherwise)."""
    try:
        result = cli.main(args=args, prog_name="bypass", standalone_mode=False, **extra)
    except BypassError as e:
        click.echo(f"bypass: {e}", err=True)
        return e.exit_code
    except click.exceptions.Abort:
        click.echo("bypass: interrupted", err=True)
        return 130
    except click.ClickException as e:
        e.show()
        return e.exit_code
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())

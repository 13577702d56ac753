# SPDX-License-Identifier: Apache-2.0
"""`bypass doctor`."""

from __future__ import annotations

import json

import click

STYLE = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.argument("interface", metavar="[IFACE]", default="")
@click.option(
    "-c",
    "--config",
    "file",
    metavar="POLICY",
    help="Check what this policy needs; its interface, if none is given.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(interface: str, file: str | None, as_json: bool) -> int:
    """Check this machine, and IFACE if it is given; say what to mend and what `mode: auto` would take.

    With a policy of kind dpdk also what its port needs: DPDK's libraries, the plug-in, hugepages, IOMMU, vfio, the
    device's driver. Without one it is said what there is of these.

    \b
    Exit code: 0 nothing fails (there may be warnings), 1 something does, 2 there is no such interface, or the policy
    is wrong.

    \b
    Examples:
      bypass doctor
      bypass doctor eth1
      bypass doctor -c policy.yaml
      bypass lab exec server -- bypass doctor bypass0
    """
    from bypass.doctor import diagnose
    from bypass.policy import load_policy

    policy = load_policy(file) if file else None
    if policy is not None and policy.backend.kind == "afxdp":
        interface = interface or policy.interface
    elif policy is not None and interface == policy.interface:
        interface = ""  # of dpdk it is the TAP device, made when it starts
    report = diagnose(interface, policy)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return int(report.verdict == "fail")

    from rich.markup import escape

    from bypass.cli.table import console, print_table

    def styled(verdict: str) -> str:
        return f"[{STYLE[verdict]}]{verdict}[/]"

    rows = []
    for c in report.checks:
        found = escape(c.found) + (f"\n[cyan]mend:[/] {escape(c.fix)}" if c.fix else "")
        rows.append([interface if c.group == "interface" else "", escape(c.name), styled(c.verdict), found])
    print_table(["", "check", "verdict", "found"], rows, markup=True)
    out = console()
    if report.mode:
        out.print(f"mode: auto takes [bold]{report.mode}[/]: {escape(report.reason)}")
    bad = {v: sum(c.verdict == v for c in report.checks) for v in ("fail", "warn")}
    out.print(f"{styled(report.verdict)}: {bad['fail']} to mend, {bad['warn']} to know about")
    return int(report.verdict == "fail")

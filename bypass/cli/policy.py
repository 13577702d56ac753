# SPDX-License-Identifier: Apache-2.0
"""`bypass policy check | schema`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from bypass.cli.table import print_table
from bypass.errors import PolicyError
from bypass.policy import DpdkBackend, Policy, load_policy, policy_schema
from bypass.rules import MAX_MASKS, Mask

SHOWN_RULES = 50


@click.group()
def policy() -> None:
    """Check a policy file; print the schema.

    \b
    Examples:
      bypass policy check config/web.yaml
      bypass policy check --json config/web.yaml
      bypass policy schema > policy.schema.json
    """


@policy.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def check(file: str, as_json: bool) -> int:
    """Check FILE and say what it means. Nothing is applied, no privilege is needed.

    Every error is printed as FILE:LINE:COLUMN: FIELD: what is wrong: what would be right. Exit code 0, or 2 when
    there are errors.

    \b
    Example:
      bypass policy check config/web.yaml
    """
    try:
        checked = load_policy(file)
    except PolicyError as error:
        if as_json:
            problems = [asdict(p) for p in error.problems]
            click.echo(json.dumps({"file": file, "ok": False, "problems": problems}, indent=2))
        else:
            click.echo(str(error), err=True)
            click.echo(f"{len(error.problems)} problem{'s' * (len(error.problems) != 1)}", err=True)
        return error.exit_code
    if as_json:
        click.echo(json.dumps({"file": file, "ok": True, **summary(checked)}, indent=2))
    else:
        print_summary(checked)
    return 0


@policy.command()
def schema() -> None:
    """Print the JSON Schema of policy files, so that editors complete and check them.

    \b
    Example, for editors that use yaml-language-server:
      bypass policy schema > policy.schema.json
      and at the head of the policy:  # yaml-language-server: $schema=policy.schema.json
    """
    click.echo(json.dumps(policy_schema(), indent=2))


def summary(checked: Policy) -> dict[str, Any]:
    """What a good policy says, for programs. `rules` are in the order in which they decide."""
    compiled = checked.compiled
    order = sorted(compiled.rules, key=lambda r: -compiled.ranks[r.index])
    return {
        "interface": checked.interface,
        "backend": backend_json(checked),
        "profile": checked.profile,
        "stack": {k: v for k, v in asdict(checked.stack).items() if v is not None},
        "congestion": checked.congestion,
        "rules": [
            {
                "name": r.name,
                "line": r.line,
                "match": r.match_text(),
                "action": r.action,
                "rank": compiled.ranks[r.index],
            }
            for r in order
        ],
        "masks": [asdict(m) for m in compiled.masks],
        "max_masks": MAX_MASKS,
        "entries": len(compiled),
        "conflicts": [],
        "parses": {"ipv6": compiled.uses_v6, "vlan_tags": compiled.vlan_depth},
    }


def backend_json(checked: Policy) -> dict[str, Any]:
    backend = checked.backend
    if not isinstance(backend, DpdkBackend):
        return asdict(backend)
    routes = [{"to": str(to), "via": str(via)} for to, via in backend.routes]
    return asdict(backend) | {"addresses": [str(a) for a in backend.addresses], "routes": routes}


def backend_text(checked: Policy) -> str:
    b = checked.backend
    if isinstance(b, DpdkBackend):
        kernel = (
            f"kernel by {b.exception}, {b.exception_rate} packets/s" if b.exception == "tap" else "no kernel"
        )
        rules = "" if b.hardware_rules == "none" else f", hardware rules {b.hardware_rules}"
        return f"{b.device}, {b.queues} queue{'s' * (b.queues != 1)}, {kernel}{rules}"
    queues = "all queues" if b.queues is None else "queues " + ", ".join(map(str, b.queues))
    rules = "" if b.hardware_rules == "none" else f", hardware rules {b.hardware_rules}"
    return f"mode {b.mode}, {queues}{rules}"


def print_summary(checked: Policy) -> None:
    """The same for people."""
    compiled, backend = checked.compiled, checked.backend
    click.echo(f"{checked.path}: good. {checked.interface} by {backend.kind}, {backend_text(checked)}")
    if isinstance(backend, DpdkBackend):
        click.echo(f"Addresses: {', '.join(map(str, backend.addresses)) or 'none'}")
        for to, via in backend.routes:
            click.echo(f"Route: {to} via {via}")
    if checked.profile is not None:
        click.echo(f"Profile: {checked.profile}")
    said = [f"{k} {v}" for k, v in asdict(checked.stack).items() if v is not None]
    if said:
        click.echo(f"Stack: {', '.join(said)}")
    if checked.congestion is not None:
        click.echo(f"Congestion control: {checked.congestion}")
    order = sorted(compiled.rules, key=lambda r: -compiled.ranks[r.index])
    click.echo("\nRules, in the order in which they decide:")
    rows = [(str(r.line), r.name, r.action, r.match_text()) for r in order[:SHOWN_RULES]]
    print_table(("LINE", "NAME", "ACTION", "MATCH"), rows, right=("LINE",))
    if len(order) > SHOWN_RULES:
        click.echo(f"... and {len(order) - SHOWN_RULES} more")
    click.echo(f"\nMasks: {len(compiled.masks)} of {MAX_MASKS}; entries: {len(compiled)}")
    print_table(("MASK",), [(mask_text(m, compiled.key_v6),) for m in compiled.masks])
    click.echo("\nConflicts: none")


def mask_text(mask: Mask, key_v6: bool) -> str:
    """A mask in words. Lengths are of IPv6 addresses where keys hold these (IPv4: 96 more)."""
    bits = 128 if key_v6 else 32
    parts = []
    if mask.family:
        parts.append("family")
    parts += [
        f"{side} /{n} of {bits}"
        for side, n in (("local", mask.local_plen), ("remote", mask.remote_plen))
        if n
    ]
    ports = (("local_port", mask.local_port_mask), ("remote_port", mask.remote_port_mask))
    parts += [name if value == 0xFFFF else f"{name} & {value:#06x}" for name, value in ports if value]
    parts += [name for name, used in (("proto", mask.proto), ("vlan", mask.vlan)) if used]
    return ", ".join(parts)

# SPDX-License-Identifier: Apache-2.0
"""The benchmark's tables for people; bench.json holds the same and more."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

QUIET_SHARE = 0.05  # CPU of others up to which rates are worth reading


def show(result: dict[str, Any], console: Console) -> None:
    """Every part that was run."""
    if "tests" in result:
        for test in result["tests"].values():
            console.print(_test(test))
        _warn(result["tests"], console)
    if "drop" in result:
        for sender in result["drop"]["senders"].values():
            console.print(_drop(sender))
        for way, what in result["drop"]["missing"].items():
            console.print(f"[yellow]{way}: not measured, missing: {what}")
    if "instructions" in result:
        _instructions(result["instructions"], console)
    if "sim_bulk" in result:
        b = result["sim_bulk"]
        console.print(
            f"\n[bold]Bulk over the simulated wire[/], both ends on one core, MSS {b['mss']}: "
            f"{_spread(b['gbit_per_cpu_s'])} Gbit per CPU second (budget: {b['budget']:g})"
        )
    if "hostile" in result:
        h = result["hostile"]
        fates = ", ".join(f"{h[fate]:,} {fate}" for fate in ("lost", "reordered", "duplicated", "corrupted"))
        console.print(
            f"\n[bold]Over a hostile wire[/]: {h['bytes'] / 1e9:g} GB, every byte as it was sent; of {h['frames']:,} "
            f"frames of the sender {fates}; longest stall {h['longest_stall_s']:g} s of virtual time; "
            f"{h['cpu_s']:g} s of CPU"
        )
    if "idle_connection" in result:
        i = result["idle_connection"]
        console.print(
            f"[bold]Idle connection[/]: {i['bytes']:.0f} bytes, {i['conns']:,} of them (budget: {i['budget']}); "
            f"address space for 1,000,000: {i['arena_bytes_1m'] / 1e6:.0f} MB"
        )
    if "copies" in result:
        _copies(result["copies"], console)
    if "churn" in result:
        _churn(result["churn"], console)
    if "flood" in result:
        _flood(result["flood"], console)
    if "costs" in result:
        _costs(result["costs"], console)


def _copies(found: dict[str, Any], console: Console) -> None:
    each = (
        f"{name.replace('_', ' ')} {max(c['sent']):g} sent, {max(c['received']):g} received"
        for name in ("plain", "zero_copy")
        for c in (found[name],)
    )
    console.print(
        f"[bold]Payload bytes copied by the stack per byte delivered[/]: {'; '.join(each)} (budget: 1 and 0). "
        f"CPU without copies by CPU with them: {_spread(found['cpu_ratio'])}"
    )


def _churn(found: dict[str, Any], console: Console) -> None:
    table = Table(title="\nConnections opened, used and closed one after another", title_justify="left")
    table.title_style = "bold"
    for name in (
        "connections",
        "server MB",
        "client MB",
        "process MB",
        "at the server",
        "TIME_WAIT",
        "chunks",
    ):
        table.add_column(name, justify="right")
    for m in found["memory"]:
        table.add_row(
            f"{m['conns']:,}",
            *(f"{m[which] / 1e6:.2f}" for which in ("server", "client", "process")),
            *(f"{m[which]:,}" for which in ("open", "time_wait", "chunks")),
        )
    table.caption = (
        f"{found['per_cpu_s']:,.0f} a CPU second, both ends on one core; TIME_WAIT taken over {found['taken_over']:,} "
        "times"
    )
    table.caption_justify = "left"
    console.print(table)


def _flood(found: dict[str, Any], console: Console) -> None:
    if "missing" in found:
        console.print(f"[yellow]Flood of SYNs: not counted, missing: {found['missing']}")
        return
    table = Table(
        title=f"\nA flood of {found['syns']:,} forged SYNs", title_justify="left", title_style="bold"
    )
    table.add_column("instructions of the server's stack")
    table.add_column("count", justify="right")
    for what, count in (
        ("a request and its answer, without the flood", found["quiet"]),
        (f"the same, with {found['syns'] // found['requests']} forged SYNs for each", found["flooded"]),
        ("a forged SYN", found["syn"]),
    ):
        table.add_row(what, f"{count:,.0f}")
    table.caption = (
        f"ratio {found['ratio']:.3f} (budget: {found['budget']:g}); {found['newcomers']} new clients connected, asked "
        f"and left; {found['cookies']:,} cookies; the server's arena after a tenth, a half and all: "
        + ", ".join(f"{n / 1e3:,.0f} kB" for n in found["resident"])
    )
    table.caption_justify = "left"
    console.print(table)


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _spread(s: dict[str, float]) -> str:
    return f"{_number(s['median'])} ({_number(s['min'])} .. {_number(s['max'])})"


def _test(test: dict[str, Any]) -> Table:
    table = Table(title=f"\n{test['title']}", title_justify="left", title_style="bold")
    table.add_column("server")
    table.add_column(test["unit"], justify="right")
    table.add_column("CPU s/GB" if test["unit"] == "Gbit/s" else "CPU s/Mop", justify="right")
    latency = "p50_us" in next(iter(test["variants"].values()))
    if latency:
        table.add_column("p50 µs", justify="right")
        table.add_column("p99 µs", justify="right")
    for v in test["variants"].values():
        row = [f"({v['role']}) {v['title']}", _spread(v["rate"]), _number(v["cpu_s"]["median"])]
        if latency:
            row += [_number(v["p50_us"]["median"]), _number(v["p99_us"]["median"])]
        table.add_row(*row)
    lines = ["rate: " + "   ".join(f"{name} {_spread(r)}" for name, r in test["ratios"].items())]
    lines += ["CPU: " + "   ".join(f"{name} {_spread(r)}" for name, r in test["cpu_ratios"].items())]
    table.caption = "\n".join(lines)
    table.caption_justify = "left"
    return table


def _warn(tests: dict[str, Any], console: Console) -> None:
    worst = max(v["other_cpu_share"]["median"] for t in tests.values() for v in t["variants"].values())
    if worst > QUIET_SHARE:
        console.print(
            f"[yellow]The machine was not quiet: other programs took up to {worst:.0%} of both cores. "
            "Rates and latencies say little then; the CPU of servers that sleep still does."
        )


def _drop(sender: dict[str, Any]) -> Table:
    table = Table(
        title=f"\nDropping a flood, sender: {sender['title']}", title_justify="left", title_style="bold"
    )
    for name in ("dropped by", "packets/s", "CPU s/Mpkt", "arrived"):
        table.add_column(name, justify="left" if name == "dropped by" else "right")
    for w in sender["ways"].values():
        table.add_row(
            w["title"],
            _spread(w["packets_per_s"]),
            _spread(w["cpu_s_per_million"]),
            f"{w['arrived_share']['median']:.1%}",
        )
    table.caption = "   ".join(f"{name} {_spread(r)}" for name, r in sender["ratios"].items())
    table.caption_justify = "left"
    return table


def _instructions(found: dict[str, Any], console: Console) -> None:
    if "missing" in found:
        console.print(f"[yellow]Instructions: not counted, missing: {found['missing']}")
        return
    one, many = found["one"], found["batch"]
    console.print(
        f"\n[bold]Instructions of one request and response[/], server's side: {one['per_request']:,.0f}, of them the "
        f"stack {one['stack']:,.0f} (budget: {found['budget']:,}), the device of memory {one['device']:.0f}, the "
        f"program {one['program']:.0f}; with {many['connections']} requests a poll the stack takes "
        f"{many['stack']:,.0f}"
    )
    table = Table("function", "instructions", "share")
    for name, n in one["functions"].items():
        table.add_row(name, f"{n:.0f}", f"{n / one['per_request']:.1%}")
    console.print(table)


def _costs(costs: dict[str, Any], console: Console) -> None:
    if "missing" in costs:
        console.print(f"[yellow]Profile: not taken, missing: {costs['missing']}")
        return
    profiles = list(costs["tests"].values())
    for profile in profiles:
        if "missing" in profile:
            console.print(f"[yellow]Profile of {profile['title']}: {profile['missing']}")
    profiles = [p for p in profiles if "missing" not in p]
    table = Table(title=f"\nWhere the server's time goes ({costs['variant']})", title_justify="left")
    table.title_style = "bold"
    table.add_column("cost")
    for profile in profiles:
        table.add_column(profile["title"], justify="right")
    for name in dict.fromkeys(name for p in profiles for name in p["groups"]):
        table.add_row(name, *(f"{p['groups'].get(name, 0):.1%}" for p in profiles))
    console.print(table)
    for profile in profiles:
        largest = ", ".join(f"{name} {share:.1%}" for name, share in list(profile["functions"].items())[:5])
        console.print(escape(f"Largest functions, {profile['title']}: {largest}"))

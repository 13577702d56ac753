# SPDX-License-Identifier: Apache-2.0
"""Asking the processes of this network namespace; what `bypass flows` and `bypass stats` share."""

from __future__ import annotations

from typing import Any

import click

from bypass import netns
from bypass.errors import BypassError
from bypass.status import ask, instances


def ask_all(what: str, interface: str, limit: int) -> list[dict[str, Any]]:
    """The answers of all processes, of one interface or (`""`) of all. Those that do not answer are told on stderr.

    Raises:
        BypassError: there is none, or none answers.
    """
    found = instances(interface or None)
    if not found:
        raise BypassError(nobody(interface))
    answers, failures = [], []
    for instance in found:
        try:
            answers.append(ask(instance, what, limit))
        except BypassError as error:
            failures.append(str(error))
    if not answers:
        raise BypassError("; ".join(failures))
    for failure in failures:
        click.echo(f"bypass: {failure}", err=True)
    return answers


def nobody(interface: str) -> str:
    """Says that nobody is here, and where somebody is."""
    on = f" on {interface}" if interface else ""
    elsewhere = []
    for name in netns.names():
        try:
            if netns.run(name, instances, interface or None):
                elsewhere.append(name)
        except OSError:
            continue  # entering it needs CAP_SYS_ADMIN
    hint = f"; there are some in: {', '.join(elsewhere)} (ip netns exec NAME bypass ...)" if elsewhere else ""
    return f"no process steers flows{on} in this network namespace{hint}"


def xdp_text(answer: dict[str, Any]) -> str:
    """How XDP runs, where there is some."""
    return f", XDP {answer['xdp_mode']}" if answer["xdp_mode"] else ""

# SPDX-License-Identifier: Apache-2.0
"""What the benchmark's commands share: figures into a file, and errors as one line and exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.programs import BenchError
from bypass.errors import BypassError


def save(result: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


def start(main: Callable[[], Any], name: str = "bench") -> None:
    try:
        main()
    except (BenchError, BypassError) as e:
        click.echo(f"{name}: {e}", err=True)
        sys.exit(2)

# SPDX-License-Identifier: Apache-2.0
"""Medians and spreads over rounds, as they stand in bench.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypedDict


class Spread(TypedDict):
    """Over rounds: the middle value, the smallest, the largest."""

    median: float
    min: float
    max: float


def spread(values: Sequence[float], digits: int = 4) -> Spread:
    """Rounded to `digits` significant digits. ValueError: no values."""
    return {
        "median": significant(statistics.median(values), digits),
        "min": significant(min(values), digits),
        "max": significant(max(values), digits),
    }


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Of pairs from the same round: what disturbs one round disturbs both of its members."""
    return spread([n / d for n, d in zip(numerators, denominators, strict=True)])


def significant(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")

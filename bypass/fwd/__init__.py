# SPDX-License-Identifier: Apache-2.0
"""The broker's side of bypass-fwd: starting it, finding one that runs, and everything that it can be told.

    forwarder.py   Forwarder: the messages of `fwd.h`, one method each
    connection.py  requests and answers, and what comes unasked
    records.py     what is told and answered, between Python and the structs of `fwd.h`
    program.py     where the program is, and how it starts

The C files of this folder are bypass-fwd itself (docs/fwd.md).
"""

from __future__ import annotations

from bypass.fwd.forwarder import Forwarder
from bypass.fwd.program import binary
from bypass.fwd.records import (
    Died,
    Doorbells,
    Event,
    ForwarderError,
    Item,
    Lease,
    LinkState,
    Listed,
    PortCut,
    QueuesAdded,
)

__all__ = [
    "Died",
    "Doorbells",
    "Event",
    "Forwarder",
    "ForwarderError",
    "Item",
    "Lease",
    "LinkState",
    "Listed",
    "PortCut",
    "QueuesAdded",
    "binary",
]

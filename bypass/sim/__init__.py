# SPDX-License-Identifier: Apache-2.0
"""Simulated networks: any number of stacks on wires with a virtual clock, seeded faults, and pcapng of any wire.

    from bypass.sim import Faults, Network

    net = Network(seed=7)
    net.wire(faults=Faults(loss=0.02, delay_ns=5_000_000))
    a, b = net.stack("10.0.0.1/24"), net.stack("10.0.0.2/24")
    server = b.create_server(("10.0.0.2", 80))
    client = a.create_connection(("10.0.0.2", 80))   # runs the virtual clock

network.py: the objects; pcap.py: recorded frames; *.c: the simulation itself, its interface in sim.h.
"""

from bypass.sim.network import (
    Capture,
    DeviceFaults,
    Fate,
    Faults,
    Network,
    Port,
    PortStats,
    RawPort,
    SimulationError,
    Wire,
)
from bypass.sim.pcap import DeviceCapture, Frame, Recorder, write_pcapng

__all__ = [
    "Capture",
    "DeviceCapture",
    "DeviceFaults",
    "Fate",
    "Faults",
    "Frame",
    "Network",
    "Port",
    "PortStats",
    "RawPort",
    "Recorder",
    "SimulationError",
    "Wire",
    "write_pcapng",
]

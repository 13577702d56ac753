# SPDX-License-Identifier: Apache-2.0
"""Your own protocol on raw frames: every UDP datagram of a policy's flows goes back to where it came from.

.venv/bin/bypass lab up
.venv/bin/bypass lab exec server -- .venv/bin/python examples/raw_ping.py config/udp-echo.yaml 192.0.2.10 7
.venv/bin/bypass lab exec client -- sh -c 'echo hello | nc -u -w1 192.0.2.10 7'
"""

from __future__ import annotations

import sys

import bypass
import bypass.raw


def turned_round(frame: bytes) -> bytes:
    """MAC addresses, IPv4 addresses and UDP ports swapped; neither checksum changes by that."""
    ip = 14
    udp = ip + (frame[ip] & 15) * 4
    return (
        frame[6:12] + frame[0:6] + frame[12 : ip + 12]
        + frame[ip + 16 : ip + 20] + frame[ip + 12 : ip + 16] + frame[ip + 20 : udp]
        + frame[udp + 2 : udp + 4] + frame[udp : udp + 2] + frame[udp + 4 :]
    )  # fmt: skip


def main() -> None:
    policy, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with bypass.raw.open_port(policy, [("udp", host, port)]) as raw:
        print(f"turning round what comes to {host}:{port}; Ctrl-C ends it", flush=True)
        while True:
            for frame in raw.recv():
                raw.send([turned_round(frame.data)], queue=frame.queue)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except bypass.BypassError as e:
        sys.exit(f"raw_ping: {e}")

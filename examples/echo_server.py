# SPDX-License-Identifier: Apache-2.0
"""An echo server on blocking sockets, shaped like the standard library's.

.venv/bin/bypass lab up
.venv/bin/bypass lab exec server -- .venv/bin/python examples/echo_server.py config/web.yaml 192.0.2.10 8080
.venv/bin/bypass lab exec client -- sh -c 'echo hello | nc -N 192.0.2.10 8080'
"""

from __future__ import annotations

import sys

import bypass


def main() -> None:
    policy, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with bypass.Stack.from_policy(policy) as stack, stack.create_server((host, port)) as server:
        print(f"echoing on {host}:{port}; one connection at a time, Ctrl-C ends it", flush=True)
        while True:
            connection, peer = server.accept()
            with connection:
                while data := connection.recv(65536):
                    connection.sendall(data)
            print(f"{peer[0]}:{peer[1]} has gone", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except bypass.BypassError as e:
        sys.exit(f"echo_server: {e}")

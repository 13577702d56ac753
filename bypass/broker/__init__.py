# SPDX-License-Identifier: Apache-2.0
"""The broker: who may take which flows of an interface, and everything that applications may not do themselves.

    policy --> Broker --- SOCK_SEQPACKET ---> applications (bypass/app/app.h)
                 |  grants, leases, next hops, addresses; memory file and AF_XDP sockets by SCM_RIGHTS
                 v
               Site: XDP program, live endpoints, AF_XDP sockets, netlink

It holds what needs privilege; applications have none. No packet passes through it.

    protocol.py  messages, between bytes and Python        apps.py    applications, their processes, their leases
    memory.py    an application's memory file              broker.py  which message is whose; state.py what parts share
    shadow.py    the kernel socket that holds a port       arrivals.py, leasing.py, news.py, departures.py  its parts
    blocks.py    blocks of ports, for who connects much    server.py  the socket, the one loop
    site.py      what the broker asks of an interface      admin.py   what tools ask; tools.py is their end
    interface.py an interface, of whatever kind            private.py, daemon.py  how a broker begins and ends
    afxdp.py     one by AF_XDP; direct.py, shared.py: who  closer.py  closing what anybody passed
    ports.py     several applications, by bypass-fwd       users.py   who asks, and which rules it may use
    holder.py    what outlives the broker                  takeover.py  going on with what a killed one left
"""

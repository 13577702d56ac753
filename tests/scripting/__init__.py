# SPDX-License-Identifier: Apache-2.0
"""Conversations as data: scripts in packetdrill's language, run on our stack in virtual time or on Linux in real time.

    lang.py     text -> Script (what is said, and where it stands in the file)
    packets.py  segments of a script <-> IPv4 packets
    play.py     runs a Script against a backend and judges
    infos.py    the expressions of %{ assert ... }% blocks, and the names of TCP_INFO
    ours.py     backend: our stack, alone on a simulated wire, virtual time
    linux.py    backend: the kernel of this machine, behind a TUN device in a namespace of its own, real time

The language is described in docs/scripts.md.
"""

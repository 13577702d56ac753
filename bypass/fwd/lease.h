/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lease.h - which application a flow belongs to: a hash table of leases. Both directions ask the same question: who
 * would get the answer may send. One with a peer comes before one for an address, before one for any address; single
 * ports before blocks of 256. Addresses are IPv4 in network order, ports in host order.
 */
#ifndef BYPASS_FWD_LEASE_H
#define BYPASS_FWD_LEASE_H

#include "bypass.h"

enum { LEASES_MAX = 65536, LEASE_BLOCK = 256 /* ports of a block, aligned */ };

struct flow {
    uint32_t local, remote;
    uint16_t local_port, remote_port;
    uint8_t proto;
};

struct lease_key {
    uint32_t local;  /* 0: any address of the host */
    uint32_t remote; /* 0, as is remote_port: any peer */
    uint16_t local_port, remote_port;
    uint8_t proto;
    uint8_t block; /* 1: LEASE_BLOCK ports from local_port on */
    uint16_t zero;
};

struct lease {
    struct lease_key key;
    uint32_t owner; /* 0: this place is empty */
};

struct leases {
    struct lease *table; /* 2 * LEASES_MAX places, open addressing */
    uint32_t count;
    uint32_t of_kind[8]; /* so that kinds which nobody has are not looked for */
    uint64_t seed;       /* applications choose ports, not chains */
};

int leases_init(struct leases *l, uint64_t seed); /* 0, -ENOMEM */
void leases_free(struct leases *l);
/* owner: not 0. -EINVAL: no such key; -EEXIST: it is there; -ENOSPC. */
int leases_add(struct leases *l, const struct lease_key *key, uint32_t owner);
/* -ENOENT: it is not there, or another's. */
int leases_remove(struct leases *l, const struct lease_key *key, uint32_t owner);
void leases_remove_all(struct leases *l, uint32_t owner);
/* The owner of the lease that fits best; 0: nobody's. */
uint32_t leases_owner(const struct leases *l, const struct flow *f);

#endif

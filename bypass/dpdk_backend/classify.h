/* SPDX-License-Identifier: Apache-2.0 */
/*
 * classify.h - the steering program's decision (bypass/bpf/xdp_steer.c) in plain C, for packets that no XDP program sees:
 * whose they are by the policy's rules, the live entries and this host's addresses. Same reasons, verdicts, rules,
 * entries and hashes for the same bytes.
 *
 * Everything lies in one memory range without pointers, which several processes may map at different addresses (a sealed
 * memfd: the broker writes, bypass-fwd reads). `struct classifier` is a process's own view of it.
 *
 *   Readers   classify(): takes no lock, waits for nobody, and reads nothing outside of the range whatever stands in it.
 *             Counters are written by it: one thread at a time classifies on a range.
 *   Writers   any process that has it mapped; they are trusted. They exclude each other by two locks in the range: one for
 *             the rules, held while a policy is put in (long), one for all the rest, held for one change (short). A
 *             writer that is killed in the middle leaves the old or the new state, and the next one goes on: nothing is
 *             changed in place that a reader could find half done (classify_mem.h says how).
 *
 * Nothing here allocates, makes system calls (but those of a lock that somebody else holds) or reads a clock. Results
 * are >= 0, or -errno. Memory has to be zero before classify_init().
 */
#ifndef BYPASS_DPDK_CLASSIFY_H
#define BYPASS_DPDK_CLASSIFY_H

#ifndef BYPASS_CDEF
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#endif

#include "bpf/reasons.h"

enum {
    CLASSIFY_ABI = 2,     /* changes with anything that lies in the memory */
    CLASSIFY_MASKS = 16,  /* distinct masks of a policy */
    CLASSIFY_OWNERS = 16, /* sets of queues */
    CLASSIFY_QUEUES = 256,
    CLASSIFY_KEY = 40, /* bytes of a rule's key, at most */
    CLASSIFY_NONE = 0xffffffff,
    CLASSIFY_BURST = 32, /* frames that classify_burst() looks at together */

    /* classify_result.verdict */
    CLASSIFY_PASS = 0, /* the kernel's */
    CLASSIFY_DROP = 1,
    CLASSIFY_STEER = 2, /* the stack's, or the application's that owns the entry */

    /* classify_endpoint.flags */
    CLASSIFY_DRAIN = 1,     /* TCP flows that are held (classify_held_*) pass */
    CLASSIFY_UNSETTLED = 2, /* which flows are held is being found out: TCP passes but SYNs, which are dropped */

    /* classify_key.kind */
    CLASSIFY_SOCKET = 0,
    CLASSIFY_BLOCK = 1, /* 256 local ports from local_port on */

    /* flags of a held flow */
    CLASSIFY_TIME_WAIT = 1, /* the kernel's socket waits only: a SYN is not its own */

    /* sets of 16-byte members, for classify_set_* */
    CLASSIFY_LOCALS4 = 0, /* IPv4 address in the first 4 bytes, zeroes behind */
    CLASSIFY_LOCALS6 = 1,
    CLASSIFY_GROUPS = 2, /* joined group MAC addresses: 6 bytes, zeroes behind */
    CLASSIFY_SETS = 3,
};

/* How much a range has room for. What is not used costs address space, and no memory. */
struct classify_config {
    uint32_t abi;       /* CLASSIFY_ABI */
    uint32_t keys;      /* of the rules of a policy, after compilation; at most 1 << 22 */
    uint32_t endpoints; /* live entries; their numbers are below */
    uint32_t held;      /* flows of the kernel */
    uint32_t members;   /* of each set */
    uint32_t reserved;
    uint64_t seed; /* unpredictable: hash tables are keyed with it */
};

struct classify_area { /* one of the two places for a policy; private */
    uint64_t slots, counts;
};

struct classify_table { /* private */
    uint64_t slots, bits;
};

/* A process's view. Fields are private. */
struct classifier {
    uint8_t *mem;
    uint64_t size, seed[2];
    struct classify_config cfg;
    uint32_t area_bits; /* slots of an area: 1 << area_bits */
    struct classify_area area[2];
    struct classify_table endpoints, held, set[CLASSIFY_SETS];
    uint64_t entry_counts;
};

struct classify_result {
    uint8_t reason;  /* enum steer_reason, or REASON_UNSETTLED.. of reasons.h */
    uint8_t verdict; /* CLASSIFY_PASS.. */
    uint16_t owner;  /* CLASSIFY_STEER: of the entry */
    uint32_t entry;  /* CLASSIFY_STEER: its number; else CLASSIFY_NONE */
    uint32_t rule;   /* the rule that decided, in file order from 0; CLASSIFY_NONE: none did */
    uint32_t hash;   /* CLASSIFY_STEER: of the flow; same flow, same value; not keyed */
};

struct classify_frame {
    const uint8_t *data; /* from the destination MAC address on */
    uint32_t len, queue;
};

struct classify_count {
    uint64_t packets, bytes;
};

/* IPv4; addresses and ports as they are on the wire (network order). */
struct classify_key {
    uint8_t local[4];  /* 0: any */
    uint8_t remote[4]; /* 0, as is remote_port: not connected */
    uint8_t local_port[2];
    uint8_t remote_port[2];
    uint8_t proto;
    uint8_t kind; /* CLASSIFY_SOCKET, CLASSIFY_BLOCK */
    uint8_t zero[2];
};

struct classify_endpoint {
    uint32_t entry; /* below classify_config.endpoints */
    uint16_t owner; /* below CLASSIFY_OWNERS */
    uint16_t flags;
};

/* One mask of a policy: the bits that a key compares. Layout of keys: struct rule_key of bypass/bpf/steer.h; of 16 bytes,
 * or of 40 with key_v6. The number of the mask lies in the low half of the last byte of a key. */
struct classify_mask {
    uint8_t bits[CLASSIFY_KEY];
    uint32_t max_rank; /* of the rules below it */
    uint32_t reserved;
};

struct classify_rule {    /* struct rule_value of steer.h */
    uint32_t rank;        /* larger wins; unique to the rule, from 1 */
    uint32_t rule_action; /* number of the rule << 2 | 0 steer, 1 pass, 2 drop */
};

struct classify_policy {
    uint32_t key_v6;     /* addresses in keys have 16 bytes */
    uint32_t with_v6;    /* IPv6 packets are parsed */
    uint32_t vlan_depth; /* tags that are looked behind, 0..2 */
    uint32_t masks_n;
    uint32_t rules; /* numbers of rules are below */
    uint32_t keys_n;
    const struct classify_mask *masks; /* by descending max_rank */
    const uint8_t *keys;               /* one behind the other, each of 16 or 40 bytes */
    const struct classify_rule *values;
};

/* ---- The range ----------------------------------------------------------------------------------------------- */

/* Bytes of a range, or 0: the configuration makes no sense. */
size_t classify_mem_size(const struct classify_config *cfg);
/* In zeroed memory of at least that size, aligned to 64. Until classify_rules_set() and classify_set_add() nothing is
 * taken. -EINVAL. */
int classify_init(struct classifier *c, void *mem, size_t size, const struct classify_config *cfg);
/* On what another process has made. -EINVAL: that is something else. */
int classify_attach(struct classifier *c, void *mem, size_t size);

/* ---- Readers ------------------------------------------------------------------------------------------------- */

/* Judges one frame that came by a receive queue, and counts it. Returns the verdict. */
int classify(struct classifier *c, const uint8_t *frame, uint32_t len, uint32_t queue, struct classify_result *out);
/* The same for n frames, with what they need of memory asked for ahead. */
void classify_burst(struct classifier *c, const struct classify_frame *in, uint32_t n, struct classify_result *out);

/* ---- Writers ------------------------------------------------------------------------------------------------- */

/* Puts a policy in force: each packet meets the old rules or the new ones. -EINVAL: it makes no sense, or has the same
 * key twice; -ENOSPC: more keys or rules than the range has room for. The old policy stays in force then. */
int classify_rules_set(struct classifier *c, const struct classify_policy *p);

/* -EEXIST, -ENOSPC, -EINVAL. Its counter begins at 0. */
int classify_endpoint_add(struct classifier *c, const struct classify_key *key, const struct classify_endpoint *e);
/* Other flags. -ENOENT. */
int classify_endpoint_set(struct classifier *c, const struct classify_key *key, uint32_t flags);
/* -ENOENT. wait false: -EBUSY where another writer is at it, for who must not wait. */
int classify_endpoint_del(struct classifier *c, const struct classify_key *key, bool wait);
/* -ENOENT. */
int classify_endpoint_get(struct classifier *c, const struct classify_key *key, struct classify_endpoint *out);
/* The next one from place *at on (0 first), which moves on. 1; 0: there is none any more. */
int classify_endpoint_next(struct classifier *c, uint32_t *at, struct classify_key *key, struct classify_endpoint *out);

/* A TCP flow that the kernel has a connection of, both ends named; again: other flags. -ENOSPC, -EINVAL. */
int classify_held_add(struct classifier *c, const struct classify_key *flow, uint32_t flags);
int classify_held_del(struct classifier *c, const struct classify_key *flow); /* -ENOENT */
int classify_held_next(struct classifier *c, uint32_t *at, struct classify_key *flow, uint32_t *flags);

int classify_set_add(struct classifier *c, int set, const uint8_t member[16]); /* -EEXIST, -ENOSPC, -EINVAL */
int classify_set_del(struct classifier *c, int set, const uint8_t member[16]); /* -ENOENT, -EINVAL */
int classify_set_next(struct classifier *c, int set, uint32_t *at, uint8_t member[16]);

/* The interface's MAC address, the only one; or a new one, beside which the one before is taken until the next
 * classify_mac_set(): while the kernel's device changes, nothing that the stack has may reach it by either. */
void classify_mac_set(struct classifier *c, const uint8_t mac[6]);
void classify_mac_change(struct classifier *c, const uint8_t mac[6]);
void classify_mac(const struct classifier *c, uint8_t mac[6]);
/* Whether an owner takes packets of a queue. All owners take those of all queues until this says otherwise; what live
 * TCP comes by another one is dropped, UDP passes (as where a queue has no AF_XDP socket). -EINVAL */
int classify_served_set(struct classifier *c, uint32_t owner, uint32_t queue, bool served);

/* ---- Counters ------------------------------------------------------------------------------------------------ */

int classify_reason_count(const struct classifier *c, uint32_t reason, struct classify_count *out); /* -EINVAL */
int classify_entry_count(const struct classifier *c, uint32_t entry, struct classify_count *out);   /* -EINVAL */
/* Of the first n rules of the policy in force (previous 0), or of the one before it (1), which a reader may have counted for
 * until just now. Returns how many rules there are. */
int classify_rule_counts(const struct classifier *c, int previous, struct classify_count *out, uint32_t n);

#endif

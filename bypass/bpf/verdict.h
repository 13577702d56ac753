/* SPDX-License-Identifier: (GPL-2.0 OR BSD-2-Clause) */
/*
 * What the steering program writes into the 16 bytes of packet metadata in front of each frame that it
 * redirects, and AF_XDP delivers there (kernel Documentation/networking/xdp-rx-metadata.rst). Read by
 * bypass/afxdp/. Host byte order. Included by the BPF program and by the C core.
 */
#ifndef BYPASS_BPF_VERDICT_H
#define BYPASS_BPF_VERDICT_H

#define STEER_VERDICT_MAGIC 0x42595053u /* "BYPS" */

struct steer_verdict {
    unsigned int magic; /* STEER_VERDICT_MAGIC: metadata of another program is not taken for ours */
    unsigned int entry; /* number of the live entry */
    unsigned int rule;  /* number of the policy rule, in file order from 0 */
    unsigned int hash;  /* flow hash: same flow, same value; not keyed */
};

#endif

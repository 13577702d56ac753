/* SPDX-License-Identifier: Apache-2.0 */
/* The built-in algorithms. They use the public interface (bypass.h, "Congestion control") and nothing else. */
#ifndef BYPASS_STACK_TCP_CC_H
#define BYPASS_STACK_TCP_CC_H

#include "types.h"

extern const struct bypass_cc_ops tcp_bbr, tcp_cubic, tcp_dctcp, tcp_reno;

enum { TCP_CC_BUILTINS = 4 };
const char *tcp_cc_builtin(uint32_t i); /* the name of an index of conn.cc; NULL: it is none of the built-in ones */

/* Slow start, then congestion avoidance by one segment a window, with the bytes towards it in *rest. */
void tcp_reno_grow(struct bypass_cc *cc, uint32_t acked, uint64_t *rest);
/* RFC 5681 equation 4. */
uint32_t tcp_reno_ssthresh(struct bypass_cc *cc, int event);
/* Slow start with appropriate byte counting (RFC 3465), by so many segments at most. Returns what is left of `acked`
 * when ssthresh is reached. */
uint32_t tcp_reno_slow_start(struct bypass_cc *cc, uint32_t acked, uint32_t segments);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* The services of the benchmark's servers, on their old port numbers (RFC 862, 863, 864). */
#ifndef BENCH_PORTS_H
#define BENCH_PORTS_H

enum { PORT_ECHO = 7, PORT_DISCARD = 9, PORT_CHARGEN = 19 };

#endif

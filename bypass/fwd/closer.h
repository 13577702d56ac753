/* SPDX-License-Identifier: Apache-2.0 */
/*
 * closer.h - closes descriptors that came from elsewhere. close(2) may take as long as it likes: a socket with SO_LINGER
 * waits for its peer, a file of a file system in user space for that. So it is done by threads, but for those that cannot.
 */
#ifndef BYPASS_FWD_CLOSER_H
#define BYPASS_FWD_CLOSER_H

/* Never waits. -1 is skipped. */
void close_later(const int *fds, int n);

#endif

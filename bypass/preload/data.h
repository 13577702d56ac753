/* SPDX-License-Identifier: Apache-2.0 */
/* data.h - bytes in and out of an object, without the C library's conventions: results are >= 0 or -errno. */
#ifndef BYPASS_PRELOAD_DATA_H
#define BYPASS_PRELOAD_DATA_H

#include "preload.h"

/* Lock held (let go of while it waits); fd names the object. flags: MSG_*. from, to: may be NULL. *out_flags: MSG_* of
 * what came; may be NULL. */
int64_t data_receive(struct object *o, int fd, const struct iovec *iov, int count, int flags,
                     struct bypass_endpoint *from, int *out_flags);
int64_t data_send(struct object *o, int fd, const struct iovec *iov, int count, int flags,
                  const struct bypass_endpoint *to);
/* Bytes of all pieces, or -EINVAL: too many. */
int64_t data_size(const struct iovec *iov, int count);
/* After leave(): SIGPIPE, where the call was a stream's and did not ask for none (send(2)). */
int64_t data_broken_pipe(int64_t r, int flags, int type);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * own_calls.h - put in front of the device's sources when they are compiled for the preload library: what they call is
 * the C library's, not ours, which hides the library's own descriptors from programs.
 */
#ifndef BYPASS_PRELOAD_OWN_CALLS_H
#define BYPASS_PRELOAD_OWN_CALLS_H

#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "preload/real.h"

#define socket(...) real.socket(__VA_ARGS__)
#define bind(...) real.bind(__VA_ARGS__)
#define getsockopt(...) real.getsockopt(__VA_ARGS__)
#define setsockopt(...) real.setsockopt(__VA_ARGS__)
#define sendto(...) real.sendto(__VA_ARGS__)
#define recvfrom(...) real.recvfrom(__VA_ARGS__)
#define recv(...) real.recv(__VA_ARGS__)
#define ioctl(...) real.ioctl(__VA_ARGS__)
#define fcntl(...) real.fcntl(__VA_ARGS__)
#define close(...) real.close(__VA_ARGS__)
#define read(...) real.read(__VA_ARGS__)
#define write(...) real.write(__VA_ARGS__)
#define poll(...) real.poll(__VA_ARGS__)
#define epoll_create1(...) real.epoll_create1(__VA_ARGS__)
#define epoll_ctl(...) real.epoll_ctl(__VA_ARGS__)

#endif

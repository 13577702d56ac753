/* SPDX-License-Identifier: (GPL-2.0 OR BSD-2-Clause) */
/* The kernel's own type names on top of the UAPI ones, for the helpers that bcc puts in front of each program. */
#ifndef BYPASS_BPF_LINUX_TYPES_H
#define BYPASS_BPF_LINUX_TYPES_H

#include_next <linux/types.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;
enum { false = 0, true = 1 };

#endif

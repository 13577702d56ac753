/* SPDX-License-Identifier: (GPL-2.0 OR BSD-2-Clause) */
/* bcc asks for the version of the kernel that it builds for; the steering program uses nothing that depends on it. */
#define LINUX_VERSION_CODE 0
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))

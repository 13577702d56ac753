/* SPDX-License-Identifier: (GPL-2.0 OR BSD-2-Clause) */
/* Keeps the folder: bcc passes it to the compiler and wants it to exist. */

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * load.h - finds and loads the DPDK plug-in. Needs no DPDK; without it there is one error that names the packages.
 */
#ifndef BYPASS_DPDK_LOAD_H
#define BYPASS_DPDK_LOAD_H

#include "dpdk_backend/plugin.h"

/* The plug-in's table, once loaded for the rest of the process. `path` names the file; NULL: $BYPASS_DPDK, else
 * bypass-dpdk.so beside this code, in build/ next to the package, or in lib/bypass below its prefix. NULL: *error says
 * why (ENOENT: there is none; ELIBACC: DPDK's libraries are missing; ELIBBAD: another build's). */
BYPASS_API const struct dpdk_plugin *dpdk_load(const char *path, struct dpdk_error *error);

#endif

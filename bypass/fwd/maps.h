/* SPDX-License-Identifier: Apache-2.0 */
/* maps.h - bpf(2) on maps that were passed by descriptor. 0 or -errno. */
#ifndef BYPASS_FWD_MAPS_H
#define BYPASS_FWD_MAPS_H

#include <stdint.h>

int map_update(int map, uint32_t key, uint32_t value);
int map_delete(int map, const void *key);

#endif

/* SPDX-License-Identifier: Apache-2.0 */
/* afxdp_order.h - what the device had done by the time it called bind, once per call. */
#ifndef AFXDP_ORDER_H
#define AFXDP_ORDER_H

#include "afxdp/afxdp.h"

int order_binds(void);           /* calls so far */
uint32_t order_filled(int call); /* frames that the fill ring held */
uint32_t order_flags(int call);  /* sxdp_flags */

#endif

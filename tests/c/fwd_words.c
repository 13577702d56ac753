/* SPDX-License-Identifier: Apache-2.0 */
#include "fwd_words.h"

#include "fwd/layout.h"

uint32_t *fwd_word(void *mem, int which)
{
    struct port_shared *sh = mem;
    uint32_t *words[] = {&sh->rx_posted, &sh->tx_posted,  &sh->rx_done,   &sh->tx_done,
                         &sh->link,      &sh->fwd_sleeps, &sh->app_sleeps};

    return words[which];
}

void fwd_positions(void *mem, uint32_t first)
{
    struct port_shared *sh = mem;
    uint32_t *const all[] = {&sh->rx_posted,   &sh->tx_posted,  &sh->rx_done,      &sh->tx_done,      &sh->st.rx_posted,
                             &sh->st.rx_taken, &sh->st.rx_done, &sh->st.tx_posted, &sh->st.tx_reaped, &sh->st.tx_done};

    for (unsigned i = 0; i < sizeof all / sizeof *all; i++) {
        *all[i] += first;
    }
}

uint32_t *fwd_rx_slot(struct port *p, uint32_t i) { return &p->rx[i & (p->sh->cfg.rx_ring - 1)].frame; }
uint32_t *fwd_tx_slot(struct port *p, uint32_t i) { return &p->tx[i & (p->sh->cfg.tx_ring - 1)].frame; }

void fwd_spoil(struct port *p, int how)
{
    switch (how) {
    case 0:
        p->free_list[1] = p->free_list[0];
        break;
    case 1:
        p->nd.meta[p->free_list[0]].holders = BYPASS_HOLD_STACK;
        break;
    case 2:
        p->sh->st.rx_taken--;
        break;
    default:
        p->sh->st.tx_posted++;
    }
}

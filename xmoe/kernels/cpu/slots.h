/* Slots, which are (token, choice) pairs, sorted by the expert they chose. */
#ifndef XMOE_CPU_SLOTS_H
#define XMOE_CPU_SLOTS_H

#include "product.h"

struct piece { /* slots of one expert: `slot[first]` and those that follow, as many as `count` */
    int64_t expert, first, count;
};

/* Sorts `all` slots, indices[i] being the expert of slot i or -1 for none, and cuts each expert's into pieces of at most
 * `most`; returns how many pieces. Written: slot[r], the slot at rank r; place[i], the rank of slot i or -1. next is room for
 * experts + 1, slot, place and piece are room for `all`. */
static int64_t sort_slots(const int64_t *indices, int64_t all, int64_t experts, int64_t most, int64_t *next, int64_t *place,
                          int64_t *slot, struct piece *piece) {
    int64_t pieces = 0;
    memset(next, 0, (experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < all; i++)
        if (indices[i] >= 0) next[indices[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) {
        int64_t first = next[e], last = next[e + 1] += first;
        for (; first < last; first += most) piece[pieces++] = (struct piece){e, first, smaller(most, last - first)};
    }
    for (int64_t i = 0; i < all; i++) {
        place[i] = indices[i] < 0 ? -1 : next[indices[i]]++;
        if (place[i] >= 0) slot[place[i]] = i;
    }
    return pieces;
}
#endif

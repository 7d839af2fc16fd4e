/* What adapters add to a product with few rows: the weight of expert e becomes W[e] + scale * b[e] a[e], and W stays as it is.
 *
 * a [experts, rank, inner] and b [experts, rows, rank] are floats; `a` is NULL where a weight has no adapter.
 */
#ifndef XMOE_CPU_ADAPTER_H
#define XMOE_CPU_ADAPTER_H

#include "vector.h"

struct adapter {
    const float *a, *b;
    int64_t rank;
    float scale;
};

/* inside[rank] = scale * a[expert] x */
INLINE void into_rank(struct adapter l, int64_t expert, const element *x, int64_t inner, float *inside) {
    for (int64_t j = 0; j < l.rank; j++) {
        const float *row = l.a + (expert * l.rank + j) * inner;
        vf sum = splat(0.0f);
        for (int64_t i = 0; i < inner; i += LANES) sum += load_part(x + i, inner - i) * load_float_part(row + i, inner - i);
        inside[j] = sum_lanes(sum) * l.scale;
    }
}
/* sums[i] += b[row + i] inside, where `row` counts through all experts */
INLINE void out_of_rank(struct adapter l, int64_t row, int64_t rows, const float *inside, float *sums) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < l.rank; j++) sums[i] += l.b[(row + i) * l.rank + j] * inside[j];
}
#endif

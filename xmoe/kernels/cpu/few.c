/* A dense product for a handful of rows, as decoding has them: the weight streams past once, straight from where it lies,
 * and each vector of it is multiplied with every row. bf16 weights are multiplied in pairs where the machine does that.
 *
 * A thread reads four rows of the weight together, far from each other. Neighbouring rows share pages, and such streams
 * the hardware does not tell apart: reading them together halves the bandwidth.
 */
#include "kernels.h"
#include "product.h"

#define STREAMS 4    /* rows of the weight that are read together */
#define MOST_ROWS 4  /* rows of x */
#define TASK 32      /* columns of the result that a thread takes at a time */
#define STEP (LANES * PAIR)
#define AHEAD 1024 /* bytes of a stream from what is read to what is asked for */

#if PAIR == 2
typedef element ready; /* as the activations are multiplied */
INLINE vu load_weight(const element *p) { return load_unit(p); }
#else
typedef float ready;
INLINE vu load_weight(const element *p) { return (vu)load(p); }
#endif

/* sums[c][r] over one vector of the inner dimension, of which `left` values exist */
INLINE void add_products(int rows, int64_t left, const element *const *weight, int64_t at, const ready *x, int64_t x_row,
                         vf sums[STREAMS][MOST_ROWS]) {
#pragma GCC unroll 4
    for (int c = 0; c < STREAMS; c++) {
        const element *from = weight[c] + at;
        vu w;
        if (left >= STEP) w = load_weight(from);
        else {
            element part[STEP] = {0};
            memcpy(part, from, left * sizeof(element));
            w = load_weight(part);
        }
        __builtin_prefetch((const char *)from + AHEAD, 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sums[c][r] = multiply_add(sums[c][r], load_unit(x + at + r * x_row), w);
    }
}
INLINE void columns_by_rows(int rows, const element *weight, const ready *x, int64_t x_row, int64_t inner, int64_t columns,
                            const void *bias, int bias_is_float, element *y, int64_t y_row) {
    int64_t each = (columns + STREAMS - 1) / STREAMS; /* columns of a stream */
    for (int64_t c = 0; c < each; c++) {
        vf sums[STREAMS][MOST_ROWS] = {0};
        int64_t k = 0, column[STREAMS];
        const element *from[STREAMS];
#pragma GCC unroll 4
        for (int i = 0; i < STREAMS; i++) { /* where they do not divide evenly, the last one is computed more than once */
            column[i] = smaller(c + i * each, columns - 1);
            from[i] = weight + column[i] * inner;
        }
        for (; k + STEP <= inner; k += STEP) add_products(rows, STEP, from, k, x, x_row, sums);
        if (k < inner) add_products(rows, inner - k, from, k, x, x_row, sums);
        for (int i = 0; i < STREAMS; i++) {
            int64_t j = column[i];
            float b = !bias ? 0.0f : bias_is_float ? ((const float *)bias)[j] : widen_one(((const uint16_t *)bias)[j]);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) store_one(y + r * y_row + j, total_lanes(sums[i][r]) + b);
        }
    }
}

/* y [rows, columns] = x [rows, inner] weight [columns, inner]^T + bias [columns], floats or bf16, or NULL; up to 4 rows */
int NAME(few_rows)(const element *x, const element *weight, const void *bias, int bias_is_float, int64_t rows, int64_t inner,
                   int64_t columns, element *y) {
    int64_t x_row = round_up(inner, STEP), tasks = (columns + TASK - 1) / TASK;
    ready *from = rooms(rows * x_row * sizeof(ready));
    if (!from) return 1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < x_row; i++)
#if PAIR == 2
            from[r * x_row + i] = i < inner ? x[r * inner + i] : 0;
#else
            from[r * x_row + i] = i < inner ? load_one(x + r * inner + i) : 0.0f;
#endif
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t first = task * TASK, count = smaller(TASK, columns - first);
        const element *w = weight + first * inner;
        const void *b = !bias ? NULL : bias_is_float ? (const void *)((const float *)bias + first) : (const void *)((const uint16_t *)bias + first);
        switch (rows) {
        case 1: columns_by_rows(1, w, from, x_row, inner, count, b, bias_is_float, y + first, columns); break;
        case 2: columns_by_rows(2, w, from, x_row, inner, count, b, bias_is_float, y + first, columns); break;
        case 3: columns_by_rows(3, w, from, x_row, inner, count, b, bias_is_float, y + first, columns); break;
        default: columns_by_rows(4, w, from, x_row, inner, count, b, bias_is_float, y + first, columns);
        }
    }
    free(from);
    return 0;
}

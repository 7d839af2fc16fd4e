/* A dense product for a handful of rows, as decoding has them: the weight streams past once, straight from where it lies,
 * and each vector of it is multiplied with every row. bf16 weights are multiplied in pairs where the machine does that.
 */
#include "product.h"

#define COLUMNS 4    /* rows of the weight that are read side by side */
#define MOST_ROWS 4  /* rows of x */
#define TASK 32      /* columns of the result that a thread takes at a time */
#define STEP (LANES * PAIR)

#if PAIR == 2
typedef element ready; /* as the activations are multiplied */
INLINE vu load_weight(const element *p) { return load_unit(p); }
#else
typedef float ready;
INLINE vu load_weight(const element *p) { return (vu)load(p); }
#endif

/* sums[c][r] over one vector of the inner dimension, of which `left` values exist */
INLINE void add_products(int rows, int64_t left, const element *weight, int64_t inner, const ready *x, int64_t x_row,
                         vf sums[COLUMNS][MOST_ROWS]) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; c++) {
        vu w;
        if (left >= STEP) w = load_weight(weight + c * inner);
        else {
            element part[STEP] = {0};
            memcpy(part, weight + c * inner, left * sizeof(element));
            w = load_weight(part);
        }
        __builtin_prefetch(weight + c * inner + 1024 / sizeof(element));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sums[c][r] = multiply_add(sums[c][r], load_unit(x + r * x_row), w);
    }
}
INLINE void columns_by_rows(int rows, const element *weight, const ready *x, int64_t x_row, int64_t inner, int64_t columns,
                            const void *bias, int bias_is_float, element *y, int64_t y_row) {
    for (int64_t c = 0; c < columns; c += COLUMNS) {
        vf sums[COLUMNS][MOST_ROWS] = {0};
        int64_t k = 0, from = c + COLUMNS <= columns ? c : columns - COLUMNS; /* the last few once more, if need be */
        for (; k + STEP <= inner; k += STEP) add_products(rows, STEP, weight + from * inner + k, inner, x + k, x_row, sums);
        if (k < inner) add_products(rows, inner - k, weight + from * inner + k, inner, x + k, x_row, sums);
        for (int i = 0; i < COLUMNS; i++) {
            float b = !bias ? 0.0f : bias_is_float ? ((const float *)bias)[from + i] : widen_one(((const uint16_t *)bias)[from + i]);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) store_one(y + r * y_row + from + i, total_lanes(sums[i][r]) + b);
        }
    }
}

/* y [rows, columns] = x [rows, inner] weight [columns, inner]^T + bias [columns], floats or bf16, or NULL; up to 4 rows,
 * at least 4 columns */
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
        if (count < COLUMNS) first = columns - COLUMNS, count = COLUMNS;
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

/* The small matrix product that attention and the grouped products share, and the two forms its operands take.
 *
 * The left side is rows of units along the inner dimension, each broadcast to all lanes; the right side is one row of
 * lanes for every unit of the inner dimension. `interleave` and `turn` bring rows of elements into these forms.
 */
#ifndef XMOE_CPU_PRODUCT_H
#define XMOE_CPU_PRODUCT_H

#include "vector.h"

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* c[rows x vectors] (+)= a[rows x k] b[k x vectors], held in registers */
INLINE void tile(int rows, int vectors, int64_t k, const unit *a, int64_t a_row, const unit *b, int64_t b_row, float *c,
                 int64_t c_row, int add) {
    vf sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sum[r][v] = add ? load_float(c + r * c_row + v * LANES) : splat(0.0f);
    for (int64_t i = 0; i < k; i++) {
        vu right[TILE_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) right[v] = load_unit(b + i * b_row + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vu left = (vu){0} + a[r * a_row + i];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sum[r][v] = multiply_add(sum[r][v], left, right[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) store_float(c + r * c_row + v * LANES, sum[r][v]);
}

/* any number of rows: whole tiles, then one tile of what is left over */
INLINE void strip(int vectors, int64_t rows, int64_t k, const unit *a, int64_t a_row, const unit *b, int64_t b_row, float *c,
                  int64_t c_row, int add) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS, a += TILE_ROWS * a_row, c += TILE_ROWS * c_row)
        tile(TILE_ROWS, vectors, k, a, a_row, b, b_row, c, c_row, add);
    switch (rows) {
    case 5: tile(5, vectors, k, a, a_row, b, b_row, c, c_row, add); break;
    case 4: tile(4, vectors, k, a, a_row, b, b_row, c, c_row, add); break;
    case 3: tile(3, vectors, k, a, a_row, b, b_row, c, c_row, add); break;
    case 2: tile(2, vectors, k, a, a_row, b, b_row, c, c_row, add); break;
    case 1: tile(1, vectors, k, a, a_row, b, b_row, c, c_row, add); break;
    }
}

/* c[rows x lanes] (+)= a[rows x k] b[k x lanes]; lanes a multiple of LANES */
static void product(int64_t rows, int64_t lanes, int64_t k, const unit *a, int64_t a_row, const unit *b, int64_t b_row,
                    float *c, int64_t c_row, int add) {
    int64_t l = 0;
    for (; l + TILE_VECTORS * LANES <= lanes; l += TILE_VECTORS * LANES)
        strip(TILE_VECTORS, rows, k, a, a_row, b + l, b_row, c + l, c_row, add);
    for (; l < lanes; l += LANES) strip(1, rows, k, a, a_row, b + l, b_row, c + l, c_row, add);
}

/* elements [rows x width] -> left-hand units [rows x width / PAIR] */
static const unit *as_units(unit *room, const element *from, int64_t count) {
#if defined(XMOE_ELEMENT_BF16) && PAIR == 1
    for (int64_t i = 0; i < count; i += LANES) store_float((float *)room + i, load(from + i));
    return room;
#else
    (void)room, (void)count;
    return (const unit *)from;
#endif
}
/* elements [rows x width] -> right-hand units [rows / PAIR x width]: a unit holds PAIR rows of one column */
static const unit *interleave(unit *room, const element *from, int64_t rows, int64_t width) {
#if PAIR == 2
    for (int64_t i = 0; i < rows; i += 2)
        for (int64_t j = 0; j < width; j += LANES) {
            vu even = __builtin_convertvector((vh) * (const vh_any *)(from + i * width + j), vu);
            vu odd = __builtin_convertvector((vh) * (const vh_any *)(from + (i + 1) * width + j), vu);
            store_unit(room + i / 2 * width + j, even | odd << 16);
        }
    return room;
#else
    return as_units(room, from, rows * width);
#endif
}
INLINE void turn(unit *to, int64_t to_row, const unit *from, int64_t from_row, int64_t rows, int64_t cols) {
    transpose((float *)to, to_row, (const float *)from, from_row, rows, cols);
}

/* the sum of all lanes by halving, where adding them one after the other would wait for each */
INLINE float total_lanes(vf x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    return sum_lanes(x);
#endif
}

static void *carve(char **from, int64_t bytes) {
    void *out = *from;
    *from += round_up(bytes, 64);
    return out;
}
static void *rooms(int64_t bytes) {
    void *out = NULL;
    return posix_memalign(&out, 4096, round_up(bytes, 4096)) ? NULL : out;
}
#endif

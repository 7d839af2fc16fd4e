/* What products for a handful of rows share, whatever form the weight has: the activations, and how sums become results. */
#ifndef XMOE_CPU_ACTIVATIONS_H
#define XMOE_CPU_ACTIVATIONS_H

#include "integers.h"
#include "slots.h"

#define STREAMS 4    /* rows of the weight that are read together */
#define AT_ONCE 4    /* rows of x that a vector of the weight is multiplied with */
#define STEP (LANES * PAIR)
#define AHEAD 1024 /* bytes of a stream from what is read to what is asked for */

#if PAIR == 2
typedef element ready; /* as the activations are multiplied */
INLINE vf load_ready(const ready *p) { return load(p); }
INLINE vu load_weight(const element *p) { return load_unit(p); }
#else
typedef float ready;
INLINE vf load_ready(const ready *p) { return load_float(p); }
INLINE vu load_weight(const element *p) { return (vu)load(p); }
#endif
#if defined(XMOE_ELEMENT_BF16) && defined(__AVX2__)
#define SHORTS (2 * LANES) /* beside integer weights activations are 16-bit integers: so many in a vector */
#else
#define SHORTS 0
#endif

/* A handful of activations in the forms that products take, `row` values apart and zero beyond the end. */
struct activations {
    ready *x;
    int16_t *shorts; /* x / scale, 15 bits and a sign: beside integer weights, where SHORTS */
    float *scale;    /* one for every 32 values; those of a block are alike */
    int64_t row;
};
#define LONGEST_BLOCK 128 /* values under one scale, so that a loud one leaves the others heard: a weight's group at most */
INLINE int64_t block_end(int64_t from, int64_t group) { return smaller(from + LONGEST_BLOCK, (from / group + 1) * group); }

/* what `rows` rows of `inner` activations need, and the same carved out of a workspace */
INLINE int64_t activation_bytes(int64_t rows, int64_t inner) {
    return rows * (round_up(inner, 64) * (sizeof(ready) + (SHORTS ? 2 : 0)) + round_up(inner, 64) / 8) + 3 * 64;
}
INLINE struct activations carve_activations(char **room, int64_t rows, int64_t inner) {
    int64_t row = round_up(inner, 64);
    ready *x = carve(room, rows * row * sizeof(ready));
    int16_t *shorts = carve(room, SHORTS ? rows * row * 2 : 0);
    return (struct activations){x, shorts, carve(room, rows * row / 8), row};
}
INLINE struct activations activations_from(struct activations a, int64_t row) {
    return (struct activations){a.x + row * a.row, a.shorts + row * a.row, a.scale + row * a.row / 32, a.row};
}
/* The shorts of row r, whose x is there, for a weight of such groups, which with inner are multiples of 32. A block that is not
 * finite gets a scale that is not. */
INLINE void make_shorts(struct activations a, int64_t r, int64_t inner, int64_t group) {
#if SHORTS
    const ready *x = a.x + r * a.row;
    int16_t *to = a.shorts + r * a.row;
    for (int64_t from = 0, end; from < inner; from = end) {
        end = block_end(from, group);
        vf largest = splat(0.0f), odd = splat(0.0f), half = splat(0.5f);
        for (int64_t i = from; i < end; i += LANES) {
            vf v = load_ready(x + i);
            largest = vmax(largest, vmax(v, -v)), odd += v * 0.0f;
        }
        float most = 0;
        for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
        int finite = sum_lanes(odd) == 0;
        vf up = splat(finite && most > 0 ? 32767.0f / most : 0.0f);
        for (int64_t i = from; i < end; i += 32) a.scale[r * a.row / 32 + i / 32] = finite ? most / 32767.0f : NAN;
        for (int64_t i = from; i < end; i += LANES) {
            vf v = load_ready(x + i) * up;
            vi whole = __builtin_convertvector(v + (vf)((vi)half | ((vi)v & (int32_t)0x80000000)), vi);
            for (int l = 0; l < LANES; l++) to[i + l] = (int16_t)whole[l];
        }
    }
#else
    (void)a, (void)r, (void)inner, (void)group;
#endif
}
/* row r of `a` from `inner` elements at x, in the forms that this weight is multiplied with */
INLINE void make_ready(struct activations a, int64_t r, const element *x, int64_t inner, const struct weight *w) {
    ready *to = a.x + r * a.row;
    for (int64_t i = 0; i < a.row; i++)
#if PAIR == 2
        to[i] = i < inner ? x[i] : 0;
#else
        to[i] = i < inner ? load_one(x + i) : 0.0f;
#endif
    if (w->form != DENSE) make_shorts(a, r, inner, w->group);
}

/* y[r, column[i]] = the lanes of sums[i][r], added up, and the bias */
INLINE void write_sums(int rows, vf sums[STREAMS][AT_ONCE], const int64_t *column, const void *bias, int bias_is_float, void *y,
                       int64_t y_row, int y_is_float) {
    for (int i = 0; i < STREAMS; i++) {
        int64_t j = column[i];
        float b = !bias ? 0.0f : bias_is_float ? ((const float *)bias)[j] : widen_one(((const uint16_t *)bias)[j]);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            float sum = total_lanes(sums[i][r]) + b;
            if (y_is_float) ((float *)y)[r * y_row + j] = sum;
            else store_one((element *)y + r * y_row + j, sum);
        }
    }
}
#endif

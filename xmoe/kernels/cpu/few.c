/* Dense products for a handful of rows, as decoding has them: the weight streams past once, straight from where it lies,
 * and each vector of it is multiplied with every row. bf16 weights are multiplied in pairs where the machine does that.
 *
 * A thread reads four rows of the weight together, far from each other. Neighbouring rows share pages, and such streams
 * the hardware does not tell apart: reading them together halves the bandwidth.
 */
#include "integers.h"
#include "kernels.h"
#include "slots.h"

#define STREAMS 4    /* rows of the weight that are read together */
#define AT_ONCE 4    /* rows of x that a vector of the weight is multiplied with */
#define MOST_TASK 512 /* columns of the result that a thread takes at a time: many, so that the streams lie far apart, */
#define LEAST_TASK 32 /* but a few tasks for every thread, down to this */
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
                         vf sums[STREAMS][AT_ONCE]) {
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
                            const void *bias, int bias_is_float, void *y, int64_t y_row, int y_is_float) {
    int64_t each = (columns + STREAMS - 1) / STREAMS; /* columns of a stream */
    for (int64_t c = 0; c < each; c++) {
        vf sums[STREAMS][AT_ONCE] = {0};
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
            for (int r = 0; r < rows; r++) {
                float sum = total_lanes(sums[i][r]) + b;
                if (y_is_float) ((float *)y)[r * y_row + j] = sum;
                else store_one((element *)y + r * y_row + j, sum);
            }
        }
    }
}

INLINE const void *bias_from(const void *bias, int is_float, int64_t first) {
    return !bias ? NULL : (const char *)bias + first * (is_float ? 4 : 2);
}
/* rows of x as they are multiplied, zero beyond the end */
INLINE void make_ready(ready *to, const element *x, int64_t inner, int64_t padded) {
    for (int64_t i = 0; i < padded; i++)
#if PAIR == 2
        to[i] = i < inner ? x[i] : 0;
#else
        to[i] = i < inner ? load_one(x + i) : 0.0f;
#endif
}

/* y [rows, columns] = x [rows, inner] weight [columns, inner]^T + bias [columns], floats or bf16, or NULL; for a handful of rows */
int NAME(few_rows)(const element *x, const element *weight, const void *bias, int bias_is_float, int64_t rows, int64_t inner,
                   int64_t columns, element *y) {
    int64_t x_row = round_up(inner, STEP), each = columns / (4 * max_threads());
    ready *from = rooms(rows * x_row * sizeof(ready));
    if (!from) return 1;
    each = smaller(each > LEAST_TASK ? each : LEAST_TASK, MOST_TASK);
    int64_t tasks = (columns + each - 1) / each;
    for (int64_t r = 0; r < rows; r++) make_ready(from + r * x_row, x + r * inner, inner, x_row);
#pragma omp parallel for schedule(dynamic) if (WORTH_SHARING(columns * inner / 4))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t first = task * each, count = smaller(each, columns - first);
        const element *w = weight + first * inner;
        const void *b = bias_from(bias, bias_is_float, first);
        for (int64_t r = 0; r < rows; r += AT_ONCE) { /* from the second time on, the weight comes from the cache */
            const ready *some = from + r * x_row;
            element *to = y + r * columns + first;
            switch (smaller(rows - r, AT_ONCE)) {
            case 1: columns_by_rows(1, w, some, x_row, inner, count, b, bias_is_float, to, columns, 0); break;
            case 2: columns_by_rows(2, w, some, x_row, inner, count, b, bias_is_float, to, columns, 0); break;
            case 3: columns_by_rows(3, w, some, x_row, inner, count, b, bias_is_float, to, columns, 0); break;
            default: columns_by_rows(4, w, some, x_row, inner, count, b, bias_is_float, to, columns, 0);
            }
        }
    }
    free(from);
    return 0;
}

#define PIECE 64 /* rows of an expert's weight that a task takes: gates and ups in turn */

#define DECODED 16 /* rows of integers that are decoded together, few enough for the cache next to the core */

INLINE void piece_of_dense_rows(int64_t rows, const element *weight, const ready *x, int64_t x_row, int64_t inner, int64_t count,
                                const void *bias, int bias_is_float, float *y, int64_t y_row) {
    switch (rows) {
    case 1: columns_by_rows(1, weight, x, x_row, inner, count, bias, bias_is_float, y, y_row, 1); break;
    case 2: columns_by_rows(2, weight, x, x_row, inner, count, bias, bias_is_float, y, y_row, 1); break;
    case 3: columns_by_rows(3, weight, x, x_row, inner, count, bias, bias_is_float, y, y_row, 1); break;
    default: columns_by_rows(4, weight, x, x_row, inner, count, bias, bias_is_float, y, y_row, 1);
    }
}
/* y[rows x count] = up to 4 rows of x times `count` rows of a weight from `row` on, plus their bias; room [DECODED x inner] */
static void piece_of_rows(int64_t rows, const struct weight *w, int64_t row, const ready *x, int64_t x_row, int64_t inner,
                          int64_t count, const void *bias, int bias_is_float, float *y, int64_t y_row, element *room) {
    bias = bias_from(bias, bias_is_float, row);
    if (w->form == DENSE) {
        piece_of_dense_rows(rows, (const element *)w->values + row * inner, x, x_row, inner, count, bias, bias_is_float, y, y_row);
        return;
    }
    for (int64_t r = 0; r < count; r += DECODED) {
        int64_t some = smaller(DECODED, count - r);
        for (int64_t i = 0; i < some; i++) decode_integers(room + i * inner, w, inner, row + r + i, 0, inner);
        piece_of_dense_rows(rows, room, x, x_row, inner, some, bias_from(bias, bias_is_float, r), bias_is_float, y + r, y_row);
    }
}

/* `count` rows of an expert's gate_up, 64 at most, times up to 4 rows of x, and the clamped SwiGLU of their pairs. */
static void activate(int64_t rows, const struct weight *w, int64_t row, const void *bias, int bias_is_float, const ready *x,
                     int64_t x_row, int64_t width, int64_t count, float limit, float alpha, ready *act, int64_t act_row,
                     element *room) {
    float sums[AT_ONCE * PIECE] = {0}, done[PIECE / 2], *h = sums;
    piece_of_rows(rows, w, row, x, x_row, width, count, bias, bias_is_float, sums, PIECE, room);
    for (int64_t i = 0; i < rows; i++, h += PIECE, act += act_row) {
        swiglu_of_pairs(h, PIECE, limit, alpha, done);
        for (int64_t r = 0; r < count / 2; r++) {
#if PAIR == 2
            act[r] = narrow_one(done[r]);
#else
            act[r] = done[r];
#endif
        }
    }
}

/* packed_experts of mxfp4.c for weights that are dense or integers and a handful of tokens: y[t] = sum over k of weights[t, k]
 * f_e(x[t]).
 *
 * gate_up [experts, 2 inner, width], down [experts, width, inner]; a task reads its rows once for each 4 slots of its expert. */
int NAME(few_experts)(const element *x, const int64_t *indices, const float *weights, const struct weight *gate_up,
                      const void *up_bias, const struct weight *down, const void *down_bias, int bias_is_float, element *y, float *norms,
                      int64_t tokens, int64_t slots, int64_t experts, int64_t width, int64_t inner, float limit, float alpha) {
    int64_t all = tokens * slots, x_row = round_up(width, STEP), act_row = round_up(inner, STEP);
    int64_t up_tasks = (2 * inner + PIECE - 1) / PIECE, down_tasks = (width + PIECE - 1) / PIECE;
    int64_t widest = width > inner ? width : inner, decoded = DECODED * round_up(widest, 64) * sizeof(element);
    int64_t bytes = all * (x_row + act_row) * sizeof(ready) + all * width * 4 + all * (16 + sizeof(struct piece)) + (experts + 1) * 8;
    int unpacks = gate_up->form != DENSE || down->form != DENSE;
    char *all_room = rooms(bytes + 8 * 64 + unpacks * decoded * max_threads()), *room = all_room;
    if (!room) return 1;
    ready *from = carve(&room, all * x_row * sizeof(ready)), *act = carve(&room, all * act_row * sizeof(ready)); /* by rank */
    float *out = carve(&room, all * width * 4);
    int64_t *slot = carve(&room, all * 8), *place = carve(&room, all * 8), *next = carve(&room, (experts + 1) * 8);
    struct piece *piece = carve(&room, all * sizeof(struct piece));
    char *to_decode = room;
    int64_t pieces = sort_slots(indices, all, experts, AT_ONCE, next, place, slot, piece);
    for (int64_t i = 0; i < all; i++) {
        if (place[i] < 0) continue;
        make_ready(from + place[i] * x_row, x + i / slots * width, width, x_row);
        memset(act + place[i] * act_row + inner, 0, (act_row - inner) * sizeof(ready));
    }
#pragma omp parallel if (WORTH_SHARING(all * inner * width / 2))
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pieces * up_tasks; task++) { /* the pieces of an expert follow one another, block by block */
            struct piece p = piece[task % pieces];
            int64_t first = task / pieces * PIECE, row = p.expert * 2 * inner + first;
            activate(p.count, gate_up, row, up_bias, bias_is_float, from + p.first * x_row, x_row, width,
                     smaller(PIECE, 2 * inner - first), limit, alpha, act + p.first * act_row + first / 2, act_row,
                     (element *)(to_decode + unpacks * decoded * thread_number()));
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pieces * down_tasks; task++) {
            struct piece p = piece[task % pieces];
            int64_t first = task / pieces * PIECE, row = p.expert * width + first;
            piece_of_rows(p.count, down, row, act + p.first * act_row, act_row, inner, smaller(PIECE, width - first), down_bias,
                          bias_is_float, out + p.first * width + first, width,
                          (element *)(to_decode + unpacks * decoded * thread_number()));
        }
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = 0; c < width; c += LANES) {
            vf sum = splat(0.0f);
            for (int64_t i = t * slots; i < (t + 1) * slots; i++)
                if (place[i] >= 0) sum += load_float_part(out + place[i] * width + c, width - c) * weights[i];
            store_part(y + t * width + c, sum, width - c);
        }
    for (int64_t i = 0; norms && i < all; i++) {
        vf square = splat(0.0f);
        for (int64_t c = 0; place[i] >= 0 && c < width; c += LANES) {
            vf v = load_float_part(out + place[i] * width + c, width - c);
            square += v * v;
        }
        norms[i] = sqrtf(total_lanes(square));
    }
    free(all_room);
    return 0;
}

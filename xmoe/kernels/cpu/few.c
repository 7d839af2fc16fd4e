/* Products for a handful of rows, as decoding has them: the weight streams past once, straight from where it lies, and each
 * vector of it is multiplied with every row. bf16 weights are multiplied in pairs where the machine does that; what integers
 * do stands in few_integers.h.
 *
 * A thread reads four rows of the weight together, far from each other. Neighbouring rows share pages, and such streams
 * the hardware does not tell apart: reading them together halves the bandwidth.
 */
#include "few_integers.h"
#include "kernels.h"

#define MOST_TASK 512 /* columns of the result that a thread takes at a time: many, so that the streams lie far apart, */
#define LEAST_TASK 32 /* but a few tasks for every thread, down to this */

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
        write_sums(rows, sums, column, bias, bias_is_float, y, y_row, y_is_float);
    }
}

INLINE const void *bias_from(const void *bias, int is_float, int64_t first) {
    return !bias ? NULL : (const char *)bias + first * (is_float ? 4 : 2);
}
/* y [rows, columns] = up to 4 rows of x times `columns` rows of a weight from row `first` on, plus their bias (of those rows) */
INLINE void some_rows(int rows, const struct weight *w, int64_t first, struct activations x, int64_t inner, int64_t columns,
                      const void *bias, int bias_is_float, void *y, int64_t y_row, int y_is_float) {
    if (w->form != DENSE)
        integer_columns_by_rows(rows, w, first, x, inner, columns, bias, bias_is_float, y, y_row, y_is_float);
    else
        columns_by_rows(rows, (const element *)w->values + first * inner, x.x, x.row, inner, columns, bias, bias_is_float, y,
                        y_row, y_is_float);
}
INLINE void up_to_four_rows(int64_t rows, const struct weight *w, int64_t first, struct activations x, int64_t inner,
                            int64_t columns, const void *bias, int bias_is_float, void *y, int64_t y_row, int y_is_float) {
    bias = bias_from(bias, bias_is_float, first);
    switch (rows) {
    case 1: some_rows(1, w, first, x, inner, columns, bias, bias_is_float, y, y_row, y_is_float); break;
    case 2: some_rows(2, w, first, x, inner, columns, bias, bias_is_float, y, y_row, y_is_float); break;
    case 3: some_rows(3, w, first, x, inner, columns, bias, bias_is_float, y, y_row, y_is_float); break;
    default: some_rows(4, w, first, x, inner, columns, bias, bias_is_float, y, y_row, y_is_float);
    }
}

/* y [rows, columns] = x [rows, inner] weight [columns, inner]^T + bias [columns], floats or bf16, or NULL; for a handful of rows.
 * The weight is dense, or int8 or int4 with scales, zeros and groups as in integers.h. */
int NAME(few_rows)(const element *x, const void *values, const void *scales, const uint8_t *zeros, int64_t group, int64_t form,
                   const void *bias, int bias_is_float, int64_t rows, int64_t inner, int64_t columns, element *y) {
    struct weight weight = {values, scales, zeros, group, form};
    int64_t each = columns / (4 * max_threads());
    char *all_room = rooms(activation_bytes(rows, inner)), *room = all_room;
    if (!room) return 1;
    struct activations from = carve_activations(&room, rows, inner);
    each = smaller(each > LEAST_TASK ? each : LEAST_TASK, MOST_TASK);
    int64_t tasks = (columns + each - 1) / each;
    for (int64_t r = 0; r < rows; r++) make_ready(from, r, x + r * inner, inner, &weight);
#pragma omp parallel for schedule(dynamic) if (WORTH_SHARING(columns * inner / 4))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t first = task * each, count = smaller(each, columns - first);
        for (int64_t r = 0; r < rows; r += AT_ONCE) /* from the second time on, the weight comes from the cache */
            up_to_four_rows(smaller(rows - r, AT_ONCE), &weight, first, activations_from(from, r), inner, count, bias,
                            bias_is_float, y + r * columns + first, columns, 0);
    }
    free(all_room);
    return 0;
}

#define PIECE 64 /* rows of an expert's weight that a task takes: gates and ups in turn */

/* `count` rows of an expert's gate_up, 64 at most, times up to 4 rows of x, and the clamped SwiGLU of their pairs. */
static void activate(int64_t rows, const struct weight *w, int64_t row, const void *bias, int bias_is_float, struct activations x,
                     int64_t width, int64_t count, float limit, float alpha, struct activations act, int64_t at) {
    float sums[AT_ONCE * PIECE] = {0}, done[PIECE / 2], *h = sums;
    up_to_four_rows(rows, w, row, x, width, count, bias, bias_is_float, sums, PIECE, 1);
    for (int64_t i = 0; i < rows; i++, h += PIECE) {
        ready *to = act.x + i * act.row + at;
        swiglu_of_pairs(h, PIECE, limit, alpha, done);
        for (int64_t r = 0; r < count / 2; r++) {
#if PAIR == 2
            to[r] = narrow_one(done[r]);
#else
            to[r] = done[r];
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
    int64_t all = tokens * slots, up_tasks = (2 * inner + PIECE - 1) / PIECE, down_tasks = (width + PIECE - 1) / PIECE;
    int64_t bytes = all * width * 4 + all * (16 + sizeof(struct piece)) + (experts + 1) * 8 + 5 * 64;
    char *all_room = rooms(bytes + activation_bytes(all, width) + activation_bytes(all, inner)), *room = all_room;
    if (!room) return 1;
    struct activations from = carve_activations(&room, all, width), act = carve_activations(&room, all, inner); /* by rank */
    float *out = carve(&room, all * width * 4);
    int64_t *slot = carve(&room, all * 8), *place = carve(&room, all * 8), *next = carve(&room, (experts + 1) * 8);
    struct piece *piece = carve(&room, all * sizeof(struct piece));
    int64_t pieces = sort_slots(indices, all, experts, AT_ONCE, next, place, slot, piece), used = 0;
    for (int64_t i = 0; i < all; i++) {
        if (place[i] < 0) continue;
        make_ready(from, place[i], x + i / slots * width, width, gate_up);
        memset(act.x + place[i] * act.row + inner, 0, (act.row - inner) * sizeof(ready));
        used++;
    }
#pragma omp parallel if (WORTH_SHARING(all * inner * width / 2))
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pieces * up_tasks; task++) { /* the pieces of an expert follow one another, block by block */
            struct piece p = piece[task % pieces];
            int64_t first = task / pieces * PIECE, row = p.expert * 2 * inner + first;
            activate(p.count, gate_up, row, up_bias, bias_is_float, activations_from(from, p.first), width,
                     smaller(PIECE, 2 * inner - first), limit, alpha, activations_from(act, p.first), first / 2);
        }
        if (down->form != DENSE && SHORTS) {
#pragma omp for
            for (int64_t r = 0; r < used; r++) make_shorts(act, r, inner, down->group);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pieces * down_tasks; task++) {
            struct piece p = piece[task % pieces];
            int64_t first = task / pieces * PIECE, row = p.expert * width + first;
            up_to_four_rows(p.count, down, row, activations_from(act, p.first), inner, smaller(PIECE, width - first), down_bias,
                            bias_is_float, out + p.first * width + first, width, 1);
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

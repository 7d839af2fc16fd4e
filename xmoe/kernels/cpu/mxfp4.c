/* Products with MXFP4 weights as they lie in a checkpoint, so that mapped files stay mapped and every packed byte is read
 * once. A group is 32 inputs of one row: 16 bytes, byte j holding elements 2j (low nibble) and 2j + 1, and a scale byte.
 *
 * Few rows (decoding): a vector of packed bytes is shifted by 4, 8, ... bits and each time looked up in a table, so the
 * values of 8 * LANES weights appear in registers without moving a byte. Lane d then holds elements 8d, 8d + 1, ...: the
 * activations are brought into that order once, which costs nothing beside the weights. A group is 4 lanes, so one
 * multiplication applies its scale. Weights are exact; activations are elements, sums are floats.
 *
 * Many rows (prefill, gradients): pieces of a weight are decoded into the panels of a blocked product, as small as the
 * first cache; no expert ever exists decoded.
 */
#include "adapter.h"
#include "kernels.h"
#include "product.h"
#include "integers.h"
#include "slots.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define GROUP 32
#define GROUP_BYTES 16

#if defined(XMOE_ELEMENT_BF16) && defined(__AVX512BF16__)
#define STEPS 4 /* shifts of a vector: nibbles in a 16-bit word, whose bf16 values are multiplied two a lane */
typedef uint16_t ready;
#else
#define STEPS 8 /* nibbles in a lane, whose values are floats */
typedef float ready;
#endif
#define CHUNK (LANES * 8)               /* weights in a vector of packed bytes */
#define CHUNK_GROUPS (CHUNK / GROUP)    /* = LANES / 4, so LANES groups are 4 chunks */
/* Rows of a weight that are read together, far from each other: neighbours share pages, and such streams the hardware does
 * not tell apart, which costs a third of the bandwidth. */
#if defined(__AVX512F__)
#define STREAMS 4
#else
#define STREAMS 2
#endif
#define AHEAD 1024 /* bytes of a stream from what is read to what is asked for */
#define TOKENS_AT_ONCE 4
#define TASK_ROWS 64   /* rows of a weight a task takes: with gates and ups in turn, one group of activations */
#define TASK_TOKENS 16 /* tokens of one expert that a task takes; it reads the rows again for each 4, from the cache */

/* ------------------------------------------------------------------------------------------- decoding in registers */

/* E2M1: 1 sign bit, 2 exponent bits, 1 mantissa bit; the value of the low nibble of every lane */
INLINE vf nibble_values(vu v) {
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    return (vf)_mm512_permutexvar_ps((__m512i)v, table); /* looks at the low 4 bits only */
#elif defined(__AVX2__)
    const __m256 table = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
    vf magnitude = (vf)_mm256_permutevar8x32_ps(table, (__m256i)v); /* looks at the low 3 bits only */
    return (vf)((vu)magnitude | (v << 28 & 0x80000000u));
#else
    vu code = v & 7u;
    vf f = (vf)((code << 22) + (126u << 23)); /* right from code 2 on; 0 and 1 give 0.5 and 0.75 for 0 and 0.5 */
    f += keep(f - 1.0f, (vi)(code < 2u));
    return (vf)((vu)f | (v << 28 & 0x80000000u));
#endif
}

/* what a step of the product takes: the values of nibble `step` of every lane, or of every 16-bit word */
INLINE vu step_values(vu bytes, int step) {
#if STEPS == 4
    const __m512i table = _mm512_set_epi16( /* bf16, twice, since 5 bits of a word are looked at */
        0xc0c0, 0xc080, 0xc040, 0xc000, 0xbfc0, 0xbf80, 0xbf00, 0x8000, 0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0,
        0xc0c0, 0xc080, 0xc040, 0xc000, 0xbfc0, 0xbf80, 0xbf00, 0x8000, 0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0);
    return (vu)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)bytes, 4 * step), table);
#else
    return (vu)nibble_values(bytes >> (4 * step));
#endif
}
INLINE vf step_product(vf sum, vu weights, const ready *x) {
#if STEPS == 4
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)load_unit(x));
#else
    return sum + (vf)weights * load_float(x);
#endif
}
/* where value i of a row of activations stands in the order described above */
INLINE int64_t place_of(int64_t i) { return i / CHUNK * CHUNK + i % STEPS * (CHUNK / STEPS) + i % CHUNK / STEPS; }
INLINE ready make_ready(float x) {
#if STEPS == 4
    return narrow_one(x);
#else
    return x;
#endif
}

INLINE element ready_to_element(ready x) {
#if STEPS == 4
    return x;
#else
    element e;
    return store_one(&e, x), e;
#endif
}

/* 2^(s - 127): s is the exponent field of a float, except that 2^-127 is the subnormal number with the top bit */
INLINE vf scale_values(vu s) {
    vu bits = s << 23;
    return (vf)(bits | ((vu)(s == 0u) & 0x00400000u));
}
INLINE float scale_value(uint8_t s) {
    union { uint32_t u; float f; } c = {s ? (uint32_t)s << 23 : 0x00400000u};
    return c.f;
}
/* LANES bytes as integers; compilers take a general conversion of bytes apart, one by one */
INLINE vu load_bytes(const uint8_t *p) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    bytes b;
    memcpy(&b, p, LANES);
    return __builtin_convertvector(b, vu);
#endif
}
/* the scales of LANES groups, of which `left` exist */
INLINE vf load_scales(const uint8_t *p, int64_t left) {
    if (left >= LANES) return scale_values(load_bytes(p));
#if defined(__AVX512F__) /* a masked load need not wait for bytes on their way through memory */
    return scale_values((vu)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((1u << left) - 1, p)));
#else
    uint8_t part[LANES] = {0};
    memcpy(part, p, left);
    return scale_values(load_bytes(part));
#endif
}
/* the scales of one chunk out of four, each over the lanes of its group */
INLINE vf spread(vf scales, int chunk) {
#if LANES == 16
    const vi lanes = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    return (vf)_mm512_permutexvar_ps((__m512i)(lanes + chunk * 4), (__m512)scales);
#elif LANES == 8
    float a = scales[2 * chunk], b = scales[2 * chunk + 1];
    return (vf){a, a, a, a, b, b, b, b};
#else
    return splat(scales[chunk]);
#endif
}
/* LANES * 4 packed bytes, of which `bytes` exist */
INLINE vu load_packed(const uint8_t *p, int64_t bytes) {
    if (bytes >= LANES * 4) return load_unit(p);
#if defined(__AVX512F__)
    return (vu)_mm512_maskz_loadu_epi32((1u << bytes / 4) - 1, p);
#else
    uint8_t part[LANES * 4] = {0};
    memcpy(part, p, bytes);
    return load_unit(part);
#endif
}
/* ------------------------------------------------------------------------------------------------- few rows */

/* sums[i] += `left` groups from group g on, up to LANES, of one row of a weight a stream times `tokens` rows of activations */
INLINE void add_groups(int tokens, int64_t left, const uint8_t *const *blocks, const uint8_t *const *scales, int64_t g,
                       const ready *const *x, vf sums[STREAMS][TOKENS_AT_ONCE]) {
    vf factors[STREAMS];
#pragma GCC unroll 4
    for (int i = 0; i < STREAMS; i++) factors[i] = load_scales(scales[i] + g, left);
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        if (c * CHUNK_GROUPS >= left) break;
        int64_t at = g * GROUP + c * CHUNK;
#pragma GCC unroll 4
        for (int i = 0; i < STREAMS; i++) {
            const uint8_t *from = blocks[i] + at / 2;
            vu packed = load_packed(from, (left - c * CHUNK_GROUPS) * GROUP_BYTES), weights[STEPS];
            __builtin_prefetch(from + AHEAD, 0, 2);
#pragma GCC unroll 8
            for (int s = 0; s < STEPS; s++) weights[s] = step_values(packed, s);
            vf factor = spread(factors[i], c);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                vf part = splat(0.0f);
#pragma GCC unroll 8
                for (int s = 0; s < STEPS; s++) part = step_product(part, weights[s], x[t] + at + s * (CHUNK / STEPS));
                sums[i][t] += part * factor;
            }
        }
    }
}

/* out[t * TASK_ROWS + r] = row r of the weight times row t of x */
INLINE void rows_by_tokens(int tokens, const uint8_t *blocks, const uint8_t *scales, int64_t groups, int64_t rows,
                           const ready *const *x, float *out) {
    int64_t each = (rows + STREAMS - 1) / STREAMS; /* rows of a stream */
    for (int64_t r = 0; r < each; r++) {
        vf sums[STREAMS][TOKENS_AT_ONCE] = {0};
        int64_t g = 0, row[STREAMS];
        const uint8_t *b[STREAMS], *s[STREAMS];
#pragma GCC unroll 4
        for (int i = 0; i < STREAMS; i++) { /* where they do not divide evenly, the last one is computed more than once */
            row[i] = smaller(r + i * each, rows - 1);
            b[i] = blocks + row[i] * groups * GROUP_BYTES, s[i] = scales + row[i] * groups;
        }
        for (; g + LANES <= groups; g += LANES) add_groups(tokens, LANES, b, s, g, x, sums);
        if (g < groups) add_groups(tokens, groups - g, b, s, g, x, sums);
#pragma GCC unroll 4
        for (int i = 0; i < STREAMS; i++)
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) out[t * TASK_ROWS + row[i]] = total_lanes(sums[i][t]);
    }
}

static void few_rows(int64_t tokens, const uint8_t *blocks, const uint8_t *scales, int64_t groups, int64_t rows,
                     const ready *const *x, float *out) {
    for (int64_t t = 0; t < tokens; t += TOKENS_AT_ONCE, x += TOKENS_AT_ONCE, out += TOKENS_AT_ONCE * TASK_ROWS)
        switch (tokens - t) {
        case 1: rows_by_tokens(1, blocks, scales, groups, rows, x, out); break;
        case 2: rows_by_tokens(2, blocks, scales, groups, rows, x, out); break;
        case 3: rows_by_tokens(3, blocks, scales, groups, rows, x, out); break;
        default: rows_by_tokens(4, blocks, scales, groups, rows, x, out);
        }
}

INLINE float bias_at(const void *bias, int is_float, int64_t i) {
    return is_float ? ((const float *)bias)[i] : widen_one(((const uint16_t *)bias)[i]);
}

/* One group of 32 activations of a piece: 64 rows of gate_up, their bias, the clamped SwiGLU. */
static void activate(struct piece p, const int64_t *slot, int64_t group, const uint8_t *blocks, const uint8_t *scales,
                     const void *bias, int bias_is_float, const ready *x, int64_t x_row, int64_t slots_per_token, int64_t groups,
                     int64_t width, float limit, float alpha, struct adapter low, const float *inside, ready *act,
                     int64_t act_row) {
    const ready *rows[TASK_TOKENS];
    float sums[TASK_TOKENS * TASK_ROWS], *h = sums, done[TASK_ROWS / 2];
    int64_t row = p.expert * 2 * width + group * TASK_ROWS;
    for (int64_t i = 0; i < p.count; i++) rows[i] = x + slot[p.first + i] / slots_per_token * x_row;
    few_rows(p.count, blocks + row * groups * GROUP_BYTES, scales + row * groups, groups, TASK_ROWS, rows, sums);
    for (int64_t i = 0; i < p.count; i++, h += TASK_ROWS) {
        for (int64_t r = 0; r < TASK_ROWS; r++) h[r] += bias_at(bias, bias_is_float, row + r);
        if (low.a) out_of_rank(low, row, TASK_ROWS, inside + (p.first + i) * low.rank, h);
        swiglu_of_pairs(h, TASK_ROWS, limit, alpha, done);
        ready *to = act + (p.first + i) * act_row;
        for (int64_t r = 0; r < TASK_ROWS / 2; r++) to[place_of(group * GROUP + r)] = make_ready(done[r]);
    }
}

/* Everything between the router and the residual stream, for few tokens: y[t] = sum over k of weights[t, k] f_e(x[t]).
 *
 * x, y [tokens, width]; indices, weights [tokens, slots], index -1 for a slot that is not used; gate_up [experts, 2 inner,
 * width] and down [experts, width, inner] packed; biases floats or bf16; norms [tokens, slots] = ||f_e(x)||, or NULL. Adapters
 * of the two weights as in adapter.h, each with its rank and scale. */
int NAME(packed_experts)(const element *x, const int64_t *indices, const float *weights, const uint8_t *up_blocks,
                         const uint8_t *up_scales, const void *up_bias, const uint8_t *down_blocks, const uint8_t *down_scales,
                         const void *down_bias, int bias_is_float, element *y, float *norms, int64_t tokens, int64_t slots,
                         int64_t experts, int64_t width, int64_t inner, float limit, float alpha, const float *up_a,
                         const float *up_b, int64_t up_rank, float up_scale, const float *down_a, const float *down_b,
                         int64_t down_rank, float down_scale) {
    struct adapter up_adapter = {up_a, up_b, up_rank, up_scale}, down_adapter = {down_a, down_b, down_rank, down_scale};
    int64_t all = tokens * slots, x_row = round_up(width, CHUNK), act_row = round_up(inner, CHUNK);
    int64_t bytes = all * 5 * 8 + (experts + 1) * 8 + tokens * x_row * sizeof(ready) + all * (act_row * sizeof(ready) + width * 4);
    bytes += all * (up_rank + down_rank) * 4 + (down_a ? all * inner * sizeof(element) : 0);
    char *all_room = rooms(bytes + 11 * 64), *room = all_room;
    if (!room) return 1;
    int64_t *slot = carve(&room, all * 8), *place = carve(&room, all * 8), *next = carve(&room, (experts + 1) * 8);
    struct piece *piece = carve(&room, all * sizeof(struct piece));
    ready *ready_x = carve(&room, tokens * x_row * sizeof(ready)), *act = carve(&room, all * act_row * sizeof(ready));
    float *out = carve(&room, all * width * 4);
    float *up_inside = carve(&room, all * up_rank * 4), *down_inside = carve(&room, all * down_rank * 4);
    element *act_elements = carve(&room, down_a ? all * inner * sizeof(element) : 0); /* activations in their own order */

    int64_t pieces = sort_slots(indices, all, experts, TASK_TOKENS, next, place, slot, piece);
    int64_t up_tasks = inner / (TASK_ROWS / 2), down_tasks = (width + TASK_ROWS - 1) / TASK_ROWS;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            memset(ready_x + (t + 1) * x_row - CHUNK, 0, CHUNK * sizeof(ready)); /* zeros meet what is beyond the last group */
            for (int64_t i = 0; i < width; i++) ready_x[t * x_row + place_of(i)] = make_ready(load_one(x + t * width + i));
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < all; i++) memset(act + (i + 1) * act_row - CHUNK, 0, CHUNK * sizeof(ready));
        if (up_a) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < all; i++)
                if (place[i] >= 0)
                    into_rank(up_adapter, indices[i], x + i / slots * width, width, up_inside + place[i] * up_rank);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pieces * up_tasks; task++)
            activate(piece[task / up_tasks], slot, task % up_tasks, up_blocks, up_scales, up_bias, bias_is_float, ready_x, x_row,
                     slots, width / GROUP, inner, limit, alpha, up_adapter, up_inside, act, act_row);
        if (down_a) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < all; i++) {
                if (place[i] < 0) continue;
                element *own = act_elements + i * inner;
                for (int64_t c = 0; c < inner; c++) own[c] = ready_to_element(act[place[i] * act_row + place_of(c)]);
                into_rank(down_adapter, indices[i], own, inner, down_inside + place[i] * down_rank);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < pieces * down_tasks; task++) {
            struct piece p = piece[task / down_tasks];
            int64_t first = task % down_tasks * TASK_ROWS, count = smaller(TASK_ROWS, width - first), groups = inner / GROUP;
            int64_t row = p.expert * width + first;
            const ready *rows[TASK_TOKENS];
            float sums[TASK_TOKENS * TASK_ROWS];
            for (int64_t i = 0; i < p.count; i++) rows[i] = act + (p.first + i) * act_row;
            few_rows(p.count, down_blocks + row * groups * GROUP_BYTES, down_scales + row * groups, groups, count, rows, sums);
            for (int64_t i = 0; i < p.count; i++) {
                float *to = out + (p.first + i) * width + first;
                for (int64_t r = 0; r < count; r++) to[r] = sums[i * TASK_ROWS + r] + bias_at(down_bias, bias_is_float, row + r);
                if (down_a) out_of_rank(down_adapter, row, count, down_inside + (p.first + i) * down_rank, to);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens * width / GROUP; i++) { /* width is a multiple of GROUP */
            int64_t t = i / (width / GROUP), from = i % (width / GROUP) * GROUP;
            for (int64_t c = from; c < from + GROUP; c += LANES) {
                vf sum = splat(0.0f);
                for (int64_t k = t * slots; k < (t + 1) * slots; k++)
                    if (place[k] >= 0) sum += load_float(out + place[k] * width + c) * weights[k];
                store(y + t * width + c, sum);
            }
        }
        if (norms) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < all; i++) {
                vf square = splat(0.0f);
                for (int64_t c = 0; place[i] >= 0 && c < width; c += LANES) {
                    vf v = load_float(out + place[i] * width + c);
                    square += v * v;
                }
                norms[i] = sqrtf(total_lanes(square));
            }
        }
    }
    free(all_room);
    return 0;
}

/* ------------------------------------------------------------------------------------------------ many rows */

#define PANEL 64     /* columns of the result that a task computes together; two groups */
#define DEPTH 256    /* inner dimension taken at a time, so that a decoded panel stays in the first cache */
#define MOST_ROWS 512 /* rows of a task */

/* to[32] = one group, in the order of its elements; exact */
INLINE void decode_group(element *to, const uint8_t *blocks, uint8_t scale) {
    vf factor = splat(scale_value(scale));
    for (int i = 0; i < GROUP_BYTES; i += LANES) {
        vu v = load_bytes(blocks + i);
        vf even = nibble_values(v) * factor, odd = nibble_values(v >> 4) * factor;
#if defined(XMOE_ELEMENT_BF16)
        store_unit(to + 2 * i, (vu)even >> 16 | ((vu)odd & 0xffff0000u)); /* bf16 holds every value: nothing is lost */
#else
        store_float(to + 2 * i, ZIP_LOW(even, odd));
        store_float(to + 2 * i + LANES, ZIP_HIGH(even, odd));
#endif
    }
}
/* to[rows x to_row] = rows `row` and following of a weight, from column `first` on; zero beyond used_rows and used_columns, which
 * is a multiple of 32 */
static void decode(element *to, int64_t to_row, const struct weight *w, int64_t inner, int64_t row, int64_t first,
                   int64_t used_rows, int64_t used_columns, int64_t rows) {
    int64_t groups = inner / GROUP;
    for (int64_t r = 0; r < rows; r++, to += to_row) {
        int64_t used = r < used_rows ? used_columns : 0;
        if (used && w->form != MXFP4) decode_integers(to, w, inner, row + r, first, used);
        else
            for (int64_t g = 0; g < used / GROUP; g++) {
                int64_t at = (row + r) * groups + first / GROUP + g;
                decode_group(to + g * GROUP, (const uint8_t *)w->values + at * GROUP_BYTES, ((const uint8_t *)w->scales)[at]);
            }
        memset(to + used, 0, (to_row - used) * sizeof(element));
    }
}

static void rows_times_packed_panel(const element *x, const struct weight *w, int transposed, int64_t inner, int64_t columns,
                                    struct piece s, int64_t panel, element *y, char *room) {
    int64_t width = smaller(PANEL, columns - panel);
    element *flat = carve(&room, PANEL * DEPTH * sizeof(element));
    unit *spare = carve(&room, PANEL * DEPTH * 4), *right = carve(&room, PANEL * DEPTH * 4);
    float *sum = carve(&room, MOST_ROWS * PANEL * 4);
    unit *left_room = carve(&room, MOST_ROWS * DEPTH * 4);
    element *rows = carve(&room, MOST_ROWS * DEPTH * sizeof(element));
    for (int64_t k = 0; k < inner; k += DEPTH) {
        int64_t depth = smaller(DEPTH, inner - k), from_row = s.expert * (transposed ? inner : columns); /* rows of the weight */
        const unit *panel_units = right;
        if (transposed) { /* its columns already lie side by side */
            decode(flat, PANEL, w, columns, from_row + k, panel, depth, width, depth);
            panel_units = interleave(spare, flat, depth, PANEL);
        } else {
            decode(flat, depth, w, inner, from_row + panel, k, width, depth, PANEL);
            turn(right, PANEL, as_units(spare, flat, PANEL * depth), depth / PAIR, PANEL, depth / PAIR);
        }
        const element *from = x + s.first * inner + k;
        const unit *left = (const unit *)from;
        int64_t left_row = inner / PAIR;
        if (sizeof(element) * PAIR != sizeof(unit)) { /* bf16 where the machine multiplies floats */
            for (int64_t r = 0; r < s.count; r++) memcpy(rows + r * depth, from + r * inner, depth * sizeof(element));
            left = as_units(left_room, rows, s.count * depth);
            left_row = depth / PAIR;
        }
        product(s.count, PANEL, depth / PAIR, left, left_row, panel_units, PANEL, sum, PANEL, k > 0);
    }
    for (int64_t r = 0; r < s.count; r++)
        for (int64_t i = 0; i < width; i += LANES) store(y + (s.first + r) * columns + panel + i, load_float(sum + r * PANEL + i));
}

/* y [rows, columns] = x [rows, inner] times the packed weight of each row's expert: [experts, columns, inner], or, where
 * `transposed`, [experts, inner, columns]. The weight is MXFP4 or integers, as in integers.h. inner and columns are multiples
 * of 32. */
int NAME(packed_product)(const element *x, const void *values, const void *scales, const uint8_t *zeros, int64_t group,
                         int64_t form, int transposed, const int64_t *offsets, int64_t experts, int64_t inner, int64_t columns,
                         element *y) {
    struct weight w = {values, scales, zeros, group, form};
    int64_t panels = (columns + PANEL - 1) / PANEL, pieces = 0;
    for (int64_t e = 0; e < experts; e++) pieces += (offsets[e + 1] - offsets[e] + MOST_ROWS - 1) / MOST_ROWS;
    if (!pieces) return 0;
    struct piece *piece = malloc(pieces * sizeof(struct piece));
    int64_t bytes = round_up(PANEL * DEPTH * 12 + MOST_ROWS * PANEL * 4 + MOST_ROWS * DEPTH * 8 + 4096, 4096);
    char *room = rooms(bytes * max_threads());
    int failed = !piece || !room;
    if (!failed) {
        int64_t n = 0;
        for (int64_t e = 0; e < experts; e++)
            for (int64_t r = offsets[e]; r < offsets[e + 1]; r += MOST_ROWS)
                piece[n++] = (struct piece){e, r, smaller(MOST_ROWS, offsets[e + 1] - r)};
#pragma omp parallel for schedule(dynamic)
        for (int64_t task = 0; task < pieces * panels; task++)
            rows_times_packed_panel(x, &w, transposed, inner, columns, piece[task / panels], task % panels * PANEL, y,
                                    room + bytes * thread_number());
    }
    free(piece), free(room);
    return failed;
}

/* Attention for the handful of queries that decoding has: keys and values stream past once, as they lie in the cache.
 *
 * attention.c puts one query in every lane, which few queries leave mostly empty. Here the query rows of a group (token i / R,
 * head i % R, as there) are the rows of the products and a block of keys is their lanes:
 *     S = Q K'      P = exp2(S - m)      O += P V
 * The softmax runs online over blocks (FlashAttention, arXiv 2205.14135), and a sink starts its maximum and sum.
 */
#include "kernels.h"
#include "product.h"

#define BLOCK 64 /* keys at a time */
#define LOW (-1e30f)

INLINE const element *row_at(const void *base, const int64_t *stride, int64_t b, int64_t token, int64_t head) {
    return (const element *)base + b * stride[0] + token * stride[1] + head * stride[2];
}
/* to[BLOCK x head_dim] = one head of `count` rows of keys or values, zero beyond */
static const element *gather(element *to, const void *from, const int64_t *stride, int64_t b, int64_t g, int64_t first,
                             int64_t count, int64_t head_dim) {
    for (int64_t j = 0; j < count; j++) {
        const char *row = (const char *)row_at(from, stride, b, first + j, g);
        for (int64_t i = 0; i < head_dim * (int64_t)sizeof(element); i += 64) /* the next block, whose rows lie far apart */
            __builtin_prefetch(row + stride[1] * BLOCK * (int64_t)sizeof(element) + i, 0, 2);
        memcpy(to + j * head_dim, row, head_dim * sizeof(element));
    }
    memset(to + count * head_dim, 0, (BLOCK - count) * head_dim * sizeof(element));
    return to;
}

struct room {
    element *rows;                             /* [BLOCK x head_dim] */
    unit *spare, *turned, *query;              /* [BLOCK x head_dim] twice, [rows x head_dim] */
    float *score, *out, *top, *sum, *shrink;   /* [rows x BLOCK], [rows x head_dim], [rows] three times */
};

/* One row's scores become probabilities against its running maximum: `top`, `sum` and `shrink` follow. */
static void soften(float *score, const int32_t *at, int32_t stands, int32_t window, float scale, float *top, float *sum, float *shrink) {
    vf most_lanes = splat(*top), total = splat(0.0f);
    for (int64_t j = 0; j < BLOCK; j += LANES) {
        vi key = *(const vi_any *)(at + j), distance = stands - key;
        vi mask = (vi)(key >= 0) & (vi)(distance >= 0) & (vi)(distance < window);
        vf s = keep(load_float(score + j) * scale, mask);
        s = (vf)((vi)s | ((vi)splat(LOW) & ~mask));
        store_float(score + j, s);
        most_lanes = vmax(most_lanes, s);
    }
    float most = most_lanes[0];
    for (int i = 1; i < LANES; i++)
        if (most_lanes[i] > most) most = most_lanes[i];
    for (int64_t j = 0; j < BLOCK; j += LANES) { /* a hidden score gives exactly 0, also where nothing was seen yet */
        vf s = load_float(score + j), x = keep(exp2_lanes(s - most), s > 0.5f * LOW);
        total += x;
#if PAIR == 2
        *(vh_any *)((uint16_t *)score + j) = narrow(x); /* behind what is still to be read: halves of the same row */
#else
        store_float(score + j, x);
#endif
    }
    *shrink = exp2f(*top - most);
    *sum = *sum * *shrink + total_lanes(total);
    *top = most;
}

/* All queries of one group of one sequence. */
static void attend(const struct attention *p, int64_t b, int64_t g, struct room w) {
    int64_t heads = p->heads_per_group, rows = p->queries * heads, Dh = p->head_dim, units = Dh / PAIR;
    int32_t window = p->window > 0 && p->window < INT32_MAX ? (int32_t)p->window : INT32_MAX, stands[rows], newest = -1, oldest = INT32_MAX;
    element *query = (element *)w.out; /* room for as many floats, not yet in use */
    for (int64_t r = 0; r < rows; r++) {
        memcpy(query + r * Dh, row_at(p->q, p->q_stride, b, r / heads, g * heads + r % heads), Dh * sizeof(element));
        stands[r] = (int32_t)(p->q_pos ? p->q_pos[b * p->queries + r / heads] : r / heads);
        if (stands[r] > newest) newest = stands[r];
        if (stands[r] < oldest) oldest = stands[r];
        w.top[r] = p->sinks ? p->sinks[g * heads + r % heads] * LOG2E : LOW;
        w.sum[r] = p->sinks ? 1.0f : 0.0f;
    }
    const unit *as_left = as_units(w.query, query, rows * Dh);
    if (as_left != w.query) memcpy(w.query, as_left, rows * units * sizeof(unit));
    memset(w.out, 0, rows * Dh * sizeof(float));
    for (int64_t first = 0; first < p->keys; first += BLOCK) {
        int64_t count = smaller(BLOCK, p->keys - first), seen = 0;
        int32_t at[BLOCK];
        for (int64_t j = 0; j < BLOCK; j++) {
            at[j] = j >= count ? -1 : (int32_t)(p->k_pos ? p->k_pos[b * p->keys + first + j] : first + j);
            seen |= at[j] >= 0 && at[j] <= newest && (int64_t)oldest - at[j] < window;
        }
        if (!seen) continue;
        const element *keys = gather(w.rows, p->k, p->k_stride, b, g, first, count, Dh);
        turn(w.turned, BLOCK, as_units(w.spare, keys, BLOCK * Dh), units, BLOCK, units);
        product(rows, BLOCK, units, w.query, units, w.turned, BLOCK, w.score, BLOCK, 0);
        for (int64_t r = 0; r < rows; r++) {
            soften(w.score + r * BLOCK, at, stands[r], window, p->scale * LOG2E, w.top + r, w.sum + r, w.shrink + r);
            if (w.shrink[r] != 1.0f)
                for (int64_t d = 0; d < Dh; d += LANES)
                    store_float(w.out + r * Dh + d, load_float(w.out + r * Dh + d) * w.shrink[r]);
        }
        const element *values = gather(w.rows, p->v, p->v_stride, b, g, first, count, Dh);
        product(rows, Dh, BLOCK / PAIR, (const unit *)w.score, BLOCK, interleave(w.spare, values, BLOCK, Dh), Dh, w.out, Dh, 1);
    }
    for (int64_t r = 0; r < rows; r++) {
        element *to = (element *)row_at(p->out, p->out_stride, b, r / heads, g * heads + r % heads);
        float by = w.sum[r] > 0 ? 1.0f / w.sum[r] : 0.0f;
        for (int64_t d = 0; d < Dh; d += LANES) store(to + d, load_float(w.out + r * Dh + d) * by);
    }
}

/* As attention_forward, for few queries; head_dim is a multiple of LANES, and nothing is kept for a backward pass. */
int NAME(attention_few)(const struct attention *p) {
    int64_t rows = p->queries * p->heads_per_group, Dh = p->head_dim, tasks = p->batch * p->groups;
    int64_t each = round_up(BLOCK * Dh * 12 + rows * (Dh * 8 + BLOCK * 4 + 12) + 9 * 64, 4096);
    char *all = rooms(each * max_threads());
    if (!all) return 1;
#pragma omp parallel for schedule(dynamic) if (WORTH_SHARING(tasks * rows * p->keys * Dh / 8))
    for (int64_t task = 0; task < tasks; task++) {
        char *own = all + each * thread_number();
        struct room w;
        w.rows = carve(&own, BLOCK * Dh * sizeof(element));
        w.spare = carve(&own, BLOCK * Dh * 4), w.turned = carve(&own, BLOCK * Dh * 4);
        w.query = carve(&own, rows * Dh * 4), w.out = carve(&own, rows * Dh * 4), w.score = carve(&own, rows * BLOCK * 4);
        w.top = carve(&own, rows * 4), w.sum = carve(&own, rows * 4), w.shrink = carve(&own, rows * 4);
        attend(p, task / p->groups, task % p->groups, w);
    }
    free(all);
    return 0;
}

/* Attention for the handful of queries that decoding has: keys and values stream past once, as they lie in the cache.
 *
 * attention.c brings keys and values into the forms of a blocked product first, which many queries repay and one does not.
 * Here a block of keys is multiplied with the query rows of its group one by one, then its values are added up for four
 * rows at a time. Scores and probabilities are floats; the softmax runs online over blocks (FlashAttention, arXiv
 * 2205.14135), and a sink starts its maximum and sum, as there.
 */
#include "kernels.h"
#include "product.h"

#define BLOCK 64 /* keys at a time */
#define TOGETHER 4 /* query rows whose sums over values are held in registers */
#define LOW (-1e30f)

/* sum over head_dim of one query (floats) times one key */
INLINE float dot(const float *q, const element *k, int64_t head_dim) {
    vf sum = splat(0.0f);
    for (int64_t d = 0; d < head_dim; d += LANES) sum += load_float(q + d) * load(k + d);
    return total_lanes(sum);
}

/* out[r] = out[r] * shrink[r] + the sum over a block's keys of score[r][j] times value j, for up to TOGETHER rows */
INLINE void add_values(int rows, const float *score, const element *const *value, int64_t keys, const float *shrink,
                       int64_t head_dim, float *out) {
    for (int64_t d = 0; d < head_dim; d += LANES) {
        vf sum[TOGETHER];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sum[r] = load_float(out + r * head_dim + d) * shrink[r];
        for (int64_t j = 0; j < keys; j++) {
            vf v = load(value[j] + d);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sum[r] += v * score[r * BLOCK + j];
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) store_float(out + r * head_dim + d, sum[r]);
    }
}

INLINE const element *row_at(const void *base, const int64_t *stride, int64_t b, int64_t token, int64_t head) {
    return (const element *)base + b * stride[0] + token * stride[1] + head * stride[2];
}

/* All queries of one group of one sequence. room: queries * heads_per_group rows of (2 head_dim + BLOCK + 3) floats. */
static void attend(const struct attention *p, int64_t b, int64_t g, float *room) {
    int64_t heads = p->heads_per_group, rows = p->queries * heads, Dh = p->head_dim;
    int64_t window = p->window > 0 ? p->window : INT64_MAX;
    float *query = room, *out = query + rows * Dh, *score = out + rows * Dh;
    float *top = score + rows * BLOCK, *sum = top + rows, *shrink = sum + rows, scale = p->scale * LOG2E;
    for (int64_t r = 0; r < rows; r++) {
        const element *from = row_at(p->q, p->q_stride, b, r / heads, g * heads + r % heads);
        for (int64_t d = 0; d < Dh; d += LANES) store_float(query + r * Dh + d, load(from + d) * scale);
        top[r] = p->sinks ? p->sinks[g * heads + r % heads] * LOG2E : LOW;
        sum[r] = p->sinks ? 1.0f : 0.0f;
    }
    memset(out, 0, rows * Dh * sizeof(float));
    for (int64_t first = 0; first < p->keys; first += BLOCK) {
        int64_t keys = smaller(BLOCK, p->keys - first), at[BLOCK];
        const element *key[BLOCK], *value[BLOCK];
        for (int64_t j = 0; j < keys; j++) {
            at[j] = p->k_pos ? p->k_pos[b * p->keys + first + j] : first + j;
            key[j] = row_at(p->k, p->k_stride, b, first + j, g);
            value[j] = row_at(p->v, p->v_stride, b, first + j, g);
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t stands = p->q_pos ? p->q_pos[b * p->queries + r / heads] : r / heads;
            float *s = score + r * BLOCK, most = top[r];
            for (int64_t j = 0; j < keys; j++) {
                int seen = at[j] >= 0 && at[j] <= stands && stands - at[j] < window;
                s[j] = seen ? dot(query + r * Dh, key[j], Dh) : LOW;
                if (s[j] > most) most = s[j];
            }
            for (int64_t j = keys; j < BLOCK; j++) s[j] = LOW;
            vf total = splat(0.0f);
            for (int64_t j = 0; j < BLOCK; j += LANES) { /* a hidden score gives exactly 0, also where nothing was seen yet */
                vf x = load_float(s + j);
                x = keep(exp2_lanes(x - most), x > 0.5f * LOW);
                store_float(s + j, x);
                total += x;
            }
            shrink[r] = exp2f(top[r] - most);
            sum[r] = sum[r] * shrink[r] + total_lanes(total);
            top[r] = most;
        }
        for (int64_t r = 0; r < rows; r += TOGETHER) {
            const float *s = score + r * BLOCK, *by = shrink + r;
            float *to = out + r * Dh;
            switch (smaller(TOGETHER, rows - r)) {
            case 1: add_values(1, s, value, keys, by, Dh, to); break;
            case 2: add_values(2, s, value, keys, by, Dh, to); break;
            case 3: add_values(3, s, value, keys, by, Dh, to); break;
            default: add_values(4, s, value, keys, by, Dh, to);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        element *to = (element *)row_at(p->out, p->out_stride, b, r / heads, g * heads + r % heads);
        float by = sum[r] > 0 ? 1.0f / sum[r] : 0.0f;
        for (int64_t d = 0; d < Dh; d += LANES) store(to + d, load_float(out + r * Dh + d) * by);
    }
}

/* As attention_forward, for few queries; head_dim is a multiple of LANES, and nothing is kept for a backward pass. */
int NAME(attention_few)(const struct attention *p) {
    int64_t rows = p->queries * p->heads_per_group, tasks = p->batch * p->groups;
    int64_t each = round_up(rows * (2 * p->head_dim + BLOCK + 3) * sizeof(float), 64);
    char *room = rooms(each * max_threads());
    if (!room) return 1;
#pragma omp parallel for schedule(dynamic) if (WORTH_SHARING(tasks * rows * p->keys * p->head_dim / 8))
    for (int64_t task = 0; task < tasks; task++)
        attend(p, task / p->groups, task % p->groups, (float *)(room + each * thread_number()));
    free(room);
    return 0;
}

/* Attention with sinks and a sliding window, forward and backward, for grouped queries.
 *
 * The R query heads that share a key/value head are folded into the query axis: "row" i of a group is token i / R,
 * head i % R. They lie side by side in memory and share their position, so keys and values are never expanded.
 *
 * Score tiles are computed transposed, one key a row and one query a lane. Then the running maximum, the sum and all
 * masks are plain vertical arithmetic, and no tile has to be turned around between two products:
 *     forward    S' = K Q'      P' = exp2(S' - m)      O'  = V' P'
 *     backward   S' = K Q'      dP' = V dO'            dS' = P' (dP' - rowsum(dO O))
 *                dV = P' dO     dK = dS' Q             dQ' = K' dS'            (X' is X transposed)
 * The softmax runs online over key blocks (FlashAttention, arXiv 2205.14135). A sink is a key without a value: it
 * starts the running maximum and sum. Blocks that the causal or sliding mask hides entirely are skipped.
 *
 * Products take their left side as rows of units (pairs of bf16, or floats) and their right side as lanes of units;
 * `interleave` and `transpose` bring rows of elements into these two forms, once per block.
 */
#include "kernels.h"
#include "product.h"

#define BLOCK 64 /* queries and keys in a tile */
#define LOW (-1e30f)
#define HIDDEN INT32_MIN /* a key position that no query sees */
#define FEW 32 /* query rows of a group up to which its keys are not worth bringing into another form */

/* Sizes shared by both passes. A padded row of `width` elements is `units` used units and a tail of zeros. */
struct sizes {
    int64_t rows, width, units, keys, blocks;
};
static struct sizes measure(const struct attention *p) {
    struct sizes z;
    z.rows = p->queries * p->heads_per_group;
    z.width = round_up(p->head_dim, LANES * PAIR);
    z.units = p->head_dim / PAIR;
    z.blocks = (p->keys + BLOCK - 1) / BLOCK;
    z.keys = z.blocks * BLOCK;
    return z;
}

/* What the mask needs to know: every position as int32, and the range of positions in each block of keys. */
struct positions {
    int32_t *query, *key, *lowest, *highest;
};
static struct positions read_positions(const struct attention *p, struct sizes z) {
    struct positions out;
    int64_t nq = p->batch * p->queries, nk = p->batch * z.keys, nb = p->batch * z.blocks;
    out.query = malloc(sizeof(int32_t) * (nq + nk + 2 * nb));
    out.key = out.query + nq, out.lowest = out.key + nk, out.highest = out.lowest + nb;
    for (int64_t i = 0; i < nq; i++) out.query[i] = p->q_pos ? (int32_t)p->q_pos[i] : (int32_t)(i % p->queries);
    for (int64_t b = 0; b < p->batch; b++)
        for (int64_t block = 0; block < z.blocks; block++) {
            int32_t lowest = INT32_MAX, highest = -1;
            for (int64_t j = block * BLOCK; j < (block + 1) * BLOCK; j++) {
                int32_t at = j >= p->keys ? -1 : p->k_pos ? (int32_t)p->k_pos[b * p->keys + j] : (int32_t)j;
                if (at > highest) highest = at;
                if (at < 0) lowest = HIDDEN; /* some key here must be masked one by one */
                else if (at < lowest) lowest = at;
                out.key[b * z.keys + j] = at < 0 ? HIDDEN : at;
            }
            out.lowest[b * z.blocks + block] = lowest;
            out.highest[b * z.blocks + block] = highest;
        }
    return out;
}

/* One block of query rows of one group: which rows, and where they stand. */
struct query_block {
    int64_t first, count, lanes;
    int32_t at[BLOCK], lowest, highest;
};
static struct query_block open_block(const struct attention *p, struct sizes z, const int32_t *at, int64_t index) {
    struct query_block q;
    q.first = index * BLOCK;
    q.count = smaller(BLOCK, z.rows - q.first);
    q.lanes = round_up(q.count, LANES * PAIR);
    q.lowest = INT32_MAX, q.highest = -1;
    for (int64_t i = 0; i < BLOCK; i++) {
        q.at[i] = i < q.count ? at[(q.first + i) / p->heads_per_group] : -1; /* lanes beyond the end see nothing */
        if (i < q.lanes && q.at[i] < q.lowest) q.lowest = q.at[i];
        if (q.at[i] > q.highest) q.highest = q.at[i];
    }
    return q;
}

/* visible: 0 not at all, 1 in part, 2 everywhere */
static int visibility(const struct query_block *q, int32_t lowest, int32_t highest, int64_t window) {
    if (highest < 0 || (lowest != HIDDEN && lowest > q->highest)) return 0;
    if (q->lowest >= 0 && (int64_t)q->lowest - highest >= window) return 0;
    if (lowest != HIDDEN && highest <= q->lowest && (int64_t)q->highest - lowest < window) return 2;
    return 1;
}
INLINE vi visible(const int32_t *query, int32_t key, int32_t window) {
    vi distance = *(const vi_any *)query - key;
    return (vi)(distance >= 0) & (vi)(distance < window) & (vi)((vi){0} + (key == HIDDEN ? 0 : -1));
}

/* row i of a group in a strided [batch, token, head, head_dim] tensor */
INLINE int64_t row_offset(const int64_t *stride, const struct attention *p, int64_t b, int64_t g, int64_t i) {
    int64_t r = p->heads_per_group;
    return b * stride[0] + (i / r) * stride[1] + (g * r + i % r) * stride[2];
}
/* copies rows of elements, zero padded to `padded_rows` rows of `width` elements */
static void gather(element *to, int64_t width, const element *from, const int64_t *stride, const struct attention *p,
                   int64_t b, int64_t g, int64_t first, int64_t count, int64_t padded_rows) {
    for (int64_t i = 0; i < padded_rows; i++, to += width) {
        int64_t used = i < count ? p->head_dim : 0;
        if (used) memcpy(to, from + row_offset(stride, p, b, g, first + i), used * sizeof(element));
        memset(to + used, 0, (width - used) * sizeof(element));
    }
}
/* two rows of floats -> one row of right-hand units, or two when a unit is a float */
INLINE void store_pair(unit *to, int64_t row, vf first, vf second) {
#if PAIR == 2 && defined(__AVX512BF16__)
    vu low = __builtin_convertvector(narrow(first), vu), high = __builtin_convertvector(narrow(second), vu);
    store_unit(to, low | high << 16);
    (void)row;
#elif PAIR == 2
    store_unit(to, round_to_bf16(first) >> 16 | (round_to_bf16(second) & 0xffff0000u));
    (void)row;
#else
    store_unit(to, (vu)first);
    store_unit(to + row, (vu)second);
#endif
}
/* a row of floats -> a row of left-hand units */
INLINE void store_left(unit *to, int64_t lane, vf x) {
#if PAIR == 2
    *(vh_any *)((uint16_t *)to + lane) = narrow(x);
#else
    store_unit(to + lane, (vu)x);
#endif
}
/* One block of keys or values: `left` gets its rows as they are, `turned` its columns; either may be NULL. */
static void pack_keys(const struct attention *p, struct sizes z, int64_t b, int64_t g, int64_t block, element *rows,
                      unit *spare, const element *from, const int64_t *stride, unit *left, unit *turned) {
    struct attention one = *p; /* here a head is a group of its own */
    one.heads_per_group = 1;
    int64_t first = block * BLOCK;
    gather(rows, z.width, from, stride, &one, b, g, first, smaller(BLOCK, p->keys - first), BLOCK);
    if (left) {
        const unit *u = as_units(spare, rows, BLOCK * z.width);
        memcpy(left + block * BLOCK * (z.width / PAIR), u, BLOCK * (z.width / PAIR) * sizeof(unit));
    }
    if (turned) {
        const unit *u = interleave(spare, rows, BLOCK, z.width);
        /* [BLOCK / PAIR x width] -> [head_dim x BLOCK / PAIR] */
        turn(turned + block * p->head_dim * (BLOCK / PAIR), BLOCK / PAIR, u, z.width, BLOCK / PAIR, p->head_dim);
    }
}

INLINE element *key_row(void *base, const int64_t *stride, int64_t b, int64_t g, int64_t j) {
    return (element *)base + b * stride[0] + j * stride[1] + g * stride[2];
}
INLINE void store_row(element *to, const float *from, int64_t count, float factor) {
    int64_t d = 0;
    for (; d + LANES <= count; d += LANES) store(to + d, load_float(from + d) * factor);
    for (; d < count; d++) store_one(to + d, from[d] * factor);
}
/* columns [width x BLOCK]: column i is row i of the block; spare holds BLOCK x width floats */
static void scatter_columns(const struct attention *p, struct sizes z, const struct query_block *q, int64_t b, int64_t g,
                            void *to, const int64_t *stride, const float *columns, float *spare, float factor) {
    transpose(spare, z.width, columns, BLOCK, z.width, q->lanes);
    for (int64_t i = 0; i < q->count; i++)
        store_row((element *)to + row_offset(stride, p, b, g, q->first + i), spare + i * z.width, p->head_dim, factor);
}

/* ------------------------------------------------------------------------------------------------ forward */

static void forward_part(const struct attention *p, struct sizes z, struct positions at, int64_t b, int64_t g,
                         int64_t part, int64_t parts, char *room) {
    int64_t row_units = z.width / PAIR, key_units = BLOCK / PAIR;
    unit *k_left = carve(&room, z.keys * row_units * 4), *v_turned = carve(&room, z.blocks * p->head_dim * key_units * 4);
    element *rows = carve(&room, BLOCK * z.width * sizeof(element));
    unit *spare = carve(&room, BLOCK * z.width * 4), *q_right = carve(&room, BLOCK * row_units * 4);
    float *score = carve(&room, BLOCK * BLOCK * 4), *out = carve(&room, z.width * BLOCK * 4);
    unit *prob = carve(&room, BLOCK * BLOCK * 4);
    float *top = carve(&room, BLOCK * 4), *sum = carve(&room, BLOCK * 4), *shrink = carve(&room, BLOCK * 4);
    char *packed = carve(&room, z.blocks);
    memset(packed, 0, z.blocks);
    int64_t window = p->window > 0 ? p->window : INT32_MAX, blocks = (z.rows + BLOCK - 1) / BLOCK;
    float scale = p->scale * LOG2E;
    for (int64_t index = part; index < blocks; index += parts) {
        struct query_block q = open_block(p, z, at.query + b * p->queries, index);
        gather(rows, z.width, p->q, p->q_stride, p, b, g, q.first, q.count, q.lanes);
        turn(q_right, BLOCK, as_units(spare, rows, q.lanes * z.width), row_units, q.lanes, z.units);
        for (int64_t i = 0; i < q.lanes; i++) {
            int64_t head = g * p->heads_per_group + (q.first + i) % p->heads_per_group;
            top[i] = p->sinks ? p->sinks[head] * LOG2E : LOW;
            sum[i] = p->sinks ? 1.0f : 0.0f;
        }
        memset(out, 0, z.width * BLOCK * 4);
        for (int64_t block = 0; block < z.blocks; block++) {
            const int32_t *key_at = at.key + b * z.keys + block * BLOCK;
            int seen = visibility(&q, at.lowest[b * z.blocks + block], at.highest[b * z.blocks + block], window);
            if (!seen) continue;
            if (!packed[block]) {
                pack_keys(p, z, b, g, block, rows, spare, p->k, p->k_stride, k_left, NULL);
                pack_keys(p, z, b, g, block, rows, spare, p->v, p->v_stride, NULL, v_turned);
                packed[block] = 1;
            }
            int64_t keys = round_up(smaller(BLOCK, p->keys - block * BLOCK), 4);
            product(keys, q.lanes, z.units, k_left + block * BLOCK * row_units, row_units, q_right, BLOCK, score, BLOCK, 0);
            int changed = 0;
            for (int64_t i = 0; i < q.lanes; i += LANES) {
                vf m = load_float(top + i), most = m, total = splat(0.0f);
                if (seen == 1)
                    for (int64_t j = 0; j < keys; j++) {
                        vi mask = visible(q.at + i, key_at[j], (int32_t)window);
                        vf s = keep(load_float(score + j * BLOCK + i) * scale, mask);
                        s = (vf)((vi)s | ((vi)splat(LOW) & ~mask));
                        store_float(score + j * BLOCK + i, s);
                        most = vmax(most, s);
                    }
                else
                    for (int64_t j = 0; j < keys; j++) {
                        vf s = load_float(score + j * BLOCK + i) * scale;
                        store_float(score + j * BLOCK + i, s);
                        most = vmax(most, s);
                    }
                for (int64_t j = 0; j < keys; j += 2) {
                    vf first = load_float(score + j * BLOCK + i), second = load_float(score + (j + 1) * BLOCK + i);
                    /* a hidden score must give exactly 0, also where nothing has been seen yet */
                    first = keep(exp2_lanes(first - most), first > 0.5f * LOW);
                    second = keep(exp2_lanes(second - most), second > 0.5f * LOW);
                    total += first + second;
                    store_pair(prob + j / PAIR * BLOCK + i, BLOCK, first, second);
                }
                vf factor = exp2_lanes(m - most);
                store_float(shrink + i, factor);
                store_float(sum + i, load_float(sum + i) * factor + total);
                store_float(top + i, most);
                for (int x = 0; x < LANES; x++) changed |= most[x] > m[x];
            }
            if (changed)
                for (int64_t d = 0; d < p->head_dim; d++)
                    for (int64_t i = 0; i < q.lanes; i += LANES)
                        store_float(out + d * BLOCK + i, load_float(out + d * BLOCK + i) * load_float(shrink + i));
            product(p->head_dim, q.lanes, keys / PAIR, v_turned + block * p->head_dim * key_units, key_units, prob, BLOCK, out,
                    BLOCK, 1);
        }
        for (int64_t i = 0; i < q.lanes; i++) {
            if (i < q.count && p->lse) p->lse[(b * p->groups + g) * z.rows + q.first + i] = sum[i] > 0 ? top[i] + log2f(sum[i]) : -LOW;
            sum[i] = sum[i] > 0 ? 1.0f / sum[i] : 0.0f;
        }
        for (int64_t d = 0; d < p->head_dim; d++)
            for (int64_t i = 0; i < q.lanes; i += LANES)
                store_float(out + d * BLOCK + i, load_float(out + d * BLOCK + i) * load_float(sum + i));
        scatter_columns(p, z, &q, b, g, p->out, p->out_stride, out, (float *)spare, 1.0f);
    }
}

static int64_t forward_room(const struct attention *p, struct sizes z) {
    return z.keys * z.width * 4 + z.blocks * p->head_dim * BLOCK * 4 + BLOCK * z.width * 16 + BLOCK * BLOCK * 8 + z.blocks + 8192;
}

int NAME(attention_forward)(const struct attention *p) {
    struct sizes z = measure(p);
    if (!z.rows || !p->batch) return 0;
    if (z.rows <= FEW && !p->lse && p->head_dim % LANES == 0) return NAME(attention_few)(p);
    int threads = max_threads();
    int64_t pairs = p->batch * p->groups, blocks = (z.rows + BLOCK - 1) / BLOCK;
    /* few sequences, many cores: several tasks share a group, each taking every parts-th block of queries */
    int64_t parts = pairs >= threads ? 1 : smaller(blocks, (2 * threads + pairs - 1) / pairs);
    struct positions at = read_positions(p, z);
    int64_t bytes = round_up(forward_room(p, z), 4096);
    char *room = rooms(bytes * threads);
    int failed = !room || !at.query;
    if (!failed) {
#pragma omp parallel for schedule(dynamic) collapse(2) if (WORTH_SHARING(p->batch * z.rows * p->keys * p->groups / 4))
        for (int64_t task = 0; task < pairs; task++)
            for (int64_t part = 0; part < parts; part++)
                forward_part(p, z, at, task / p->groups, task % p->groups, part, parts, room + bytes * thread_number());
    }
    free(room), free(at.query);
    return failed;
}

/* ----------------------------------------------------------------------------------------------- backward */

#define STRIP 8 /* keys whose scores and score gradients are held at a time: small enough for the first cache */

static void backward_group(const struct attention *p, struct sizes z, struct positions at, int64_t b, int64_t g, char *room) {
    int64_t row_units = z.width / PAIR, key_units = BLOCK / PAIR;
    unit *k_left = carve(&room, z.keys * row_units * 4), *v_left = carve(&room, z.keys * row_units * 4);
    unit *k_turned = carve(&room, z.blocks * p->head_dim * key_units * 4);
    float *dk = carve(&room, z.keys * z.width * 4), *dv = carve(&room, z.keys * z.width * 4);
    element *rows = carve(&room, BLOCK * z.width * sizeof(element)), *drows = carve(&room, BLOCK * z.width * sizeof(element));
    unit *spare = carve(&room, BLOCK * z.width * 4);
    unit *q_right = carve(&room, BLOCK * row_units * 4), *do_right = carve(&room, BLOCK * row_units * 4);
    unit *q_lanes = carve(&room, BLOCK * z.width * 4), *do_lanes = carve(&room, BLOCK * z.width * 4);
    float *score = carve(&room, STRIP * BLOCK * 4), *dprob = carve(&room, STRIP * BLOCK * 4);
    unit *prob = carve(&room, BLOCK * BLOCK * 4), *dscore = carve(&room, BLOCK * BLOCK * 4);
    unit *dscore_lanes = carve(&room, BLOCK * BLOCK * 4);
    float *dq = carve(&room, z.width * BLOCK * 4), *lse = carve(&room, BLOCK * 4), *delta = carve(&room, BLOCK * 4);
    int64_t window = p->window > 0 ? p->window : INT32_MAX, blocks = (z.rows + BLOCK - 1) / BLOCK;
    float scale = p->scale * LOG2E;
    memset(dk, 0, z.keys * z.width * 4);
    memset(dv, 0, z.keys * z.width * 4);
    for (int64_t block = 0; block < z.blocks; block++) {
        pack_keys(p, z, b, g, block, rows, spare, p->k, p->k_stride, k_left, k_turned);
        pack_keys(p, z, b, g, block, rows, spare, p->v, p->v_stride, v_left, NULL);
    }
    for (int64_t index = 0; index < blocks; index++) {
        struct query_block q = open_block(p, z, at.query + b * p->queries, index);
        gather(rows, z.width, p->out, p->out_stride, p, b, g, q.first, q.count, q.lanes);
        gather(drows, z.width, p->dout, p->dout_stride, p, b, g, q.first, q.count, q.lanes);
        for (int64_t i = 0; i < q.lanes; i++) {
            vf dot = splat(0.0f);
            for (int64_t d = 0; d < z.width; d += LANES) dot += load(rows + i * z.width + d) * load(drows + i * z.width + d);
            delta[i] = sum_lanes(dot);
            lse[i] = i < q.count ? p->lse[(b * p->groups + g) * z.rows + q.first + i] : -LOW;
            if (p->sinks && i < q.count) {
                int64_t head = g * p->heads_per_group + (q.first + i) % p->heads_per_group;
                p->dsinks[b * p->groups * p->heads_per_group + head] -= exp2f(p->sinks[head] * LOG2E - lse[i]) * delta[i];
            }
        }
        gather(rows, z.width, p->q, p->q_stride, p, b, g, q.first, q.count, q.lanes);
        turn(q_right, BLOCK, as_units(spare, rows, q.lanes * z.width), row_units, q.lanes, z.units);
        turn(do_right, BLOCK, as_units(spare, drows, q.lanes * z.width), row_units, q.lanes, z.units);
        const unit *q_by_lane = interleave(q_lanes, rows, q.lanes, z.width);
        const unit *do_by_lane = interleave(do_lanes, drows, q.lanes, z.width);
        memset(dq, 0, z.width * BLOCK * 4);
        for (int64_t block = 0; block < z.blocks; block++) {
            const int32_t *key_at = at.key + b * z.keys + block * BLOCK;
            int seen = visibility(&q, at.lowest[b * z.blocks + block], at.highest[b * z.blocks + block], window);
            if (!seen) continue;
            int64_t keys = round_up(smaller(BLOCK, p->keys - block * BLOCK), STRIP);
            for (int64_t j = 0; j < keys; j += STRIP) {
                int64_t key = block * BLOCK + j;
                product(STRIP, q.lanes, z.units, k_left + key * row_units, row_units, q_right, BLOCK, score, BLOCK, 0);
                product(STRIP, q.lanes, z.units, v_left + key * row_units, row_units, do_right, BLOCK, dprob, BLOCK, 0);
                for (int64_t i = 0; i < q.lanes; i += LANES) {
                    vf norm = load_float(lse + i), row_sum = load_float(delta + i);
                    for (int64_t r = 0; r < STRIP; r += 2) {
                        vf pr[2], ds[2];
#pragma GCC unroll 2
                        for (int x = 0; x < 2; x++) {
                            pr[x] = exp2_lanes(load_float(score + (r + x) * BLOCK + i) * scale - norm);
                            if (seen == 1) pr[x] = keep(pr[x], visible(q.at + i, key_at[j + r + x], (int32_t)window));
                            ds[x] = pr[x] * (load_float(dprob + (r + x) * BLOCK + i) - row_sum);
                            store_left(prob + (j + r + x) * key_units, i, pr[x]);
                            store_left(dscore + (j + r + x) * key_units, i, ds[x]);
                        }
                        store_pair(dscore_lanes + (j + r) / PAIR * BLOCK + i, BLOCK, ds[0], ds[1]);
                    }
                }
            }
            int64_t at_key = block * BLOCK * z.width;
            product(keys, z.width, q.lanes / PAIR, prob, key_units, do_by_lane, z.width, dv + at_key, z.width, 1);
            product(keys, z.width, q.lanes / PAIR, dscore, key_units, q_by_lane, z.width, dk + at_key, z.width, 1);
            product(p->head_dim, q.lanes, keys / PAIR, k_turned + block * p->head_dim * key_units, key_units, dscore_lanes,
                    BLOCK, dq, BLOCK, 1);
        }
        scatter_columns(p, z, &q, b, g, p->dq, p->dq_stride, dq, (float *)spare, p->scale);
    }
    for (int64_t j = 0; j < p->keys; j++) {
        store_row(key_row(p->dk, p->dk_stride, b, g, j), dk + j * z.width, p->head_dim, p->scale);
        store_row(key_row(p->dv, p->dv_stride, b, g, j), dv + j * z.width, p->head_dim, 1.0f);
    }
}

static int64_t backward_room(const struct attention *p, struct sizes z) {
    return z.keys * z.width * 16 + z.blocks * p->head_dim * BLOCK * 4 + BLOCK * z.width * 32 + BLOCK * BLOCK * 16 +
           2 * STRIP * BLOCK * 4 + 16384;
}

/* dq, dk, dv are written whole; dsinks [batch, heads] is added to. One task a group, so sums have one fixed order. */
int NAME(attention_backward)(const struct attention *p) {
    struct sizes z = measure(p);
    if (!z.rows || !p->batch) return 0;
    struct positions at = read_positions(p, z);
    int64_t bytes = round_up(backward_room(p, z), 4096), pairs = p->batch * p->groups;
    char *room = rooms(bytes * max_threads());
    int failed = !room || !at.query;
    if (!failed) {
#pragma omp parallel for schedule(dynamic) if (WORTH_SHARING(p->batch * z.rows * p->keys * p->groups / 4))
        for (int64_t task = 0; task < pairs; task++)
            backward_group(p, z, at, task / p->groups, task % p->groups, room + bytes * thread_number());
    }
    free(room), free(at.query);
    return failed;
}

/* A few tokens through all blocks of a model in one call: what lies between the products of a token takes longer to ask for
 * from Python than to compute. The products are those of few.c and mxfp4.c, in the order and with the roundings of the
 * modules that they stand for.
 */
#include "decode_step.h"
#include "integers.h"
#include "kernels.h"

static const float *as_floats(float *room, const element *from, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store_float_part(room + i, load_part(from + i, count - i), count - i);
    return room;
}

/* stream += y, rounded once */
static void add(element *stream, const element *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES)
        store_part(stream + i, load_part(stream + i, count - i) + load_part(y + i, count - i), count - i);
}

/* The best `chosen` of one row's experts, best first, the lower id where two score alike, and a softmax over their logits.
 * A score that is not a number counts as the best, so that it shows. */
static void choose(const struct decode_layer *l, const float *logits, int64_t *indices, float *weights) {
    for (int64_t k = 0; k < l->chosen; k++) {
        int64_t best = -1;
        float best_score = 0;
        for (int64_t e = 0; e < l->experts; e++) {
            int taken = l->kept && !l->kept[e];
            for (int64_t i = 0; i < k; i++) taken |= indices[i] == e;
            if (taken) continue;
            float score = logits[e] + (l->selection_bias ? l->selection_bias[e] : 0.0f);
            if (best < 0 || score > best_score || (score != score && best_score == best_score)) best = e, best_score = score;
        }
        indices[k] = best;
    }
    float most = logits[indices[0]], total = 0;
    for (int64_t k = 1; k < l->chosen; k++)
        if (logits[indices[k]] > most) most = logits[indices[k]];
    for (int64_t k = 0; k < l->chosen; k++) total += weights[k] = expf(logits[indices[k]] - most);
    for (int64_t k = 0; k < l->chosen; k++) weights[k] /= total;
}

struct workspace {
    element *normed, *qkv, *rotated, *mixed, *y;
    float *floats, *scale;
};

static int attend(const struct decode_step *s, const struct decode_layer *l, struct workspace w) {
    int64_t H = s->heads, G = s->groups, Dh = s->head_dim, all = H + 2 * G, S = s->tokens;
    NAME(rope)(w.qkv, S * all * Dh, all * Dh, s->cosine, s->sine, s->angle_batch, w.rotated, s->batch, S, H + G, Dh, 1.0f);
    for (int64_t b = 0; b < s->batch; b++)
        for (int64_t t = 0; t < S; t++) {
            int64_t row = b * S + t, at = (b * l->room + l->slots[t]) * G * Dh;
            memcpy((element *)l->keys + at, w.rotated + (row * (H + G) + H) * Dh, G * Dh * sizeof(element));
            memcpy((element *)l->values + at, w.qkv + (row * all + H + G) * Dh, G * Dh * sizeof(element));
        }
    struct attention p = {
        .q = w.rotated, .k = l->keys, .v = l->values, .out = w.mixed, .sinks = as_floats(w.floats, l->sinks, H),
        .q_pos = s->positions, .k_pos = l->key_positions, .batch = s->batch, .queries = S, .keys = l->key_count, .groups = G,
        .heads_per_group = H / G, .head_dim = Dh, .window = l->window, .scale = 1.0f / sqrtf((float)Dh),
        .q_stride = {S * (H + G) * Dh, (H + G) * Dh, Dh}, .k_stride = {l->room * G * Dh, G * Dh, Dh},
        .v_stride = {l->room * G * Dh, G * Dh, Dh}, .out_stride = {S * H * Dh, H * Dh, Dh},
    };
    return NAME(attention_forward)(&p);
}

static int block(const struct decode_step *s, const struct decode_layer *l, struct workspace w) {
    int64_t rows = s->batch * s->tokens, D = s->width, heads = (s->heads + 2 * s->groups) * s->head_dim, bias_is_float = sizeof(element) == 4;
    element *x = s->x;
    int failed = 0;
    NAME(rms_norm_forward)(x, 0, as_floats(w.floats, l->attn_norm, D), w.normed, w.scale, rows, D, s->eps);
    failed |= NAME(few_rows)(w.normed, l->qkv, l->qkv_scales, NULL, l->qkv_group, l->qkv_form, l->qkv_bias, bias_is_float, rows, D,
                             heads, w.qkv);
    failed |= attend(s, l, w);
    failed |= NAME(few_rows)(w.mixed, l->out, l->out_scales, NULL, l->out_group, l->out_form, l->out_bias, bias_is_float, rows,
                             s->heads * s->head_dim, D, w.y);
    add(x, w.y, rows * D);
    NAME(rms_norm_forward)(x, 0, as_floats(w.floats, l->moe_norm, D), w.normed, w.scale, rows, D, s->eps);
    failed |= NAME(few_rows)(w.normed, l->router, NULL, NULL, 0, DENSE, l->router_bias, bias_is_float, rows, D, l->experts, w.y);
    if (failed) return 1;
    as_floats(l->logits, w.y, rows * l->experts);
    for (int64_t r = 0; r < rows; r++)
        choose(l, l->logits + r * l->experts, l->indices + r * l->chosen, l->weights + r * l->chosen);
    struct weight up = {l->up, l->up_scales, l->up_zeros, l->up_group, l->up_form};
    struct weight down = {l->down, l->down_scales, l->down_zeros, l->down_group, l->down_form};
    if (up.form == MXFP4)
        failed = NAME(packed_experts)(w.normed, l->indices, l->weights, l->up, l->up_scales, l->up_bias, l->down, l->down_scales,
                                      l->down_bias, bias_is_float, w.y, l->norms, rows, l->chosen, l->experts, D, s->inner,
                                      l->limit, l->alpha, NULL, NULL, 0, 0, NULL, NULL, 0, 0);
    else
        failed = NAME(few_experts)(w.normed, l->indices, l->weights, &up, l->up_bias, &down, l->down_bias, bias_is_float, w.y,
                                   l->norms, rows, l->chosen, l->experts, D, s->inner, l->limit, l->alpha);
    add(x, w.y, rows * D);
    return failed;
}

/* All blocks, one after the other; x holds the stream before and after. */
int NAME(decode_step)(const struct decode_step *s) {
    int64_t rows = s->batch * s->tokens, H = s->heads * s->head_dim, G = s->groups * s->head_dim, widest = s->width, floats = s->heads;
    for (int64_t i = 0; i < s->layers; i++)
        if (s->layer[i].experts > widest) widest = s->layer[i].experts;
    if (s->width > floats) floats = s->width;
    int64_t elements = rows * (s->width + (H + 2 * G) + (H + G) + H + widest) + 5 * LANES;
    char *all = rooms(elements * sizeof(element) + (floats + rows) * 4 + 7 * 64), *room = all;
    if (!room) return 1;
    struct workspace w;
    w.normed = carve(&room, rows * s->width * sizeof(element));
    w.qkv = carve(&room, rows * (H + 2 * G) * sizeof(element));
    w.rotated = carve(&room, rows * (H + G) * sizeof(element));
    w.mixed = carve(&room, rows * H * sizeof(element));
    w.y = carve(&room, rows * widest * sizeof(element));
    w.floats = carve(&room, floats * 4);
    w.scale = carve(&room, rows * 4);
    int failed = 0;
    for (int64_t i = 0; i < s->layers && !failed; i++) failed = block(s, &s->layer[i], w);
    free(all);
    return failed;
}

/* Everything in a training step that is not a matrix product or attention: norm, rotation, activation, routing traffic
 * and the softmax of the loss. Each kernel reads its input once, computes in float and rounds once.
 *
 * Sums over rows (weight gradients) are cut into a fixed number of pieces, never by thread, so the result does not
 * depend on how many threads run.
 */
#include "kernels.h"
#include "vector.h"

#define PIECES 16 /* partial sums of a reduction over rows; the caller provides [PIECES, width] floats of room */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* A residual stream may stay in float while products run in bf16: x is then float beside bf16 outputs. */
INLINE vf load_either(const void *p, int is_float, int64_t i, int64_t n) {
    return is_float ? load_float_part((const float *)p + i, n) : load_part((const element *)p + i, n);
}

/* ---------------------------------------------------------------------------------------------- RMSNorm */

/* y = x * rsqrt(mean(x^2) + eps) * weight; keeps the reciprocal root of each row for the backward pass */
void NAME(rms_norm_forward)(const void *x, int x_is_float, const float *weight, element *y, float *scale, int64_t rows,
                            int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (WORTH_SHARING(rows * width))
    for (int64_t r = 0; r < rows; r++) {
        vf square = splat(0.0f);
        for (int64_t i = 0; i < width; i += LANES) {
            vf v = load_either(x, x_is_float, r * width + i, width - i);
            square += v * v;
        }
        scale[r] = 1.0f / sqrtf(sum_lanes(square) / (float)width + eps);
        for (int64_t i = 0; i < width; i += LANES) {
            vf v = load_either(x, x_is_float, r * width + i, width - i);
            store_part(y + r * width + i, v * scale[r] * load_float_part(weight + i, width - i), width - i);
        }
    }
}

/* dx = s (dy w) - x s^3 mean(dy w x), dweight = sum over rows of dy x s */
void NAME(rms_norm_backward)(const element *dy, const void *x, int x_is_float, const float *weight, const float *scale,
                             void *dx, float *dweight, float *room, int64_t rows, int64_t width) {
    int64_t step = (rows + PIECES - 1) / PIECES;
#pragma omp parallel for schedule(static) if (WORTH_SHARING(rows * width))
    for (int64_t piece = 0; piece < PIECES; piece++) {
        float *sum = room + piece * width;
        memset(sum, 0, width * sizeof(float));
        for (int64_t r = piece * step; r < smaller(rows, (piece + 1) * step); r++) {
            vf dot = splat(0.0f);
            for (int64_t i = 0; i < width; i += LANES) {
                int64_t n = width - i;
                vf v = load_either(x, x_is_float, r * width + i, n), d = load_part(dy + r * width + i, n);
                dot += v * d * load_float_part(weight + i, n);
                store_float_part(sum + i, load_float_part(sum + i, n) + d * v * scale[r], n);
            }
            float s = scale[r], back = s * s * s * sum_lanes(dot) / (float)width;
            for (int64_t i = 0; i < width; i += LANES) {
                int64_t n = width - i;
                vf v = load_either(x, x_is_float, r * width + i, n), d = load_part(dy + r * width + i, n);
                vf g = d * load_float_part(weight + i, n) * s - v * back;
                if (x_is_float) store_float_part((float *)dx + r * width + i, g, n);
                else store_part((element *)dx + r * width + i, g, n);
            }
        }
    }
    for (int64_t i = 0; i < width; i++) {
        float total = 0;
        for (int64_t piece = 0; piece < PIECES; piece++) total += room[piece * width + i];
        dweight[i] = total;
    }
}

/* ------------------------------------------------------------------------------------------------- RoPE */

/* y[b, s, n] = x[b, s, n] rotated by the angle of token s; direction -1 turns back, which is also the gradient.
 * x has strides for batch and token and packed heads; y is contiguous. */
void NAME(rope)(const element *x, int64_t x_batch, int64_t x_token, const float *cosine, const float *sine,
                int64_t angle_batch, element *y, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                float direction) {
    int64_t half = head_dim / 2;
#pragma omp parallel for schedule(static) if (WORTH_SHARING(batch * tokens * heads * head_dim))
    for (int64_t row = 0; row < batch * tokens; row++) {
        int64_t b = row / tokens, t = row % tokens;
        const float *c = cosine + b * angle_batch + t * half, *s = sine + b * angle_batch + t * half;
        for (int64_t h = 0; h < heads; h++) {
            const element *from = x + b * x_batch + t * x_token + h * head_dim;
            element *to = y + (row * heads + h) * head_dim;
            for (int64_t i = 0; i < half; i += LANES) {
                int64_t n = half - i;
                vf first = load_part(from + i, n), second = load_part(from + half + i, n);
                vf co = load_float_part(c + i, n), si = load_float_part(s + i, n) * direction;
                store_part(to + i, first * co - second * si, n);
                store_part(to + half + i, second * co + first * si, n);
            }
        }
    }
}

/* --------------------------------------------------------------------------------------------- experts */

/* 2n interleaved values -> n gates and n ups */
INLINE void load_gate_up(const element *p, int64_t n, vf *gate, vf *up) {
#if defined(XMOE_ELEMENT_BF16)
    vu both; /* a pair of bf16 is one 32-bit value, the gate in its lower half */
    if (n >= LANES) both = load_unit(p);
    else {
        unit part[LANES] = {0};
        memcpy(part, p, n * sizeof(unit));
        both = load_unit(part);
    }
    *gate = (vf)(both << 16);
    *up = (vf)(both & 0xffff0000u);
#else
    vf low = load_float_part(p, 2 * n), high = n > LANES / 2 ? load_float_part(p + LANES, 2 * n - LANES) : splat(0.0f);
    *gate = EVEN(low, high);
    *up = ODD(low, high);
#endif
}
INLINE void store_gate_up(element *p, int64_t n, vf gate, vf up) {
#if defined(XMOE_ELEMENT_BF16)
    vu both = round_to_bf16(gate) >> 16 | (round_to_bf16(up) & 0xffff0000u);
    if (n >= LANES) store_unit(p, both);
    else {
        unit part[LANES];
        store_unit(part, both);
        memcpy(p, part, n * sizeof(unit));
    }
#else
    store_float_part(p, ZIP_LOW(gate, up), 2 * n);
    if (n > LANES / 2) store_float_part(p + LANES, ZIP_HIGH(gate, up), 2 * n - LANES);
#endif
}
INLINE void load_gate_up_bias(const float *p, int64_t n, vf *gate, vf *up) {
    vf low = load_float_part(p, 2 * n), high = n > LANES / 2 ? load_float_part(p + LANES, 2 * n - LANES) : splat(0.0f);
    *gate = EVEN(low, high);
    *up = ODD(low, high);
}
/* the expert that owns a row, where offsets[e] is expert e's first row; `hint` makes a scan over rows cheap */
INLINE int64_t owner(const int64_t *offsets, int64_t row, int64_t hint) {
    while (row >= offsets[hint + 1]) hint++;
    return hint;
}

/* Sorts T*K slots by expert, stably; slots with expert -1 are left out.
 * offsets [E + 1]: first row of each expert; token, slot [rows]: where a row comes from; place [T*K]: its row or -1. */
void NAME(sort_by_expert)(const int64_t *indices, const float *weights, int64_t slots, int64_t slots_per_token,
                          int64_t experts, int64_t *offsets, int64_t *token, float *row_weight, int64_t *place) {
    memset(offsets, 0, (experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < slots; i++)
        if (indices[i] >= 0) offsets[indices[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
    int64_t *next = malloc((experts + 1) * sizeof(int64_t));
    memcpy(next, offsets, (experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < slots; i++) {
        place[i] = indices[i] >= 0 ? next[indices[i]]++ : -1;
        if (place[i] < 0) continue;
        token[place[i]] = i / slots_per_token;
        row_weight[place[i]] = weights[i];
    }
    free(next);
}

/* to[r] = from[token[r]]; where a bias [experts, width] is given, dot[r] = to[r] . bias[expert of r] */
void NAME(gather_rows)(const element *from, const int64_t *token, element *to, int64_t rows, int64_t width,
                       const float *bias, const int64_t *offsets, float *dot) {
#pragma omp parallel for schedule(static) if (WORTH_SHARING(rows * width))
    for (int64_t chunk = 0; chunk < rows; chunk += 32) {
        int64_t e = 0;
        for (int64_t r = chunk; r < smaller(rows, chunk + 32); r++) {
            memcpy(to + r * width, from + token[r] * width, width * sizeof(element));
            if (!bias) continue;
            e = owner(offsets, r, e);
            vf sum = splat(0.0f);
            for (int64_t i = 0; i < width; i += LANES)
                sum += load_part(to + r * width + i, width - i) * load_float_part(bias + e * width + i, width - i);
            dot[r] = sum_lanes(sum);
        }
    }
}

/* gate_up [rows, 2 width] before its bias -> min(gate, limit) sigmoid(alpha gate) (clamp(up) + 1)  [rows, width] */
void NAME(swiglu_forward)(const element *gate_up, const float *bias, const int64_t *offsets, int64_t rows, int64_t width,
                          float limit, float alpha, element *act) {
#pragma omp parallel for schedule(static) if (WORTH_SHARING(rows * width))
    for (int64_t chunk = 0; chunk < rows; chunk += 32) {
        int64_t e = 0;
        for (int64_t r = chunk; r < smaller(rows, chunk + 32); r++) {
            e = owner(offsets, r, e);
            for (int64_t i = 0; i < width; i += LANES) {
                int64_t n = smaller(LANES, width - i);
                vf gate, up, gate_bias, up_bias;
                load_gate_up(gate_up + r * 2 * width + 2 * i, n, &gate, &up);
                load_gate_up_bias(bias + e * 2 * width + 2 * i, n, &gate_bias, &up_bias);
                store_part(act + r * width + i, swiglu_lanes(gate + gate_bias, up + up_bias, limit, alpha), n);
            }
        }
    }
}

/* From d act (before weighting) and each row's routing weight w:
 *   weighted = w act, d_gate_up = gradient of the pre-activation, dweight[r] += act . d act. */
void NAME(swiglu_backward)(const element *gate_up, const float *bias, const int64_t *offsets, int64_t rows, int64_t width,
                           float limit, float alpha, const float *row_weight, const element *dact, element *weighted,
                           element *dgate_up, float *dweight) {
#pragma omp parallel for schedule(static) if (WORTH_SHARING(rows * width))
    for (int64_t chunk = 0; chunk < rows; chunk += 32) {
        int64_t e = 0;
        for (int64_t r = chunk; r < smaller(rows, chunk + 32); r++) {
            e = owner(offsets, r, e);
            vf dot = splat(0.0f);
            for (int64_t i = 0; i < width; i += LANES) {
                int64_t n = smaller(LANES, width - i);
                vf gate, up, gate_bias, up_bias;
                load_gate_up(gate_up + r * 2 * width + 2 * i, n, &gate, &up);
                load_gate_up_bias(bias + e * 2 * width + 2 * i, n, &gate_bias, &up_bias);
                gate += gate_bias, up += up_bias;
                vi gate_free = gate <= limit, up_free = (up <= limit) & (up >= -limit); /* clamps pass no gradient */
                gate = vmin(gate, splat(limit));
                up = vmax(vmin(up, splat(limit)), splat(-limit)) + 1.0f;
                vf s = sigmoid_lanes(gate * alpha), silu = gate * s, act = silu * up;
                vf d = load_part(dact + r * width + i, n);
                dot += act * d;
                d = d * row_weight[r];
                store_part(weighted + r * width + i, act * row_weight[r], n);
                store_gate_up(dgate_up + r * 2 * width + 2 * i, n, keep(d * up * (s + alpha * silu * (1.0f - s)), gate_free),
                              keep(d * silu, up_free));
            }
            dweight[r] += sum_lanes(dot);
        }
    }
}

/* out[t] = sum over k of weight[t, k] (rows[place[t, k]] + bias[expert]); bias, weight (then 1) and norms may be NULL.
 * norms[t, k] = || rows[place] + bias ||, 0 for an unused slot. */
void NAME(combine)(const element *rows, const int64_t *place, const int64_t *indices, const float *weight, const float *bias,
                   element *out, float *norms, int64_t tokens, int64_t slots, int64_t width) {
#pragma omp parallel for schedule(static) if (WORTH_SHARING(tokens * slots * width))
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t n = width - i;
            vf sum = splat(0.0f);
            for (int64_t k = t * slots; k < (t + 1) * slots; k++) {
                if (place[k] < 0) continue;
                vf v = load_part(rows + place[k] * width + i, n);
                if (bias) v += load_float_part(bias + indices[k] * width + i, n);
                sum += weight ? v * weight[k] : v;
            }
            store_part(out + t * width + i, sum, n);
        }
        for (int64_t k = t * slots; norms && k < (t + 1) * slots; k++) {
            vf square = splat(0.0f);
            for (int64_t i = 0; place[k] >= 0 && i < width; i += LANES) {
                vf v = load_part(rows + place[k] * width + i, width - i);
                if (bias) v += load_float_part(bias + indices[k] * width + i, width - i);
                square += v * v;
            }
            norms[k] = sqrtf(sum_lanes(square));
        }
    }
}

/* out[e] = sum over the rows of expert e of scale[r] x[r]; scale may be NULL (1). One expert: plain column sums. */
void NAME(column_sums)(const element *x, const float *scale, const int64_t *offsets, int64_t experts, int64_t width, float *out) {
    int64_t strips = (width + 127) / 128;
#pragma omp parallel for schedule(dynamic) collapse(2) if (WORTH_SHARING((offsets[experts] - offsets[0]) * width))
    for (int64_t e = 0; e < experts; e++)
        for (int64_t strip = 0; strip < strips; strip++) {
            float *sum = out + e * width;
            int64_t first = strip * 128, last = smaller(width, first + 128);
            memset(sum + first, 0, (last - first) * sizeof(float));
            for (int64_t r = offsets[e]; r < offsets[e + 1]; r++) {
                float by = scale ? scale[r] : 1.0f;
                for (int64_t i = first; i < last; i += LANES)
                    store_float_part(sum + i, load_float_part(sum + i, last - i) + load_part(x + r * width + i, last - i) * by,
                                     last - i);
            }
        }
}

/* ------------------------------------------------------------------------------------------------- loss */

/* Rows of logits become scale * (softmax - one at the target), in place; losses[r] = -log softmax[target].
 * A target of -100 gives a loss and a gradient of 0. */
void NAME(cross_entropy)(element *logits, const int64_t *targets, int64_t rows, int64_t width, float scale, float *losses) {
#pragma omp parallel for schedule(static) if (WORTH_SHARING(rows * width))
    for (int64_t r = 0; r < rows; r++) {
        element *x = logits + r * width;
        if (targets[r] < 0) {
            memset(x, 0, width * sizeof(element));
            losses[r] = 0.0f;
            continue;
        }
        vf top = splat(-INFINITY), sum = splat(0.0f);
        int64_t whole = width / LANES * LANES;
        float most = -INFINITY, total;
        for (int64_t i = 0; i < whole; i += LANES) top = vmax(load(x + i), top);
        for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
        for (int64_t i = whole; i < width; i++) most = load_one(x + i) > most ? load_one(x + i) : most;
        for (int64_t i = 0; i < whole; i += LANES) sum += exp2_lanes((load(x + i) - most) * LOG2E);
        total = sum_lanes(sum);
        for (int64_t i = whole; i < width; i++) total += exp2f((load_one(x + i) - most) * LOG2E);
        float at_target = load_one(x + targets[r]), by = scale / total;
        losses[r] = logf(total) + (most - at_target);
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t n = width - i;
            store_part(x + i, exp2_lanes((load_part(x + i, n) - most) * LOG2E) * by, n);
        }
        store_one(x + targets[r], exp2f((at_target - most) * LOG2E) * by - scale);
    }
}

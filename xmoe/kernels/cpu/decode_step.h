/* The arguments of a decode step; library.py mirrors these structs field by field. */
#ifndef XMOE_CPU_DECODE_STEP_H
#define XMOE_CPU_DECODE_STEP_H

#include <stdint.h>

/* One block. Weights, biases, norms and sinks are elements (bf16 or float); the two projections of attention may be int8
 * without zeros, and experts are held in any form of integers.h. */
struct decode_layer {
    const void *attn_norm, *qkv, *qkv_scales, *qkv_bias, *out, *out_scales, *out_bias, *sinks; /* sinks [heads] */
    const void *moe_norm, *router, *router_bias;                        /* router [experts, width] */
    const void *up, *up_scales, *up_zeros, *up_bias, *down, *down_scales, *down_zeros, *down_bias;
    void *keys, *values;          /* the cache: [batch, room, groups, head_dim] */
    const int64_t *slots;         /* [tokens]: the rows of the cache that the new keys and values take */
    const int64_t *key_positions; /* [batch, key_count] */
    const uint8_t *kept;          /* [experts], 0 for those that may not be chosen; NULL: all may */
    const float *selection_bias;  /* [experts], added to the scores for the choice alone; or NULL */
    float *logits, *weights, *norms; /* written: [rows, experts], [rows, chosen]; norms NULL where nobody asks */
    int64_t *indices;             /* written: [rows, chosen] */
    int64_t room, key_count, window, experts, chosen; /* window 0: none */
    int64_t qkv_group, qkv_form, out_group, out_form, up_group, up_form, down_group, down_form;
    float limit, alpha;
};

/* The new tokens of all sequences: rows = batch * tokens of them. */
struct decode_step {
    const struct decode_layer *layer;
    void *x;                      /* [rows, width]: the embedded tokens, replaced by the stream before the final norm */
    const float *cosine, *sine;   /* [1 or batch, tokens, head_dim / 2]; angle_batch 0 or tokens * head_dim / 2 */
    const int64_t *positions;     /* [batch, tokens] */
    int64_t layers, batch, tokens, width, inner, heads, groups, head_dim, angle_batch;
    float eps;
};
#endif

/* The arguments of the attention kernels; library.py mirrors this struct field by field. */
#ifndef XMOE_CPU_ATTENTION_H
#define XMOE_CPU_ATTENTION_H

#include <stdint.h>

/* Tensors are [batch, token, head, head_dim] with head_dim contiguous; strides, in elements, are those of the first
 * three axes. Every pointer is to elements (bf16 or float) unless its type says otherwise. */
struct attention {
    const void *q, *k, *v;
    void *out;             /* forward: written; backward: read */
    const void *dout;      /* backward only, as all that starts with d */
    void *dq, *dk, *dv;
    float *lse;            /* [batch, groups, queries * heads_per_group], base-2 log of the softmax denominator */
    const float *sinks;    /* [heads] or NULL */
    float *dsinks;         /* [batch, heads] */
    const int64_t *q_pos;  /* [batch, queries] or NULL: 0, 1, 2, ... */
    const int64_t *k_pos;  /* [batch, keys] or NULL */
    int64_t batch, queries, keys, groups, heads_per_group, head_dim, window; /* window 0: none */
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3], dout_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
    float scale;
};
#endif

/* Kernels that other kernels call, all of one element type and instruction set; each is explained where it is defined. */
#ifndef XMOE_CPU_KERNELS_H
#define XMOE_CPU_KERNELS_H

#include "attention.h"
#include "vector.h"

struct weight; /* of integers.h */

int NAME(attention_forward)(const struct attention *p);
int NAME(attention_few)(const struct attention *p);
int NAME(few_rows)(const element *x, const void *values, const void *scales, const uint8_t *zeros, int64_t group, int64_t form,
                   const void *bias, int bias_is_float, int64_t rows, int64_t inner, int64_t columns, element *y);
void NAME(rms_norm_forward)(const void *x, int x_is_float, const float *weight, element *y, float *scale, int64_t rows,
                            int64_t width, float eps);
void NAME(rope)(const element *x, int64_t x_batch, int64_t x_token, const float *cosine, const float *sine,
                int64_t angle_batch, element *y, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                float direction);
int NAME(packed_experts)(const element *x, const int64_t *indices, const float *weights, const uint8_t *up_blocks,
                         const uint8_t *up_scales, const void *up_bias, const uint8_t *down_blocks, const uint8_t *down_scales,
                         const void *down_bias, int bias_is_float, element *y, float *norms, int64_t tokens, int64_t slots,
                         int64_t experts, int64_t width, int64_t inner, float limit, float alpha, const float *up_a,
                         const float *up_b, int64_t up_rank, float up_scale, const float *down_a, const float *down_b,
                         int64_t down_rank, float down_scale);
int NAME(few_experts)(const element *x, const int64_t *indices, const float *weights, const struct weight *gate_up,
                      const void *up_bias, const struct weight *down, const void *down_bias, int bias_is_float, element *y, float *norms,
                      int64_t tokens, int64_t slots, int64_t experts, int64_t width, int64_t inner, float limit, float alpha);
#endif

/* One page of vector arithmetic, so that every kernel is written once.
 *
 * The kernels (attention.c, pointwise.c) are compiled once per instruction set and element type, with
 *     -DXMOE_ISA=avx512bf16 -DXMOE_ELEMENT=bf16 -DXMOE_ELEMENT_BF16     (or -DXMOE_ELEMENT=f32)
 * and the machine flags of that set. Everything here follows from what those flags define: the number of lanes,
 * and whether products take one float or a pair of bf16 values per 32-bit "unit".
 *
 * A *unit* is 32 bits of a matrix product's inner dimension: one float, or two neighbouring bf16 values where the
 * machine multiplies such pairs (VDPBF16PS, BFDOT). Both have the same size, so packing and tiles share one layout.
 */
#ifndef XMOE_CPU_VECTOR_H
#define XMOE_CPU_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A product's tile is TILE_ROWS x TILE_VECTORS accumulators: as many as the registers hold beside its operands. */
#define TILE_ROWS 6
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define TILE_VECTORS 4
#elif defined(__AVX__)
#define LANES 8
#define TILE_VECTORS 2
#elif defined(__aarch64__)
#define LANES 4
#define TILE_VECTORS 4
#else
#define LANES 4
#define TILE_VECTORS 2
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#define NAME2(op, element, isa) op##_##element##_##isa
#define NAME1(op, element, isa) NAME2(op, element, isa)
#define NAME(op) NAME1(op, XMOE_ELEMENT, XMOE_ISA) /* the exported symbol, e.g. rope_bf16_avx2 */

#if defined(XMOE_ELEMENT_BF16)
typedef uint16_t element;
#else
typedef float element;
#endif
#if defined(XMOE_ELEMENT_BF16) && (defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define PAIR 2 /* bf16 values in a unit */
#else
#define PAIR 1
#endif

typedef uint32_t unit;
typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
/* the same types without an alignment promise, for loads and stores through them */
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* Threads are those of PyTorch: the OpenMP symbols resolve to the runtime that torch has already loaded, so both share
 * one pool and torch.set_num_threads rules. Declared here because not every compiler that can emit OpenMP has omp.h. */
#ifdef _OPENMP
int omp_get_max_threads(void);
int omp_get_thread_num(void);
#define max_threads() omp_get_max_threads()
#define thread_number() omp_get_thread_num()
#else
#define max_threads() 1
#define thread_number() 0
#endif

/* Waking other threads costs some microseconds: smaller jobs (values touched, or multiplications) stay on one. */
#define WORTH_SHARING(values) ((values) > 32768)

#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf splat(float x) { return (vf){0} + x; }
INLINE vf load_float(const float *p) { return (vf) * (const vf_any *)p; }
INLINE void store_float(float *p, vf x) { *(vf_any *)p = x; }
INLINE vu load_unit(const void *p) { return (vu) * (const vu_any *)p; }
INLINE void store_unit(void *p, vu x) { *(vu_any *)p = x; }
INLINE vf vmax(vf a, vf b) { vi m = a > b; return (vf)(((vi)a & m) | ((vi)b & ~m)); }
INLINE vf vmin(vf a, vf b) { vi m = a < b; return (vf)(((vi)a & m) | ((vi)b & ~m)); }
INLINE vf keep(vf x, vi mask) { return (vf)((vi)x & mask); }

INLINE float sum_lanes(vf x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

/* bf16 <-> float: the upper half of the bits; rounding to nearest even. */
INLINE vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
INLINE vu round_to_bf16(vf x) { /* result in the upper half of each lane, lower half undefined */
    vu b = (vu)x;
    return b + (0x7fffu + ((b >> 16) & 1u));
}
INLINE vh narrow(vf x) {
#if defined(__AVX512BF16__) && LANES == 16
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    return __builtin_convertvector(round_to_bf16(x) >> 16, vh);
#endif
}
INLINE float widen_one(uint16_t h) {
    union { uint32_t u; float f; } c = {(uint32_t)h << 16};
    return c.f;
}
INLINE uint16_t narrow_one(float x) {
    union { float f; uint32_t u; } c = {x};
    if (x != x) return 0x7fc0;
    return (uint16_t)((c.u + 0x7fffu + ((c.u >> 16) & 1u)) >> 16);
}

/* element access as float, a vector or one at a time */
#if defined(XMOE_ELEMENT_BF16)
INLINE vf load(const element *p) { return widen((vh) * (const vh_any *)p); }
INLINE void store(element *p, vf x) { *(vh_any *)p = narrow(x); }
INLINE float load_one(const element *p) { return widen_one(*p); }
INLINE void store_one(element *p, float x) { *p = narrow_one(x); }
#else
INLINE vf load(const element *p) { return load_float(p); }
INLINE void store(element *p, vf x) { store_float(p, x); }
INLINE float load_one(const element *p) { return *p; }
INLINE void store_one(element *p, float x) { *p = x; }
#endif

/* the same for the last n < LANES values of a row; what lies beyond reads as 0 */
INLINE vf load_part(const element *p, int64_t n) {
    if (n >= LANES) return load(p);
    element part[LANES] = {0};
    memcpy(part, p, n * sizeof(element));
    return load(part);
}
INLINE void store_part(element *p, vf x, int64_t n) {
    if (n >= LANES) {
        store(p, x);
        return;
    }
    element part[LANES];
    store(part, x);
    memcpy(p, part, n * sizeof(element));
}
INLINE vf load_float_part(const float *p, int64_t n) {
    if (n >= LANES) return load_float(p);
    float part[LANES] = {0};
    memcpy(part, p, n * sizeof(float));
    return load_float(part);
}
INLINE void store_float_part(float *p, vf x, int64_t n) {
    if (n >= LANES) {
        store_float(p, x);
        return;
    }
    float part[LANES];
    store_float(part, x);
    memcpy(p, part, n * sizeof(float));
}

/* 2^x for x <= 127, relative error about 2e-7; below -126 it returns 2^-126, which every caller may take for 0. */
INLINE vf exp2_lanes(vf x) {
    x = vmax(x, splat(-126.0f));
    vf shifted = x + splat(12582912.0f); /* 1.5 * 2^23: the sum's low bits hold round(x) */
    vi whole = (vi)shifted - (vi)splat(12582912.0f);
    vf f = x - (shifted - splat(12582912.0f)); /* in [-0.5, 0.5] */
    vf p = splat(1.5403530e-4f); /* Taylor terms ln2^i / i!, enough for the half-unit range */
    p = p * f + splat(1.3333558e-3f);
    p = p * f + splat(9.6181291e-3f);
    p = p * f + splat(5.5504109e-2f);
    p = p * f + splat(2.4022651e-1f);
    p = p * f + splat(6.9314718e-1f);
    p = p * f + splat(1.0f);
    return (vf)((vi)p + (whole << 23));
}
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
INLINE vf sigmoid_lanes(vf x) { return 1.0f / (1.0f + exp2_lanes(vmin(x * -LOG2E, splat(126.0f)))); }

/* the clamped SwiGLU of the experts: min(gate, limit) sigmoid(alpha gate) (clamp(up) + 1) */
INLINE vf swiglu_lanes(vf gate, vf up, float limit, float alpha) {
    gate = vmin(gate, splat(limit)), up = vmax(vmin(up, splat(limit)), splat(-limit));
    return gate * sigmoid_lanes(gate * alpha) * (up + 1.0f);
}

/* one step of a product: acc += a (one unit, in every lane) * b */
INLINE vf multiply_add(vf acc, vu a, vu b) {
#if PAIR == 2 && defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#elif PAIR == 2
    return (vf)vbfdotq_f32((float32x4_t)acc, vreinterpretq_bf16_u32((uint32x4_t)a), vreinterpretq_bf16_u32((uint32x4_t)b));
#else
    return acc + (vf)a * (vf)b;
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define HAVE_SHUFFLE 1
#if LANES == 16
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif
#else /* older compilers: the same four shuffles, spelled with index vectors */
INLINE vf shuffle_(vf a, vf b, int start, int step, int zip) {
    vi m;
    for (int i = 0; i < LANES; i++) m[i] = zip ? start + i / 2 + (i & 1) * LANES : start + i * step;
    return __builtin_shuffle(a, b, m);
}
#define EVEN(a, b) shuffle_(a, b, 0, 2, 0)
#define ODD(a, b) shuffle_(a, b, 1, 2, 0)
#define ZIP_LOW(a, b) shuffle_(a, b, 0, 0, 1)
#define ZIP_HIGH(a, b) shuffle_(a, b, LANES / 2, 0, 1)
#endif

/* `count` values that alternate gate and up, a multiple of 2 LANES, -> count / 2 activations */
INLINE void swiglu_of_pairs(const float *pairs, int64_t count, float limit, float alpha, float *act) {
    for (int64_t r = 0; r < count; r += 2 * LANES) {
        vf low = load_float(pairs + r), high = load_float(pairs + r + LANES);
        store_float(act + r / 2, swiglu_lanes(EVEN(low, high), ODD(low, high), limit, alpha));
    }
}

/* LANES x LANES transpose in registers: a perfect shuffle of the rows, repeated log2(LANES) times. */
INLINE void transpose_block(vf *r) {
    vf t[LANES];
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            t[2 * i] = ZIP_LOW(r[i], r[i + LANES / 2]);
            t[2 * i + 1] = ZIP_HIGH(r[i], r[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) r[i] = t[i];
    }
}

/* to[col * to_row + row] = from[row * from_row + col], 32-bit values; rows must be a multiple of LANES */
INLINE void transpose(float *to, int64_t to_row, const float *from, int64_t from_row, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i += LANES) {
        int64_t j = 0;
        for (; j + LANES <= cols; j += LANES) {
            vf r[LANES];
#pragma GCC unroll 16
            for (int x = 0; x < LANES; x++) r[x] = load_float(from + (i + x) * from_row + j);
            transpose_block(r);
#pragma GCC unroll 16
            for (int x = 0; x < LANES; x++) store_float(to + (j + x) * to_row + i, r[x]);
        }
        for (; j < cols; j++)
            for (int x = 0; x < LANES; x++) to[j * to_row + i + x] = from[(i + x) * from_row + j];
    }
}
#endif

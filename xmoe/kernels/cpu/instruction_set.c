/* Which of the compiled instruction sets this machine can run. The kernels themselves are in attention.c and
 * pointwise.c; each is exported once per set, and library.py asks here which names to use. */
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>
#endif

const char *xmoe_best_instruction_set(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    (void)avx512;
#if defined(XMOE_HAS_avx512bf16)
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return "avx512bf16";
#endif
#if defined(XMOE_HAS_avx512)
    if (avx512) return "avx512";
#endif
#if defined(XMOE_HAS_avx2)
    if (avx2) return "avx2";
#endif
#elif defined(XMOE_HAS_neonbf16) && defined(__linux__)
    if (getauxval(AT_HWCAP2) & (1ul << 14)) return "neonbf16"; /* HWCAP2_BF16 */
#elif defined(XMOE_HAS_neonbf16) && defined(__APPLE__)
    int has = 0;
    size_t size = sizeof(has);
    if (!sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, NULL, 0) && has) return "neonbf16";
#endif
    return "base";
}

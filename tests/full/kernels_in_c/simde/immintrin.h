/* Stands before the compiler's own header: every intrinsic by SIMDe's portable C, on a CPU that lacks the instructions. */
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

/* SIMDe has those of AVX512-VNNI alone; AVX-VNNI's are the same operations. */
#define _mm_dpbusd_avx_epi32 simde_mm_dpbusd_epi32
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32

/* Debian's SIMDe (0.7.4) lacks these. */
#ifndef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(x, half) \
    simde_mm256_castpd_ps(simde_mm512_extractf64x4_pd(simde_mm512_castps_pd(x), half))
#endif

/* The instruction set that the functions of a file are compiled for; included before everything else, with tier_end.h as the last line.
 *
 * build.py defines one TIER_... for each compilation of a file. The compiler's own flags name the baseline of the
 * architecture, the same for every compiler.
 */
#ifndef TIER_H
#define TIER_H

#if defined(TIERS_EMULATED) /* a test, on any CPU */
#define BEGIN_TARGET(features)
#elif defined(__clang__)
#define BEGIN_TARGET_(text) _Pragma(#text)
#define BEGIN_TARGET(features) \
    BEGIN_TARGET_(clang attribute push(__attribute__((target(features))), apply_to = function))
#else
#define BEGIN_TARGET_(text) _Pragma(#text)
#define BEGIN_TARGET(features) BEGIN_TARGET_(GCC target(features))
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(TIER_generic)
#define TIER_SUFFIX generic
#elif defined(TIER_avx2)
#define TIER_SUFFIX avx2
BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2")
#elif defined(TIER_avxvnni)
#define TIER_SUFFIX avxvnni
BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2,avxvnni")
#elif defined(TIER_avx512vnni)
#define TIER_SUFFIX avx512vnni
BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#elif defined(TIER_amx)
#define TIER_SUFFIX amx
BEGIN_TARGET("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16")
#elif defined(TIER_dotprod)
#define TIER_SUFFIX dotprod
BEGIN_TARGET("arch=armv8.2-a+dotprod")
#elif defined(TIER_i8mm)
#define TIER_SUFFIX i8mm
BEGIN_TARGET("arch=armv8.2-a+dotprod+i8mm")
#else
#error "no tier is defined: build.py defines it"
#endif

#endif

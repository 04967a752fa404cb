/* The table of all kernels, and the tiers that this CPU can run. */

#include "attention.h"
#include "elementwise.h"
#include "gate.h"
#include "kernel.h"
#include "lora.h"
#include "norm.h"
#include "replay.h"
#include "rotary.h"
#include "softmax.h"

#define EXPORTED __attribute__((visibility("default")))

#if defined(__x86_64__)
#define DECLARED(name) extern kernel_code name##_generic, name##_avx2, name##_avx512vnni;
#define VECTOR_CODE(name) {[GENERIC] = name##_generic, [AVX2] = name##_avx2, [AVX512VNNI] = name##_avx512vnni}
#else
#define DECLARED(name) extern kernel_code name##_generic;
#define VECTOR_CODE(name) {[GENERIC] = name##_generic}
#endif
#define ENTRY(name, fields) {#name, fields(TEXT_OF_FIELD), sizeof(struct name##_record), VECTOR_CODE(name)},

/* Kernels that are compiled for every vector tier. */
#define VECTOR_KERNELS(KERNEL) \
    KERNEL(add, ADD_FIELDS) \
    KERNEL(scale, SCALE_FIELDS) \
    KERNEL(rms_norm, RMS_NORM_FIELDS) \
    KERNEL(rotary, ROTARY_FIELDS) \
    KERNEL(gate, GATE_FIELDS) \
    KERNEL(add_deltas, ADD_DELTAS_FIELDS) \
    KERNEL(softmax_blocks, SOFTMAX_BLOCKS_FIELDS) \
    KERNEL(attention, ATTENTION_FIELDS)

#define DECLARE(name, fields) DECLARED(name)
VECTOR_KERNELS(DECLARE)
extern kernel_code replay;

EXPORTED const struct kernel quickchange_kernels[] = {
    VECTOR_KERNELS(ENTRY)
    {"replay", REPLAY_FIELDS(TEXT_OF_FIELD), sizeof(struct replay_record), {[GENERIC] = replay}},
    {0},
};
EXPORTED const char quickchange_tier_names[] = "generic avx2 avxvnni avx512vnni amx dotprod i8mm";
EXPORTED const char quickchange_compiler[] = __VERSION__;

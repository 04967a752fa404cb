/* Ends what tier.h began; the last line of each file that includes it. */
#if defined(__clang__) && !defined(TIER_generic)
#pragma clang attribute pop
#endif

// What this machine can do, for the percentages of cpu_kernels.py: bytes read from memory and INT8 products, one thread.
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Reads `bytes` (a multiple of 8192) and returns something that depends on all of them. Four streams, fetched 8 kB
// ahead, are the fastest that was found: the processor's own prefetcher stops at the end of a page.
extern "C" int64_t read_memory(const char* memory, size_t bytes) {
  constexpr size_t ROW = 2048, AHEAD = 8192;
  int64_t sums[32] = {};
  for (size_t block = 0; block < bytes; block += 4 * ROW)
    for (size_t i = 0; i < ROW; i += 64)
      for (int row = 0; row < 4; row++) {
        const char* line = memory + block + row * ROW + i;
        __builtin_prefetch(line + AHEAD);
        const int64_t* words = reinterpret_cast<const int64_t*>(line);
        for (int j = 0; j < 8; j++) sums[8 * row + j] ^= words[j];
      }
  int64_t sum = 0;
  for (int j = 0; j < 32; j++) sum ^= sums[j];
  return sum;
}

#if defined(__x86_64__)
// Runs `rounds` x 12 independent 512-bit VNNI instructions of 128 operations; the caller checks the processor.
extern "C" __attribute__((target("avx512f,avx512vnni"))) int multiply(int64_t rounds) {
  __m512i sum[12], x = _mm512_set1_epi32(1), y = _mm512_set1_epi32(3);
#pragma GCC unroll 12
  for (int j = 0; j < 12; j++) sum[j] = _mm512_set1_epi32(j);
  for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum[j]) : "v"(x), "v"(y));
  int total = 0;
#pragma GCC unroll 12
  for (int j = 0; j < 12; j++) total += _mm512_reduce_add_epi32(sum[j]);
  return total;
}
#endif

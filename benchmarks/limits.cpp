// What this machine can do, for the percentages of cpu_kernels.py: bytes read from memory and INT8 products, one thread.
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Reads `bytes` (a multiple of 4 * row) and returns something that depends on all of them: four rows side by side, each
// fetched 8 kB ahead, because the processor's own prefetcher stops at the end of a page. Whether it follows rows that
// are short, and so near each other, depends on the processor.
extern "C" int64_t read_memory(const char* memory, size_t bytes, size_t row) {
  constexpr size_t AHEAD = 8192;
  int64_t sums[32] = {};
  for (size_t block = 0; block < bytes; block += 4 * row)
    for (size_t i = 0; i < row; i += 64)
      for (int stream = 0; stream < 4; stream++) {
        const char* line = memory + block + stream * row + i;
        __builtin_prefetch(line + AHEAD, 0, 2);
        const int64_t* words = reinterpret_cast<const int64_t*>(line);
        for (int j = 0; j < 8; j++) sums[8 * stream + j] ^= words[j];
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

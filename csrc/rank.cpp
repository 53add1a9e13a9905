#include "rank.h"

#include <algorithm>
#include <thread>
#include <vector>

void pair_scores_cpu(const float* queries, const float* gallery, const int64_t* offsets, const int64_t* positives,
                     int64_t Q, int64_t D, int64_t P, int metric, int threads, float* out) {
  const auto work = [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      out[p] = canonical_score(queries + query_of(offsets, Q, p) * D, gallery + positives[p] * D, D, metric);
  };
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, P * D / 65536));  // a thread costs ~20 us
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < parts; ++i) pool.emplace_back(work, P * i / parts, P * (i + 1) / parts);
  work(0, P / parts);
  for (auto& thread : pool) thread.join();
}

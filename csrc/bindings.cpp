// kernels._C: tensors arrive as addresses (0: none); kernels/*.py have checked shapes, dtypes and devices before.
#include <pybind11/pybind11.h>

#include <vector>

#include "augment.h"
#include "cuda.h"
#include "emulated.h"
#include "product.h"
#include "rank.h"
#include "simd.h"
#include "topk.h"

namespace py = pybind11;
using address = uintptr_t;

namespace {

template <class T>
T* at(address value) {
  return reinterpret_cast<T*>(value);
}

Pairs make_pairs(address queries, address gallery, address query_norms, address gallery_norms, int64_t D, int kind,
                 int metric) {
  return {at<const float>(queries), at<const void>(gallery), at<const double>(query_norms),
          at<const double>(gallery_norms), D, kind, metric};
}

Bounds make_bounds(address a, address b, address e, address f, address of_query) {
  return {at<const float>(a), at<const float>(b), at<const float>(e), at<const float>(f),
          at<const QueryBound>(of_query)};
}

Exclusion make_exclusion(address query_keys, address gallery_keys, int64_t J) {
  return {at<const int64_t>(query_keys), at<const int64_t>(gallery_keys), J};
}

Tile make_tile(address products, bool integers, int64_t q0, int64_t q1, int64_t g0, int64_t g1) {
  return {at<const void>(products), integers, q0, q1, g0, g1};
}

Candidates make_candidates(address entries, address counts, address floors, int64_t capacity) {
  return {at<Candidate>(entries), at<int32_t>(counts), at<float>(floors), capacity};
}

Counting make_counting(const Pairs& pairs, const Bounds& bounds, address query_group, address gallery_group,
                       address offsets, address thresholds, address index, int64_t index_base) {
  return {pairs, bounds, at<const int64_t>(query_group), at<const int64_t>(gallery_group),
          {at<const int64_t>(offsets), at<const float>(thresholds), at<const int64_t>(index)}, index_base};
}

Grouped make_grouped(const Pairs& pairs, const Bounds& bounds, const Exclusion& excluded, address row, address group,
                     int64_t groups) {
  return {pairs, bounds, excluded, at<const int64_t>(row), at<const int64_t>(group), groups};
}

// Merges `count` lists of candidates [count, Q, capacity].
template <void work(const TopK&, const Candidates*, int64_t, int64_t, int64_t, float*, int64_t*)>
void finish(const TopK& search, const Candidates& parts, int64_t count, int64_t Q, int64_t q0, int64_t q1,
            address values, address rows) {
  std::vector<Candidates> lists;
  for (int64_t p = 0; p < count; ++p) lists.push_back(parts.part(p, Q));
  work(search, lists.data(), count, q0, q1, at<float>(values), at<int64_t>(rows));
}

template <void work(const Counting&, const Tile&, int64_t*)>
void count_tile(const Counting& counting, const Tile& tile, address counts) {
  work(counting, tile, at<int64_t>(counts));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++/CUDA parts of kernels; use the functions of the package instead.";
  const py::call_guard<py::gil_scoped_release> unlocked;

  py::class_<Pairs>(m, "Pairs").def(py::init(&make_pairs));
  py::class_<Bounds>(m, "Bounds").def(py::init(&make_bounds));
  py::class_<Exclusion>(m, "Exclusion").def(py::init(&make_exclusion));
  py::class_<Tile>(m, "Tile").def(py::init(&make_tile));
  py::class_<Candidates>(m, "Candidates").def(py::init(&make_candidates));
  py::class_<TopK>(m, "TopK").def(py::init([](const Pairs& pairs, const Bounds& bounds, const Exclusion& excluded,
                                              int64_t k) { return TopK{pairs, bounds, excluded, k}; }));
  py::class_<Counting>(m, "Counting").def(py::init(&make_counting));
  py::class_<Grouped>(m, "Grouped").def(py::init(&make_grouped));

  m.def("simd_level", &simd_level);
  m.def("limit_simd", &limit_simd);
  m.def("norms_cpu", [](address rows, int kind, int64_t G, int64_t D, address norms) {
    norms_cpu(at<const void>(rows), kind, G, D, at<double>(norms));
  }, unlocked);
  m.def("encode_cpu", [](address rows, int kind, address inverse, int64_t n, int64_t D, address codes) {
    encode_cpu(at<const void>(rows), kind, at<const float>(inverse), n, D, at<int16_t>(codes));
  }, unlocked);
  m.def("product_cpu", [](address queries, int64_t Q, address rows, int kind, address inverse, int64_t G, int64_t D,
                          address scratch, address products) {
    product_cpu({at<const int16_t>(queries), Q, at<const void>(rows), kind, at<const float>(inverse), G, D,
                 at<int16_t>(scratch), at<int32_t>(products)});
  }, unlocked);
  m.def("topk_tile_cpu", [](const TopK& search, const Tile& tile, const Candidates& candidates, int64_t, int64_t) {
    topk_tile_cpu(search, tile, candidates);  // a tile's columns are not divided
  }, unlocked);
  m.def("topk_finish_cpu", &finish<topk_finish_cpu>, unlocked);
  m.def("pair_scores_cpu", [](const Pairs& pairs, address offsets, address positives, int64_t Q, int64_t begin,
                              int64_t end, address out) {
    pair_scores_cpu(pairs, at<const int64_t>(offsets), at<const int64_t>(positives), Q, begin, end, at<float>(out));
  }, unlocked);
  m.def("count_tile_cpu", &count_tile<count_tile_cpu>, unlocked);
  m.def("group_tile_cpu", [](const Grouped& grouped, const Tile& tile, address scores, address rows) {
    group_tile_cpu(grouped, tile, at<float>(scores), at<int64_t>(rows));
  }, unlocked);

  m.def("augment_cpu", [](address pixels, int64_t height, int64_t width, address how, address out, int64_t out_height,
                          int64_t out_width, address scale, address bias) {
    augment_cpu({at<const uint8_t>(pixels), height, width}, *at<const Augmentation>(how),
                {at<float>(out), out_height, out_width, at<const float>(scale), at<const float>(bias)});
  }, unlocked);

  m.def("topk_tile_emulated", &topk_tile_emulated, unlocked);
  m.def("topk_finish_emulated", &finish<topk_finish_emulated>, unlocked);
  m.def("count_tile_emulated", &count_tile<count_tile_emulated>, unlocked);

#ifdef WITH_CUDA
  m.attr("with_cuda") = true;
  py::class_<Launch>(m, "Launch").def(py::init([](int device, address stream) {
    return Launch{device, at<void>(stream)};
  }));
  m.def("norms_cuda", [](address rows, int kind, int64_t G, int64_t D, address norms, const Launch& launch) {
    norms_cuda(at<const void>(rows), kind, G, D, at<double>(norms), launch);
  }, unlocked);
  m.def("topk_tile_cuda", &topk_tile_cuda, unlocked);
  m.def("topk_finish_cuda", &topk_finish_cuda, unlocked);
  m.def("topk_score_cuda", [](const TopK& search, const Candidates& candidates, int64_t Q, int64_t split,
                              int64_t width, address scores, address rows, const Launch& launch) {
    topk_score_cuda(search, candidates, Q, split, width, at<float>(scores), at<int64_t>(rows), launch);
  }, unlocked);
  m.def("pair_scores_cuda", [](const Pairs& pairs, address offsets, address positives, int64_t Q, int64_t P,
                               address out, const Launch& launch) {
    pair_scores_cuda(pairs, at<const int64_t>(offsets), at<const int64_t>(positives), Q, P, at<float>(out), launch);
  }, unlocked);
  m.def("count_tile_cuda", [](const Counting& counting, const Tile& tile, address counts, const Launch& launch) {
    count_tile_cuda(counting, tile, at<int64_t>(counts), launch);
  }, unlocked);
  m.def("group_tile_cuda", [](const Grouped& grouped, const Tile& tile, address scores, address rows,
                              const Launch& launch) {
    group_tile_cuda(grouped, tile, at<float>(scores), at<int64_t>(rows), launch);
  }, unlocked);
#else
  m.attr("with_cuda") = false;
#endif
}

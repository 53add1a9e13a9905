// kernels._C: tensors arrive as addresses; kernels/*.py have checked shapes, dtypes and devices before.
#include <pybind11/pybind11.h>

#include "rank.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void pair_scores(uintptr_t queries, uintptr_t gallery, uintptr_t offsets, uintptr_t positives, int64_t Q, int64_t D,
                 int64_t P, int metric, int threads, uintptr_t out) {
  const py::gil_scoped_release release;
  pair_scores_cpu(at<const float>(queries), at<const float>(gallery), at<const int64_t>(offsets),
                  at<const int64_t>(positives), Q, D, P, metric, threads, at<float>(out));
}

#ifdef WITH_CUDA
void pair_scores_on_device(uintptr_t queries, uintptr_t gallery, uintptr_t offsets, uintptr_t positives, int64_t Q,
                           int64_t D, int64_t P, int metric, int device, uintptr_t stream, uintptr_t out) {
  const py::gil_scoped_release release;
  pair_scores_cuda(at<const float>(queries), at<const float>(gallery), at<const int64_t>(offsets),
                   at<const int64_t>(positives), Q, D, P, metric, device, at<void>(stream), at<float>(out));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++/CUDA parts of kernels; use the functions of the package instead.";
  m.def("pair_scores_cpu", &pair_scores);
#ifdef WITH_CUDA
  m.def("pair_scores_cuda", &pair_scores_on_device);
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}

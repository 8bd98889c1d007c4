// The host module mkconvlstm_cuda._C: plans and facts about this build. Loads without a GPU and without CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "build_info.h"
#include "plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace mkconvlstm {

namespace {

template <typename Value, size_t kCount>
Value lookup(const std::array<std::pair<const char*, Value>, kCount>& table, const char* argument,
             const std::string& name) {
  std::string names;
  for (const auto& [known, value] : table) {
    if (name == known) return value;
    names += (names.empty() ? "'" : ", '") + std::string(known) + "'";
  }
  throw std::invalid_argument("plan: " + std::string(argument) + " must be one of " + names + ", got '" + name + "'");
}

constexpr std::array<std::pair<const char*, DType>, 4> kDTypes = {{{"float64", DType::kFloat64},
                                                                   {"float32", DType::kFloat32},
                                                                   {"float16", DType::kFloat16},
                                                                   {"bfloat16", DType::kBFloat16}}};

constexpr std::array<std::pair<const char*, Layout>, 3> kLayouts = {{{"channels_first", Layout::kChannelsFirst},
                                                                     {"channels_last", Layout::kChannelsLast},
                                                                     {"strided", Layout::kStrided}}};

constexpr std::array<std::pair<const char*, PeepholeShape>, 2> kPeepholes = {
    {{"channel", PeepholeShape::kChannel}, {"pixel", PeepholeShape::kPixel}}};

GateStepPlan plan_from_python(int64_t batch, int64_t channels, int64_t height, int64_t width, const std::string& dtype,
                              const std::string& layout, const std::optional<std::string>& peephole,
                              int max_vector_width, int multiprocessors, int max_threads_per_multiprocessor) {
  GateStepProblem problem;
  problem.batch = batch;
  problem.channels = channels;
  problem.height = height;
  problem.width = width;
  problem.dtype = lookup(kDTypes, "dtype", dtype);
  problem.layout = lookup(kLayouts, "layout", layout);
  if (peephole) problem.peephole = lookup(kPeepholes, "peephole", *peephole);
  problem.max_vector_width = max_vector_width;
  return plan(problem, DeviceLimits{multiprocessors, max_threads_per_multiprocessor});
}

std::string repr(const GateStepPlan& plan) {
  std::ostringstream text;
  text << "GateStepPlan(vector_width=" << plan.vector_width << ", vectors_per_image=" << plan.vectors_per_image
       << ", threads=" << plan.threads << ", blocks_x=" << plan.blocks_x << ", blocks_y=" << plan.blocks_y
       << ", bytes_forward=" << plan.bytes_forward << ", bytes_backward=" << plan.bytes_backward << ")";
  return text.str();
}

// build_info.h is written by CMake. Empty strings mean "not there".
py::dict build_info() {
  const auto text_or_none = [](const std::string& text) -> py::object {
    return text.empty() ? py::object(py::none()) : py::str(text);
  };
  return py::dict("compiler"_a = MKCONVLSTM_COMPILER, "build_type"_a = MKCONVLSTM_BUILD_TYPE,
                  "cpu_library"_a = MKCONVLSTM_CPU_LIBRARY,
                  "cuda"_a = text_or_none(MKCONVLSTM_CUDA_VERSION),
                  "cuda_missing"_a = text_or_none(MKCONVLSTM_CUDA_MISSING),
                  "cuda_library"_a = text_or_none(MKCONVLSTM_CUDA_LIBRARY),
                  "cuda_architectures"_a = text_or_none(MKCONVLSTM_CUDA_ARCHITECTURES),
                  "torch"_a = text_or_none(MKCONVLSTM_TORCH_VERSION));
}

}  // namespace

void bind_sequence_plan(py::module_& m);
void bind_step_plans(py::module_& m);

}  // namespace mkconvlstm

PYBIND11_MODULE(_C, m) {
  using mkconvlstm::GateStepPlan;
  m.doc() = "Host side of mkconvlstm_cuda: how kernels are launched, and what this build contains.";

  py::class_<GateStepPlan>(m, "GateStepPlan", "How one pointwise step is launched; bytes count each operand once.")
      .def_readonly("vector_width", &GateStepPlan::vector_width)
      .def_readonly("vectors_per_image", &GateStepPlan::vectors_per_image)
      .def_readonly("threads", &GateStepPlan::threads)
      .def_readonly("blocks_x", &GateStepPlan::blocks_x)
      .def_readonly("blocks_y", &GateStepPlan::blocks_y)
      .def_readonly("bytes_forward", &GateStepPlan::bytes_forward)
      .def_readonly("bytes_backward", &GateStepPlan::bytes_backward)
      .def("__repr__", &mkconvlstm::repr);

  m.def("plan", &mkconvlstm::plan_from_python,
        "The launch of one pointwise step on [batch, channels, height, width]. dtype: float64, float32, float16 or\n"
        "bfloat16. layout: channels_first, channels_last or strided. peephole: None, channel or pixel.\n"
        "Raises ValueError for sizes that no launch can serve.",
        py::kw_only(), "batch"_a, "channels"_a, "height"_a, "width"_a, "dtype"_a = "float32",
        "layout"_a = "channels_first", "peephole"_a = py::none(), "max_vector_width"_a = 16, "multiprocessors"_a = 132,
        "max_threads_per_multiprocessor"_a = 2048);

  mkconvlstm::bind_sequence_plan(m);
  mkconvlstm::bind_step_plans(m);

  m.def("build_info", &mkconvlstm::build_info,
        "Compilers, CUDA architectures and torch of this build; cuda_missing says why there is no CUDA library.");
}

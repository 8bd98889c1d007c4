// The plans of the kernels that compute one step a launch, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <vector>

#include "../simt/params.h"
#include "../simt/plan.h"
#include "../sm80/params.h"
#include "../sm80/plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace mkconvlstm {

namespace {

using Branches = std::vector<std::array<int64_t, 5>>;

step::Problem problem_from_python(int64_t batch, int64_t height, int64_t width, const Branches& branches) {
  step::Problem problem{batch, height, width, {}};
  for (const auto& [channels, kernel_height, kernel_width, dilation_height, dilation_width] : branches)
    problem.branches.push_back({channels, kernel_height, kernel_width, dilation_height, dilation_width});
  return problem;
}

std::string repr(const simt::Pass& pass) {
  std::ostringstream text;
  text << "SimtPass(pixels_per_thread=" << pass.pixels_per_thread << ", blocks_x=" << pass.blocks_x
       << ", blocks_y=" << pass.blocks_y << ")";
  return text.str();
}

std::string repr(const sm80::Pass& pass) {
  std::ostringstream text;
  text << "Sm80Pass(block_pixels=" << pass.block_pixels << ", blocks_x=" << pass.blocks_x
       << ", blocks_y=" << pass.blocks_y << ", splits=" << pass.splits << ", share=" << pass.share << ", band_slots=" << pass.band_slots
       << ", band_rows=" << pass.band_rows << ", shared_memory=" << pass.shared_memory << ")";
  return text.str();
}

template <typename Plan>
void bind_plan(py::module_& m, const char* name, const char* doc) {
  py::class_<Plan>(m, name, doc)
      .def_readonly("forward", &Plan::forward)
      .def_readonly("backward", &Plan::backward)
      .def_readonly("order", &Plan::order, "The branches as the kernels have them: those with most taps first.")
      .def_readonly("first_blocks", &Plan::first_blocks, "Forward, along y, of each branch in that order.")
      .def("__repr__", [name = std::string(name)](const Plan& plan) {
        return name + "(forward=" + repr(plan.forward) + ", backward=" + repr(plan.backward) + ")";
      });
}

}  // namespace

void bind_step_plans(py::module_& m) {
  py::class_<simt::Pass>(m, "SimtPass", "One launch a step: blocks along pixels (x) and columns (y).")
      .def_readonly("pixels_per_thread", &simt::Pass::pixels_per_thread)
      .def_readonly("blocks_x", &simt::Pass::blocks_x)
      .def_readonly("blocks_y", &simt::Pass::blocks_y)
      .def("__repr__", [](const simt::Pass& pass) { return repr(pass); });
  bind_plan<simt::Plan>(m, "SimtPlan", "How the SIMT kernels go through a step.");

  py::class_<sm80::Pass>(m, "Sm80Pass", "One launch a step: blocks along pixels (x), columns (y) and products (z).")
      .def_readonly("block_pixels", &sm80::Pass::block_pixels)
      .def_readonly("blocks_x", &sm80::Pass::blocks_x)
      .def_readonly("blocks_y", &sm80::Pass::blocks_y)
      .def_readonly("splits", &sm80::Pass::splits, "The most blocks that share out the products of a tile.")
      .def_readonly("share", &sm80::Pass::share, "About as many of a tile's products go to one block.")
      .def_readonly("band_slots", &sm80::Pass::band_slots)
      .def_readonly("band_rows", &sm80::Pass::band_rows)
      .def_readonly("shared_memory", &sm80::Pass::shared_memory, "Bytes of a block.")
      .def("__repr__", [](const sm80::Pass& pass) { return repr(pass); });
  bind_plan<sm80::Plan>(m, "Sm80Plan", "How the tensor-core kernels go through a step.");

  m.def(
      "plan_simt",
      [](int64_t batch, int64_t height, int64_t width, const Branches& branches, int multiprocessors) {
        return simt::plan(problem_from_python(batch, height, width, branches), multiprocessors);
      },
      "The launches of the SIMT kernels, for float64 and float32. branches: (channels, kernel height, kernel width,\n"
      "dilation height, dilation width) of each hidden branch.\n"
      "Raises ValueError with the reason where the kernels cannot serve the problem.",
      py::kw_only(), "batch"_a, "height"_a, "width"_a, "branches"_a, "multiprocessors"_a = 132);

  m.def(
      "plan_sm80",
      [](int64_t batch, int64_t height, int64_t width, const Branches& branches, int element_bytes, int multiprocessors,
         int shared_memory) {
        return sm80::plan(problem_from_python(batch, height, width, branches), element_bytes,
                          {multiprocessors, shared_memory});
      },
      "The launches of the tensor-core kernels. branches as for plan_simt; element_bytes: 4 for float32, 2 for half\n"
      "types; shared_memory: bytes that a block may have.\n"
      "Raises ValueError with the reason where the kernels cannot serve the problem.",
      py::kw_only(), "batch"_a, "height"_a, "width"_a, "branches"_a, "element_bytes"_a = 2, "multiprocessors"_a = 132,
      "shared_memory"_a = 232448);

  m.attr("STEP_COLUMNS") = step::kBlockColumns;
  m.attr("SIMT_LANES") = simt::kLanes;
  m.attr("SIMT_COLUMNS") = simt::kColumns;
  m.attr("SIMT_DEPTH") = simt::kPackedDepth;
  m.attr("SM80_ROW_BYTES") = sm80::kRowBytes;
  m.attr("SM80_CHUNK_BYTES") = sm80::kChunkBytes;
}

}  // namespace mkconvlstm

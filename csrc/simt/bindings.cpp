// The plan of the SIMT kernels, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <vector>

#include "params.h"
#include "plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace mkconvlstm::simt {

namespace {

Plan plan_from_python(int64_t batch, int64_t height, int64_t width,
                      const std::vector<std::array<int64_t, 5>>& branches, int multiprocessors) {
  Problem problem{batch, height, width, {}};
  for (const auto& [channels, kernel_height, kernel_width, dilation_height, dilation_width] : branches)
    problem.branches.push_back({channels, kernel_height, kernel_width, dilation_height, dilation_width});
  return plan(problem, multiprocessors);
}

std::string repr(const Pass& pass) {
  std::ostringstream text;
  text << "SimtPass(pixels_per_thread=" << pass.pixels_per_thread << ", blocks_x=" << pass.blocks_x
       << ", blocks_y=" << pass.blocks_y << ")";
  return text.str();
}

}  // namespace

void bind_plan(py::module_& m) {
  py::class_<Pass>(m, "SimtPass", "One launch a step: blocks along pixels (x) and columns (y).")
      .def_readonly("pixels_per_thread", &Pass::pixels_per_thread)
      .def_readonly("blocks_x", &Pass::blocks_x)
      .def_readonly("blocks_y", &Pass::blocks_y)
      .def("__repr__", &repr);

  py::class_<Plan>(m, "SimtPlan", "How the SIMT kernels go through a step.")
      .def_readonly("forward", &Plan::forward)
      .def_readonly("backward", &Plan::backward)
      .def_readonly("order", &Plan::order, "The branches as the kernels have them: those with most taps first.")
      .def_readonly("first_blocks", &Plan::first_blocks, "Forward, along y, of each branch in that order.")
      .def("__repr__", [](const Plan& plan) {
        return "SimtPlan(forward=" + repr(plan.forward) + ", backward=" + repr(plan.backward) + ")";
      });

  m.def("plan_simt", &plan_from_python,
        "The launches of the SIMT kernels, for float64 and float32. branches: (channels, kernel height, kernel width,\n"
        "dilation height, dilation width) of each hidden branch.\n"
        "Raises ValueError with the reason where the kernels cannot serve the problem.",
        py::kw_only(), "batch"_a, "height"_a, "width"_a, "branches"_a, "multiprocessors"_a = 132);

  m.attr("SIMT_LANES") = kLanes;
  m.attr("SIMT_COLUMNS") = kColumns;
  m.attr("SIMT_DEPTH") = kPackedDepth;
}

}  // namespace mkconvlstm::simt

// The plans of the kernels that compute one step a launch, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <vector>

#include "../simt/params.h"
#include "../simt/plan.h"

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

  m.def(
      "plan_simt",
      [](int64_t batch, int64_t height, int64_t width, const Branches& branches, int multiprocessors) {
        return simt::plan(problem_from_python(batch, height, width, branches), multiprocessors);
      },
      "The launches of the SIMT kernels, for float64 and float32. branches: (channels, kernel height, kernel width,\n"
      "dilation height, dilation width) of each hidden branch.\n"
      "Raises ValueError with the reason where the kernels cannot serve the problem.",
      py::kw_only(), "batch"_a, "height"_a, "width"_a, "branches"_a, "multiprocessors"_a = 132);

  m.attr("SIMT_LANES") = simt::kLanes;
  m.attr("SIMT_COLUMNS") = simt::kColumns;
  m.attr("SIMT_DEPTH") = simt::kPackedDepth;
}

}  // namespace mkconvlstm

// The plan of the recurrence on Hopper, for Python: whether a problem is served, and what the kernels will do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "sequence_plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace mkconvlstm {

namespace {

using Branch = std::tuple<int64_t, int64_t, int64_t>;

ForwardPlan forward_plan(int64_t batch, int64_t height, int64_t width, const std::vector<Branch>& branches,
                         int multiprocessors, int shared_memory) {
  SequenceProblem problem{batch, height, width, {}};
  for (const auto& [kernel_height, kernel_width, channels] : branches)
    problem.branches.push_back({kernel_height, kernel_width, channels});
  return plan_forward(problem, {multiprocessors, shared_memory});
}

// The products of a tile in order: box, tap (dy, dx), rows that it moves by, and what happens to the box.
py::list units(const ForwardPlan& plan) {
  const sm90::Program& program = plan.program;
  py::list result;
  const int last = program.run_count[0] - 1;
  const int count = program.runs[0][last].first + program.runs[0][last].count;
  for (int i = 0; i < count; ++i) {
    const sm90::Unit& unit = program.units[i];
    const auto is = [&](sm90::UnitFlag flag) { return (unit.flags & flag) != 0; };
    result.append(py::dict("box"_a = unit.box,
                           "tap"_a = py::make_tuple(unit.y - program.radius_y, unit.x - program.radius_x),
                           "rows"_a = unit.rows, "enters"_a = is(sm90::kEnterBox), "acquires"_a = is(sm90::kAcquireBox),
                           "releases"_a = is(sm90::kReleaseBox)));
  }
  return result;
}

// How a consumer goes through the units: first, count, columns ("both" or "second"), groups that it finishes before.
py::list runs(const ForwardPlan& plan, int consumer) {
  py::list result;
  for (int r = 0; r < plan.program.run_count[consumer]; ++r) {
    const sm90::Run& run = plan.program.runs[consumer][r];
    const auto does = [&](sm90::Action action) { return (run.actions & action) != 0; };
    result.append(py::dict("first"_a = run.first, "count"_a = run.count,
                           "columns"_a = run.columns == sm90::Columns::kBoth ? "both" : "second",
                           "finishes_first"_a = does(sm90::kFinishFirst),
                           "finishes_second"_a = does(sm90::kFinishSecond),
                           "finishes_second_early"_a = does(sm90::kFinishSecondEarly)));
  }
  return result;
}

py::list groups(const ForwardPlan& plan) {
  py::list result;
  for (const ColumnGroup& g : plan.groups)
    result.append(py::dict("branch"_a = g.branch, "first_in_branch"_a = g.first_in_branch,
                           "first_hidden"_a = g.first_hidden, "channels"_a = g.channels,
                           "kernel"_a = py::make_tuple(g.kernel_height, g.kernel_width)));
  return result;
}

// Boxes of channels in the order of their first use: first channel, groups whose channels it holds.
py::list boxes(const ForwardPlan& plan) {
  py::list result;
  for (int i = 0; i < plan.program.box_count; ++i) {
    const sm90::Box& box = plan.program.boxes[i];
    result.append(py::make_tuple(box.channel, box.groups));
  }
  return result;
}

}  // namespace

void bind_sequence_plan(py::module_& m) {
  py::class_<ForwardPlan>(m, "ForwardPlan", "How the recurrence runs forward on Hopper.")
      .def_readonly("tiles_m", &ForwardPlan::tiles_m)
      .def_readonly("tiles_n", &ForwardPlan::tiles_n)
      .def_readonly("blocks", &ForwardPlan::blocks)
      .def_readonly("shared_memory", &ForwardPlan::shared_memory)
      .def_property_readonly("box_slots", [](const ForwardPlan& plan) { return plan.program.box_slots; })
      .def_property_readonly("box_rows",
                             [](const ForwardPlan& plan) { return plan.program.box_chunks * plan.program.chunk_rows; })
      .def_property_readonly("chunk_rows", [](const ForwardPlan& plan) { return plan.program.chunk_rows; })
      .def_property_readonly("halo", [](const ForwardPlan& plan) { return plan.program.halo; })
      .def_property_readonly("stages", [](const ForwardPlan& plan) { return plan.program.stages; })
      .def_property_readonly("stages_per_tile", [](const ForwardPlan& plan) { return plan.program.stages_per_tile; })
      .def_property_readonly("groups", &groups)
      .def_property_readonly("boxes", &boxes)
      .def_property_readonly("units", &units)
      .def("runs", &runs, "consumer"_a);

  m.def("plan_forward", &forward_plan,
        "The recurrence forward on Hopper. branches: (kernel height, kernel width, hidden channels) of each.\n"
        "Raises ValueError with the reason where the kernels cannot serve the problem.",
        py::kw_only(), "batch"_a, "height"_a, "width"_a, "branches"_a, "multiprocessors"_a = 132,
        "shared_memory"_a = 232448);
}

}  // namespace mkconvlstm

// The plan of the recurrence on Hopper, for Python: whether a problem is served, and what the kernels will do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "resident_plan.h"
#include "sequence_plan.h"
#include "sm90/images.h"

namespace py = pybind11;
using namespace py::literals;

namespace mkconvlstm {

namespace {

using Branch = std::tuple<int64_t, int64_t, int64_t>;

SequenceProblem problem_of(int64_t batch, int64_t height, int64_t width, const std::vector<Branch>& branches) {
  SequenceProblem problem{batch, height, width, {}};
  for (const auto& [kernel_height, kernel_width, channels] : branches)
    problem.branches.push_back({kernel_height, kernel_width, channels});
  return problem;
}

ForwardPlan forward_plan(int64_t batch, int64_t height, int64_t width, const std::vector<Branch>& branches,
                         int multiprocessors, int shared_memory) {
  return plan_forward(problem_of(batch, height, width, branches), {multiprocessors, shared_memory});
}

BackwardPlan backward_plan(int64_t batch, int64_t height, int64_t width, const std::vector<Branch>& branches,
                           int multiprocessors, int shared_memory, int pieces) {
  return plan_backward(problem_of(batch, height, width, branches), {multiprocessors, shared_memory}, pieces);
}

template <auto kPlan>
ResidentPlan resident_plan(int64_t batch, int64_t height, int64_t width, const std::vector<Branch>& branches,
                           int multiprocessors, int shared_memory) {
  return kPlan(problem_of(batch, height, width, branches), {multiprocessors, shared_memory});
}

int unit_count(const ForwardPlan& plan) {
  const sm90::Run& last = plan.program.runs[0][plan.program.run_count[0] - 1];
  return last.first + last.count;
}

int unit_count(const BackwardPlan& plan) {
  const sm90::Piece& last = plan.program.pieces[plan.program.piece_count - 1];
  return last.first_unit + last.units;
}

// The products of a tile in order: box, tap (dy, dx), rows that it moves by, and what happens to the box.
template <typename Plan>
py::list units(const Plan& plan) {
  const auto& program = plan.program;
  py::list result;
  for (int i = 0; i < unit_count(plan); ++i) {
    const sm90::Unit& unit = program.units[i];
    const auto is = [&](sm90::UnitFlag flag) { return (unit.flags & flag) != 0; };
    result.append(py::dict("box"_a = unit.box,
                           "tap"_a = py::make_tuple(unit.y - program.radius_y, unit.x - program.radius_x),
                           "rows"_a = unit.offset / sm90::kRowBytes, "enters"_a = is(sm90::kEnterBox),
                           "acquires"_a = is(sm90::kAcquireBox), "releases"_a = is(sm90::kReleaseBox)));
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

// Which units each piece has, and its boxes in the order of their first use: part, and the first of the gates.
py::list pieces(const BackwardPlan& plan) {
  py::list result;
  for (int p = 0; p < plan.program.piece_count; ++p) {
    const sm90::Piece& piece = plan.program.pieces[p];
    py::list boxes;
    for (int i = 0; i < piece.boxes; ++i) {
      const sm90::GateBox& box = plan.program.boxes[piece.first_box + i];
      boxes.append(py::make_tuple(box.part, box.first));
    }
    result.append(py::dict("first"_a = piece.first_unit, "count"_a = piece.units, "boxes"_a = boxes));
  }
  return result;
}

py::tuple patch(const sm90::Tiling& tiling) { return py::make_tuple(tiling.patch_height(), tiling.patch_width()); }

py::tuple box(const sm90::Tiling& tiling) { return py::make_tuple(tiling.box_height(), tiling.box_width()); }

// What both plans have.
template <typename Plan>
py::class_<Plan> bind_plan(py::module_& m, const char* name, const char* doc) {
  return py::class_<Plan>(m, name, doc)
      .def_readonly("tiles_m", &Plan::tiles_m)
      .def_readonly("tiles_n", &Plan::tiles_n)
      .def_property_readonly("blocks", [](const Plan& plan) { return plan.dealing.blocks(); })
      .def_property_readonly("period", [](const Plan& plan) { return plan.dealing.period; })
      .def_readonly("shared_memory", &Plan::shared_memory)
      .def_property_readonly("box_slots", [](const Plan& plan) { return plan.program.box_slots; })
      .def_property_readonly("box_bytes", [](const Plan& plan) { return plan.program.box_bytes(); })
      .def_property_readonly("chunk_width", [](const Plan& plan) { return plan.program.chunk_width; })
      .def_property_readonly("chunks", [](const Plan& plan) { return plan.program.box_chunks; })
      .def_property_readonly("tiling", [](const Plan& plan) { return plan.program.tiling; })
      .def_property_readonly("patch", [](const Plan& plan) { return patch(plan.program.tiling); })
      .def_property_readonly("box", [](const Plan& plan) { return box(plan.program.tiling); })
      .def_property_readonly("stages", [](const Plan& plan) { return plan.program.stages; })
      .def_property_readonly("stages_per_tile", [](const Plan& plan) { return plan.program.stages_per_tile; })
      .def_property_readonly("units", &units<Plan>);
}

}  // namespace

void bind_sequence_plan(py::module_& m) {
  using sm90::Tiling;
  py::class_<Tiling>(m, "Tiling", "Which pixels a tile has, and where these lie in its boxes.")
      .def_property_readonly("patch", &patch, "Height and width.")
      .def_property_readonly("box", &box, "Height and width.")
      .def_property_readonly("tiles", &Tiling::tiles)
      .def_readonly("line", &Tiling::line, "Rows of a box from one line of an image to the next.")
      .def("pixel", [](const Tiling& t, int tile, int row) {
        const Tiling::Pixel pixel = t.pixel(t.place(tile), row);
        return pixel.exists() ? pixel.index : -1;
      }, "Of the batch, or -1.", "tile"_a, "row"_a)
      .def("box_row", &Tiling::box_row, "row"_a)
      .def(
          "neighbours",
          [](const Tiling& t, int tile) {
            const sm90::Neighbours near(t, t.place(tile));
            py::list result;
            for (int i = 0; i < near.count(); ++i) result.append(near.tile(i));
            return result;
          },
          "Tiles that a tile's box touches.", "tile"_a);
  bind_plan<ForwardPlan>(m, "ForwardPlan", "How the recurrence runs forward on Hopper.")
      .def_property_readonly("groups", &groups)
      .def_property_readonly("boxes", &boxes)
      .def("runs", &runs, "consumer"_a);
  bind_plan<BackwardPlan>(m, "BackwardPlan", "How the recurrence runs backward on Hopper.")
      .def_property_readonly("items", &BackwardPlan::items)
      .def_property_readonly("packed_bytes", &BackwardPlan::packed_bytes)
      .def_property_readonly("partial_bytes", &BackwardPlan::partial_bytes)
      .def_property_readonly("tile_channels",
                             [](const BackwardPlan& plan) { return plan.program.chunks * sm90::kChunkChannels; })
      .def_property_readonly("batch", [](const BackwardPlan& plan) { return plan.program.batch; })
      .def_property_readonly("pieces", &pieces);

  m.def("plan_forward", &forward_plan,
        "The recurrence forward on Hopper. branches: (kernel height, kernel width, hidden channels) of each.\n"
        "Raises ValueError with the reason where the kernels cannot serve the problem.",
        py::kw_only(), "batch"_a, "height"_a, "width"_a, "branches"_a, "multiprocessors"_a = 132,
        "shared_memory"_a = 232448);
  m.def("plan_backward", &backward_plan,
        "The recurrence backward on Hopper; arguments as above. pieces: how many a tile is cut into, 0 for the best.\n"
        "Raises ValueError with the reason where the kernels cannot serve the problem.",
        py::kw_only(), "batch"_a, "height"_a, "width"_a, "branches"_a, "multiprocessors"_a = 132,
        "shared_memory"_a = 232448, "pieces"_a = 0);

  py::class_<ResidentPlan>(m, "ResidentPlan", "How the recurrence runs on Hopper with weights in shared memory.")
      .def_readonly("blocks", &ResidentPlan::blocks)
      .def_readonly("shared_memory", &ResidentPlan::shared_memory)
      .def_readonly("cycles", &ResidentPlan::cycles)
      .def_property_readonly("windows", &ResidentPlan::windows)
      .def_property_readonly("groups", [](const ResidentPlan& plan) { return plan.problem.groups; })
      .def_property_readonly("split", [](const ResidentPlan& plan) { return plan.problem.split; })
      .def_property_readonly("window", [](const ResidentPlan& plan) {
        return py::make_tuple(plan.problem.window_height(), plan.problem.window_width);
      });
  m.def("plan_resident_forward", &resident_plan<plan_resident_forward>,
        "The recurrence forward on Hopper with weights that stay in shared memory; arguments as for plan_forward.\n"
        "Raises ValueError with the reason where the kernels cannot serve the problem.",
        py::kw_only(), "batch"_a, "height"_a, "width"_a, "branches"_a, "multiprocessors"_a = 132,
        "shared_memory"_a = 232448);
  m.def("plan_resident_backward", &resident_plan<plan_resident_backward>, "The same backward.", py::kw_only(),
        "batch"_a, "height"_a, "width"_a, "branches"_a, "multiprocessors"_a = 132, "shared_memory"_a = 232448);

  m.def(
      "place_pixel",
      [](int height, int width, int pixel) {
        const auto images = sm90::Images::of(height, width);
        const auto at = images.place(pixel);
        return py::make_tuple(images.image(pixel), at.y, at.x);
      },
      "Image, line and column of a pixel of a batch, as the kernels on Hopper divide.", "height"_a, "width"_a,
      "pixel"_a);
}

}  // namespace mkconvlstm

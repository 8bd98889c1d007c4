#include "plan.h"

#include "params.h"

namespace mkconvlstm::simt {

namespace {

// The largest tile with which few multiprocessors are idle: measured, a larger tile beats more blocks.
Pass plan_pass(int64_t pixels, int blocks_y, int multiprocessors) {
  Pass pass{8, 0, blocks_y};
  const auto blocks_x = [&] { return step::ceil_div(pixels, kPixelGroups * pass.pixels_per_thread); };
  while (pass.pixels_per_thread > 2 && 8 * blocks_x() * blocks_y < 7 * multiprocessors) pass.pixels_per_thread /= 2;
  pass.blocks_x = blocks_x();
  return pass;
}

}  // namespace

Plan plan(const step::Problem& problem, int multiprocessors) {
  Plan plan{step::share_columns(problem, multiprocessors), {}, {}};
  plan.forward = plan_pass(problem.pixels(), plan.forward_blocks, multiprocessors);
  plan.backward = plan_pass(problem.pixels(), plan.backward_blocks, multiprocessors);
  return plan;
}

}  // namespace mkconvlstm::simt

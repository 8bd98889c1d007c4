// Passes over all steps on a CPU, from arrays that step_kernels.py makes. To be included after host_block.h.
#include "step/params.h"

namespace {

using namespace mkconvlstm;

// Integers of a call, as step_kernels.py lists them.
struct Sizes {
  int64_t steps, batch, height, width, hidden, branches, peepholes, peephole_pixels, keep;
  int64_t state_row, blocks_x, blocks_y;
  int64_t family[4];  // for the family of kernels
};

template <typename T>
void fill(step::Sequence<T>& s, const Sizes& sizes, const int64_t* branches, void** gates, void** weights) {
  s.steps = sizes.steps;
  s.pixels = sizes.batch * sizes.height * sizes.width;
  s.height = sizes.height;
  s.width = sizes.width;
  s.hidden = sizes.hidden;
  s.branch_count = sizes.branches;
  for (int r = 0; r < s.branch_count; ++r, branches += 7) {
    s.branches[r] = {static_cast<T*>(gates[r]),         static_cast<T*>(weights[r]),
                     static_cast<int>(branches[0]),     static_cast<int>(branches[1]),
                     static_cast<int>(branches[2]),     static_cast<int>(branches[3]),
                     static_cast<int>(branches[4]),     static_cast<int>(branches[5]),
                     static_cast<unsigned>(branches[6])};
  }
  s.c_step = sizes.keep ? int64_t{s.pixels} * s.hidden : 0;
  s.peepholes = static_cast<Peepholes>(sizes.peepholes);
  s.peephole_pixels = sizes.peephole_pixels;
}

// run_step(params, t): one launch.
template <typename T, typename RunStep>
void run_forward(const Sizes& sizes, const int64_t* branches, void** gates, void** weights, void** operands,
                 RunStep run_step) {
  using Cell = step::Cell<T>;
  step::Forward<T> p{};
  fill(p, sizes, branches, gates, weights);
  p.keep_gates = sizes.keep;
  p.state_row = sizes.state_row;
  p.h_0 = static_cast<T*>(operands[0]);
  p.c_0 = static_cast<Cell*>(operands[1]);
  p.bias = static_cast<Cell*>(operands[2]);
  p.peephole = static_cast<Cell*>(operands[3]);
  p.state = static_cast<T*>(operands[4]);
  p.h = static_cast<T*>(operands[5]);
  p.c = static_cast<Cell*>(operands[6]);
  step::for_each_step(p, [&](int64_t t) { run_step(p, t); });
}

template <typename T, typename RunStep>
void run_backward(const Sizes& sizes, const int64_t* branches, void** gates, void** weights, void** operands,
                  const int64_t* dh_strides, RunStep run_step) {
  using Cell = step::Cell<T>;
  step::Backward<T> p{};
  fill(p, sizes, branches, gates, weights);
  p.c_0 = static_cast<Cell*>(operands[0]);
  p.c = static_cast<Cell*>(operands[1]);
  p.peephole = static_cast<Cell*>(operands[2]);
  p.dh = static_cast<T*>(operands[3]);
  p.dc_n = static_cast<Cell*>(operands[4]);
  p.lengths = static_cast<int64_t*>(operands[5]);
  p.dh_0 = static_cast<T*>(operands[6]);
  p.dc = static_cast<Cell*>(operands[7]);
  p.dh_image = dh_strides[0], p.dh_step = dh_strides[1], p.dh_channel = dh_strides[2];
  p.dh_row = dh_strides[3], p.dh_column = dh_strides[4];
  step::for_each_step(p, [&](int64_t t) { run_step(p, t); });
}

}  // namespace

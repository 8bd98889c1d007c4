// The operations on CPUs: tiles of all parts, shared out among torch's own threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "gate_step_cpu.h"
#include "operands.h"

namespace mkconvlstm {

namespace {

// A tile takes about two microseconds; waking a thread for less than some of them does not pay.
constexpr int64_t kTilesPerThread = 8;

template <typename Step>
void run(const GateSteps<Step>& steps) {
  int64_t tiles = 0;
  for (const Step& part : steps.parts) tiles += count_tiles(part);
  torch::stable::parallel_for(0, tiles, kTilesPerThread, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Step& part : steps.parts) {
      const int64_t count = count_tiles(part);
      const int64_t stop = std::min(end - first, count);
      for (int64_t k = std::max<int64_t>(begin - first, 0); k < stop; ++k) advance(part, steps.dtype, tile_at(part, k));
      first += count;
    }
  });
}

constexpr auto kDevice = torch::headeronly::DeviceType::CPU;

void gate_step_forward(TensorList z, TensorList u, Tensor c_prev, Tensor h, Tensor c, OptionalTensor peephole,
                       bool current_output_peephole) {
  run(read_forward(kDevice, z, u, c_prev, h, c, peephole, current_output_peephole));
}

void gate_step_backward(TensorList gates, OptionalTensor dh, OptionalTensor dh_prev, Tensor dc, Tensor c_prev,
                        Tensor c, OptionalTensor peephole, bool current_output_peephole) {
  run(read_backward(kDevice, gates, dh, dh_prev, dc, c_prev, c, peephole, current_output_peephole));
}

}  // namespace

}  // namespace mkconvlstm

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CPU, m) {
  m.impl("gate_step_forward", TORCH_BOX(&mkconvlstm::gate_step_forward));
  m.impl("gate_step_backward", TORCH_BOX(&mkconvlstm::gate_step_backward));
}

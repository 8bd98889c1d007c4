// The recurrence forward on Hopper with resident weights, one persistent launch over all steps.
#pragma once

#include "../gates.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace mkconvlstm::sm90 {

template <typename T>
__global__ void __launch_bounds__(kResidentThreads, 1)
    resident_forward_kernel(const __grid_constant__ ResidentForward params) {
  char* const memory = shared_memory();
  const ResidentProblem& problem = params.problem;
  const ResidentPlace place(problem);
  const int first_groups = problem.branches[0].channels / kFinishedChannels;
  const int r = place.group < first_groups ? 0 : 1;
  const ResidentBranch& branch = problem.branches[r];
  const ResidentOperands& operands = params.branches[r];
  const int first_channel = (place.group - r * first_groups) * kFinishedChannels;  // of the branch

  const ResidentShape shape = forward_shape(problem, branch);
  ResidentProducts<T, 4 * kFinishedChannels, 1> products(shape, memory);
  products.place(problem, place);
  // Columns: the four gates of each channel.
  const int taps = branch.kernel_height * branch.kernel_width;
  products.fill(0, 0, shape.boxes, 0, problem.hidden / kPieceElements, branch.kernel_height, branch.kernel_width,
                [&](int column, int element, int tap) {
                  const int64_t row = column % 4 * branch.channels + first_channel + column / 4;
                  return static_cast<const uint16_t*>(operands.weights)[(row * problem.hidden + element) * taps + tap];
                });
  products.ready();

  // The thread's own cell.
  const int channel = first_channel + place.channel, hidden_channel = branch.first_hidden + channel;
  const int image_pixels = problem.height * problem.width, pixels = problem.pixels();
  const int state = place.pixel * problem.hidden + hidden_channel;
  const int row_bytes = problem.hidden * sizeof(T);
  float bias[4] = {}, c = 0;
  if (place.inside && params.bias != nullptr) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) bias[gate] = params.bias[gate * problem.hidden + hidden_channel];
  }
  if (place.inside && params.c_0 != nullptr) c = params.c_0[state];

#pragma unroll 1
  for (int step = 0; step < params.steps; ++step) {
    __syncwarp();  // after those that have no cell
    T* gates = static_cast<T*>(operands.gates) + (int64_t{step} * pixels + place.pixel) * 4 * branch.channels + channel;
    T z[4] = {};
    if (place.inside) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) z[gate] = gates[gate * branch.channels];
    }
    auto* exchanged = static_cast<T*>(params.exchange) + int64_t{step} * pixels * problem.hidden;  // this step's
    float4 sums{};
    if (step > 0 || params.h_0 != nullptr) {
      products.gather(step > 0 ? exchanged - int64_t{pixels} * problem.hidden : params.h_0, row_bytes, step > 0);
      products.multiply_window(step);
      sums = products.template total<float4>(step, place.pixel_in_window, 4 * place.channel);
    }
    if (!place.inside) continue;
    const Gates<float> preactivations{
        sums.x + static_cast<float>(z[0]) + bias[0], sums.y + static_cast<float>(z[1]) + bias[1],
        sums.z + static_cast<float>(z[2]) + bias[2], sums.w + static_cast<float>(z[3]) + bias[3]};
    const auto out = cell_forward<float, HalfMath<T>>(preactivations, c, {}, Peepholes::kNone);
    c = out.c;
    const uint32_t h = HalfMath<T>::pack(out.h, 0);
    if (step + 1 < params.steps) store_relaxed(exchanged + state, static_cast<uint16_t>(present(h)));
    const int64_t h_at = (int64_t{place.image} * params.steps + step) * problem.hidden + hidden_channel;
    static_cast<uint16_t*>(params.h)[h_at * image_pixels + place.y * problem.width + place.x] =
        static_cast<uint16_t>(h);
    if (params.keep) {
      params.c[int64_t{step} * pixels * problem.hidden + state] = c;
      gates[0] = static_cast<T>(out.gates.i);
      gates[branch.channels] = static_cast<T>(out.gates.f);
      gates[2 * branch.channels] = static_cast<T>(out.gates.g);
      gates[3 * branch.channels] = static_cast<T>(out.gates.o);
    } else if (step + 1 == params.steps) {
      params.c[state] = c;
    }
  }
}

template <typename T>
void launch_resident(const ResidentForward& forward, int blocks, int shared_memory, cudaStream_t stream) {
  launch_cooperative(resident_forward_kernel<T>, blocks, 1, kResidentThreads, shared_memory, stream, forward);
}

}  // namespace mkconvlstm::sm90

// The recurrence backward on Hopper with resident weights, one persistent launch over all steps.
#pragma once

#include "../gates.cuh"
#include "launch.cuh"
#include "resident.cuh"

namespace mkconvlstm::sm90 {

// What a cell needs of a step but the sums, early enough that it is there when they are.
template <typename T>
struct ResidentGradient {
  T gates[4];
  float c_prev, dh, dc_n;
};

template <typename T, int kSplit>
__global__ void __launch_bounds__(kResidentThreads, 1)
    resident_backward_kernel(const __grid_constant__ ResidentBackward params) {
  char* const memory = shared_memory();
  const ResidentProblem& problem = params.problem;
  const ResidentPlace place(problem);
  const int first_channel = place.group * kFinishedChannels * kSplit;
  const ResidentShape shape = backward_shape(problem);
  ResidentProducts<T, kFinishedChannels * kSplit, kSplit> products(shape, memory);
  products.place(problem, place);
  // Columns: hidden channels. Where dz is read, a tap's neighbour lies on the other side. Elements: a branch's gates,
  // in the exchange four of a channel together.
  for (int r = 0, unit = 0, box = 0; r < problem.branch_count; ++r) {
    const ResidentBranch& branch = problem.branches[r];
    const int boxes = backward_boxes(problem, branch), taps = branch.kernel_height * branch.kernel_width;
    const int pieces = 4 * branch.channels / kPieceElements, before = 4 * branch.first_hidden / kPieceElements;
    const int first_piece = pieces * place.rank / kSplit, end_piece = pieces * (place.rank + 1) / kSplit;
    products.fill(
        unit, box, boxes, before + first_piece, before + end_piece, branch.kernel_height, branch.kernel_width,
        [&](int column, int element, int tap) -> uint16_t {
          if (first_channel + column >= problem.hidden) return 0;
          const int gate = first_piece * kPieceElements + element;  // of the branch, in the exchange's order
          const int64_t row = gate % 4 * branch.channels + gate / 4;
          return static_cast<const uint16_t*>(
              params.branches[r].weights)[(row * problem.hidden + first_channel + column) * taps + taps - 1 - tap];
        });
    unit += boxes * taps;
    box += boxes;
  }
  products.ready();

  // The thread's own cell.
  const int column = place.rank * kFinishedChannels + place.channel, hidden_channel = first_channel + column;
  const bool there = place.inside && hidden_channel < problem.hidden;
  const int r = problem.branch_count > 1 && hidden_channel >= problem.branches[1].first_hidden ? 1 : 0;
  const ResidentBranch& branch = problem.branches[r];
  const int pixels = problem.pixels(), row_bytes = 4 * problem.hidden * sizeof(T);
  const int state = place.pixel * problem.hidden + hidden_channel;
  const int in_image = place.y * problem.width + place.x;
  const int64_t length = params.lengths == nullptr ? params.steps : params.lengths[place.image];

  const auto gates_of = [&](int step) {
    return static_cast<T*>(params.branches[r].gates) + (int64_t{step} * pixels + place.pixel) * 4 * branch.channels +
           (hidden_channel - branch.first_hidden);
  };
  const auto c_of = [&](int step) {
    if (step < 0) return params.c_0 == nullptr ? 0.f : params.c_0[state];
    const int64_t at = int64_t{step} * pixels * problem.hidden + state;
    return params.c_is_half ? static_cast<float>(static_cast<const T*>(params.c)[at])
                            : static_cast<const float*>(params.c)[at];
  };
  const auto exchanged_of = [&](int step) {
    return static_cast<T*>(params.exchange) + int64_t{step} * pixels * 4 * problem.hidden;
  };

  float dc = 0, c = there ? c_of(params.steps - 1) : 0;
  Gates<float> dbias{};
  const int last = params.dh_0 == nullptr ? 0 : -1;
#pragma unroll 1
  for (int step = params.steps - 1; step >= last; --step) {
    __syncwarp();  // after those that have no cell
    ResidentGradient<T> own{};
    if (there && step >= 0) {
      const T* gates = gates_of(step);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) own.gates[gate] = gates[gate * branch.channels];
      own.c_prev = c_of(step - 1);
      if (params.dc_n != nullptr && step == length - 1) own.dc_n = params.dc_n[state];
      if (params.dh != nullptr)
        own.dh = static_cast<float>(
            static_cast<const T*>(params.dh)[place.image * params.dh_image + step * params.dh_step +
                                             hidden_channel * params.dh_channel + in_image * params.dh_pixel]);
    }
    float dh = 0;
    if (step + 1 < params.steps) {
      products.gather(exchanged_of(step + 1), row_bytes, true);
      products.multiply_window(step + 1);
      dh = products.template total<float>(step + 1, place.pixel_in_window, column);
    }
    if (!there) continue;
    if (step < 0) {
      static_cast<T*>(params.dh_0)[state] = static_cast<T>(dh);
      continue;
    }
    const Gates<float> activated{static_cast<float>(own.gates[0]), static_cast<float>(own.gates[1]),
                                 static_cast<float>(own.gates[2]), static_cast<float>(own.gates[3])};
    const auto out =
        cell_backward<float, HalfMath<T>>(activated, own.c_prev, c, dh + own.dh, dc + own.dc_n, {}, Peepholes::kNone);
    dc = out.dc_prev;
    c = own.c_prev;
    dbias.i += out.dz.i;
    dbias.f += out.dz.f;
    dbias.g += out.dz.g;
    dbias.o += out.dz.o;
    const uint2 dz = {HalfMath<T>::pack(out.dz.i, out.dz.f), HalfMath<T>::pack(out.dz.g, out.dz.o)};
    if (step > last) store_relaxed(exchanged_of(step) + 4 * int64_t{state}, uint2{present(dz.x), present(dz.y)});
    auto* gates = reinterpret_cast<uint16_t*>(gates_of(step));
    gates[0] = static_cast<uint16_t>(dz.x);
    gates[branch.channels] = static_cast<uint16_t>(dz.x >> 16);
    gates[2 * branch.channels] = static_cast<uint16_t>(dz.y);
    gates[3 * branch.channels] = static_cast<uint16_t>(dz.y >> 16);
  }
  if (there) params.dc[state] = dc;
  if (there && params.dbias != nullptr) {
    float* const sums = params.dbias + 4 * int64_t{place.pixel} * problem.hidden + hidden_channel;
    sums[0] = dbias.i;
    sums[problem.hidden] = dbias.f;
    sums[2 * problem.hidden] = dbias.g;
    sums[3 * problem.hidden] = dbias.o;
  }
  sync_cluster<kSplit>();  // others may still read this block's sums
}

template <typename T>
void launch_resident(const ResidentBackward& backward, int blocks, int shared_memory, cudaStream_t stream) {
  const auto kernel = backward.problem.split == 1 ? resident_backward_kernel<T, 1> : resident_backward_kernel<T, 2>;
  launch_cooperative(kernel, blocks, backward.problem.split, kResidentThreads, shared_memory, stream, backward);
}

}  // namespace mkconvlstm::sm90

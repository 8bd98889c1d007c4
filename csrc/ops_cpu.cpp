// The operations on CPUs, shared out among torch's own threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "describe.h"
#include "fourier_cpu.h"
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

// A unit takes about a microsecond.
constexpr int64_t kUnitsPerThread = 16;

// What both transforms ask of `images` [N, C, H, W] and of their spectrum [frequencies, ..., tiles, C]. The sizes come
// from this package's own code; the checks are there so that nothing outside of a tensor is ever touched.
TiledImages read_images(const char* op, const Tensor& images, int64_t step, int64_t side, const Tensor& spectrum,
                        const Shape& planes) {
  for (const Tensor* tensor : {&images, &spectrum}) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == torch::headeronly::ScalarType::Float, op,
                    ": images and spectrum must be float32 on the CPU");
  }
  STD_TORCH_CHECK(1 <= step && step <= side && side <= kMaxSide, op, ": wanted 1 <= step <= side <= ", kMaxSide,
                  ", got step ", step, ", side ", side);
  STD_TORCH_CHECK(images.dim() == 4 && (images.size(1) <= 1 || images.stride(1) == 1), op,
                  ": images must be [N, C, H, W], channels-last");
  const TiledImages tiled = {static_cast<float*>(images.data_ptr()),
                             images.size(0),
                             images.size(2),
                             images.size(3),
                             images.size(1),
                             images.stride(0),
                             images.stride(2),
                             images.stride(3),
                             step,
                             (images.size(2) + step - 1) / step,
                             (images.size(3) + step - 1) / step};
  Shape wanted = planes;
  wanted.insert(wanted.begin(), count_frequencies(static_cast<int>(side)));
  wanted.insert(wanted.end(), {tiled.tiles(), tiled.channels});
  const auto sizes = spectrum.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()) &&
                      (tiled.channels <= 1 || spectrum.stride(spectrum.dim() - 1) == 1),
                  op, ": spectrum must be ", shape_string(wanted.data(), wanted.size()),
                  ", its channels contiguous, got ", shape_string(sizes.data(), sizes.size()));
  return tiled;
}

void fourier_analyze(Tensor images, int64_t step, int64_t before, int64_t extent, int64_t side, Tensor spectrum) {
  const TiledImages tiled = read_images("fourier_analyze", images, step, side, spectrum, {2});
  STD_TORCH_CHECK(0 <= before && before < side && 0 <= extent && extent <= side,
                  "fourier_analyze: wanted before and extent within the side ", side);
  const Spectrum target = {static_cast<float*>(spectrum.data_ptr()), spectrum.stride(0), spectrum.stride(1),
                           spectrum.stride(2), static_cast<int>(side)};
  torch::stable::parallel_for(0, count_units(tiled), kUnitsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit)
      analyze(tiled, static_cast<int>(before), static_cast<int>(extent), target, unit);
  });
}

void fourier_synthesize(Tensor products, OptionalTensor bias, int64_t step, int64_t side, Tensor images) {
  const TiledImages tiled = read_images("fourier_synthesize", images, step, side, products, {2, 2});
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->scalar_type() == torch::headeronly::ScalarType::Float &&
                            bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == tiled.channels),
                  "fourier_synthesize: bias must be [", tiled.channels, "] contiguous float32 on the CPU");
  const float* constants = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  const SpectrumProducts source = {static_cast<const float*>(products.data_ptr()),
                                   products.stride(0),
                                   products.stride(1),
                                   products.stride(2),
                                   products.stride(3),
                                   static_cast<int>(side)};
  torch::stable::parallel_for(0, count_units(tiled), kUnitsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) synthesize(source, constants, tiled, unit);
  });
}

}  // namespace

}  // namespace mkconvlstm

STABLE_TORCH_LIBRARY_IMPL(mkconvlstm, CPU, m) {
  m.impl("gate_step_forward", TORCH_BOX(&mkconvlstm::gate_step_forward));
  m.impl("gate_step_backward", TORCH_BOX(&mkconvlstm::gate_step_backward));
  m.impl("fourier_analyze", TORCH_BOX(&mkconvlstm::fourier_analyze));
  m.impl("fourier_synthesize", TORCH_BOX(&mkconvlstm::fourier_synthesize));
}

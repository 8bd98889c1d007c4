#include "plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>

namespace mkconvlstm {

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kMaxGridY = 65535;
constexpr int kMaxAccessBytes = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements that follow one another in memory in all operands, and share what a thread computes once for a vector.
int64_t contiguous_run(const GateStepProblem& problem) {
  const int64_t pixels = problem.height * problem.width;
  switch (problem.layout) {
    case Layout::kChannelsFirst:
      // A vector may cross into the next channel, unless one weight serves the whole channel.
      return problem.peephole == PeepholeShape::kChannel ? pixels : problem.channels * pixels;
    case Layout::kChannelsLast:
      return problem.channels;
    case Layout::kStrided:
      return 1;
  }
  throw std::invalid_argument("plan: unknown layout");
}

// a * b * ..., refused where it would pass the largest int64: sizes come from users.
int64_t checked_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) throw std::invalid_argument("plan: problem is too large");
  }
  return product;
}

void check(const GateStepProblem& problem, const DeviceLimits& limits) {
  if (std::min({problem.batch, problem.channels, problem.height, problem.width}) < 0)
    throw std::invalid_argument("plan: batch, channels, height and width must not be negative");
  if (checked_product({problem.channels, problem.height, problem.width}) > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("plan: channels * height * width must be below 2^31");
  if (problem.max_vector_width < 1) throw std::invalid_argument("plan: max_vector_width must be positive");
  if (limits.multiprocessors < 1 || limits.max_threads_per_multiprocessor < kMaxThreads)
    throw std::invalid_argument("plan: the device needs a multiprocessor that holds 256 threads");
}

}  // namespace

int scalar_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  throw std::invalid_argument("plan: unknown dtype");
}

int accumulate_bytes(DType dtype) { return std::max(scalar_bytes(dtype), 4); }

GateStepPlan plan(const GateStepProblem& problem, const DeviceLimits& limits) {
  check(problem, limits);
  const int64_t pixels = problem.height * problem.width;
  const int64_t image = problem.channels * pixels;
  const int64_t elements = checked_product({problem.batch, image});
  GateStepPlan plan;
  if (elements == 0) return plan;

  // The widest power of two that the memory access, the addresses and the run of neighbours allow.
  plan.vector_width = kMaxAccessBytes / scalar_bytes(problem.dtype);
  while (plan.vector_width > problem.max_vector_width || contiguous_run(problem) % plan.vector_width != 0)
    plan.vector_width /= 2;
  plan.vectors_per_image = image / plan.vector_width;

  // One image's blocks side by side, at most as many in all as the device can hold: the rest is looped over.
  plan.threads = static_cast<int>(std::min<int64_t>(ceil_div(plan.vectors_per_image, kWarp) * kWarp, kMaxThreads));
  const int64_t resident = int64_t{limits.multiprocessors} * (limits.max_threads_per_multiprocessor / plan.threads);
  plan.blocks_y = static_cast<int>(std::min<int64_t>({problem.batch, resident, kMaxGridY}));
  plan.blocks_x = static_cast<int>(
      std::min(ceil_div(plan.vectors_per_image, plan.threads), std::max<int64_t>(resident / plan.blocks_y, 1)));

  const int64_t scalar = scalar_bytes(problem.dtype);
  const int64_t accumulate = accumulate_bytes(problem.dtype);
  const int64_t weights = problem.peephole == PeepholeShape::kNone      ? 0
                          : problem.peephole == PeepholeShape::kChannel ? 3 * problem.channels
                                                                        : 3 * image;
  // Forward: z in and out, u, h; c_prev, c. Backward: gates in and out, dh_out, dh_rec; dc in and out, c_prev, c.
  plan.bytes_forward = checked_product({elements, 13 * scalar + 2 * accumulate}) + weights * accumulate;
  plan.bytes_backward = checked_product({elements, 10 * scalar + 4 * accumulate}) + weights * accumulate;
  return plan;
}

}  // namespace mkconvlstm

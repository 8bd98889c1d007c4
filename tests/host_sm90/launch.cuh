// Launches on a CPU.
#pragma once

#include <cuda_runtime_api.h>

#include "host_grid.h"

namespace mkconvlstm::sm90 {

template <typename... Parameters, typename... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), int blocks, int cluster, int threads, int shared_memory,
                        cudaStream_t, const Arguments&... arguments) {
  if (threads != kBlockThreads || shared_memory > static_cast<int>(kSharedBytes)) __trap();
  run_grid(blocks, cluster, [&] { kernel(arguments...); });
}

}  // namespace mkconvlstm::sm90

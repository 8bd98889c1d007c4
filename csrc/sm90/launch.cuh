// Launches of blocks that wait for each other.
#pragma once

#include <cuda_runtime_api.h>

namespace mkconvlstm::sm90 {

// All blocks at once on the device, or an error, which is left to cudaGetLastError.
template <typename... Parameters, typename... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), int blocks, int threads, int shared_memory, cudaStream_t stream,
                        const Arguments&... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory);
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_memory;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace mkconvlstm::sm90

// Launches of blocks that wait for each other.
#pragma once

#include <cuda_runtime_api.h>

namespace mkconvlstm::sm90 {

// All blocks at once on the device, in clusters of that many, or an error, which is left to cudaGetLastError.
template <typename... Parameters, typename... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), int blocks, int cluster, int threads, int shared_memory,
                        cudaStream_t stream, const Arguments&... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_memory;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace mkconvlstm::sm90

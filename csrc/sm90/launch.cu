// Which kernel serves an element type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backward.h"
#include "forward.h"
#include "resident.h"

namespace mkconvlstm::sm90 {

template <typename T>
void launch_forward(const Forward& forward, const ForwardMaps& maps, int blocks, int shared_memory,
                    cudaStream_t stream);
template <typename T>
void launch_resident(const ResidentForward& forward, int blocks, int shared_memory, cudaStream_t stream);
template <typename T>
void launch_resident(const ResidentBackward& backward, int blocks, int shared_memory, cudaStream_t stream);
template <typename T>
void launch_backward(const Backward& backward, const BackwardMaps& maps, int blocks, int shared_memory,
                     cudaStream_t stream);

void launch(const Forward& forward, const ForwardMaps& maps, DType dtype, int blocks, int shared_memory,
            cudaStream_t stream) {
  const auto chosen = dtype == DType::kFloat16 ? launch_forward<__half> : launch_forward<__nv_bfloat16>;
  chosen(forward, maps, blocks, shared_memory, stream);
}

void launch(const Backward& backward, const BackwardMaps& maps, DType dtype, int blocks, int shared_memory,
            cudaStream_t stream) {
  const auto chosen = dtype == DType::kFloat16 ? launch_backward<__half> : launch_backward<__nv_bfloat16>;
  chosen(backward, maps, blocks, shared_memory, stream);
}

void launch(const ResidentForward& forward, DType dtype, int blocks, int shared_memory, cudaStream_t stream) {
  if (dtype == DType::kFloat16) {
    launch_resident<__half>(forward, blocks, shared_memory, stream);
  } else {
    launch_resident<__nv_bfloat16>(forward, blocks, shared_memory, stream);
  }
}

void launch(const ResidentBackward& backward, DType dtype, int blocks, int shared_memory, cudaStream_t stream) {
  if (dtype == DType::kFloat16) {
    launch_resident<__half>(backward, blocks, shared_memory, stream);
  } else {
    launch_resident<__nv_bfloat16>(backward, blocks, shared_memory, stream);
  }
}

}  // namespace mkconvlstm::sm90

#include "launch.cuh"

namespace mkconvlstm::sm80 {

template cudaError_t launch(const Forward<__nv_bfloat16>&, const Tiling&, const Pass&, cudaStream_t);
template cudaError_t launch(const Backward<__nv_bfloat16>&, const Tiling&, const Pass&, cudaStream_t);

}  // namespace mkconvlstm::sm80

#include "launch.cuh"

namespace mkconvlstm::sm80 {

template cudaError_t launch(const Forward<float>&, const Tiling&, const Pass&, cudaStream_t);
template cudaError_t launch(const Backward<float>&, const Tiling&, const Pass&, cudaStream_t);

}  // namespace mkconvlstm::sm80

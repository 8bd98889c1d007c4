#include "launch.cuh"

namespace mkconvlstm::simt {

template void launch(const Forward<float>&, const Pass&, cudaStream_t);
template void launch(const Backward<float>&, const Pass&, cudaStream_t);

}  // namespace mkconvlstm::simt

#include "launch.cuh"

namespace mkconvlstm::simt {

template void launch(const Forward<double>&, const Pass&, cudaStream_t);
template void launch(const Backward<double>&, const Pass&, cudaStream_t);

}  // namespace mkconvlstm::simt

#include "forward.cuh"

namespace mkconvlstm::sm90 {

template void launch_forward<__nv_bfloat16>(const Forward&, const CUtensorMap&, int, int, cudaStream_t);

}  // namespace mkconvlstm::sm90

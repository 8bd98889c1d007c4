#include "resident_backward.cuh"
#include "resident_forward.cuh"

namespace mkconvlstm::sm90 {

template void launch_resident<__nv_bfloat16>(const ResidentForward&, int, int, cudaStream_t);
template void launch_resident<__nv_bfloat16>(const ResidentBackward&, int, int, cudaStream_t);

}  // namespace mkconvlstm::sm90

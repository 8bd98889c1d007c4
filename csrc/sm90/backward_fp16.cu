#include "backward.cuh"

namespace mkconvlstm::sm90 {

template void launch_backward<__half>(const Backward&, const BackwardMaps&, int, int, cudaStream_t);

}  // namespace mkconvlstm::sm90

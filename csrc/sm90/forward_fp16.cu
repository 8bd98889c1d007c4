#include "forward.cuh"

namespace mkconvlstm::sm90 {

template void launch_forward<__half>(const Forward&, const ForwardMaps&, int, int, cudaStream_t);

}  // namespace mkconvlstm::sm90

// All of it that the kernels' headers name.
#pragma once

using cudaStream_t = void*;

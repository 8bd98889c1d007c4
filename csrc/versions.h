// For a function of a CPU library that is worth several versions: the loader picks what the machine can run.
#pragma once

#include "gates.cuh"

#if defined(__x86_64__) && defined(__ELF__)
#define MKCONVLSTM_VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MKCONVLSTM_VERSIONS
#endif

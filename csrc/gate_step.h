// The pointwise step: what is left of a recurrent step once the hidden-to-hidden convolution is done. One hidden branch
// at a time: its pre-activations are a tensor of their own, its channels of h and c a slice of theirs.
// All pointers are memory of the step's device, owned by the caller; on a GPU until the stream has passed the kernel.
#pragma once

#include <cstdint>

#include "gates.cuh"

namespace mkconvlstm {

// One operand [batch, channels, pixels]; strides count elements. Height and width form one axis, the pixels.
struct Operand {
  void* data = nullptr;  // null: absent
  int64_t batch = 0;
  int64_t channel = 0;
  int64_t pixel = 0;
  bool wide = false;  // holds the accumulate type rather than the gates' own
};

// What both passes share. "Wide" operands hold float64 for float64 gates and float32 for all others.
struct GateStep {
  int64_t batch;
  uint32_t channels, pixels;  // channels: of this branch
  bool channels_last;         // the order in which a GPU's threads walk through an image
  Peepholes peepholes;

  Operand z;         // [batch, 4 * channels, pixels], gate-major i f g o; overwritten
  Operand c_prev;    // wide
  Operand c;         // wide; forward writes it
  Operand peephole;  // wide [3, channels, pixels], rows i f o; its batch stride is the row's; 0 where it is broadcast
};

// z: pre-activations, become activated gates.
struct GateStepForward : GateStep {
  Operand u;  // added to z; may be absent; must not overlap the others
  Operand h;  // written
};

// z: activated gates, become their gradients.
struct GateStepBackward : GateStep {
  Operand dh_out, dh_rec;  // summed; either may be absent, either may be wide
  Operand dc;              // wide: dL/dc_t, becomes dL/dc_{t-1}
};

}  // namespace mkconvlstm

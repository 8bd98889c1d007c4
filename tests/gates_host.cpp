// csrc/gates.cuh compiled as plain C++, for test_gate_step.py. Arrays are [rows, n]: gates i f g o, peepholes i f o.
#include "gates.cuh"

using namespace mkconvlstm;

namespace {

Gates<double> gates_at(const double* rows, long n, long k) {
  return {rows[k], rows[n + k], rows[2 * n + k], rows[3 * n + k]};
}

void put_gates(double* rows, long n, long k, Gates<double> gates) {
  rows[k] = gates.i;
  rows[n + k] = gates.f;
  rows[2 * n + k] = gates.g;
  rows[3 * n + k] = gates.o;
}

}  // namespace

extern "C" void forward(long n, double* z, const double* c_prev, double* h, double* c, const double* w, int peepholes) {
  for (long k = 0; k < n; ++k) {
    const auto cell = cell_forward<double>(gates_at(z, n, k), c_prev[k], {w[k], w[n + k], w[2 * n + k]},
                                           static_cast<Peepholes>(peepholes));
    put_gates(z, n, k, cell.gates);
    h[k] = cell.h;
    c[k] = cell.c;
  }
}

extern "C" void backward(long n, double* gates, const double* dh, double* dc, const double* c_prev, const double* c,
                         const double* w, int peepholes) {
  for (long k = 0; k < n; ++k) {
    const auto gradient = cell_backward<double>(gates_at(gates, n, k), c_prev[k], c[k], dh[k], dc[k],
                                                {w[k], w[n + k], w[2 * n + k]}, static_cast<Peepholes>(peepholes));
    put_gates(gates, n, k, gradient.dz);
    dc[k] = gradient.dc_prev;
  }
}

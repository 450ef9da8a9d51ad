// What the host code asks of the device it is built for: CUDA (device_cuda.cpp), or the CPU, where
// the kernels are emulated for tests (device_cpu.cpp, -DLORAPAR_EMULATE).
#pragma once
#include <ATen/core/Tensor.h>

#include "kernels.h"

#ifdef LORAPAR_EMULATE
#define LORAPAR_DISPATCH_KEY CPU
#else
#define LORAPAR_DISPATCH_KEY CUDA
#endif

namespace lorapar {

constexpr at::DeviceType kDevice = at::DeviceType::LORAPAR_DISPATCH_KEY;

cudaStream_t current_stream(at::Device device);

// A contiguous tensor that nobody filled, past the dispatcher.
at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType type, at::Device device);

// Raises what a launch since the last call left behind.
void check_launches(const char* op);

// out [M, N] = [out +] x [M, K] w, with w [N, K] transposed, or w [K, N]. All have two dimensions
// and one dtype; the rows of x and out are contiguous, w has any strides. The workspace has
// gemm_workspace's bytes.
struct Gemm {
  const at::Tensor &x, &w, &out;
  bool transposed, accumulate;
};
size_t gemm_workspace(const Gemm& of);
void gemm(const Gemm& of, void* workspace, cudaStream_t stream);

// The same by PyTorch: fp32, where its TF32 flags rule, and what cuBLASLt cannot take.
void gemm_by_torch(const Gemm& of);

}  // namespace lorapar

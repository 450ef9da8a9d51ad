// CUDA kernels on the CPU: every thread of a block is a fiber, blocks run one after another. What
// csrc/ptx.h declares for the GPU, with the same signatures, and what CUDA C++ itself brings.
//
// Stricter than a GPU, so that a fault shows:
//   - shared memory is all NaN when a block begins; a write past its end is found when it ends
//   - cp_async fills its place with NaN and copies when its thread waits for it
//   - blocks take their warps, and warps their lanes, in one order and then the other, each running
//     until it must wait for others: a missing barrier gives something else in one of the two
//   - lanes of a warp at different operations, a barrier that some threads never reach, and a
//     vector access at an odd address stop the program
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace lorapar {

constexpr size_t kMostShared = 99 * 1024;
int multiprocessors();  // 132, or what set_multiprocessors was given

namespace emulator {

constexpr int kLanes = 32;
using Operation = void (*)(void* const* lanes);

// Waits for the other lanes of the warp; the last to come does `operation` with the arguments of
// all, in order.
void together(Operation operation, void* argument);
void barrier();
void run(dim3 grid, int threads, size_t shared, const std::function<void()>& kernel);
char* shared_memory();
void check(bool right, const char* what);  // stops the program, says where

// What every lane gets of what every lane has.
template <typename T, typename Choose>
struct Exchange {
  T value, result;
  Choose from;  // lane -> lane
  static void operation(void* const* lanes) {
    for (int l = 0; l < kLanes; ++l) {
      auto* lane = static_cast<Exchange*>(lanes[l]);
      int from = lane->from(l);
      bool inside = from >= 0 && from < kLanes;
      lane->result = static_cast<Exchange*>(lanes[inside ? from : l])->value;
    }
  }
};
template <typename T, typename Choose>
T exchange(unsigned mask, T value, Choose from) {
  check(mask == 0xffffffffu, "a shuffle of part of a warp");
  Exchange<T, Choose> lane{value, value, from};
  together(&Exchange<T, Choose>::operation, &lane);
  return lane.result;
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};
void mma_f16(void* const* lanes);
void mma_bf16(void* const* lanes);
struct Ldmatrix {
  uint32_t* r;
  const void* row;
};
void ldmatrix(void* const* lanes);
void ldmatrix_transposed(void* const* lanes);
inline void nothing(void* const*) {}

}  // namespace emulator

inline void wait_for_previous() {}

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  emulator::Mma lane{d, a, b};
  emulator::together(emulator::mma_f16, &lane);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  emulator::Mma lane{d, a, b};
  emulator::together(emulator::mma_bf16, &lane);
}
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  emulator::Ldmatrix lane{r, row};
  emulator::together(emulator::ldmatrix, &lane);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  emulator::Ldmatrix lane{r, row};
  emulator::together(emulator::ldmatrix_transposed, &lane);
}

void cp_async(void* shared, const void* global, int bytes = 16);
void cp_async_commit();
void cp_async_wait_until(int left);
template <int left>
inline void cp_async_wait() {
  cp_async_wait_until(left);
}

// Two 16-bit numbers times 0 or 1: bits 0 and 16 of `keep`. See ptx.h.
uint32_t times_keep(uint32_t pair, uint32_t keep, __half);
uint32_t times_keep(uint32_t pair, uint32_t keep, __nv_bfloat16);

inline void store_16(void* to, uint4 v) { *static_cast<uint4*>(to) = v; }

struct Wide {
  uint32_t low, high;
};
inline Wide multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product = uint64_t(a) * b;
  return {uint32_t(product), uint32_t(product >> 32)};
}

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t,
            Arguments&&... arguments) {
  emulator::run(grid, threads, shared,
                [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace lorapar

inline void __syncthreads() { lorapar::emulator::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  lorapar::emulator::check(mask == 0xffffffffu, "a __syncwarp of part of a warp");
  lorapar::emulator::together(lorapar::emulator::nothing, nullptr);
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
  return lorapar::emulator::exchange(mask, value, [lane](int) { return lane & 31; });
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return lorapar::emulator::exchange(mask, value, [lanes](int l) { return l ^ lanes; });
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  return lorapar::emulator::exchange(mask, value, [lanes](int l) { return l + int(lanes); });
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  return lorapar::emulator::exchange(mask, value, [lanes](int l) { return l - int(lanes); });
}
template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline int __popc(uint32_t a) { return __builtin_popcount(a); }
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

#define LORAPAR_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(::lorapar::emulator::shared_memory())

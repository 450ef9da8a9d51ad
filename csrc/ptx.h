// The few instructions that CUDA C++ has no name for. A build for the CPU (tests/kernels/emulator)
// brings its own.
#pragma once
#ifdef LORAPAR_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace lorapar {

// With programmatic dependent launch a kernel starts when the one before it ends its last blocks:
// nothing that was written before may be read above this line. Every kernel begins with it. None
// asks for the next one earlier than that: in CUDA graphs its waiting blocks slow this one down
// (shrink 38 us for 14 at M = 512).
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d [16, 8] += a [16, 16] b [16, 8], fragments as PTX lays them out for m16n8k16.row.col.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16 bit; lane l gives the address of row l % 8 of matrix l / 8, 16-byte
// aligned.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, past the registers; zeros past the first `bytes`. Both
// addresses 16-byte aligned.
__device__ __forceinline__ void cp_async(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `left` groups are on their way.
template <int left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// Two 16-bit numbers, each times 1 where its bit of `keep` (0 and 16) is set, else times 0, which
// lets a NaN through. keep has no other bit.
__device__ __forceinline__ uint32_t times_keep(uint32_t pair, uint32_t keep, __half) {
  uint32_t out;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(out) : "r"(pair), "r"(keep * 0x3C00u));
  return out;
}
__device__ __forceinline__ uint32_t times_keep(uint32_t pair, uint32_t keep, __nv_bfloat16) {
  uint32_t out;  // mul.bf16x2 needs sm_90
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(out)
      : "r"(pair), "r"(keep * 0x3F80u), "r"(0x80008000u));
  return out;
}

// 16 bytes to global memory in one instruction: the compiler likes to make four of a uint4.
__device__ __forceinline__ void store_16(void* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// a b in two words. Of a 64-bit product the compiler adds 0 to the upper half.
struct Wide {
  uint32_t low, high;
};
__device__ __forceinline__ Wide multiply_wide(uint32_t a, uint32_t b) {
  Wide out;
  asm("{\n.reg .u64 p;\nmul.wide.u32 p, %2, %3;\nmov.b64 {%0, %1}, p;\n}"
      : "=r"(out.low), "=r"(out.high)
      : "r"(a), "r"(b));
  return out;
}

// kernel<<<grid, threads, shared, stream>>>(args...), with programmatic dependent launch where the
// card has it. The error, if any, is the caller's to read by cudaGetLastError.
bool starts_early();    // launch.cpp: whether the current device has it (sm_90 on)
int multiprocessors();  // launch.cpp: of the current device
constexpr size_t kMostShared = 99 * 1024;  // what a block may have on every card from sm_80 on
void allow_shared(const void* kernel, int bytes);  // launch.cpp
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute early[1];
  early[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early[0].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = early;
  config.numAttrs = starts_early() ? 1 : 0;
  if (shared > 48 * 1024)  // more than a kernel gets unasked
    allow_shared(reinterpret_cast<const void*>(kernel), static_cast<int>(kMostShared));
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace lorapar

// The block's dynamic shared memory, the only kind that the kernels use.
#define LORAPAR_SHARED(type, name)                                \
  extern __shared__ __align__(128) unsigned char lorapar_shared[]; \
  type* name = reinterpret_cast<type*>(lorapar_shared)
#endif

// Thread-block clusters: the blocks that split one sum and read each other's part of it. Cards
// before sm_90 have none: there a cluster is one block.
#pragma once
#include "ptx.h"

namespace lorapar {

#ifdef LORAPAR_EMULATE
// One emulated block plays all blocks of a cluster, each by its own `kThreads` threads.
inline int emulated_cluster = 1;  // most blocks
inline int emulated_size = 1;     // blocks of the kernel that runs
inline size_t emulated_shared = 0;  // bytes of one
template <int kThreads>
struct Cluster {
  static int thread() { return static_cast<int>(threadIdx.x) % kThreads; }
  static int rank() { return static_cast<int>(threadIdx.x) / kThreads; }
  static int size() { return emulated_size; }
  static int block() { return static_cast<int>(blockIdx.x) * size() + rank(); }
  static char* shared() {
    LORAPAR_SHARED(char, memory);
    return memory + rank() * emulated_shared;
  }
  static void barrier() { __syncthreads(); }
  static void leave() { __syncthreads(); }
  template <typename T>
  static const T* of_rank(const T* mine, int other) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(mine) +
                                      (other - rank()) * static_cast<int64_t>(emulated_shared));
  }
};

template <int kThreads, typename Parameter>
void launch_cluster(void (*kernel)(Parameter), int blocks, int size, size_t shared, cudaStream_t s,
                    const Parameter& argument) {
  emulated_size = size;
  emulated_shared = (shared + 127) / 128 * 128;
  launch(kernel, dim3(blocks / size), kThreads * size, emulated_shared * size, s, argument);
}
inline int cluster_size(int) { return emulated_cluster; }
inline bool has_clusters() { return true; }

#else
template <int kThreads>
struct Cluster {
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int block() { return static_cast<int>(blockIdx.x); }
  static __device__ __forceinline__ char* shared() {
    LORAPAR_SHARED(char, memory);
    return memory;
  }
#if __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ int rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
  }
  static __device__ __forceinline__ int size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return static_cast<int>(size);
  }
  // Of all threads of the cluster; what was written to shared memory before is seen after it.
  static __device__ __forceinline__ void barrier() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
  }
  // The last barrier, after which nobody reads what others wrote: it waits for no store.
  static __device__ __forceinline__ void leave() {
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.aligned;" ::
            : "memory");
  }
  // Where another block has what this one has at `mine` in its shared memory.
  template <typename T>
  static __device__ __forceinline__ const T* of_rank(const T* mine, int other) {
    uint64_t there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(other));
    return reinterpret_cast<const T*>(there);
  }
#else
  static __device__ __forceinline__ int rank() { return 0; }
  static __device__ __forceinline__ int size() { return 1; }
  static __device__ __forceinline__ void barrier() { __syncthreads(); }
  static __device__ __forceinline__ void leave() { __syncthreads(); }
  template <typename T>
  static __device__ __forceinline__ const T* of_rank(const T* mine, int) {
    return mine;
  }
#endif
};

// kernel<<<blocks, kThreads, shared, stream>>>(argument) in clusters of `size` blocks, else as
// `launch`.
template <int kThreads, typename Parameter>
void launch_cluster(void (*kernel)(Parameter), int blocks, int size, size_t shared,
                    cudaStream_t stream, const Parameter& argument) {
  if (size == 1) return launch(kernel, dim3(blocks), kThreads, shared, stream, argument);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = size;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  if (shared > 48 * 1024)
    allow_shared(reinterpret_cast<const void*>(kernel), static_cast<int>(kMostShared));
  cudaLaunchKernelEx(&config, kernel, argument);
}
// The size to launch with: `wanted` where the card has clusters.
inline bool has_clusters() { return starts_early(); }  // sm_90 has brought both
inline int cluster_size(int wanted) { return has_clusters() ? wanted : 1; }
#endif

}  // namespace lorapar

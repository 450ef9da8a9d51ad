// The compute copies of the adapters of one x: live columns only, the compute dtype, zeros up to R.
//
// Computes    a_pack[i·R + c, k] = A_i[live[c], k]               for c < columns, else 0
//             b_pack[c, first_i + n] = scale · B_i[n, live[c]]   for c < columns, else 0
//             valid[i·R + c] = c < columns
//
// Shapes      A [r, K], B [N, r] in any type   a_pack [P·R, K], b_pack [R, sum N] in one
// Cost        one launch; r·(K+N) elements read and R·(K+N) written a projection.
#include "tile.h"

namespace lorapar {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockN = 128, kBlockR = 16;  // of a tile of B, turned in shared memory
static_assert(kBlockN * kBlockR == kThreads * 8, "each thread stores eight elements of a tile");
constexpr int kStride = kBlockN + 8;

struct Packing {
  PackProjection of[kMaxProjections];
  int64_t first_n[kMaxProjections];   // of b_pack
  int first_block[kMaxProjections];
  int projections, blocks_a;
  int64_t K, stride_b_pack;
  int R;
};

__device__ __forceinline__ int live_column(const PackProjection& p, int c) {
  return p.live == nullptr ? c : p.live[c];
}

template <typename T>
__device__ void pack_a(const Packing& all, const PackProjection& p, int block, T* out) {
  int chunks = static_cast<int>(divide_up<int64_t>(all.K, 8));
  int64_t i = static_cast<int64_t>(block) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(all.R) * chunks) return;
  int c = static_cast<int>(i / chunks);
  int64_t k = i % chunks * 8;
  Eight<float> v = {};
  if (c < p.columns) {
    v = load_8(row_of(p.a, p.a_type, live_column(p, c)), p.a_type, k, all.K,
               aligned_16(p.a.data, p.a.stride, p.a_type));
  }
  store_8(out + c * all.K, k, all.K, aligned_16<T>(out, all.K), convert<T>(v));
}

template <typename T>
__device__ void pack_b(const Packing& all, const PackProjection& p, int block, T* out, T* tile) {
  int blocks_r = all.R / kBlockR;
  int64_t first_n = static_cast<int64_t>(block / blocks_r) * kBlockN;
  int first_c = block % blocks_r * kBlockR;
  int c = threadIdx.x % kBlockR;  // neighbours in a row of B
  bool inside = first_c + c < p.columns;
  int column = inside ? live_column(p, first_c + c) : 0;
#pragma unroll
  for (int i = 0; i < kBlockN; i += kThreads / kBlockR) {
    int n = i + threadIdx.x / kBlockR;
    bool there = inside && first_n + n < p.n;
    float v = there ? load_float(row_of(p.b, p.b_type, first_n + n), p.b_type, column) : 0.0f;
    tile[c * kStride + n] = from_float<T>(there ? p.scale * v : 0.0f);
  }
  __syncthreads();
  int row = threadIdx.x / (kBlockN / 8), n = threadIdx.x % (kBlockN / 8) * 8;
  store_8(out + (first_c + row) * all.stride_b_pack, first_n + n, p.n,
          aligned_16<T>(out, all.stride_b_pack), load_8(tile + row * kStride, n, kBlockN, true));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const Packing all, T* a_pack, T* b_pack, int8_t* valid) {
  wait_for_previous();
  LORAPAR_SHARED(T, tile);
  int i = 0;
  while (i + 1 < all.projections && static_cast<int>(blockIdx.x) >= all.first_block[i + 1]) ++i;
  const PackProjection& p = all.of[i];
  int block = blockIdx.x - all.first_block[i];
  if (block == 0)
    for (int c = threadIdx.x; c < all.R; c += kThreads) valid[i * all.R + c] = c < p.columns;
  if (block < all.blocks_a) {
    pack_a(all, p, block, a_pack + static_cast<int64_t>(i) * all.R * all.K);
  } else {
    pack_b(all, p, block - all.blocks_a, b_pack + all.first_n[i], tile);
  }
}

}  // namespace

void pack(const PackProjection* of, int projections, int64_t K, int R, Type type, void* a_pack,
          void* b_pack, int64_t stride_b_pack, int8_t* valid, cudaStream_t stream) {
  if (projections == 0 || R == 0) return;
  Packing all = {};
  all.projections = projections;
  all.K = K;
  all.R = R;
  all.stride_b_pack = stride_b_pack;
  int64_t blocks_a = divide_up<int64_t>(R * divide_up<int64_t>(K, 8), kThreads);
  all.blocks_a = static_cast<int>(blocks_a > 0 ? blocks_a : 1);  // one writes `valid`
  int64_t blocks = 0, n = 0;
  for (int i = 0; i < projections; ++i) {
    all.of[i] = of[i];
    all.first_n[i] = n;
    all.first_block[i] = static_cast<int>(blocks);
    n += of[i].n;
    blocks += all.blocks_a + divide_up<int64_t>(of[i].n, kBlockN) * (R / kBlockR);
  }
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch(pack_kernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads,
           kBlockR * kStride * sizeof(T), stream, all, static_cast<T*>(a_pack),
           static_cast<T*>(b_pack), valid);
  });
}

}  // namespace lorapar

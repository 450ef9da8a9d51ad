// What the adapters add to y, and to dX.
//
// Computes    expand       out_i[m, n] = [base_i[m, n] +] Σ_r S_i[m, r] b_i[r, n] [+ bias_i[n]]
//             expand_dx    out[m, k] = Σ_i keep_i(m, k) Σ_r dS[m, i·R + r] A[i·R + r, k]
//
// Shapes      S [M, R], b [R, N] with the scale in it, or dS [M, P·R] and A [P·R, K]
// Cost        one launch; one write of out and a read of base: bandwidth binds up to R = 128. A
//             block makes a tile of out [64, 128], each of its 4 warps 16 rows.
//
// Columns of b lie in shared memory in another order, so that a thread of the product holds eight
// neighbours of out and reads and writes 16 bytes: of 32, 8 q + 2 j + i lies at 8 j + 2 q + i.
#include "tile.h"

namespace lorapar {
namespace {

constexpr int kThreads = 128;
constexpr int kBlockM = 64, kBlockN = 128, kGroups = kBlockN / 32;
constexpr int kStrideB = kBlockN + 8;
template <typename T>
constexpr int kRankBlock = sizeof(T) == 2 ? 64 : 32;  // rank columns of one step

using Tile = float[kGroups][4][4];  // of a warp; lane 4 g + t: rows g, g+8, columns 8t ... of 32

template <typename T>
__device__ __forceinline__ void copy_b(T* shared, const T* b, int64_t stride, int ranks,
                                       int64_t first, int64_t end, bool aligned) {
  struct alignas(2 * sizeof(T)) Pair {
    T v[2];
  };
  for (int i = threadIdx.x; i < ranks * (kBlockN / 8); i += kThreads) {
    int r = i / (kBlockN / 8), chunk = i % (kBlockN / 8);
    Eight<T> v = load_8(b + r * stride, first + chunk * 8, end, aligned);
    T* to = shared + r * kStrideB + chunk / 4 * 32 + chunk % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) *reinterpret_cast<Pair*>(to + 8 * j) = {v.v[2 * j], v.v[2 * j + 1]};
  }
}

// total += keep * (s b) for s [64, R] and b [R, 128], which begin at row m and column n. `words` is
// this projection's [M, words of a row], or null.
template <typename T, bool kDrop>
__device__ __forceinline__ void add_product(Tile& total, T* shared, const Matrix& s_matrix,
                                            const Matrix& b_matrix, int64_t m, int64_t M, int64_t n,
                                            int64_t N, int R, const int16_t* words,
                                            int64_t stride_words) {
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const T* s = static_cast<const T*>(s_matrix.data) + m * s_matrix.stride;
  const T* b = static_cast<const T*>(b_matrix.data);
  bool aligned_s = aligned_16<T>(s_matrix.data, s_matrix.stride);
  bool aligned_b = aligned_16<T>(b, b_matrix.stride);
  int ranks = min(R, kRankBlock<T>), stride_s = ranks + 8;
  T *shared_s = shared, *shared_b = shared + kBlockM * stride_s;
  for (int first = 0; first < R; first += ranks) {
    if (first > 0) __syncthreads();
    constexpr int kElements = 16 / sizeof(T);
    for (int i = threadIdx.x; i < kBlockM * (ranks / kElements); i += kThreads) {
      int row = i / (ranks / kElements), r = i % (ranks / kElements) * kElements;
      bool inside = m + row < M;
      copy_16(shared_s + row * stride_s + r, inside ? s + row * s_matrix.stride + first + r : s,
              inside ? kElements : 0, aligned_s);
    }
    cp_async_commit();
    copy_b(shared_b, b + first * b_matrix.stride, b_matrix.stride, ranks, n, N, aligned_b);
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (!kDrop) {
      for (int r = 0; r < ranks; r += 16) {
        Fragment<T> f;
        load_fragment<false>(f, shared_s + warp * 16 * stride_s + r, stride_s);
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          multiply<true>(total[group], f, shared_b + r * kStrideB + group * 32, kStrideB);
      }
    } else {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float part[4][4] = {};
        for (int r = 0; r < ranks; r += 16) {
          Fragment<T> f;
          load_fragment<false>(f, shared_s + warp * 16 * stride_s + r, stride_s);
          multiply<true>(part, f, shared_b + r * kStrideB + group * 32, kStrideB);
        }
        int64_t k = n + group * 32 + 8 * t;
        int bit = bit_of(k);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int64_t row = m + warp * 16 + g + half * 8;
          uint4 w = {};
          if (row < M && k < N)
            w = *reinterpret_cast<const uint4*>(words + row * stride_words + word_of(k));
          uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float &low = part[j][2 * half], &high = part[j][2 * half + 1];
            drop_pair(low, high, pairs[j], bit);
            total[group][j][2 * half] += low;
            total[group][j][2 * half + 1] += high;
          }
        }
      }
    }
  }
}

// A thread's eight neighbours of one row.
__device__ __forceinline__ Eight<float> neighbours(const float (&group)[4][4], int half) {
  Eight<float> out;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    out.v[2 * j] = group[j][2 * half];
    out.v[2 * j + 1] = group[j][2 * half + 1];
  }
  return out;
}
__device__ __forceinline__ void add(Eight<float>& to, const Eight<float>& from) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to.v[i] += from.v[i];
}

struct Expansion {
  ExpandProjection of[kMaxProjections];
  int first_block[kMaxProjections];  // of the columns
  int projections, R;
  int64_t M;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) expand_kernel(const Expansion all) {
  wait_for_previous();
  LORAPAR_SHARED(T, shared);
  int i = 0;
  while (i + 1 < all.projections && static_cast<int>(blockIdx.y) >= all.first_block[i + 1]) ++i;
  const ExpandProjection& p = all.of[i];
  int64_t m = static_cast<int64_t>(blockIdx.x) * kBlockM;
  int64_t n = static_cast<int64_t>(blockIdx.y - all.first_block[i]) * kBlockN;
  Tile total = {};
  if (p.s.data != nullptr)
    add_product<T, false>(total, shared, p.s, p.b, m, all.M, n, p.n, all.R, nullptr, 0);

  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  bool aligned_base = aligned_16(p.base.data, p.base.stride, p.out_type);
  bool aligned_out = aligned_16(p.out.data, p.out.stride, p.out_type);
  bool aligned_bias = aligned_16(p.bias, 0, p.bias_type);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    int64_t column = n + group * 32 + 8 * t;
    if (column >= p.n) continue;
    Eight<float> bias = {};
    if (p.bias != nullptr) bias = load_8(p.bias, p.bias_type, column, p.n, aligned_bias);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t row = m + warp * 16 + g + half * 8;
      if (row >= all.M) continue;
      Eight<float> v = neighbours(total[group], half);
      if (p.bias != nullptr) add(v, bias);
      if (p.base.data != nullptr)
        add(v, load_8(row_of(p.base, p.out_type, row), p.out_type, column, p.n, aligned_base));
      void* out = const_cast<void*>(row_of({p.out.data, p.out.stride}, p.out_type, row));
      store_8(out, p.out_type, column, p.n, aligned_out, v);
    }
  }
}

template <typename T, bool kDrop>
__global__ void __launch_bounds__(kThreads, 4) expand_dx_kernel(const ExpandDx call) {
  wait_for_previous();
  LORAPAR_SHARED(T, shared);
  int64_t m = static_cast<int64_t>(blockIdx.x) * kBlockM;
  int64_t n = static_cast<int64_t>(blockIdx.y) * kBlockN;
  Tile total = {};
  for (int i = 0; i < call.projections; ++i) {
    if (i > 0) __syncthreads();
    Matrix ds = call.ds, a = call.a;
    ds.data = static_cast<const T*>(ds.data) + i * call.R;
    a.data = static_cast<const T*>(a.data) + i * call.R * a.stride;
    const int16_t* words = kDrop ? call.bits + i * call.M * call.words : nullptr;
    add_product<T, kDrop>(total, shared, ds, a, m, call.M, n, call.K, call.R, words, call.words);
  }
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  bool aligned = aligned_16<T>(call.out.data, call.out.stride);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t row = m + warp * 16 + g + half * 8, column = n + group * 32 + 8 * t;
      if (row < call.M && column < call.K)
        store_8(static_cast<T*>(call.out.data) + row * call.out.stride, column, call.K, aligned,
                convert<T>(neighbours(total[group], half)));
    }
  }
}

template <typename T>
size_t shared_bytes(int R) {
  int ranks = R < kRankBlock<T> ? R : kRankBlock<T>;
  return (kBlockM * (ranks + 8) + ranks * kStrideB) * sizeof(T);
}

}  // namespace

void expand(const ExpandProjection* of, int projections, int64_t M, int R, Type type,
            cudaStream_t stream) {
  Expansion all = {};
  all.projections = projections;
  all.R = R;
  all.M = M;
  int64_t blocks = 0;
  for (int i = 0; i < projections; ++i) {
    all.of[i] = of[i];
    all.first_block[i] = static_cast<int>(blocks);
    blocks += divide_up<int64_t>(of[i].n, kBlockN);
  }
  if (M == 0 || blocks == 0) return;
  dim3 grid(static_cast<unsigned>(divide_up<int64_t>(M, kBlockM)), static_cast<unsigned>(blocks));
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch(expand_kernel<T>, grid, kThreads, shared_bytes<T>(R), stream, all);
  });
}

void expand_dx(const ExpandDx& call, Type type, cudaStream_t stream) {
  if (call.M == 0 || call.K == 0) return;
  dim3 grid(static_cast<unsigned>(divide_up<int64_t>(call.M, kBlockM)),
            static_cast<unsigned>(divide_up<int64_t>(call.K, kBlockN)));
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    auto* kernel = call.bits == nullptr ? expand_dx_kernel<T, false> : expand_dx_kernel<T, true>;
    launch(kernel, grid, kThreads, shared_bytes<T>(call.R), stream, call);
  });
}

}  // namespace lorapar

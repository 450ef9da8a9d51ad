// What the adapters add to y, and to dX.
//
// Computes    expand       out_i[m, n] = [base_i[m, n] +] Σ_r S_i[m, r] b_i[r, n] [+ bias_i[n]]
//             expand_dx    out[m, k] = Σ_i keep_i(m, k) Σ_r dS[m, i·R + r] A[i·R + r, k]
//
// Shapes      S [M, R], b [R, N] with the scale in it, or dS [M, P·R] and A [P·R, K]
// Cost        one launch; one write of out and a read of base: bandwidth binds up to R = 128; with
//             few rows, latency.
//
// The usual calls (16 bit, aligned, R up to 128, no base) have small kernels: b or A lies in shared
// memory once for several tiles of rows, everything is on its way before anything is waited for, and
// little code and few registers leave room for many warps. All others take the `any` kernels: tiles
// of out [64, 128], each of 4 warps 16 rows, whatever the types and addresses.
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

// Two floats in one register.
__device__ __forceinline__ uint32_t pair_of(float low, float high, __half) {
  __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pair_of(float low, float high, __nv_bfloat16) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
// A thread's eight neighbours of one row, to an aligned address.
template <typename T>
__device__ __forceinline__ void store_neighbours(T* to, const float (&group)[4][4], int half) {
  uint32_t v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = pair_of(group[j][2 * half], group[j][2 * half + 1], T());
  store_16(to, {v[0], v[1], v[2], v[3]});
}

// ---- The small kernels.
// b [ranks, 128] from column `first` on to shared memory, columns as in copy_b; row r to place(r).
template <typename T, typename Place>
__device__ __forceinline__ void copy_columns(T* shared, const T* b, int64_t stride, int ranks,
                                             int64_t first, int64_t end, Place&& place) {
  constexpr int kPerRow = kBlockN / 8, kBatch = 4;  // loads on their way
  for (int i = threadIdx.x; i < ranks * kPerRow; i += kBatch * kThreads) {
    uint4 v[kBatch];
#pragma unroll
    for (int of = 0; of < kBatch; ++of) {
      int r = (i + of * kThreads) / kPerRow, column = i % kPerRow * 8;
      v[of] = {};
      if (r < ranks && first + column < end)
        v[of] = *reinterpret_cast<const uint4*>(b + r * stride + first + column);
    }
#pragma unroll
    for (int of = 0; of < kBatch; ++of) {
      int r = (i + of * kThreads) / kPerRow, chunk = i % kPerRow;
      if (r >= ranks) continue;
      auto* to = reinterpret_cast<uint32_t*>(shared + place(r) * kStrideB + chunk / 4 * 32 +
                                             chunk % 4 * 2);
      to[0] = v[of].x, to[4] = v[of].y, to[8] = v[of].z, to[12] = v[of].w;
    }
  }
}

struct Expansion {
  ExpandProjection of[kMaxProjections];
  int first_block[kMaxProjections];  // of the columns
  int projections, R;
  int tiles;  // of 64 rows, of a block
  int64_t M;
};

// A lane reads S past shared memory: of 16 ranks 4t ... 4t+3, which stand where m16n8k16 has 2t,
// 2t+1, 2t+8, 2t+9; the rows of b in shared memory have that order too.
template <typename T, int kRank>
__global__ void __launch_bounds__(kThreads, kRank == 16 ? 8 : kRank == 32 ? 7 : 4)
    expand_kernel(const __grid_constant__ Expansion all) {
  wait_for_previous();
  LORAPAR_SHARED(T, shared);
  auto* bias = reinterpret_cast<float*>(shared + kRank * kStrideB);  // [128]
  int i = 0;
  while (i + 1 < all.projections && static_cast<int>(blockIdx.y) >= all.first_block[i + 1]) ++i;
  const ExpandProjection& p = all.of[i];
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int64_t m = static_cast<int64_t>(blockIdx.x) * all.tiles * kBlockM + warp * 16;
  int64_t n = static_cast<int64_t>(blockIdx.y - all.first_block[i]) * kBlockN;

  Fragment<T> s[kRank / 16];
  auto load_s = [&](int64_t first) {  // rows past the last as the last: nobody stores them
    const T* from = static_cast<const T*>(p.s.data) + 4 * t;
    int64_t row = first + g, last = all.M - 1;
    const T* low = from + (row < last ? row : last) * p.s.stride;
    const T* high = from + (row + 8 < last ? row + 8 : last) * p.s.stride;
#pragma unroll
    for (int step = 0; step < kRank / 16; ++step) {
      uint2 a = *reinterpret_cast<const uint2*>(low + 16 * step);
      uint2 b = *reinterpret_cast<const uint2*>(high + 16 * step);
      s[step] = {{a.x, b.x, a.y, b.y}};
    }
  };
  load_s(m);
  int64_t own = n + threadIdx.x;
  bias[threadIdx.x] =
      p.bias != nullptr && own < p.n ? load_float(p.bias, p.bias_type, own) : 0.0f;
  copy_columns(shared, static_cast<const T*>(p.b.data), p.b.stride, kRank, n, p.n,
               [](int r) { return r / 16 * 16 + r % 4 / 2 * 8 + r % 16 / 4 * 2 + r % 2; });
  __syncthreads();
#pragma unroll 1
  for (int tile = 0; tile < all.tiles && m < all.M; ++tile, m += kBlockM) {
    if (tile > 0) load_s(m);
    T* out = static_cast<T*>(p.out.data) + (m + g) * p.out.stride + n + 8 * t;
#pragma unroll 2
    for (int group = 0; group < kGroups; ++group) {
      float d[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 v = *reinterpret_cast<const float2*>(bias + group * 32 + 8 * t + 2 * j);
        d[j][0] = d[j][2] = v.x;
        d[j][1] = d[j][3] = v.y;
      }
#pragma unroll
      for (int step = 0; step < kRank / 16; ++step)
        multiply<true>(d, s[step], shared + step * 16 * kStrideB + group * 32, kStrideB);
      if (n + group * 32 + 8 * t >= p.n) continue;
      if (m + g < all.M) store_neighbours(out + group * 32, d, 0);
      if (m + g + 8 < all.M) store_neighbours(out + group * 32 + 8 * p.out.stride, d, 1);
    }
  }
}

// A tile of out [32, 128] at a time: a warp makes 16 rows of the groups w and w + 2 of 32 columns,
// which have the same words. A stays, of all projections.
constexpr int kRowsDx = 32, kMostDx = 128;  // kMostDx: ranks of all projections
template <typename T, bool kDrop>
__global__ void __launch_bounds__(kThreads, 5)
    expand_dx_kernel(const __grid_constant__ ExpandDx call, int tiles) {
  wait_for_previous();
  LORAPAR_SHARED(T, shared);
  int C = call.projections * call.R, stride_ds = C + 8;
  T *shared_ds = shared + C * kStrideB, *end = shared_ds + kRowsDx * stride_ds;
  auto* words = reinterpret_cast<uint4*>(end) + threadIdx.x;  // [P, 2, kThreads]: a thread's own
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, w = warp % 2;
  int64_t n = static_cast<int64_t>(blockIdx.y) * kBlockN, last = call.M - 1;
  const T* ds = static_cast<const T*>(call.ds.data);
  T* out = static_cast<T*>(call.out.data);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    int64_t m = (static_cast<int64_t>(blockIdx.x) * tiles + tile) * kRowsDx;
    if (m >= call.M) return;
    int64_t row = m + warp / 2 * 16 + g;
    if (tile > 0) __syncthreads();
    for (int i = threadIdx.x; i < kRowsDx * (C / 8); i += kThreads) {
      int r = i / (C / 8), c = i % (C / 8) * 8;
      cp_async(shared_ds + r * stride_ds + c,
               ds + (m + r < last ? m + r : last) * call.ds.stride + c);
    }
    if constexpr (kDrop) {
      int64_t low = row < last ? row : last, high = row + 8 < last ? row + 8 : last;
      const int16_t* from = call.bits + word_of(n) + 32 * w + 8 * t;
      for (int i = 0; i < call.projections; ++i, from += call.M * call.words) {
        cp_async(words + 2 * i * kThreads, from + low * call.words);
        cp_async(words + (2 * i + 1) * kThreads, from + high * call.words);
      }
    }
    cp_async_commit();
    if (tile == 0)
      copy_columns(shared, static_cast<const T*>(call.a.data), call.a.stride, C, n, call.K,
                   [](int r) { return r; });
    cp_async_wait<0>();
    __syncthreads();

    float total[2][4][4] = {};
#pragma unroll 1
    for (int i = 0; i < call.projections; ++i) {
      const T* s = shared_ds + warp / 2 * 16 * stride_ds + i * call.R;
      const T* a = shared + i * call.R * kStrideB + w * 32;
      float part[2][4][4] = {};
#pragma unroll 1
      for (int r = 0; r < call.R; r += 16) {
        Fragment<T> f;
        load_fragment<false>(f, s + r, stride_ds);
#pragma unroll
        for (int group = 0; group < 2; ++group)
          multiply<true>(part[group], f, a + r * kStrideB + group * 64, kStrideB);
      }
      uint4 v[2] = {};
      if constexpr (kDrop) v[0] = words[2 * i * kThreads], v[1] = words[(2 * i + 1) * kThreads];
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        // 1.0f where the bit is set: its lowest bit is 23, so that the shift loses nothing.
        int bit = bit_of(n) + group;
        uint32_t mask = 1u << bit, one = 0x3F800000u >> bit;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t pairs[4] = {v[half].x, v[half].y, v[half].z, v[half].w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float low = 1.0f, high = 1.0f;
            if constexpr (kDrop) {
              low = __uint_as_float((pairs[j] & mask) * one);
              high = __uint_as_float((pairs[j] >> 16 & mask) * one);
            }
            float(&d)[4] = total[group][j];
            d[2 * half] = fmaf(part[group][j][2 * half], low, d[2 * half]);
            d[2 * half + 1] = fmaf(part[group][j][2 * half + 1], high, d[2 * half + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      int64_t column = n + (w + 2 * group) * 32 + 8 * t;
      if (column >= call.K) continue;
      T* to = out + row * call.out.stride + column;
      if (row <= last) store_neighbours(to, total[group], 0);
      if (row + 8 <= last) store_neighbours(to + 8 * call.out.stride, total[group], 1);
    }
  }
}

// ---- Any types and addresses. `total` goes through shared memory, so that there is one copy of the
// code for each type.
constexpr int kStrideOut = kBlockN + 4;

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    expand_any_kernel(const __grid_constant__ Expansion all) {
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
  auto* tile = reinterpret_cast<float*>(shared);
  __syncthreads();  // nobody reads S or b any longer
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<Eight<float>*>(tile + (warp * 16 + g + half * 8) * kStrideOut +
                                       group * 32 + 8 * t) = neighbours(total[group], half);
  }
  __syncthreads();
  bool aligned_base = aligned_16(p.base.data, p.base.stride, p.out_type);
  bool aligned_out = aligned_16(p.out.data, p.out.stride, p.out_type);
  bool aligned_bias = aligned_16(p.bias, 0, p.bias_type);
#pragma unroll 1
  for (int at = threadIdx.x; at < kBlockM * (kBlockN / 8); at += kThreads) {
    int64_t row = m + at / (kBlockN / 8), column = n + at % (kBlockN / 8) * 8;
    if (row >= all.M || column >= p.n) continue;
    auto v = *reinterpret_cast<const Eight<float>*>(tile + (row - m) * kStrideOut + column - n);
    if (p.bias != nullptr) add(v, load_8(p.bias, p.bias_type, column, p.n, aligned_bias));
    if (p.base.data != nullptr)
      add(v, load_8(row_of(p.base, p.out_type, row), p.out_type, column, p.n, aligned_base));
    void* out = const_cast<void*>(row_of({p.out.data, p.out.stride}, p.out_type, row));
    store_8(out, p.out_type, column, p.n, aligned_out, v);
  }
}

template <typename T, bool kDrop>
__global__ void __launch_bounds__(kThreads, 3)
    expand_dx_any_kernel(const __grid_constant__ ExpandDx call) {
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

// Tiles of `rows` rows for a block: as many as leave each multiprocessor `blocks` blocks, up to 4.
int tiles_of(int64_t M, int rows, int64_t columns, int blocks) {
  int tiles = 1;
  while (tiles < 4 && divide_up<int64_t>(M, 2 * tiles * rows) * columns >= blocks * multiprocessors())
    tiles *= 2;
  return tiles;
}

template <typename T>
bool small(const Expansion& all, Type type) {
  if (all.R != 16 && all.R != 32 && all.R != 64 && all.R != 128) return false;
  for (int i = 0; i < all.projections; ++i) {
    const ExpandProjection& p = all.of[i];
    if (p.s.data == nullptr || p.base.data != nullptr || p.out_type != type || p.n % 8 != 0 ||
        !aligned_16<T>(p.s.data, p.s.stride) || !aligned_16<T>(p.b.data, p.b.stride) ||
        !aligned_16<T>(p.out.data, p.out.stride))
      return false;
  }
  return true;
}

template <typename T>
bool small(const ExpandDx& call) {
  return call.projections * call.R <= kMostDx && call.projections <= kMaxProjections &&
         call.K % 8 == 0 && aligned_16<T>(call.ds.data, call.ds.stride) &&
         aligned_16<T>(call.a.data, call.a.stride) &&
         aligned_16<T>(call.out.data, call.out.stride);
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
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    auto rows = [&](int each) { return static_cast<unsigned>(divide_up<int64_t>(M, each)); };
    auto columns = static_cast<unsigned>(blocks);
    if constexpr (sizeof(T) == 2) {
      if (small<T>(all, type)) {
        all.tiles = tiles_of(M, kBlockM, blocks, 8);
        auto* kernel = R == 16   ? expand_kernel<T, 16>
                       : R == 32 ? expand_kernel<T, 32>
                       : R == 64 ? expand_kernel<T, 64>
                                 : expand_kernel<T, 128>;
        return launch(kernel, dim3(rows(all.tiles * kBlockM), columns), kThreads,
                      R * kStrideB * sizeof(T) + kBlockN * sizeof(float), stream, all);
      }
    }
    size_t out = kBlockM * kStrideOut * sizeof(float), inputs = shared_bytes<T>(R);
    launch(expand_any_kernel<T>, dim3(rows(kBlockM), columns), kThreads,
           inputs > out ? inputs : out, stream, all);
  });
}

void expand_dx(const ExpandDx& call, Type type, cudaStream_t stream) {
  if (call.M == 0 || call.K == 0) return;
  auto columns = static_cast<unsigned>(divide_up<int64_t>(call.K, kBlockN));
  auto rows = [&](int each) { return static_cast<unsigned>(divide_up<int64_t>(call.M, each)); };
  bool drop = call.bits != nullptr;
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (small<T>(call)) {
        int C = call.projections * call.R, tiles = tiles_of(call.M, kRowsDx, columns, 6);
        size_t shared = (C * kStrideB + kRowsDx * (C + 8)) * sizeof(T);
        if (drop) shared += call.projections * 2 * kThreads * 16;
        return launch(drop ? expand_dx_kernel<T, true> : expand_dx_kernel<T, false>,
                      dim3(rows(tiles * kRowsDx), columns), kThreads, shared, stream, call, tiles);
      }
    }
    launch(drop ? expand_dx_any_kernel<T, true> : expand_dx_any_kernel<T, false>,
           dim3(rows(kBlockM), columns), kThreads, shared_bytes<T>(call.R), stream, call);
  });
}

}  // namespace lorapar

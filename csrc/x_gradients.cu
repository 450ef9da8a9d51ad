// dA = dS^T (keep * x) of all projections of one x, from one read of x.
//
// Computes   partial[s, c, k] = sum of dS_i[m, c] keep_i(m, k) x[m, k] over the m of split s
//            dA_i = da.scale * sum over s, see finish
//
// Shapes     x [M, K]   dS_i [M, R]   bits_i [M, words]   dA_i [r, K]
// Cost       one read of x for kMostParts parts (a part: up to 64 columns of one dS); of dS for 64
//            columns of x. One launch where a block has all rows; else `finish` too, and partial
//            sums of 4 splits P R K bytes, each way.
//
// A block does 64 columns of x, in four runs of 16. Without dropout the runs are neighbours. With
// it they stand 64 apart, so that all four have the same 16 words: 32 bytes of bits a row, a whole
// sector, where 64 neighbours would take 128.
#include "gradients.h"

namespace lorapar {
namespace {

constexpr int kThreads = 256;
constexpr int kRuns = 4, kRun = 16, kColumns = kRuns * kRun;  // of x
constexpr int kRowGroups = kThreads / 32 / kRuns;             // of warps
constexpr int kMostRanks = 64, kMostParts = 3;
constexpr int64_t kRowsAtOnce = 1024;  // up to here `finish` costs more than it saves
constexpr int64_t kLeastRows = 512;    // of a split, from there on

struct XPart {  // kRanks columns of one projection
  Matrix ds;
  const int16_t* bits;
  bool aligned_ds, aligned_bits;
  int first_rank;
  float* partial;     // [splits, R, K] of its projection; null: written at once
  Gradient gradient;
};

constexpr int kPartsOfLaunch = 24;  // kernels take 4 KB of arguments

struct XCall {
  XPart part[kPartsOfLaunch];
  int parts = 0;
  Matrix x;
  bool aligned_x, spread;  // spread: runs stand 64 apart
  int64_t words, M, K;
  int R;
  Splits splits;
};
static_assert(sizeof(XCall) <= 4000);

// Shared memory: stages of x, dS and bits, and for fp32 what each warp kept of x; at the end dA.
template <typename T, int kRanks, int kParts>
struct XShared {
  static constexpr int kRows = 128 / sizeof(T);  // 64 or 32
  static constexpr int kStride = kColumns + 8, kStrideDs = kParts * kRanks + 8;
  static constexpr int kStrideWords = kRun + 8;  // no bank conflicts
  static constexpr int kX = kRows * kStride, kDs = kRows * kStrideDs;
  static constexpr int kWords = kRows * kStrideWords;
  static constexpr int kStage = (kX + kDs) * sizeof(T) + kParts * kWords * sizeof(int16_t);
  static constexpr int kKept = sizeof(T) == 4 ? kThreads / 32 * 256 * sizeof(T) : 0;
  static constexpr int kFit = (static_cast<int>(kMostShared) - kKept) / kStage;
  static constexpr int kStages = kFit < 4 ? kFit : 4;
  static constexpr int kStrideDa = kColumns + 4;
  static constexpr int kDa = sizeof(float) * kParts * kRanks * kStrideDa;
  static constexpr int kAll = kStages * kStage + kKept;
  static constexpr size_t kBytes = kAll > kDa ? kAll : kDa;
  static_assert(kStages >= 2 && kBytes <= kMostShared);
};

// Where run `run` of a block begins in x.
__device__ __forceinline__ int64_t first_of(int run, bool spread) {
  int64_t block = blockIdx.x;
  if (!spread) return block * kColumns + run * kRun;
  return block / 16 * 1024 + (block / 4 % 4 * kRuns + run) * 64 + block % 4 * kRun;
}

// keep * x of a tile x [16 rows, 16 columns], as the fragment of its transpose.
template <typename T>
__device__ __forceinline__ Fragment<T> kept(const Fragment<T>& x, const int16_t* words, int stride,
                                            int bit, T*) {
  Fragment<T> word, y;  // words lie as x does, so that the same load puts them beside its elements
  load_fragment<true>(word, reinterpret_cast<const T*>(words), stride);
#pragma unroll
  for (int i = 0; i < 4; ++i) y.r[i] = times_keep(x.r[i], keep_pair(word.r[i], bit), T());
  return y;
}
__device__ __forceinline__ Fragment<float> kept(const Fragment<float>& x, const int16_t* words,
                                                int stride, int bit, float* scratch) {
  __syncwarp();  // all are done with what the scratch held
  for (int e = threadIdx.x % 32; e < 256; e += 32) {
    int m = e / 16, k = e % 16;
    scratch[e] = x.a[m * x.stride_k + k] * static_cast<float>(words[m * stride + k] >> bit & 1);
  }
  __syncwarp();
  return {scratch, 1, 16};
}

template <typename T, int kRanks, int kParts>
__global__ void __launch_bounds__(kThreads, kRanks* kParts <= 96 ? 2 : 1)
    x_gradients_kernel(const __grid_constant__ XCall call) {
  using Shared = XShared<T, kRanks, kParts>;
  constexpr int kRows = Shared::kRows, kStages = Shared::kStages, kStride = Shared::kStride;
  constexpr int kStrideDs = Shared::kStrideDs, kStrideWords = Shared::kStrideWords;
  constexpr int kElements = 16 / sizeof(T);
  LORAPAR_SHARED(char, shared);
  wait_for_previous();
  if (first_of(0, call.spread) >= call.K) return;  // the whole block
  int first_part = static_cast<int>(blockIdx.z) * kParts;
  int parts = call.parts - first_part < kParts ? call.parts - first_part : kParts;
  const XPart* part = call.part + first_part;
  int64_t start, stop;
  rows_of(call.splits, blockIdx.y, call.M, start, stop);
  int tiles = stop > start ? static_cast<int>((stop - start + kRows - 1) / kRows) : 0;
  int64_t first_word = word_of(first_of(0, call.spread));

  auto copy = [&](int tile) {
    if (tile < tiles) {
      T* x = reinterpret_cast<T*>(shared + tile % kStages * Shared::kStage);
      T* ds = x + Shared::kX;
      auto* words = reinterpret_cast<__half*>(ds + Shared::kDs);  // 16 bits of any kind
      int64_t m0 = start + int64_t{tile} * kRows, rows = stop - m0;
      const T* from = static_cast<const T*>(call.x.data);
#pragma unroll
      for (int e = threadIdx.x * kElements; e < kRows * kColumns; e += kThreads * kElements) {
        int m = e / kColumns, column = e % kColumns;
        int64_t k = first_of(column / kRun, call.spread) + column % kRun;
        bool inside = m < rows && k < call.K;
        copy_16(x + m * kStride + column, inside ? from + (m0 + m) * call.x.stride + k : from,
                inside ? call.K - k : 0, call.aligned_x);
      }
#pragma unroll
      for (int i = 0; i < kParts; ++i)
        if (i < parts) {
          const Matrix& of = part[i].ds;
          copy_tile<kRows, kRanks, kThreads>(
              ds + i * kRanks, kStrideDs,
              static_cast<const T*>(of.data) + m0 * of.stride + part[i].first_rank, of.stride, rows,
              kRanks, part[i].aligned_ds);
          if (part[i].bits)
            copy_tile<kRows, kRun, kThreads>(
                words + i * Shared::kWords, kStrideWords,
                reinterpret_cast<const __half*>(part[i].bits) + m0 * call.words + first_word,
                call.words, rows, kRun, part[i].aligned_bits);
        }
    }
    cp_async_commit();
  };

  int warp = threadIdx.x / 32, run = warp % kRuns, group = warp / kRuns;
  int bit = bit_of(first_of(run, call.spread));
  T* scratch = reinterpret_cast<T*>(shared + kStages * Shared::kStage) + warp * 256;
  float da[kParts][kRanks / 8][4] = {};  // [16 columns of x, kRanks] each
  for (int tile = 0; tile < kStages - 1; ++tile) copy(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    copy(tile + kStages - 1);
    const T* x = reinterpret_cast<const T*>(shared + tile % kStages * Shared::kStage);
    const T* ds = x + Shared::kX;
    auto* words = reinterpret_cast<const int16_t*>(ds + Shared::kDs);
#pragma unroll
    for (int step = 0; step < kRows / kRowGroups; step += 16) {
      int m = group * (kRows / kRowGroups) + step;
      Fragment<T> all;
      load_fragment<true>(all, x + m * kStride + run * kRun, kStride);
#pragma unroll
      for (int i = 0; i < kParts; ++i)
        if (i < parts) {
          Fragment<T> fragment = all;
          if (part[i].bits)
            fragment = kept(all, words + i * Shared::kWords + m * kStrideWords, kStrideWords, bit,
                            scratch);
          multiply<true>(da[i], fragment, ds + m * kStrideDs + i * kRanks, kStrideDs);
        }
    }
  }
  cp_async_wait<0>();

  // dA [kParts * kRanks, columns] in shared memory: the groups of rows add to it in turn.
  auto* total = reinterpret_cast<float*>(shared);
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int turn = 0; turn < kRowGroups; ++turn) {
    __syncthreads();
    if (turn == group) {
#pragma unroll
      for (int i = 0; i < kParts; ++i)
#pragma unroll
        for (int r = 0; r < kRanks / 8; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int c = i * kRanks + r * 8 + 2 * t + e % 2, column = run * kRun + e / 2 * 8 + g;
            float& at = total[c * Shared::kStrideDa + column];
            at = turn == 0 ? da[i][r][e] : at + da[i][r][e];
          }
    }
  }
  __syncthreads();
  for (int i = 0; i < parts; ++i) {
    const Gradient& gradient = part[i].gradient;
    const float* of = total + i * kRanks * Shared::kStrideDa;
    float* partial = part[i].partial;
    int first_rank = part[i].first_rank, rows = partial ? kRanks : gradient.rank;
    for (int e = threadIdx.x; e < rows * kColumns; e += kThreads) {
      int j = e / kColumns, column = e % kColumns;
      int64_t k = first_of(column / kRun, call.spread) + column % kRun;
      if (k >= call.K) continue;
      if (partial) {
        partial[(int64_t{blockIdx.y} * call.R + first_rank + j) * call.K + k] =
            of[j * Shared::kStrideDa + column];
        continue;
      }
      int packed = packed_column(gradient, j), c = packed - first_rank;
      if (packed < 0 ? first_rank > 0 : c < 0 || c >= kRanks) continue;  // another block's
      int64_t at = j * call.K + k;
      bool frozen = packed < 0 || !trains(gradient, at);
      store(gradient.out, gradient.type, at,
            frozen ? 0.0f : gradient.scale * of[c * Shared::kStrideDa + column]);
    }
  }
}

template <typename T, int kRanks>
void launch_parts(const XCall& call, int64_t blocks, int parts, cudaStream_t stream) {
  dim3 grid(blocks, call.splits.count, divide_up(call.parts, parts));
  if (parts == 1) {
    launch(x_gradients_kernel<T, kRanks, 1>, grid, kThreads, XShared<T, kRanks, 1>::kBytes, stream,
           call);
  } else if (parts == 2) {
    launch(x_gradients_kernel<T, kRanks, 2>, grid, kThreads, XShared<T, kRanks, 2>::kBytes, stream,
           call);
  } else if constexpr (sizeof(T) == 2) {
    launch(x_gradients_kernel<T, kRanks, 3>, grid, kThreads, XShared<T, kRanks, 3>::kBytes, stream,
           call);
  }
}

// ---- What goes where.
struct XPlan {
  Splits splits;
  bool spread = false, partial;
  bool computed[kMaxProjections];
  int64_t at[kMaxProjections];  // partial sums in the workspace
  int64_t blocks, floats = 0;
  int parts = 0, parts_of_block = 1;
};

XPlan plan(const XProjection* of, int projections, int64_t M, int64_t K, int R, Type type,
           Examples examples) {
  XPlan p;
  for (int i = 0; i < projections; ++i) {
    p.computed[i] = wanted(of[i].da) && of[i].da.trained > 0 && of[i].ds.data;
    if (!p.computed[i]) continue;
    p.spread |= of[i].bits != nullptr;
    p.parts += divide_up(R, kMostRanks);
  }
  p.blocks = p.spread ? divide_up(K, int64_t{1024}) * 16 : divide_up(K, int64_t{kColumns});
  // As few launches of blocks as kMostParts allow, of equally many parts each.
  int most = type == Type::f32 ? 2 : kMostParts;
  p.parts_of_block = divide_up(p.parts, divide_up(p.parts < 1 ? 1 : p.parts, most));
  int groups = p.parts < 1 ? 1 : divide_up(p.parts, p.parts_of_block);
  p.splits = split_rows(M, 64, p.blocks * groups, M <= kRowsAtOnce ? 1 : M / kLeastRows);
  if (examples.bounds) {
    p.splits.count = examples.count;
    p.splits.bounds = examples.bounds;
  }
  p.partial = p.splits.count != 1 || examples.bounds;
  for (int i = 0; i < projections; ++i) {
    p.at[i] = p.floats;
    if (p.computed[i] && p.partial) p.floats += p.splits.count * R * K;
  }
  return p;
}

}  // namespace

size_t x_gradients_workspace(const XProjection* of, int projections, int64_t M, int64_t K, int R,
                             Type type, Examples examples) {
  return plan(of, projections, M, K, R, type, examples).floats * sizeof(float);
}

void x_gradients(const XProjection* of, int projections, Matrix x, int64_t words, int64_t M,
                 int64_t K, int R, Type type, Examples examples, void* workspace,
                 cudaStream_t stream) {
  XPlan p = plan(of, projections, M, K, R, type, examples);
  auto* partial = static_cast<float*>(workspace);
  XCall call;
  call.x = x;
  call.spread = p.spread;
  call.words = words;
  call.M = M;
  call.K = K;
  call.R = R;
  call.splits = p.splits;
  int ranks = R < kMostRanks ? R : kMostRanks;
  auto send = [&] {
    if (call.parts > 0 && p.blocks > 0 && p.splits.count > 0)
      by_type(type, [&](auto zero) {
        using T = decltype(zero);
        call.aligned_x = aligned_16<T>(x.data, x.stride);
        if (ranks == 16) {
          launch_parts<T, 16>(call, p.blocks, p.parts_of_block, stream);
        } else if (ranks == 32) {
          launch_parts<T, 32>(call, p.blocks, p.parts_of_block, stream);
        } else {
          launch_parts<T, 64>(call, p.blocks, p.parts_of_block, stream);
        }
      });
    call.parts = 0;
  };
  FinishCall rest;
  for (int i = 0; i < projections; ++i) {
    const XProjection& one = of[i];
    for (int rank = 0; p.computed[i] && rank < R; rank += ranks) {
      XPart& part = call.part[call.parts++];
      part.ds = one.ds;
      part.bits = one.bits;
      part.aligned_ds = type == Type::f32 ? aligned_16<float>(one.ds.data, one.ds.stride)
                                          : aligned_16<__half>(one.ds.data, one.ds.stride);
      part.aligned_bits = aligned_16<int16_t>(one.bits, words);
      part.first_rank = rank;
      part.partial = p.partial ? partial + p.at[i] : nullptr;
      part.gradient = one.da;
      if (call.parts == kPartsOfLaunch) send();
    }
    if (wanted(one.da) && (p.partial || !p.computed[i]))
      rest.add_gradient(one.da, partial + p.at[i], p.computed[i] ? p.splits.count : 0, R, K, true);
  }
  send();
  finish(rest, stream);
}

}  // namespace lorapar

// S = drop(x) A^T for all projections of one x.
//
// Computes    s[m, c] = scale · Σ_k x[m, k] keep_i(m, k) a[c, k]     i = c / R
//                       0 where valid[c] is 0
//
// Shapes      x [M, K]   a [C, K], C = P·R   s [M, C]   bits int16 [P, M, words] (dropout.py)
// Cost        one launch, two where few blocks would read long rows; one read of x from memory, of
//             x and a from L2 for every block. Dropout adds one Philox call for 8 elements.
//
// A block makes a tile of s [kRows, kColumns]; its warps divide K, each by itself: there is no
// barrier before their sums meet. The sum over k may run in any order, so that lane 4 g + t takes
// the columns 8t ... 8t+7 of 32, in 16 bytes, for two products of 16 columns:
//     elements 4s, 4s+1 (of the 8) stand where m16n8k16 has columns 2t, 2t+1      s = 0, 1
//              4s+2, 4s+3                                     2t+8, 2t+9
// in x and in a alike. What a lane multiplies it has copied itself, and the words of its columns'
// bits are 16 bytes too. fp32 has no such product: a lane sums over its own columns for every c.
#include <cmath>

#include "tile.h"

namespace lorapar {
namespace {

struct Arguments {
  Shrink call;
  float* partial;  // [splits, M, C], or null: one split
};

// How the warps of all splits divide K. A step is 32 columns.
//   without dropout   step after step
//   with dropout      units of 16 steps which share 32 words: 1024 q + 32 h + 64 j, j = 0 ... 15
template <bool kDrop>
__device__ __forceinline__ int column_of(int step, int warp, int warps) {
  if constexpr (!kDrop) return (step * warps + warp) * 32;
  int unit = step / 16 * warps + warp;
  return unit / 2 * 1024 + unit % 2 * 32 + step % 16 * 64;
}
template <bool kDrop>
__device__ __forceinline__ int steps_of(int64_t K, int warp, int warps) {
  int all = static_cast<int>(kDrop ? divide_up<int64_t>(K, 1024) * 2 : divide_up<int64_t>(K, 32));
  int own = all > warp ? (all - warp - 1) / warps + 1 : 0;
  return kDrop ? own * 16 : own;
}

// Of a lane: the words of rows g and g + 8 for its eight columns of a unit.
struct Words {
  uint32_t pair[2][4];
};

__device__ __forceinline__ void draw(Words& words, const Shrink& call, uint64_t seed, int64_t m,
                                     int projection, int unit, bool store) {
  int t = threadIdx.x % 4;
  uint32_t column = unit / 2 * 128 + unit % 2 * 32 + 8 * t;  // of the first 512 of 1024
  bool second = static_cast<int64_t>(unit / 2) * 1024 + 512 < call.K;
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t row = static_cast<uint32_t>(m) + 8 * half;
      uint32_t word = draw_bits(seed, column + i, row, projection, call.drop_below);
      if (second) word |= draw_bits(seed, column + i + 64, row, projection, call.drop_below) << 8;
      // Into the last half, all others one half down: which register is never a variable.
      uint32_t(&pair)[4] = words.pair[half];
#pragma unroll
      for (int j = 0; j < 3; ++j) pair[j] = pair[j] >> 16 | pair[j + 1] << 16;
      pair[3] = pair[3] >> 16 | word << 16;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!store || m + 8 * half >= call.M) continue;
    int64_t row = projection * call.M + m + 8 * half;
    int64_t word = unit / 2 * 64 + unit % 2 * 32 + 8 * t;
    const uint32_t(&w)[4] = words.pair[half];
    *reinterpret_cast<uint4*>(call.bits + row * call.words + word) = {w[0], w[1], w[2], w[3]};
  }
}

// A lane's eight elements of a chunk of one step: 16 bytes of each lane next to each other.
template <typename T>
__device__ __forceinline__ Eight<T> chunk_at(const uint4* stage, int chunk, int lane) {
  constexpr int kPieces = sizeof(T) / 2;
  Eight<T> out;
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    reinterpret_cast<uint4*>(&out)[i] = stage[(chunk * kPieces + i) * 32 + lane];
  return out;
}

// The sums of a lane. add: those of one step, x's chunks (row 8 i + g) before a's (column 8 i + g).
template <typename T, int kRows, int kColumns>
struct Sums {
  float d[kRows / 16][kColumns / 8][4] = {};

  template <bool kDrop>
  __device__ __forceinline__ void add(const uint4* stage, const Words* words, int bit) {
    int lane = threadIdx.x % 32;
    uint4 x[kRows / 8];
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      x[i] = stage[i * 32 + lane];
      if constexpr (kDrop) {
        const uint32_t(&w)[4] = words[i / 2].pair[i % 2];
        x[i].x = times_keep(x[i].x, keep_pair(w[0], bit), T());
        x[i].y = times_keep(x[i].y, keep_pair(w[1], bit), T());
        x[i].z = times_keep(x[i].z, keep_pair(w[2], bit), T());
        x[i].w = times_keep(x[i].w, keep_pair(w[3], bit), T());
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      uint4 a = stage[(kRows / 8 + j) * 32 + lane];
      uint32_t first_a[2] = {a.x, a.y}, second_a[2] = {a.z, a.w};
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        const uint4 &low = x[2 * i], &high = x[2 * i + 1];
        uint32_t first_x[4] = {low.x, high.x, low.y, high.y};
        uint32_t second_x[4] = {low.z, high.z, low.w, high.w};
        mma(d[i][j], first_x, first_a, T());
        mma(d[i][j], second_x, second_a, T());
      }
    }
  }
  __device__ __forceinline__ void finish() {}
};

template <int kRows, int kColumns>
struct Sums<float, kRows, kColumns> {
  static_assert(kRows == 16, "two rows a lane");
  float sum[2][kColumns] = {};
  float d[1][kColumns / 8][4];

  template <bool kDrop>
  __device__ __forceinline__ void add(const uint4* stage, const Words* words, int bit) {
    int lane = threadIdx.x % 32, t = lane % 4;
    Eight<float> x[2] = {chunk_at<float>(stage, 0, lane), chunk_at<float>(stage, 1, lane)};
    if constexpr (kDrop) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          drop_pair(x[i].v[2 * e], x[i].v[2 * e + 1], words[0].pair[i][e], bit);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      Eight<float> a = chunk_at<float>(stage, 2 + c / 8, c % 8 * 4 + t);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float step = 0.0f;  // each step apart, so that rounding grows slowly
#pragma unroll
        for (int e = 0; e < 8; ++e) step = fmaf(x[i].v[e], a.v[e], step);
        sum[i][c] += step;
      }
    }
  }
  // Of the four lanes of a row, to the places of m16n8k16.
  __device__ __forceinline__ void finish() {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[i][c] += __shfl_xor_sync(0xffffffffu, sum[i][c], 1);
        sum[i][c] += __shfl_xor_sync(0xffffffffu, sum[i][c], 2);
        if (c % 8 / 2 == t) d[0][c / 8][2 * i + c % 2] = sum[i][c];
      }
    }
  }
};

constexpr int kMostStages = 4;
template <typename T, int kRows, int kColumns>
constexpr int kStageBytes = (kRows + kColumns) * 32 * static_cast<int>(sizeof(T));  // of a warp
template <typename T, int kRows, int kColumns, int kWarps>
constexpr int kFitting =
    static_cast<int>(kMostShared) / kWarps / kStageBytes<T, kRows, kColumns>;
template <typename T, int kRows, int kColumns, int kWarps>
constexpr int kStages = kFitting<T, kRows, kColumns, kWarps> < kMostStages
                            ? kFitting<T, kRows, kColumns, kWarps>
                            : kMostStages;

template <typename T, int kRows, int kColumns, int kWarps, bool kDrop>
__global__ void __launch_bounds__(32 * kWarps, kRows == 16 ? 2 : 1)
    shrink_kernel(const Arguments arguments) {
  wait_for_previous();
  LORAPAR_SHARED(uint4, shared);
  constexpr int kChunks = (kRows + kColumns) / 8, kPieces = sizeof(T) / 2;
  constexpr int kDepth = kStages<T, kRows, kColumns, kWarps>;
  static_assert(kDepth >= 2, "one step is copied while another is multiplied");
  const Shrink& call = arguments.call;
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  int64_t m = static_cast<int64_t>(blockIdx.x) * kRows;
  int first_c = blockIdx.y * kColumns, projection = first_c / call.R;
  int worker = blockIdx.z * kWarps + warp, workers = gridDim.z * kWarps;
  int steps = steps_of<kDrop>(call.K, worker, workers);
  uint4* own = shared + warp * kDepth * kChunks * kPieces * 32;

  const T* x = static_cast<const T*>(call.x.data) + (m + g) * call.x.stride;
  const T* a = static_cast<const T*>(call.a.data) + (first_c + g) * call.a.stride;
  bool aligned_x = aligned_16<T>(call.x.data, call.x.stride);
  bool aligned_a = aligned_16<T>(call.a.data, call.a.stride);

  // Eight elements of a row of `matrix`, zeros past K and where not `inside`.
  auto copy_row = [&](uint4* to, const Matrix& matrix, const T* row, int64_t k, bool inside,
                      bool aligned) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      int64_t at = k + i * (8 / kPieces), count = inside ? call.K - at : 0;
      copy_16(reinterpret_cast<T*>(to + i * 32 + lane),
              count > 0 ? row + at : static_cast<const T*>(matrix.data), count, aligned);
    }
  };
  auto copy_step = [&](int step) {
    if (step < steps) {
      int64_t k = column_of<kDrop>(step, worker, workers) + 8 * t;
      uint4* to = own + step % kDepth * (kChunks * kPieces * 32);
      if (aligned_x) {
#pragma unroll
        for (int i = 0; i < kRows / 8; ++i)
          copy_row(to + i * kPieces * 32, call.x, x + 8 * i * call.x.stride, k,
                   m + g + 8 * i < call.M, true);
      } else {
#pragma unroll 1
        for (int i = 0; i < kRows / 8; ++i)
          copy_row(to + i * kPieces * 32, call.x, x + 8 * i * call.x.stride, k,
                   m + g + 8 * i < call.M, false);
      }
      to += kRows / 8 * kPieces * 32;
      if (aligned_a) {
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i)
          copy_row(to + i * kPieces * 32, call.a, a + 8 * i * call.a.stride, k,
                   first_c + g + 8 * i < call.C, true);
      } else {
#pragma unroll 1
        for (int i = 0; i < kColumns / 8; ++i)
          copy_row(to + i * kPieces * 32, call.a, a + 8 * i * call.a.stride, k,
                   first_c + g + 8 * i < call.C, false);
      }
    }
    cp_async_commit();
  };

  uint64_t seed = kDrop ? static_cast<uint64_t>(*call.seed) : 0;
  Words words[kRows / 16] = {};
  Sums<T, kRows, kColumns> sums;
#pragma unroll
  for (int step = 0; step < kDepth - 1; ++step) copy_step(step);
  for (int step = 0; step < steps; ++step) {
    if (kDrop && step % 16 == 0) {
      int unit = step / 16 * workers + worker;
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
        draw(words[i], call, seed, m + g + 16 * i, projection, unit, first_c % call.R == 0);
    }
    cp_async_wait<kDepth - 2>();
    __syncwarp();  // fp32 multiplies what other lanes copied
    copy_step(step + kDepth - 1);
    sums.template add<kDrop>(own + step % kDepth * (kChunks * kPieces * 32), words, step % 16);
  }
  sums.finish();

  // The sums of the warps meet, in their order.
  constexpr int kStride = kColumns + 8;
  auto* meet = reinterpret_cast<float*>(shared);
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      float* to = meet + (warp * kRows + 16 * i + g) * kStride + 8 * j + 2 * t;
      *reinterpret_cast<float2*>(to) = {sums.d[i][j][0], sums.d[i][j][1]};
      *reinterpret_cast<float2*>(to + 8 * kStride) = {sums.d[i][j][2], sums.d[i][j][3]};
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns; i += 32 * kWarps) {
    int row = i / kColumns, c = first_c + i % kColumns;
    if (m + row >= call.M || c >= call.C) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += meet[(w * kRows + row) * kStride + i % kColumns];
    if (arguments.partial != nullptr) {
      arguments.partial[(blockIdx.z * call.M + m + row) * call.C + c] = sum;
    } else {
      static_cast<T*>(call.s.data)[(m + row) * call.s.stride + c] =
          from_float<T>(call.valid[c] ? sum * call.scale : 0.0f);
    }
  }
}

// s from the sums of all splits.
constexpr int kSumThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const Arguments arguments, int splits) {
  wait_for_previous();
  const Shrink& call = arguments.call;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * 4;
  int64_t m = i / call.C, c = i % call.C;
  if (m >= call.M) return;
  float4 sum = {};
  for (int split = 0; split < splits; ++split) {
    float4 v = *reinterpret_cast<const float4*>(arguments.partial + split * call.M * call.C + i);
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
  }
  T* out = static_cast<T*>(call.s.data) + m * call.s.stride + c;
  out[0] = from_float<T>(call.valid[c] ? sum.x * call.scale : 0.0f);
  out[1] = from_float<T>(call.valid[c + 1] ? sum.y * call.scale : 0.0f);
  out[2] = from_float<T>(call.valid[c + 2] ? sum.z * call.scale : 0.0f);
  out[3] = from_float<T>(call.valid[c + 3] ? sum.w * call.scale : 0.0f);
}

// ---- The host's choice: tile and splits of least time, in clocks, by what each block reads.
struct Choice {
  int rows, columns, warps, splits;
};

Choice choose(const Shrink& call, Type type) {
  constexpr double kFromL2 = 64, kFromL2All = 3300;  // bytes a clock: of one SM, of all
  constexpr double kPhilox = 0.1;                    // clocks of an SM an element
  constexpr double kLaunch = 4500;                   // of the second kernel
  bool drop = call.seed != nullptr, f32 = type == Type::f32;
  int rows = drop ? 48 : 64;  // of 64 columns: with 64 words of bits would spill registers
  const Choice tiles[] = {{16, 16, 8, 1}, {16, 32, 8, 1}, {16, 64, 8, 1},
                          {64, 16, 4, 1}, {64, 32, 4, 1}, {rows, 64, 4, 1}};
  // What the warps divide; without dropout a warp should have several.
  int64_t units = drop ? divide_up<int64_t>(call.K, 1024) * 2 : divide_up<int64_t>(call.K, 64);
  double sms = multiprocessors(), least = 0;
  Choice best = {};
  for (Choice tile : tiles) {
    if (f32 && (tile.rows > 16 || tile.columns > 32)) continue;
    if (drop && tile.columns > call.R) continue;  // one projection a tile
    double blocks = static_cast<double>(divide_up<int64_t>(call.M, tile.rows)) *
                    divide_up(call.C, tile.columns);
    for (int splits = 1; splits <= 16; splits *= 2) {
      if (splits > 1 && splits * tile.warps > units) break;
      double bytes = (tile.rows + tile.columns) * static_cast<double>(call.K) * (f32 ? 4 : 2);
      double philox = drop ? kPhilox * tile.rows * call.K : 0;
      double turns = std::ceil(blocks * splits / sms);
      double longest = static_cast<double>(divide_up<int64_t>(units, splits * tile.warps));
      double share = units == 0 ? 0 : longest * tile.warps / units;  // of K, of a block
      double own = turns * (bytes / kFromL2 + philox) * share, all = blocks * bytes / kFromL2All;
      double clocks = own > all ? own : all;
      if (splits > 1)  // sums written, read
        clocks += kLaunch + 8.0 * splits * call.M * call.C / kFromL2All;
      if (best.rows == 0 || clocks < least) {
        least = clocks;
        best = tile;
        best.splits = splits;
      }
    }
  }
  return best;
}

template <typename T, int kRows, int kColumns, int kWarps, bool kDrop>
void launch_tile(const Arguments& arguments, int splits, cudaStream_t stream) {
  const Shrink& call = arguments.call;
  constexpr int kCopies = kStages<T, kRows, kColumns, kWarps> * kWarps *
                          kStageBytes<T, kRows, kColumns>;
  constexpr int kMeet = kWarps * kRows * (kColumns + 8) * static_cast<int>(sizeof(float));
  dim3 grid(static_cast<unsigned>(divide_up<int64_t>(call.M, kRows)),
            divide_up(call.C, kColumns), splits);
  launch(shrink_kernel<T, kRows, kColumns, kWarps, kDrop>, grid, 32 * kWarps,
         kCopies > kMeet ? kCopies : kMeet, stream, arguments);
}

template <typename T, bool kDrop>
void launch_choice(const Choice& choice, const Arguments& arguments, cudaStream_t stream) {
  int splits = choice.splits;
  if (choice.rows == 16) {
    if (choice.columns == 16) return launch_tile<T, 16, 16, 8, kDrop>(arguments, splits, stream);
    if (choice.columns == 32) return launch_tile<T, 16, 32, 8, kDrop>(arguments, splits, stream);
  }
  if constexpr (sizeof(T) == 2) {
    if (choice.rows == 16) return launch_tile<T, 16, 64, 8, kDrop>(arguments, splits, stream);
    if (choice.columns == 16) return launch_tile<T, 64, 16, 4, kDrop>(arguments, splits, stream);
    if (choice.columns == 32) return launch_tile<T, 64, 32, 4, kDrop>(arguments, splits, stream);
    launch_tile<T, kDrop ? 48 : 64, 64, 4, kDrop>(arguments, splits, stream);
  }
}

}  // namespace

size_t shrink_workspace(const Shrink& call, Type type) {
  int splits = choose(call, type).splits;
  return splits == 1 ? 0 : sizeof(float) * splits * call.M * call.C;
}

void shrink(const Shrink& call, Type type, void* workspace, cudaStream_t stream) {
  if (call.M == 0 || call.C == 0) return;
  Choice choice = choose(call, type);
  Arguments arguments = {call, choice.splits == 1 ? nullptr : static_cast<float*>(workspace)};
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (call.seed != nullptr) {
      launch_choice<T, true>(choice, arguments, stream);
    } else {
      launch_choice<T, false>(choice, arguments, stream);
    }
    if (choice.splits > 1) {
      auto blocks = divide_up<int64_t>(call.M * call.C, 4 * kSumThreads);
      launch(sum_kernel<T>, dim3(static_cast<unsigned>(blocks)), kSumThreads, 0, stream, arguments,
             choice.splits);
    }
  });
}

}  // namespace lorapar

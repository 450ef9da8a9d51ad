// S = drop(x) A^T for all projections of one x.
//
// Computes    s[m, c] = scale · Σ_k x[m, k] keep_i(m, k) a[c, k]     i = c / R
//                       0 where valid[c] is 0
//
// Shapes      x [M, K]   a [C, K], C = P·R   s [M, C]   bits int16 [P, M, words] (dropout.py)
// Cost        one launch; one read of x from memory, of x, a and the bits from L2 for every tile.
//             With few rows latency binds: K is split over the blocks of a cluster, which read
//             each other's sums from shared memory; cards without clusters take a second launch.
//
// A block makes a tile of s [kRows, kColumns]; its warps divide K, each by itself: there is no
// barrier before their sums meet. The sum over k may run in any order, so that lane 4 g + t takes
// the columns 8t ... 8t+7 of 32, in 16 bytes, for two products of 16 columns:
//     elements 4s, 4s+1 (of the 8) stand where m16n8k16 has columns 2t, 2t+1      s = 0, 1
//              4s+2, 4s+3                                     2t+8, 2t+9
// in x and in a alike. What a lane multiplies it has copied itself, and the words of its columns'
// bits are 16 bytes too. fp32 has no such product: a lane sums over its own columns for every c.
#include <algorithm>
#include <cmath>

#include "cluster.h"
#include "tile.h"

namespace lorapar {
namespace {

struct Arguments {
  Shrink call;
  float* partial;  // [splits, M, C], or null: one split, or the blocks of a cluster
  int splits;      // blocks that divide K for one tile, neighbours
  int tiles_c;     // tiles beside each other
  int log_unit;    // of the steps of a unit
};

// The warps of all splits divide K by units; a step is 32 columns.
//   without dropout   a unit is a step
//   with dropout      4 or 8 steps which share 32 words: 1024 q + 32 h + 64 j for some of j = 0 ... 15
constexpr int kLogUnit = 2, kLogLongUnit = 3;
template <bool kDrop>
__device__ __forceinline__ int column_of(int unit, int step, int log_unit) {
  if constexpr (!kDrop) return unit * 32;
  int log_runs = 4 - log_unit, run = unit & ((1 << log_runs) - 1);
  int half = unit >> log_runs;  // of 1024 columns
  return half / 2 * 1024 + half % 2 * 32 + ((run << log_unit) + step) * 64;
}
__host__ __device__ inline int units_of(int64_t K, bool drop, int log_unit) {
  return static_cast<int>(drop ? divide_up<int64_t>(K, 1024) << (5 - log_unit)
                               : divide_up<int64_t>(K, 32));
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

// 16 bytes of a row times 0 or 1.
template <typename T>
__device__ __forceinline__ uint4 dropped(const uint4& x, const uint4& words, int bit) {
  return {times_keep(x.x, keep_pair(words.x, bit), T()),
          times_keep(x.y, keep_pair(words.y, bit), T()),
          times_keep(x.z, keep_pair(words.z, bit), T()),
          times_keep(x.w, keep_pair(words.w, bit), T())};
}

// The sums of a lane. add: those of one step, x's chunks (row 8 i + g) before a's (column 8 i + g).
// kParts: projections of the tile, each with its own words; 0: no dropout.
template <typename T, int kRows, int kColumns, int kParts>
struct Sums {
  float d[kRows / 16][kColumns / 8][4] = {};

  // words(part, chunk): the lane's words of that chunk of x.
  template <typename Words>
  __device__ __forceinline__ void add(const uint4* stage, Words&& words, int bit) {
    constexpr int kEach = kColumns / 8 / (kParts > 0 ? kParts : 1);
    int lane = threadIdx.x % 32;
    uint4 a[kColumns / 8];
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) a[j] = stage[(kRows / 8 + j) * 32 + lane];
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      uint4 x_low = stage[2 * i * 32 + lane], x_high = stage[(2 * i + 1) * 32 + lane];
#pragma unroll
      for (int part = 0; part < (kParts > 0 ? kParts : 1); ++part) {
        uint4 low = x_low, high = x_high;
        if constexpr (kParts > 0) {
          low = dropped<T>(low, words(part, 2 * i), bit);
          high = dropped<T>(high, words(part, 2 * i + 1), bit);
        }
        uint32_t first_x[4] = {low.x, high.x, low.y, high.y};
        uint32_t second_x[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int j = part * kEach; j < (part + 1) * kEach; ++j) {
          uint32_t first_a[2] = {a[j].x, a[j].y}, second_a[2] = {a[j].z, a[j].w};
          mma(d[i][j], first_x, first_a, T());
          mma(d[i][j], second_x, second_a, T());
        }
      }
    }
  }
  __device__ __forceinline__ void finish() {}
};

template <int kRows, int kColumns, int kParts>
struct Sums<float, kRows, kColumns, kParts> {
  static_assert(kRows == 16 && kParts <= 1, "two rows a lane, and their words");
  float sum[2][kColumns] = {};
  float d[1][kColumns / 8][4];

  template <typename Words>
  __device__ __forceinline__ void add(const uint4* stage, Words&& words, int bit) {
    int lane = threadIdx.x % 32, t = lane % 4;
    Eight<float> x[2] = {chunk_at<float>(stage, 0, lane), chunk_at<float>(stage, 1, lane)};
    if constexpr (kParts > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 w = words(0, i);
        drop_pair(x[i].v[0], x[i].v[1], w.x, bit);
        drop_pair(x[i].v[2], x[i].v[3], w.y, bit);
        drop_pair(x[i].v[4], x[i].v[5], w.z, bit);
        drop_pair(x[i].v[6], x[i].v[7], w.w, bit);
      }
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

// ---- The shared memory of a warp: copies of kDepth steps, then the words of the units on their way.
constexpr int kMostStages = 4;
static_assert((1 << kLogUnit) >= kMostStages, "one unit's words are on their way at most");
// `pieces`: of 16 bytes, of eight elements. Sizes of one warp are in 16 bytes.
constexpr int stage_of(int rows, int columns, int pieces) {
  return (rows + columns) / 8 * pieces * 32;
}
// Words are held in registers while their unit lasts, where these are enough.
constexpr bool holds(int rows, int columns, int parts) {
  return rows * parts <= 96 && rows * columns <= 2048;
}
constexpr int words_of(int rows, int columns, int parts) {
  return (holds(rows, columns, parts) ? 1 : 2) * parts * (rows / 8) * 32;
}
constexpr int depth_of(int rows, int columns, int parts, int warps, int pieces) {
  int room = static_cast<int>(kMostShared) / 16 / warps - words_of(rows, columns, parts);
  int fitting = room / stage_of(rows, columns, pieces);
  return fitting < kMostStages ? fitting : kMostStages;
}
// Of a block: its warps' copies; at the end the sums of all warps, then its own.
constexpr int bytes_of(int rows, int columns, int parts, int warps, int pieces) {
  int warp = depth_of(rows, columns, parts, warps, pieces) * stage_of(rows, columns, pieces) +
             words_of(rows, columns, parts);
  int meet = (warps * (columns + 8) + columns) * rows / 4;
  return 16 * (warps * warp > meet ? warps * warp : meet);
}
template <typename T, int kRows, int kColumns, int kParts, int kWarps>
struct Layout {
  static constexpr int kPieces = sizeof(T) / 2;
  static constexpr int kStage = stage_of(kRows, kColumns, kPieces);
  static constexpr int kDepth = depth_of(kRows, kColumns, kParts, kWarps, kPieces);
  static_assert(kDepth >= 2, "one step is copied while another is multiplied");
  static constexpr bool kHeld = holds(kRows, kColumns, kParts);
  static constexpr int kUnits = kHeld ? 1 : 2;
  static constexpr int kWords = words_of(kRows, kColumns, kParts) / kUnits;  // of one unit
  static constexpr int kWarp = kDepth * kStage + kUnits * kWords;
  static constexpr int kStride = kColumns + 8;  // of the sums
  static constexpr int kBytes = bytes_of(kRows, kColumns, kParts, kWarps, kPieces);
};

template <typename T, int kRows, int kColumns, int kParts, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 8 && sizeof(T) == 2 ? 2 : 1)
    shrink_kernel(const __grid_constant__ Arguments arguments) {
  wait_for_previous();
  using Blocks = Cluster<32 * kWarps>;
  using L = Layout<T, kRows, kColumns, kParts, kWarps>;
  constexpr int kPieces = L::kPieces, kDepth = L::kDepth, kRowChunks = kRows / 8;
  constexpr bool kDrop = kParts > 0;
  constexpr bool kHeld = kDrop && L::kHeld;
  auto* shared = reinterpret_cast<uint4*>(Blocks::shared());
  const Shrink& call = arguments.call;
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = Blocks::thread() / 32;
  int splits = arguments.splits, split = Blocks::block() % splits, tile = Blocks::block() / splits;
  int64_t m = static_cast<int64_t>(tile / arguments.tiles_c) * kRows;
  int first_c = tile % arguments.tiles_c * kColumns;
  int worker = split * kWarps + warp, workers = splits * kWarps;
  int log_unit = kDrop ? arguments.log_unit : 0, units = units_of(call.K, kDrop, log_unit);
  int steps = units > worker ? ((units - worker - 1) / workers + 1) << log_unit : 0;
  uint4 *own = shared + warp * L::kWarp, *own_words = own + kDepth * L::kStage;

  // Rows past the last are read as the last: they go into sums that nobody wants.
  const T* x = static_cast<const T*>(call.x.data) + m * call.x.stride;
  const T* a = static_cast<const T*>(call.a.data) + first_c * call.a.stride;
  int last_m = call.M - m < kRows ? static_cast<int>(call.M - m) - 1 : kRows - 1;
  int last_c = min(call.C - first_c, kColumns) - 1;
  bool aligned =
      aligned_16<T>(call.x.data, call.x.stride) && aligned_16<T>(call.a.data, call.a.stride);
  uint32_t row_x[kRowChunks], row_a[kColumns / 8];  // where they begin, by 16 bytes
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kRowChunks; ++i)
      row_x[i] = static_cast<uint32_t>(min(8 * i + g, last_m) * (call.x.stride * kPieces / 8));
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i)
      row_a[i] = static_cast<uint32_t>(min(8 * i + g, last_c) * (call.a.stride * kPieces / 8));
  }
  [[maybe_unused]] const int16_t* bits = call.bits;
  if constexpr (kDrop) bits += 8 * t + (first_c / call.R * call.M + m) * call.words;
  auto copy_words = [&](int unit, uint4* to) {
    int half = unit >> (4 - log_unit);
    const int16_t* from = bits + half * 32;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kRowChunks; ++i)
        cp_async(to + (part * kRowChunks + i) * 32 + lane,
                 from + min(8 * i + g, last_m) * call.words);
      from += call.M * call.words;
    }
  };
  auto copy_step = [&](int step) {
    if (step < steps) {
      int in_unit = step & ((1 << log_unit) - 1);
      int turn = step >> log_unit, unit = turn * workers + worker;
      int k = column_of<kDrop>(unit, in_unit, log_unit) + 8 * t;
      int left = static_cast<int>(call.K) - k;
      uint4* to = own + step % kDepth * L::kStage;
      if (kDrop && in_unit == 0) copy_words(unit, own_words + turn % L::kUnits * L::kWords);
      if (aligned) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          int some = left - piece * (8 / kPieces);
          int bytes = min(max(some * static_cast<int>(sizeof(T)), 0), 16);
          int at = some > 0 ? k + piece * (8 / kPieces) : 0;
          const uint4 *from_x = reinterpret_cast<const uint4*>(x + at),
                      *from_a = reinterpret_cast<const uint4*>(a + at);
#pragma unroll
          for (int i = 0; i < kRowChunks; ++i)
            cp_async(to + (i * kPieces + piece) * 32 + lane, from_x + row_x[i], bytes);
#pragma unroll
          for (int i = 0; i < kColumns / 8; ++i)
            cp_async(to + ((kRowChunks + i) * kPieces + piece) * 32 + lane, from_a + row_a[i],
                     bytes);
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < kRowChunks + kColumns / 8; ++i) {
          const T* from = i < kRowChunks ? x + min(8 * i + g, last_m) * call.x.stride
                                         : a + min(8 * (i - kRowChunks) + g, last_c) * call.a.stride;
          Eight<T> v = load_8(from, k, call.K, false);
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece)
            to[(i * kPieces + piece) * 32 + lane] = reinterpret_cast<const uint4*>(&v)[piece];
        }
      }
    }
    cp_async_commit();
  };

  Sums<T, kRows, kColumns, kParts> sums;
  uint4 held[kHeld ? kParts : 1][kRowChunks] = {};
#pragma unroll 1
  for (int step = 0; step < kDepth - 1; ++step) copy_step(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kDepth - 2>();
    __syncwarp();  // fp32 multiplies what other lanes copied
    copy_step(step + kDepth - 1);
    const uint4* stage = own + step % kDepth * L::kStage;
    if constexpr (!kDrop) {
      sums.add(stage, [](int, int) { return uint4{}; }, 0);
    } else {
      int turn = step >> log_unit, in_unit = step & ((1 << log_unit) - 1);
      int run = (turn * workers + worker) & ((16 >> log_unit) - 1);
      const uint4* words = own_words + turn % L::kUnits * L::kWords + lane;
      if constexpr (kHeld) {
        if (in_unit == 0) {
#pragma unroll
          for (int i = 0; i < kParts * kRowChunks; ++i)
            held[i / kRowChunks][i % kRowChunks] = words[i * 32];
        }
        sums.add(stage, [&](int part, int i) { return held[part][i]; },
                 (run << log_unit) + in_unit);
      } else {
        sums.add(stage, [&](int part, int i) { return words[(part * kRowChunks + i) * 32]; },
                 (run << log_unit) + in_unit);
      }
    }
  }
  sums.finish();

  // The sums of the warps meet, in their order.
  constexpr int kStride = L::kStride;
  auto* meet = reinterpret_cast<float*>(shared);
  float* sum_of_block = meet + kWarps * kRows * kStride;
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
  auto store = [&](int i, float sum) {
    int row = i / kColumns, c = first_c + i % kColumns;
    if (row <= last_m && c < call.C)
      static_cast<T*>(call.s.data)[(m + row) * call.s.stride + c] =
          from_float<T>(call.valid[c] ? sum * call.scale : 0.0f);
  };
  bool clustered = splits > 1 && arguments.partial == nullptr;
  for (int i = Blocks::thread(); i < kRows * kColumns; i += 32 * kWarps) {
    int row = i / kColumns, c = first_c + i % kColumns;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += meet[(w * kRows + row) * kStride + i % kColumns];
    if (clustered) {
      sum_of_block[i] = sum;
    } else if (splits == 1) {
      store(i, sum);
    } else if (row <= last_m && c < call.C) {
      arguments.partial[(split * call.M + m + row) * call.C + c] = sum;
    }
  }
  if (!clustered) return;
  Blocks::barrier();  // each block adds up its share of the tile, in the order of the splits
  for (int i = split * 32 * kWarps + Blocks::thread(); i < kRows * kColumns;
       i += splits * 32 * kWarps) {
    float sum = 0.0f;
    for (int other = 0; other < splits; ++other) sum += *Blocks::of_rank(sum_of_block + i, other);
    store(i, sum);
  }
  Blocks::leave();  // until then others read here
}

// s from the sums of all splits.
constexpr int kSumThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ Arguments arguments) {
  wait_for_previous();
  const Shrink& call = arguments.call;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * 4;
  int64_t m = i / call.C, c = i % call.C;
  if (m >= call.M) return;
  float4 sum = {};
  for (int split = 0; split < arguments.splits; ++split) {
    float4 v = *reinterpret_cast<const float4*>(arguments.partial + split * call.M * call.C + i);
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
  }
  T* out = static_cast<T*>(call.s.data) + m * call.s.stride + c;
  out[0] = from_float<T>(call.valid[c] ? sum.x * call.scale : 0.0f);
  out[1] = from_float<T>(call.valid[c + 1] ? sum.y * call.scale : 0.0f);
  out[2] = from_float<T>(call.valid[c + 2] ? sum.z * call.scale : 0.0f);
  out[3] = from_float<T>(call.valid[c + 3] ? sum.w * call.scale : 0.0f);
}

// ---- The host's choice: tile and splits of least time.
struct Choice {
  int rows, columns, warps, parts;
  int splits = 1, log_unit = 0;
  bool clustered = false;
};

// In clocks: the most of the longest warp's instructions one after another, those of an SM's
// warps, and the bytes from L2; a cluster or a second launch come on top.
Choice choose(const Shrink& call, Type type) {
  constexpr double kFromL2 = 30, kFromL2All = 3300;  // bytes a clock: of one SM, of all
  constexpr double kWait = 3.2, kIssue = 0.35;       // clocks an instruction: of a warp, of an SM
  constexpr double kLatency = 120;                   // of a step's copy
  constexpr double kOfSm = 227 * 1024;               // shared memory
  constexpr double kTensor = 1.7;                    // clocks of an SM an m16n8k16
  constexpr double kLaunch = 9000;                   // of the second kernel
  // Of clusters: two barriers; to find room for all blocks of one; sums from other blocks.
  constexpr double kCluster = 3500, kClusterBlocks = 2000, kClusterSplit = 180;
  bool drop = call.drops, f32 = type == Type::f32;
  const Choice tiles[] = {{16, 16, 8, 1}, {16, 32, 8, 1}, {16, 64, 8, 1}, {64, 16, 4, 1},
                          {64, 32, 4, 1}, {64, 64, 4, 1}, {16, 32, 8, 2}, {32, 32, 4, 2},
                          {16, 48, 4, 3}, {32, 48, 4, 3}};
  int most = cluster_size(8);
  double sms = multiprocessors(), least = 0;
  Choice best = {};
  best.rows = 0;
  for (Choice tile : tiles) {
    if (f32 && tile.columns == 32) tile.warps = 4;
    if (f32 && (tile.rows > 16 || tile.columns > 32 || tile.parts > 1)) continue;
    // With dropout a part of a tile is within one projection, and the words of none are wasted.
    if (drop && tile.columns / tile.parts > call.R) continue;
    if (tile.parts > 1 && ((drop && call.R != 16) || call.C % tile.columns != 0)) continue;
    if (!drop && tile.parts == 2) continue;
    int chunks = (tile.rows + tile.columns) / 8 * (f32 ? 2 : 1);
    int products = tile.rows / 8 * (tile.columns / 8);
    double instructions = 35 + 4.0 * chunks + (f32 ? 20 * tile.columns : products);
    if (drop) instructions += 18.0 * tile.rows / 8 * tile.parts;
    int parts = drop ? tile.parts : 0, pieces = f32 ? 2 : 1;
    int depth = depth_of(tile.rows, tile.columns, parts, tile.warps, pieces);
    double shared = bytes_of(tile.rows, tile.columns, parts, tile.warps, pieces);
    double resident = std::clamp(std::floor(kOfSm / (shared + 1024)), 1.0, 16.0 / tile.warps);
    double each = divide_up<int64_t>(call.M, tile.rows) *
                  static_cast<double>(divide_up(call.C, tile.columns));
    for (int log_unit = drop ? kLogUnit : 0; log_unit <= (drop ? kLogLongUnit : 0); ++log_unit) {
      double units = units_of(call.K, drop, log_unit), length = 1 << log_unit;
      double bytes = chunks * 512.0;  // a step
      if (drop) bytes += tile.parts * tile.rows / 8 * 512.0 / length;
      for (int splits = 1; splits <= 16; splits *= 2) {
        if (splits > 1 && splits * tile.warps > units) break;
        double blocks = each * splits, of_sm = std::ceil(blocks / sms);
        double steps = std::ceil(units / (splits * tile.warps)) * length;  // of the longest warp
        double turns = std::ceil(of_sm / resident);
        double alone = turns * (steps * std::max(instructions * kWait, kLatency / (depth - 1)) +
                                kLatency);
        double issued = of_sm * tile.warps * steps *
                        std::max(instructions * kIssue, f32 ? 0.0 : products * kTensor);
        double own = of_sm * tile.warps * steps * bytes / kFromL2;
        double all = each * units * length * bytes / kFromL2All;
        double clocks = std::max(std::max(alone, issued), std::max(own, all));
        bool clustered = splits > 1 && splits <= most;
        if (clustered) clocks += kCluster + kClusterBlocks * blocks / sms + kClusterSplit * splits;
        if (splits > 1 && !clustered)  // sums written, read
          clocks += kLaunch + 8.0 * splits * call.M * call.C / kFromL2All;
        if (best.rows == 0 || clocks < least) {
          least = clocks;
          best = tile;
          best.splits = splits;
          best.log_unit = log_unit;
          best.clustered = clustered;
        }
      }
    }
  }
  return best;
}

template <typename T, int kRows, int kColumns, int kParts, int kWarps>
void launch_tile(const Choice& choice, Arguments arguments, cudaStream_t stream) {
  const Shrink& call = arguments.call;
  arguments.tiles_c = divide_up(call.C, kColumns);
  int64_t blocks = divide_up<int64_t>(call.M, kRows) * arguments.tiles_c * choice.splits;
  launch_cluster<32 * kWarps>(&shrink_kernel<T, kRows, kColumns, kParts, kWarps>,
                              static_cast<int>(blocks), choice.clustered ? choice.splits : 1,
                              Layout<T, kRows, kColumns, kParts, kWarps>::kBytes, stream,
                              arguments);
}

template <typename T, bool kDrop>
void launch_choice(const Choice& choice, const Arguments& arguments, cudaStream_t stream) {
  constexpr int kOne = kDrop ? 1 : 0, kThree = kDrop ? 3 : 0;
  constexpr int kWide = sizeof(T) == 2 ? 8 : 4;  // warps that shared memory has room for
  const Choice& c = choice;
  if (c.parts == 1 && c.rows == 16) {
    if (c.columns == 16) return launch_tile<T, 16, 16, kOne, 8>(c, arguments, stream);
    if (c.columns == 32) return launch_tile<T, 16, 32, kOne, kWide>(c, arguments, stream);
  }
  if constexpr (sizeof(T) == 2) {
    if constexpr (kDrop) {
      if (c.parts == 2 && c.rows == 16) return launch_tile<T, 16, 32, 2, 8>(c, arguments, stream);
      if (c.parts == 2) return launch_tile<T, 32, 32, 2, 4>(c, arguments, stream);
    }
    if (c.parts == 3) {
      if (c.rows == 16) return launch_tile<T, 16, 48, kThree, 4>(c, arguments, stream);
      return launch_tile<T, 32, 48, kThree, 4>(c, arguments, stream);
    }
    if (c.rows == 16) return launch_tile<T, 16, 64, kOne, 8>(c, arguments, stream);
    if (c.columns == 16) return launch_tile<T, 64, 16, kOne, 4>(c, arguments, stream);
    if (c.columns == 32) return launch_tile<T, 64, 32, kOne, 4>(c, arguments, stream);
    launch_tile<T, 64, 64, kOne, 4>(c, arguments, stream);
  }
}

}  // namespace

size_t shrink_workspace(const Shrink& call, Type type) {
  Choice choice = choose(call, type);
  if (choice.splits == 1 || choice.clustered) return 0;
  return sizeof(float) * choice.splits * call.M * call.C;
}

void shrink(const Shrink& call, Type type, void* workspace, cudaStream_t stream) {
  if (call.M == 0 || call.C == 0) return;
  Choice choice = choose(call, type);
  bool apart = choice.splits > 1 && !choice.clustered;
  Arguments arguments = {call, apart ? static_cast<float*>(workspace) : nullptr, choice.splits, 0,
                         choice.log_unit};
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (call.drops) {
      launch_choice<T, true>(choice, arguments, stream);
    } else {
      launch_choice<T, false>(choice, arguments, stream);
    }
    if (apart) {
      auto blocks = divide_up<int64_t>(call.M * call.C, 4 * kSumThreads);
      launch(sum_kernel<T>, dim3(static_cast<unsigned>(blocks)), kSumThreads, 0, stream, arguments);
    }
  });
}

}  // namespace lorapar

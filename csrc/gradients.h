// What dy_gradients.cu and x_gradients.cu share: which rows a block sums over, where elements of a
// gradient go, and `finish`, which adds partial sums in the order of their splits.
#pragma once
#include "tile.h"

namespace lorapar {

// Blocks that a launch should have: two for each multiprocessor of an H100. A constant, so that
// every card adds in the same order.
constexpr int kEnoughBlocks = 264;

inline bool wanted(const Gradient& g) { return g.out != nullptr || g.sum != nullptr; }

// ---- Rows. A split is an equal run of rows or, where bounds are given, an example.
struct Splits {
  int count = 1;
  int64_t rows = 1;  // of a split
  const int32_t* bounds = nullptr;
};

// Runs of M rows, multiples of `block`, so that count * blocks is enough; at most `most`.
inline Splits split_rows(int64_t M, int block, int64_t blocks, int64_t most) {
  int64_t count = kEnoughBlocks / (blocks < 1 ? 1 : blocks);
  count = count > most ? most : count;
  int64_t rows = divide_up(divide_up(M, count < 1 ? int64_t{1} : count), int64_t{block}) * block;
  Splits splits;
  splits.rows = rows < block ? block : rows;
  splits.count = M > 0 ? static_cast<int>(divide_up(M, splits.rows)) : 1;
  return splits;
}

__device__ __forceinline__ void rows_of(const Splits& splits, int split, int64_t M, int64_t& start,
                                        int64_t& stop) {
  if (splits.bounds) {
    start = splits.bounds[split];
    stop = splits.bounds[split + 1];
  } else {
    start = split * splits.rows;
    stop = start + splits.rows < M ? start + splits.rows : M;
  }
}

// ---- Elements.
__device__ __forceinline__ void store(void* out, Type type, int64_t at, float v) {
  if (type == Type::f32) {
    static_cast<float*>(out)[at] = v;
  } else if (type == Type::f16) {
    static_cast<__half*>(out)[at] = from_float<__half>(v);
  } else {
    static_cast<__nv_bfloat16*>(out)[at] = from_float<__nv_bfloat16>(v);
  }
}

// The packed column that rank column j of the adapter is, or -1: its gradient is exact 0.
__device__ __forceinline__ int packed_column(const Gradient& g, int j) {
  int place = g.slot ? g.slot[j] : j;
  if (place < 0 || place >= g.trained) return -1;
  return g.index ? g.index[place] : place;
}

__device__ __forceinline__ bool trains(const Gradient& g, int64_t at) {
  return !g.trainable || g.trainable[at];
}

// ---- finish: g = scale * (partial[0] + partial[1] + ...), 0 where frozen or not valid, cast.
//   a gradient   out = g, or sum += the g of each split and square += their squares
//   dS           out = g
// Cost: the partial sums once; one launch for all projections.
struct FinishJob {
  const float* partial;   // [splits][stride_split]
  int64_t stride_split;
  int splits;             // 0: zeros
  int first_block;
  int64_t threads;        // an element of a gradient each, or four of dS
  int R;                  // columns of partial sums: [width, R], or [R, width] where rank_first
  int64_t width;          // K, N, or M
  bool rank_first;
  Gradient gradient;
  Output ds;              // data null: a gradient
  Type ds_type;
  const int8_t* valid;    // [R]
  float scale;            // of dS
};

constexpr int kFinishThreads = 256;
constexpr int kFinishJobs = 2 * kMaxProjections;  // dS and dB

struct FinishCall {
  FinishJob job[kFinishJobs];
  int jobs = 0;
  int blocks = 0;

  void add(FinishJob one) {
    one.first_block = blocks;
    blocks += static_cast<int>(divide_up(one.threads, int64_t{kFinishThreads}));
    job[jobs++] = one;
  }
  void add_gradient(const Gradient& g, const float* partial, int splits, int R, int64_t width,
                    bool rank_first) {
    FinishJob one = {};
    one.gradient = g;
    one.partial = partial;
    one.splits = splits;
    one.stride_split = R * width;
    one.R = R;
    one.width = width;
    one.rank_first = rank_first;
    one.threads = g.rank * width;
    add(one);
  }
  void add_ds(Output ds, Type type, const int8_t* valid, float scale, const float* partial,
              int splits, int R, int64_t M) {
    FinishJob one = {};
    one.ds = ds;
    one.ds_type = type;
    one.valid = valid;
    one.scale = scale;
    one.partial = partial;
    one.splits = splits;
    one.stride_split = R * M;
    one.R = R;
    one.width = M;
    one.threads = R * M / 4;
    add(one);
  }
};

// a = quotient * b + rest; a division of 64 bits takes some 70 instructions more.
__device__ __forceinline__ void divide(int64_t a, int64_t b, int64_t& quotient, int64_t& rest) {
  if ((a | b) >> 32) {
    quotient = a / b;
    rest = a % b;
  } else {
    quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    rest = static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
  }
}

__device__ __forceinline__ void finish_ds(const FinishJob& job, int64_t thread) {
  int64_t first = thread * 4, m, r;
  divide(first, job.R, m, r);
  float total[4] = {};
  const float* at = job.partial + first;
#pragma unroll 8
  for (int split = 0; split < job.splits; ++split, at += job.stride_split) {
    float4 part = *reinterpret_cast<const float4*>(at);
    total[0] += part.x;
    total[1] += part.y;
    total[2] += part.z;
    total[3] += part.w;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float v = job.valid[r + i] ? job.scale * total[i] : 0.0f;
    store(job.ds.data, job.ds_type, m * job.ds.stride + r + i, v);
  }
}

__device__ __forceinline__ void finish_gradient(const FinishJob& job, int64_t e) {
  const Gradient& g = job.gradient;
  int64_t row, column;  // of out
  divide(e, job.rank_first ? job.width : g.rank, row, column);
  int64_t w = job.rank_first ? column : row;
  int c = packed_column(g, static_cast<int>(job.rank_first ? row : column));
  float total = 0.0f, squares = 0.0f;
  if (c >= 0 && trains(g, e)) {
    const float* at = job.partial + (job.rank_first ? c * job.width + w : w * job.R + c);
#pragma unroll 4
    for (int split = 0; split < job.splits; ++split, at += job.stride_split) {
      float part = g.scale * *at;
      total += part;
      squares += part * part;
    }
  }
  if (g.sum) {
    g.sum[e] += total;
    g.square[e] += squares;
  } else {
    store(g.out, g.type, e, total);
  }
}

static __global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ FinishCall call) {
  wait_for_previous();
  int block = static_cast<int>(blockIdx.x), i = call.jobs - 1;
  while (i > 0 && block < call.job[i].first_block) --i;
  const FinishJob& job = call.job[i];
  int64_t thread = int64_t{block - job.first_block} * kFinishThreads + threadIdx.x;
  if (thread >= job.threads) return;
  if (job.ds.data) {
    finish_ds(job, thread);
  } else {
    finish_gradient(job, thread);
  }
}

inline void finish(const FinishCall& call, cudaStream_t stream) {
  if (call.blocks > 0) launch(finish_kernel, dim3(call.blocks), kFinishThreads, 0, stream, call);
}

}  // namespace lorapar

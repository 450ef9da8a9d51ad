// The backward of few rows: dS, then dA and dB, of all projections of one x in two launches.
//
// Computes   dS_i = scale * dY_i b_i^T, 0 where not valid
//            dA_i = da.scale * dS_i^T (keep_i * x)      dB_i = db.scale * dY_i^T S_i
//
// Shapes     x [M, K]   dY_i [M, N_i]   b_i [R, N_i]   S_i, dS_i [M, R]   bits_i [M, words]
//            dA_i [r, K]   dB_i [N_i, r]       M <= kFewRows, R <= 64, 16 bit, vectors of 16 bytes
// Cost       bound by latency and L2: dY is read twice, x once a projection, b once for 32 or 64
//            rows. No partial sums in memory and no launch that adds them, so that with few rows it
//            is faster than dy_gradients.cu and x_gradients.cu, which read dY once.
//
// dS: the blocks of a cluster divide N, their warps divide it further, each by itself, in steps of
// 32 columns: lane 4 g + t takes the columns 8t ... 8t+7 in 16 bytes, for two products of 16 columns
// (see shrink.cu). Sums meet in shared memory, first of the warps, then of the blocks.
//
// dA and dB are one kind of product, (tall matrix)^T times (tall matrix): a block makes 64 columns,
// in four runs of 16, and its warps divide the rows, each with its own copies in shared memory and no
// barrier. With dropout the runs stand 64 apart, as their words are then the same (x_gradients.cu).
#include "cluster.h"
#include "gradients.h"

namespace lorapar {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kFewRows = 1024;
constexpr int kMostRanks = 64;
constexpr int64_t kMostStride = 1 << 24;  // rows begin at 32-bit multiples of 16 bytes
constexpr int kSlots = kWarps / 2;        // in which the sums of two warps each meet

// ---- dS.
constexpr int kBlocksOfCluster = 8;
constexpr int kStep = 32;  // columns of dY that a warp takes at a time

struct DsJob {
  Matrix dy, b;
  Output ds;
  const int8_t* valid;
  int n;
};
struct DsCall {
  DsJob job[kMaxProjections];  // of which clusters make 16 or 32 columns of the rank
  int row_blocks, M;
  int rank_blocks;
  float scale;
};

__device__ __forceinline__ uint4 load_16(const uint4* at, bool inside) {
  return inside ? *at : uint4{0, 0, 0, 0};
}

// What a lane holds of a step: rows g and g + 8 of each tile of dY, row g of each 8 of b.
template <int kRanks, int kTiles>
struct DsStep {
  uint4 dy[kTiles][2], b[kRanks / 8];
};

template <typename T, int kRanks, int kTiles>
__device__ __forceinline__ void multiply_step(float (&d)[kTiles][kRanks / 8][4],
                                              const DsStep<kRanks, kTiles>& step) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 &low = step.dy[i][0], &high = step.dy[i][1];
      uint32_t left[4] = {half ? low.z : low.x, half ? high.z : high.x, half ? low.w : low.y,
                          half ? high.w : high.y};
#pragma unroll
      for (int r = 0; r < kRanks / 8; ++r) {
        const uint4& b = step.b[r];
        uint32_t right[2] = {half ? b.z : b.x, half ? b.w : b.y};
        mma(d[i][r], left, right, T());
      }
    }
  }
}

template <int kRanks, int kTiles>
struct DsShared {
  static constexpr int kStride = kRanks + 8;  // no bank conflicts
  float slot[kSlots][16 * kTiles][kStride];   // the first is the block's sum in the end
};

template <typename T, int kRanks, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) ds_kernel(const __grid_constant__ DsCall call) {
  using Blocks = Cluster<kThreads>;
  using Memory = DsShared<kRanks, kTiles>;
  constexpr int kRows = 16 * kTiles;
  wait_for_previous();
  Memory& shared = *reinterpret_cast<Memory*>(Blocks::shared());
  int thread = Blocks::thread(), warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  int rank = Blocks::rank(), size = Blocks::size(), cluster = Blocks::block() / size;
  int other = cluster / call.row_blocks, m0 = (cluster - other * call.row_blocks) * kRows;
  const DsJob& job = call.job[other / call.rank_blocks];
  int first_rank = other % call.rank_blocks * kRanks;

  const uint4* dy = static_cast<const uint4*>(job.dy.data) + t;
  const uint4* b = static_cast<const uint4*>(job.b.data) + t;
  uint32_t stride_dy = static_cast<uint32_t>(job.dy.stride / 8);
  uint32_t stride_b = static_cast<uint32_t>(job.b.stride / 8);
  uint32_t row[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int m = m0 + 16 * i + 8 * half + g;  // rows past the last are not stored
      row[i][half] = (m < call.M ? m : call.M - 1) * stride_dy;
    }
  int steps = (job.n + kStep - 1) / kStep, warps = size * kWarps;
  auto load = [&](DsStep<kRanks, kTiles>& to, int step) {
    bool inside = step * kStep + 8 * t < job.n;
    uint32_t column = step * (kStep / 8);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        to.dy[i][half] = load_16(dy + (row[i][half] + column), inside);
#pragma unroll
    for (int r = 0; r < kRanks / 8; ++r)
      to.b[r] = load_16(b + ((first_rank + 8 * r + g) * stride_b + column), inside);
  };

  float d[kTiles][kRanks / 8][4] = {};  // [16 rows, kRanks] each
  DsStep<kRanks, kTiles> now, next;
  int step = rank * kWarps + warp;
  if constexpr (sizeof(now) <= 128) {  // registers enough to have the next step on its way
    load(now, step);
    for (; step < steps; step += 2 * warps) {
      load(next, step + warps);
      multiply_step<T>(d, now);
      load(now, step + 2 * warps);
      multiply_step<T>(d, next);
    }
  } else {
    for (; step < steps; step += warps) {
      load(now, step);
      multiply_step<T>(d, now);
    }
  }

  for (int turn = 0; turn < 2; ++turn) {
    if (warp / kSlots == turn) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int r = 0; r < kRanks / 8; ++r)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            auto* at = reinterpret_cast<float2*>(
                &shared.slot[warp % kSlots][16 * i + 8 * half + g][8 * r + 2 * t]);
            float2 v = {d[i][r][2 * half], d[i][r][2 * half + 1]};
            if (turn == 1) {
              float2 before = *at;
              v.x += before.x;
              v.y += before.y;
            }
            *at = v;
          }
    }
    __syncthreads();
  }
  for (int e = thread; e < kRows * kRanks; e += kThreads) {
    float* at = &shared.slot[0][e / kRanks][e % kRanks];
    float sum = *at;
#pragma unroll
    for (int slot = 1; slot < kSlots; ++slot) sum += at[slot * kRows * Memory::kStride];
    *at = sum;
  }
  Blocks::barrier();
  T* ds = static_cast<T*>(job.ds.data);
  for (int e = rank * kThreads + thread; e < kRows * kRanks; e += size * kThreads) {
    int m = m0 + e / kRanks, c = first_rank + e % kRanks;
    const float* at = &shared.slot[0][e / kRanks][e % kRanks];
    bool valid = job.valid[c] != 0;
    float sum = 0.0f;
#pragma unroll kBlocksOfCluster
    for (int block = 0; block < size; ++block) sum += *Blocks::of_rank(at, block);
    if (m < call.M) ds[m * job.ds.stride + c] = from_float<T>(valid ? call.scale * sum : 0.0f);
  }
  Blocks::barrier();  // until here others read this block's sums
}

template <typename T, int kRanks, int kTiles>
void launch_ds(DsCall& call, int jobs, int R, cudaStream_t stream) {
  int size = cluster_size(kBlocksOfCluster);
  call.row_blocks = divide_up(call.M, 16 * kTiles);
  call.rank_blocks = R / kRanks;
  int clusters = call.row_blocks * call.rank_blocks * jobs;
  launch_cluster<kThreads>(&ds_kernel<T, kRanks, kTiles>, clusters * size, size,
                           sizeof(DsShared<kRanks, kTiles>), stream, call);
}

template <typename T>
void make_ds(DsCall& call, int jobs, int R, cudaStream_t stream) {
  // b is read once for 64 rows where these give blocks enough.
  bool many = int64_t{divide_up(call.M, 64)} * jobs * kBlocksOfCluster >= kEnoughBlocks / 2;
  if (R > 16) {
    launch_ds<T, 32, 2>(call, jobs, R, stream);
  } else if (many) {
    launch_ds<T, 16, 4>(call, jobs, R, stream);
  } else {
    launch_ds<T, 16, 2>(call, jobs, R, stream);
  }
}

// ---- dA and dB: out = scale * (keep * x)^T s, of x [M, width] and s [M, R].
constexpr int kRuns = 4, kRun = 16, kColumns = kRuns * kRun;
constexpr int kStages = 2;
constexpr int kUnit = 16;  // rows that a warp takes at a time

struct Product {
  Matrix x, s;            // s absent: zeros
  const int16_t* bits;    // or null; then runs are neighbours
  Gradient gradient;
  int64_t width;
  int first_block;
  bool rank_first;        // out [r, width], else [width, r]
};
struct ProductCall {
  Product of[2 * kMaxProjections];
  int products = 0, blocks = 0;
  int64_t words;
  int M;
};

// Shared memory: of each warp its stages of x, words and s; at the end the sums.
template <typename T, int kBlocks>
struct ProductShared {
  static constexpr int kRanks = 8 * kBlocks;
  static constexpr int kStride = kColumns + 8, kStrideWords = kRun + 8;  // no bank conflicts
  static constexpr int kStrideS = kBlocks == 1 ? kRanks : kRanks + 8;
  struct Stage {
    T x[kUnit][kStride], words[kUnit][kStrideWords], s[kUnit][kStrideS];
  };
  static constexpr int kStrideSum = kColumns + 4;
  using Slot = float[kRanks][kStrideSum];
  static constexpr size_t kOfStages = sizeof(Stage) * kStages * kWarps;
  static constexpr size_t kOfSums = sizeof(Slot) * kSlots;
  static constexpr size_t kBytes = kOfStages > kOfSums ? kOfStages : kOfSums;
  static_assert(kBytes <= kMostShared && sizeof(Stage) % 16 == 0);
};

// Where run `run` of a block begins in x.
__device__ __forceinline__ int64_t first_of(int block, int run, bool spread) {
  if (!spread) return int64_t{block} * kColumns + run * kRun;
  return int64_t{block / 16} * 1024 + (block / 4 % 4 * kRuns + run) * 64 + block % 4 * kRun;
}

template <typename T, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks == 1 ? 4 : kBlocks == 2 ? 3 : 2)
    product_kernel(const __grid_constant__ ProductCall call) {
  using Shared = ProductShared<T, kBlocks>;
  using Stage = typename Shared::Stage;
  constexpr int kRanks = Shared::kRanks;
  LORAPAR_SHARED(unsigned char, shared);
  wait_for_previous();
  int block = static_cast<int>(blockIdx.x), i_product = call.products - 1;
  while (i_product > 0 && block < call.of[i_product].first_block) --i_product;
  const Product& of = call.of[i_product];
  block -= of.first_block;
  bool spread = of.bits != nullptr;
  if (first_of(block, 0, spread) >= of.width) return;  // the whole block
  int first_rank = static_cast<int>(blockIdx.y) * kRanks;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* stages = reinterpret_cast<Stage*>(shared) + warp * kStages;

  // What a lane copies lies in the same columns of every unit.
  int row_x = lane / 8, row_words = lane / 2;
  int64_t k = first_of(block, lane % 8 / 2, spread) + lane % 2 * 8;
  bool inside = k < of.width;
  const T* x = static_cast<const T*>(of.x.data) + (inside ? k : 0);
  const int16_t* words = of.bits + word_of(first_of(block, 0, spread)) + lane % 2 * 8;
  const T* s = static_cast<const T*>(of.s.data) + first_rank;
  int units = of.s.data ? (call.M + kUnit - 1) / kUnit : 0;  // of all warps
  auto copy = [&](int unit, Stage& to) {
    if (unit < units) {
      int m0 = unit * kUnit;
#pragma unroll
      for (int i = 0; i < kUnit; i += 4) {
        bool row = m0 + i + row_x < call.M;
        cp_async(&to.x[i + row_x][lane % 8 * 8], x + (row ? m0 + i + row_x : 0) * of.x.stride,
                 row && inside ? 16 : 0);
      }
      if (spread) {
        bool row = m0 + row_words < call.M;
        cp_async(&to.words[row_words][lane % 2 * 8],
                 words + (row ? m0 + row_words : 0) * call.words, row ? 16 : 0);
      }
#pragma unroll
      for (int i = 0; i < kUnit * kBlocks; i += 32) {
        int row_s = (i + lane) / kBlocks, column = (i + lane) % kBlocks * 8;
        if (kUnit * kBlocks >= 32 || lane < kUnit * kBlocks) {
          bool row = m0 + row_s < call.M;
          cp_async(&to.s[row_s][column], s + (row ? m0 + row_s : 0) * of.s.stride + column,
                   row ? 16 : 0);
        }
      }
    }
    cp_async_commit();
  };

  float d[kRuns][kBlocks][4] = {};  // [16 columns of x, kRanks] each
  int bit = block / 4 % 4 * kRuns;  // of the first run
  copy(warp, stages[0]);
  for (int unit = warp, now = 0; unit < units; unit += kWarps, now ^= 1) {
    cp_async_wait<kStages - 2>();
    __syncwarp();
    copy(unit + kWarps, stages[now ^ 1]);
    const Stage& stage = stages[now];
    uint32_t right[kBlocks][2];
    int row = lane % 16, column = lane / 16 * 8;
#pragma unroll
    for (int r = 0; r < kBlocks; r += 2) {
      uint32_t two[4];
      ldmatrix_transposed(two, &stage.s[row][r * 8 + (kBlocks == 1 ? 0 : column)]);
      right[r][0] = two[0];
      right[r][1] = two[1];
      if constexpr (kBlocks > 1) {
        right[r + 1][0] = two[2];
        right[r + 1][1] = two[3];
      }
    }
    Fragment<T> word = {};
    if (spread) {  // words lie as x does, so that the same load puts them beside its elements
      load_fragment<true>(word, &stage.words[0][0], Shared::kStrideWords);
#pragma unroll
      for (int i = 0; i < 4; ++i) word.r[i] >>= bit;
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      Fragment<T> left;
      load_fragment<true>(left, &stage.x[0][run * kRun], Shared::kStride);
      if (spread) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          left.r[i] = times_keep(left.r[i], keep_pair(word.r[i], run), T());
      }
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) mma(d[run][r], left.r, right[r], T());
    }
  }
  cp_async_wait<0>();

  auto* slots = reinterpret_cast<typename Shared::Slot*>(shared);
  int g = lane / 4, t = lane % 4;
  for (int turn = 0; turn < 2; ++turn) {
    __syncthreads();
    if (warp / kSlots == turn) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run)
#pragma unroll
        for (int r = 0; r < kBlocks; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& at =
                slots[warp % kSlots][8 * r + 2 * t + e % 2][run * kRun + e / 2 * 8 + g];
            at = turn == 0 ? d[run][r][e] : at + d[run][r][e];
          }
    }
  }
  __syncthreads();
  const Gradient& gradient = of.gradient;
  int rank = gradient.rank;
  for (int e = threadIdx.x; e < rank * kColumns; e += kThreads) {
    int j = of.rank_first ? e / kColumns : e % rank, column = of.rank_first ? e % kColumns : e / rank;
    int64_t k = first_of(block, column / kRun, spread) + column % kRun;
    if (k >= of.width) continue;
    int packed = packed_column(gradient, j), c = packed - first_rank;
    if (packed < 0 ? first_rank > 0 : c < 0 || c >= kRanks) continue;  // another block's
    int64_t at = of.rank_first ? j * of.width + k : k * rank + j;
    float sum = 0.0f;
    if (packed >= 0 && trains(gradient, at)) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) sum += slots[slot][c][column];
      sum *= gradient.scale;
    }
    store(gradient.out, gradient.type, at, sum);
  }
}

template <typename T>
void launch_products(const ProductCall& call, int ranks, cudaStream_t stream) {
  if (ranks <= 8) {
    launch(product_kernel<T, 1>, dim3(call.blocks), kThreads, ProductShared<T, 1>::kBytes, stream,
           call);
  } else if (ranks <= 16) {
    launch(product_kernel<T, 2>, dim3(call.blocks), kThreads, ProductShared<T, 2>::kBytes, stream,
           call);
  } else {
    launch(product_kernel<T, 4>, dim3(call.blocks, divide_up(ranks, 32)), kThreads,
           ProductShared<T, 4>::kBytes, stream, call);
  }
}

bool fits(Matrix of) {
  return aligned_16<__half>(of.data, of.stride) && of.stride < kMostStride;
}

}  // namespace

bool takes_few_rows(const FewRows& call, Type type) {
  bool takes = has_clusters() && type != Type::f32 && call.M > 0 && call.M <= kFewRows &&
               call.R <= kMostRanks;
  for (int i = 0; takes && i < call.dys; ++i) {
    const DyProjection& one = call.dy[i];
    takes = !one.db.sum && one.n % 8 == 0 && one.n < kMostStride && fits(one.dy) && fits(one.s) &&
            (!one.ds.data || fits(one.b));
  }
  for (int i = 0; takes && i < call.xs; ++i)
    takes = !call.of_x[i].da.sum && call.K % 8 == 0 && fits(call.x) && fits(call.of_x[i].ds);
  return takes;
}

void few_rows(const FewRows& call, Type type, cudaStream_t stream) {
  auto with_type = [&](auto work) {
    type == Type::f16 ? work(__half()) : work(__nv_bfloat16());
  };
  DsCall of_ds;
  of_ds.M = static_cast<int>(call.M);
  of_ds.scale = call.scale;
  int jobs = 0, ranks = 0;
  for (int i = 0; i < call.dys; ++i) {
    const DyProjection& one = call.dy[i];
    if (one.ds.data)
      of_ds.job[jobs++] = {one.dy, one.b, one.ds, one.valid, static_cast<int>(one.n)};
  }
  if (jobs > 0)
    with_type([&](auto zero) { make_ds<decltype(zero)>(of_ds, jobs, call.R, stream); });

  ProductCall products;
  products.words = call.words;
  products.M = static_cast<int>(call.M);
  auto add = [&](Product one) {
    if (!one.gradient.out || one.gradient.rank == 0 || one.width == 0) return;
    if (!one.s.data) one.gradient.trained = 0;
    one.first_block = products.blocks;
    products.blocks += static_cast<int>(one.bits ? divide_up<int64_t>(one.width, 1024) * 16
                                                 : divide_up<int64_t>(one.width, kColumns));
    products.of[products.products++] = one;
    ranks = one.gradient.rank > ranks ? one.gradient.rank : ranks;
  };
  for (int i = 0; i < call.xs; ++i) {  // first, as they take longest
    const XProjection& one = call.of_x[i];
    add({call.x, one.ds, one.bits, one.da, call.K, 0, true});
  }
  for (int i = 0; i < call.dys; ++i) {
    const DyProjection& one = call.dy[i];
    add({one.dy, one.s, nullptr, one.db, one.n, 0, false});
  }
  if (products.products > 0)  // live columns are no more than r
    with_type([&](auto zero) {
      launch_products<decltype(zero)>(products, ranks < call.R ? ranks : call.R, stream);
    });
}

}  // namespace lorapar

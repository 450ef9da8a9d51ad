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
// 32 columns: lane 4 g + t takes the columns 8t ... 8t+7 in 16 bytes, for two products of 16
// columns (see shrink.cu). Sums meet in shared memory, first of the warps, then of the blocks.
//
// dA and dB are one kind of product, (tall matrix)^T times (tall matrix): a block makes 64 columns,
// in four runs of 16, and its warps divide the rows, each with its own copies in shared memory and
// no barrier. With dropout the runs stand 64 apart, as their words are then the same
// (x_gradients.cu).
#include "cluster.h"
#include "gradients.h"

namespace lorapar {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kFewRows = 1024;        // from there on a second read of dY costs too much
constexpr int kMostRanks = 64;            // R: 16, 32 or 64
constexpr int64_t kMostStride = 1 << 24;  // rows begin at 32-bit multiples of 16 bytes
constexpr int kSlots = kWarps / 2;        // in which the sums of two warps each meet

// v is in a register from here on: without this the compiler computes it anew at every use.
template <typename T>
__device__ __forceinline__ void settle([[maybe_unused]] T& v) {
#ifndef LORAPAR_EMULATE
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(v));
  } else {
    asm volatile("" : "+r"(v));
  }
#endif
}

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
  DsJob job[kMaxProjections];
  int row_blocks, M;
  bool two;  // clusters make half of the rank each
  float scale;
};

__device__ __forceinline__ uint4 load_16(const uint4* at, bool inside) {
  return inside ? *at : uint4{0, 0, 0, 0};
}

// What a lane holds of a step: row g of each 8 of dY, and of each 8 of b.
template <int kRanks, int kTiles>
struct DsStep {
  uint4 dy[kTiles], b[kRanks / 8];
};

// b is the left factor, as what comes from one row of the right one needs no moves.
template <typename T, int kRanks, int kTiles>
__device__ __forceinline__ void multiply_step(float (&d)[kRanks / 16][kTiles][4],
                                              const DsStep<kRanks, kTiles>& step) {
#pragma unroll
  for (int r = 0; r < kRanks / 16; ++r) {
    const uint4 &low = step.b[2 * r], &high = step.b[2 * r + 1];
    uint32_t left[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4& dy = step.dy[i];
      uint32_t right[2][2] = {{dy.x, dy.y}, {dy.z, dy.w}};
      mma(d[r][i], left[0], right[0], T());
      mma(d[r][i], left[1], right[1], T());
    }
  }
}

template <int kRanks, int kTiles>
struct DsShared {
  static constexpr int kStride = kRanks + 4;  // no bank conflicts
  float slot[kSlots][8 * kTiles][kStride];    // the first is the block's sum in the end
};

template <typename T, int kRanks, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) ds_kernel(const __grid_constant__ DsCall call) {
  using Blocks = Cluster<kThreads>;
  using Memory = DsShared<kRanks, kTiles>;
  constexpr int kRows = 8 * kTiles;
  wait_for_previous();
  Memory& shared = *reinterpret_cast<Memory*>(Blocks::shared());
  unsigned thread = Blocks::thread(), warp = thread / 32;
  int g = thread % 32 / 4, t = thread % 4;
  int rank = Blocks::rank(), size = Blocks::size();
  int cluster = static_cast<unsigned>(Blocks::block()) / static_cast<unsigned>(size), other = 0;
  for (; cluster >= call.row_blocks; cluster -= call.row_blocks) ++other;
  int m0 = cluster * kRows, first_rank = call.two && other % 2 ? kRanks : 0;
  const DsJob& job = call.job[call.two ? other / 2 : other];

  // In 16 bytes, as are the offsets of rows.
  int own = rank * kWarps + static_cast<int>(warp), warps = size * kWarps;
  const uint4* dy = static_cast<const uint4*>(job.dy.data) + own * (kStep / 8);
  const uint4* b = static_cast<const uint4*>(job.b.data) + own * (kStep / 8);
  uint32_t stride_dy = static_cast<uint32_t>(job.dy.stride) / 8;
  uint32_t stride_b = static_cast<uint32_t>(job.b.stride) / 8;
  uint32_t row_dy[kTiles], row_b[kRanks / 8];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    int m = m0 + 8 * i + g;  // rows past the last are not stored
    row_dy[i] = (m < call.M ? m : call.M - 1) * stride_dy + t;
  }
#pragma unroll
  for (int r = 0; r < kRanks / 8; ++r) row_b[r] = (first_rank + 8 * r + g) * stride_b + t;
  int column = own * kStep + 8 * t;
  auto load = [&](DsStep<kRanks, kTiles>& to) {
    bool inside = column < job.n;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) to.dy[i] = load_16(dy + row_dy[i], inside);
#pragma unroll
    for (int r = 0; r < kRanks / 8; ++r) to.b[r] = load_16(b + row_b[r], inside);
    column += warps * kStep;
    dy += warps * (kStep / 8);
    b += warps * (kStep / 8);
  };

  float d[kRanks / 16][kTiles][4] = {};  // [16 columns of the rank, 8 rows] each
  DsStep<kRanks, kTiles> now, next;
  int step = own * kStep;
  if constexpr (sizeof(now) <= 128) {  // registers enough to have the next step on its way
    load(now);
    for (; step < job.n; step += 2 * warps * kStep) {
      load(next);
      multiply_step<T>(d, now);
      load(now);
      multiply_step<T>(d, next);
    }
  } else {
    for (; step < job.n; step += warps * kStep) {
      load(now);
      multiply_step<T>(d, now);
    }
  }

#pragma unroll
  for (unsigned turn = 0; turn < 2; ++turn) {
    if (warp / kSlots == turn) {
#pragma unroll
      for (int r = 0; r < kRanks / 16; ++r)
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& at = shared.slot[warp % kSlots][8 * i + 2 * t + e % 2][16 * r + e / 2 * 8 + g];
            at = turn == 0 ? d[r][i][e] : at + d[r][i][e];
          }
    }
    __syncthreads();
  }
  constexpr unsigned kSums = kRows * kRanks;
  constexpr int kEach = kSums / kThreads;  // of a thread
  static_assert(kSums % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    unsigned e = i * kThreads + thread;
    float* at = &shared.slot[0][e / kRanks][e % kRanks];
    float sum = *at;
#pragma unroll
    for (int slot = 1; slot < kSlots; ++slot) sum += at[slot * kRows * Memory::kStride];
    *at = sum;
  }
  Blocks::barrier();
  // Each block adds its share. Nothing is stored before the last barrier, which would wait for it.
  float sum[kEach] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    unsigned e = (i * size + rank) * kThreads + thread;
    if (e < kSums) {
      const float* at = &shared.slot[0][e / kRanks][e % kRanks];
      if (size == kBlocksOfCluster) {
#pragma unroll
        for (int block = 0; block < kBlocksOfCluster; ++block)
          sum[i] += *Blocks::of_rank(at, block);
      } else {
#pragma unroll 1
        for (int block = 0; block < size; ++block) sum[i] += *Blocks::of_rank(at, block);
      }
    }
  }
  Blocks::barrier();  // until here others read this block's sums
  T* ds = static_cast<T*>(job.ds.data);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    unsigned e = (i * size + rank) * kThreads + thread;
    int m = m0 + static_cast<int>(e / kRanks), c = first_rank + static_cast<int>(e % kRanks);
    if (e < kSums && m < call.M)
      ds[m * job.ds.stride + c] = from_float<T>(job.valid[c] ? call.scale * sum[i] : 0.0f);
  }
}

template <typename T, int kRanks, int kTiles>
void launch_ds(DsCall& call, int jobs, int R, cudaStream_t stream) {
  int size = cluster_size(kBlocksOfCluster);
  call.row_blocks = divide_up(call.M, 8 * kTiles);
  call.two = R > kRanks;
  int clusters = call.row_blocks * (call.two ? 2 : 1) * jobs;
  launch_cluster<kThreads>(&ds_kernel<T, kRanks, kTiles>, clusters * size, size,
                           sizeof(DsShared<kRanks, kTiles>), stream, call);
}

template <typename T>
void make_ds(DsCall& call, int jobs, int R, cudaStream_t stream) {
  // b is read once for 64 rows where these give blocks for most of an H100.
  bool many = divide_up(call.M, 64) * jobs * kBlocksOfCluster >= kEnoughBlocks / 3;
  if (R > 16) {
    launch_ds<T, 32, 4>(call, jobs, R, stream);
  } else if (many) {
    launch_ds<T, 16, 8>(call, jobs, R, stream);
  } else {
    launch_ds<T, 16, 4>(call, jobs, R, stream);
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
  int width, first_block;
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
  // A stage: x [kUnit, kStride], words [kUnit, kStrideWords], s [kUnit, kStrideS].
  static constexpr int kWords = kUnit * kStride, kS = kWords + kUnit * kStrideWords;
  static constexpr int kStage = kS + kUnit * kStrideS;
  static constexpr int kStrideSum = kColumns + 4;
  using Slot = float[kRanks][kStrideSum];
  static constexpr size_t kOfStages = sizeof(T) * kStage * kStages * kWarps;
  static constexpr size_t kOfSums = sizeof(Slot) * kSlots;
  static constexpr size_t kBytes = kOfStages > kOfSums ? kOfStages : kOfSums;
  static_assert(kBytes <= kMostShared && kStage % 8 == 0);
};

// Where the first run of a block begins in x.
__device__ __forceinline__ int first_column(int block, bool spread) {
  if (!spread) return block * kColumns;
  return block / 16 * 1024 + block / 4 % 4 * kRuns * 64 + block % 4 * kRun;
}

template <typename T, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks == 1 ? 4 : kBlocks == 2 ? 3 : 2)
    product_kernel(const __grid_constant__ ProductCall call) {
  using Shared = ProductShared<T, kBlocks>;
  constexpr int kRanks = Shared::kRanks;
  LORAPAR_SHARED(unsigned char, shared);
  wait_for_previous();
  int block = static_cast<int>(blockIdx.x), i_product = call.products - 1;
  while (i_product > 0 && block < call.of[i_product].first_block) --i_product;
  const Product& of = call.of[i_product];
  block -= of.first_block;
  bool spread = of.bits != nullptr;
  int first = first_column(block, spread), step = spread ? 64 : kRun, M = call.M;
  if (first >= of.width) return;  // the whole block
  int first_rank = static_cast<int>(blockIdx.y) * kRanks;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* stages = reinterpret_cast<T*>(shared) + warp * kStages * Shared::kStage;
  settle(stages);

  // What a lane copies next, how many rows are left from there on, and where in a stage it goes.
  // Past the last row and column it takes 0 bytes, which reads nothing.
  constexpr int kRowsOfS = kBlocks < 2 ? kUnit : 32 / kBlocks;  // that a warp copies at once
  int row_x = lane / 8, row_words = lane / 2, row_s = lane / kBlocks;
  int k = first + lane % 8 / 2 * step + lane % 2 * 8, m0 = warp * kUnit;
  bool inside = k < of.width;
  const T* x = static_cast<const T*>(of.x.data) + (m0 + row_x) * of.x.stride + k;
  const int16_t* words = of.bits + (m0 + row_words) * call.words + word_of(first) + lane % 2 * 8;
  const T* s = static_cast<const T*>(of.s.data) + (m0 + row_s) * of.s.stride + first_rank +
               lane % kBlocks * 8;
  int rows = of.s.data ? M : 0;
  int left_x = inside ? M - m0 - row_x : 0, left_words = spread ? M - m0 - row_words : 0;
  int left_s = kBlocks > 1 || lane < kUnit ? M - m0 - row_s : 0;
  int to_x = row_x * Shared::kStride + lane % 8 * 8;
  int to_words = Shared::kWords + row_words * Shared::kStrideWords + lane % 2 * 8;
  int to_s = Shared::kS + row_s * Shared::kStrideS + lane % kBlocks * 8;
  settle(to_x);
  settle(to_words);
  settle(to_s);
  auto copy = [&](T* to) {
    if (m0 < rows) {
#pragma unroll
      for (int i = 0; i < kUnit; i += 4)
        cp_async(to + to_x + i * Shared::kStride, x + i * of.x.stride, i < left_x ? 16 : 0);
      if (spread) cp_async(to + to_words, words, 0 < left_words ? 16 : 0);
#pragma unroll
      for (int i = 0; i < kUnit; i += kRowsOfS)
        if (kBlocks > 1 || lane < kUnit)
          cp_async(to + to_s + i * Shared::kStrideS, s + i * of.s.stride, i < left_s ? 16 : 0);
    }
    constexpr int kNext = kWarps * kUnit;
    m0 += kNext;
    left_x -= kNext;
    left_words -= kNext;
    left_s -= kNext;
    x += kNext * of.x.stride;
    words += kNext * call.words;
    s += kNext * of.s.stride;
    cp_async_commit();
  };

  float d[kRuns][kBlocks][4] = {};  // [16 columns of x, kRanks] each
  int bit = bit_of(first);
  // Where this lane's row lies that ldmatrix_transposed wants, as load_fragment<true> has it.
  int row = lane / 16 * 8 + lane % 8, half = lane / 8 % 2 * 8;
  int of_x = row * Shared::kStride + half;
  int of_words = Shared::kWords + row * Shared::kStrideWords + half;
  int of_s = Shared::kS + lane % 16 * Shared::kStrideS + (kBlocks == 1 ? 0 : lane / 16 * 8);
  settle(of_x);
  settle(of_words);
  settle(of_s);
  copy(stages);
  for (int m = warp * kUnit, now = 0; m < rows; m += kWarps * kUnit, now = Shared::kStage - now) {
    cp_async_wait<kStages - 2>();
    __syncwarp();
    copy(stages + (Shared::kStage - now));
    const T* stage = stages + now;
    uint32_t right[kBlocks][2];
#pragma unroll
    for (int r = 0; r < kBlocks; r += 2) {
      uint32_t two[4];  // or twice the same
      ldmatrix_transposed(two, stage + of_s + r * 8);
      right[r][0] = two[0];
      right[r][1] = two[1];
      if constexpr (kBlocks > 1) {
        right[r + 1][0] = two[2];
        right[r + 1][1] = two[3];
      }
    }
    uint32_t word[4] = {};
    if (spread) {  // words lie as x does, so that the same load puts them beside its elements
      ldmatrix_transposed(word, stage + of_words);
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] >>= bit;
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      uint32_t left[4];
      ldmatrix_transposed(left, stage + of_x + run * kRun);
      if (spread) {
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = times_keep(left[i], keep_pair(word[i], run), T());
      }
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) mma(d[run][r], left, right[r], T());
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
            float& at = slots[warp % kSlots][8 * r + 2 * t + e % 2][run * kRun + e / 2 * 8 + g];
            at = turn == 0 ? d[run][r][e] : at + d[run][r][e];
          }
    }
  }
  __syncthreads();
  // A thread has one column of dA [r, K], and the ranks step_j apart; or one rank of dB [N, r].
  const Gradient& gradient = of.gradient;
  bool rank_first = of.rank_first;
  constexpr int kStepJ = kThreads / kColumns, kStepColumn = kThreads / kRanks;
  int i = threadIdx.x, j = rank_first ? i / kColumns : i % kRanks;
  int column = rank_first ? i % kColumns : i / kRanks, step_j = rank_first ? kStepJ : 0;
  int step_column = rank_first ? 0 : kStepColumn;
  k = first + column / kRun * step + column % kRun;
  int64_t at = rank_first ? int64_t{j} * of.width + k : int64_t{k} * gradient.rank + j;
  int64_t step_at = int64_t{rank_first ? of.width : gradient.rank} * (step_j + step_column);
  for (int first_j = 0; first_j < gradient.rank; first_j += kRanks) {
    int64_t to = at + int64_t{first_j} * (rank_first ? of.width : 1);
#pragma unroll 2
    for (int pass = 0; pass < kRanks * kColumns / kThreads; ++pass, to += step_at) {
      int own_j = first_j + j + pass * step_j, move = pass * step_column;
      if (own_j >= gradient.rank || k + move >= of.width) continue;
      int packed = packed_column(gradient, own_j), c = packed - first_rank;
      if (packed < 0 ? first_rank > 0 : c < 0 || c >= kRanks) continue;  // another block's
      float sum = 0.0f;
      if (packed >= 0 && trains(gradient, to)) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) sum += slots[slot][c][column + move];
        sum *= gradient.scale;
      }
      store(gradient.out, gradient.type, to, sum);
    }
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
    takes = !call.of_x[i].da.sum && call.K % 8 == 0 && call.K < kMostStride && fits(call.x) &&
            fits(call.of_x[i].ds);
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
    products.blocks += one.bits ? divide_up(one.width, 1024) * 16 : divide_up(one.width, kColumns);
    products.of[products.products++] = one;
    ranks = one.gradient.rank > ranks ? one.gradient.rank : ranks;
  };
  for (int i = 0; i < call.xs; ++i) {  // first, as they take longest
    const XProjection& one = call.of_x[i];
    add({call.x, one.ds, one.bits, one.da, static_cast<int>(call.K), 0, true});
  }
  for (int i = 0; i < call.dys; ++i) {
    const DyProjection& one = call.dy[i];
    add({one.dy, one.s, nullptr, one.db, static_cast<int>(one.n), 0, false});
  }
  if (products.products > 0)  // live columns are no more than r
    with_type([&](auto zero) {
      launch_products<decltype(zero)>(products, ranks < call.R ? ranks : call.R, stream);
    });
}

}  // namespace lorapar

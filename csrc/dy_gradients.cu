// dS = dY b^T and dB = dY^T S of all projections of one x, from one read of dY.
//
// Computes   ds_partial[g, m, r] = sum of dY[m, n] b[r, n] over the n of column block g
//            db_partial[s, n, c] = sum of dY[m, n] S[m, c] over the m of split s
//            dS = scale * sum over g, 0 where not valid      dB = db.scale * sum over s, see finish
//
// Shapes     dY [M, N]   b [R, N] packed   S, dS [M, R]   dB [N, r]
// Cost       one read of dY for each kRanks columns of the rank; partial sums of
//            4 M R N/kColumns + 4 splits N R bytes, each way. Two launches: the products and
//            `finish`; dB of one split is written at once. Examples: a launch for dS, one for dB.
//
// A block walks down the rows of its split in tiles of dY [kRows, kColumns]. Each tile in shared
// memory serves both products; dB stays in registers until the last. kColumns is wide, as partial
// sums of dS cost 4 R/kColumns bytes an element of dY, written and read again.
#include "gradients.h"

namespace lorapar {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostRanks = 64;  // columns of the rank that a block does

template <typename T>
constexpr int kColumns = 512 / sizeof(T);  // of dY
template <typename T>
constexpr int kRowsOf(int ranks) {
  return sizeof(T) == 2 && ranks <= 32 ? 64 : 32;
}

struct DyJob {
  Matrix dy, b, s;
  int64_t n;
  int first_block;
  bool aligned_dy, aligned_b, aligned_s;
  float* ds;        // [column blocks, M, R]; null: no dS
  float* db;        // [splits, N, R]; null: no dB, or it is written at once
  bool makes_db;
  Gradient gradient;
};

struct DyCall {
  DyJob job[kMaxProjections];
  int jobs = 0;
  int blocks = 0;  // of columns, of all jobs
  Splits splits;
  int64_t M;
  int R;
};

// Shared memory: b, then kStages tiles of dY and S; at the end dB.
template <typename T, int kRanks>
struct DyShared {
  static constexpr int kRows = kRowsOf<T>(kRanks);
  static constexpr int kStride = kColumns<T> + 8, kStrideS = kRanks + 8;  // no bank conflicts
  static constexpr int kB = kRanks * kStride;
  static constexpr int kDy = kRows * kStride, kStage = kDy + kRows * kStrideS;
  static constexpr int kFit = (kMostShared / sizeof(T) - kB) / kStage;
  static constexpr int kStages = kFit < 3 ? kFit : 3;
  static constexpr size_t kProducts = (kB + kStages * kStage) * sizeof(T);
  static constexpr int kStrideDb = kRanks + 1;
  static constexpr size_t kDb = sizeof(float) * kColumns<T> * kStrideDb;
  static constexpr size_t kBytes = kProducts > kDb ? kProducts : kDb;
  static_assert(kStages >= 2 && kBytes <= kMostShared);
};

template <typename T, int kRanks>
__global__ void __launch_bounds__(kThreads, 2)
    dy_gradients_kernel(const __grid_constant__ DyCall call) {
  using Shared = DyShared<T, kRanks>;
  constexpr int kRows = Shared::kRows, kStages = Shared::kStages;
  constexpr int kStride = Shared::kStride, kStrideS = Shared::kStrideS;
  constexpr int kTiles = kColumns<T> / kWarps / 16;  // of a warp's columns in dB
  LORAPAR_SHARED(T, shared);
  wait_for_previous();
  int i = call.jobs - 1;
  while (i > 0 && static_cast<int>(blockIdx.x) < call.job[i].first_block) --i;
  const DyJob& job = call.job[i];
  int block = static_cast<int>(blockIdx.x) - job.first_block;
  int first_rank = static_cast<int>(blockIdx.z) * kRanks;
  int64_t M = call.M, n0 = int64_t{block} * kColumns<T>, start, stop;
  rows_of(call.splits, blockIdx.y, M, start, stop);
  bool makes_ds = job.ds != nullptr, makes_db = job.makes_db;
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  const T* dy = static_cast<const T*>(job.dy.data) + n0;
  const T* s = static_cast<const T*>(job.s.data) + first_rank;
  T* b = shared;
  T* stages = shared + Shared::kB;
  int tiles = stop > start ? static_cast<int>((stop - start + kRows - 1) / kRows) : 0;
  auto copy = [&](int tile) {
    if (tile < tiles) {
      T* to = stages + tile % kStages * Shared::kStage;
      int64_t m = start + int64_t{tile} * kRows;
      copy_tile<kRows, kColumns<T>, kThreads>(to, kStride, dy + m * job.dy.stride, job.dy.stride,
                                              stop - m, job.n - n0, job.aligned_dy);
      if (makes_db)
        copy_tile<kRows, kRanks, kThreads>(to + Shared::kDy, kStrideS, s + m * job.s.stride,
                                           job.s.stride, stop - m, kRanks, job.aligned_s);
    }
    cp_async_commit();
  };

  if (makes_ds)
    copy_tile<kRanks, kColumns<T>, kThreads>(
        b, kStride, static_cast<const T*>(job.b.data) + first_rank * job.b.stride + n0,
        job.b.stride, kRanks, job.n - n0, job.aligned_b);
  for (int tile = 0; tile < kStages - 1; ++tile) copy(tile);

  float db[kTiles][kRanks / 8][4] = {};  // [16 columns, kRanks] each
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    copy(tile + kStages - 1);
    const T* dy_tile = stages + tile % kStages * Shared::kStage;

    // dS: 16 rows and 16 columns of the rank a warp, over all columns of the tile.
    constexpr int kUnits = kRows / 16 * (kRanks / 16);
    static_assert(kUnits <= kWarps);
    if (makes_ds && warp < kUnits) {
      int row = warp % (kRows / 16) * 16, rank = warp / (kRows / 16) * 16;
      float ds[2][4] = {};
#pragma unroll 4
      for (int n = 0; n < kColumns<T>; n += 16) {
        Fragment<T> fragment;
        load_fragment<false>(fragment, dy_tile + row * kStride + n, kStride);
        multiply<false>(ds, fragment, b + rank * kStride + n, kStride);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t m = start + int64_t{tile} * kRows + row + half * 8 + g;
        if (m < stop) {
          float* to = job.ds + (block * M + m) * call.R + first_rank + rank + 2 * t;
          *reinterpret_cast<float2*>(to) = {ds[0][2 * half], ds[0][2 * half + 1]};
          *reinterpret_cast<float2*>(to + 8) = {ds[1][2 * half], ds[1][2 * half + 1]};
        }
      }
    }

    // dB: its own columns of the tile a warp, over all rows.
    if (makes_db) {
#pragma unroll
      for (int m = 0; m < kRows; m += 16) {
#pragma unroll
        for (int c = 0; c < kTiles; ++c) {
          Fragment<T> fragment;
          load_fragment<true>(fragment, dy_tile + m * kStride + (warp * kTiles + c) * 16, kStride);
          multiply<true>(db[c], fragment, dy_tile + Shared::kDy + m * kStrideS, kStrideS);
        }
      }
    }
  }
  cp_async_wait<0>();
  if (!makes_db) return;

  if (job.db) {
    float* partial = job.db + blockIdx.y * job.n * call.R + first_rank + 2 * t;
#pragma unroll
    for (int c = 0; c < kTiles; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t n = n0 + (warp * kTiles + c) * 16 + half * 8 + g;
        if (n < job.n) {
#pragma unroll
          for (int r = 0; r < kRanks / 8; ++r)
            *reinterpret_cast<float2*>(partial + n * call.R + r * 8) = {db[c][r][2 * half],
                                                                        db[c][r][2 * half + 1]};
        }
      }
    return;
  }

  // All rows were here: dB [N, r] itself, through shared memory, as r may be odd and columns move.
  constexpr int kStrideDb = Shared::kStrideDb;
  float* columns = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kTiles; ++c)
#pragma unroll
    for (int r = 0; r < kRanks / 8; ++r)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        columns[((warp * kTiles + c) * 16 + e / 2 * 8 + g) * kStrideDb + r * 8 + 2 * t + e % 2] =
            db[c][r][e];
  __syncthreads();
  const Gradient& gradient = job.gradient;
  int64_t count = (job.n - n0 < kColumns<T> ? job.n - n0 : kColumns<T>)*gradient.rank;
  for (int e = threadIdx.x; e < count; e += kThreads) {
    int column = packed_column(gradient, e % gradient.rank), c = column - first_rank;
    if (column < 0 ? first_rank > 0 : c < 0 || c >= kRanks) continue;  // another block's
    int64_t at = n0 * gradient.rank + e;
    bool frozen = column < 0 || !trains(gradient, at);
    float v = frozen ? 0.0f : gradient.scale * columns[e / gradient.rank * kStrideDb + c];
    store(gradient.out, gradient.type, at, v);
  }
}

template <typename T>
void launch_products(const DyCall& call, cudaStream_t stream) {
  if (call.blocks == 0 || call.splits.count == 0) return;
  auto run = [&](auto kernel, size_t shared, int ranks) {
    launch(kernel, dim3(call.blocks, call.splits.count, call.R / ranks), kThreads, shared, stream,
           call);
  };
  if (call.R == 16) {
    run(dy_gradients_kernel<T, 16>, DyShared<T, 16>::kBytes, 16);
  } else if (call.R == 32) {
    run(dy_gradients_kernel<T, 32>, DyShared<T, 32>::kBytes, 32);
  } else {
    run(dy_gradients_kernel<T, 64>, DyShared<T, 64>::kBytes, 64);
  }
}

// ---- What goes where.
struct DyPlan {
  Splits splits, of_db;  // of the rows, for dS and for dB
  int64_t column_blocks[kMaxProjections];
  int64_t ds[kMaxProjections], db[kMaxProjections];  // partial sums: where in the workspace
  bool makes_db[kMaxProjections], partial_db;
  int64_t floats = 0;
};

DyPlan plan(const DyProjection* of, int projections, int64_t M, int R, Type type,
            Examples examples) {
  DyPlan p;
  int columns = type == Type::f32 ? kColumns<float> : kColumns<__half>;
  int rows = type == Type::f32 ? kRowsOf<float>(R) : kRowsOf<__half>(R);
  int64_t blocks = 0;
  for (int i = 0; i < projections; ++i) {
    p.column_blocks[i] = divide_up(of[i].n, int64_t{columns});
    blocks += p.column_blocks[i] * divide_up(R, kMostRanks);
  }
  p.splits = p.of_db = split_rows(M, rows, blocks, divide_up(M, int64_t{rows}));
  if (examples.bounds) {
    p.of_db.count = examples.count;
    p.of_db.bounds = examples.bounds;
  }
  p.partial_db = p.of_db.count != 1 || examples.bounds;
  for (int i = 0; i < projections; ++i) {
    p.makes_db[i] = wanted(of[i].db) && of[i].db.trained > 0 && of[i].s.data;
    p.ds[i] = p.floats;
    if (of[i].ds.data) p.floats += p.column_blocks[i] * M * R;
    p.db[i] = p.floats;
    if (p.makes_db[i] && p.partial_db) p.floats += p.of_db.count * of[i].n * R;
  }
  return p;
}

// One launch of products: dS, dB or both.
void products(const DyProjection* of, int projections, const DyPlan& p, int64_t M, int R, Type type,
              bool makes_ds, bool makes_db, float* workspace, cudaStream_t stream) {
  DyCall call;
  call.splits = makes_db ? p.of_db : p.splits;
  call.M = M;
  call.R = R;
  for (int i = 0; i < projections; ++i) {
    const DyProjection& one = of[i];
    DyJob job = {};
    if (makes_ds && one.ds.data) job.ds = workspace + p.ds[i];
    job.makes_db = makes_db && p.makes_db[i];
    if (job.makes_db && p.partial_db) job.db = workspace + p.db[i];
    if (!job.ds && !job.makes_db) continue;
    job.dy = one.dy;
    job.b = one.b;
    job.s = one.s;
    job.n = one.n;
    job.gradient = one.db;
    by_type(type, [&](auto zero) {
      using T = decltype(zero);
      job.aligned_dy = aligned_16<T>(one.dy.data, one.dy.stride);
      job.aligned_b = aligned_16<T>(one.b.data, one.b.stride);
      job.aligned_s = aligned_16<T>(one.s.data, one.s.stride);
    });
    job.first_block = call.blocks;
    call.blocks += static_cast<int>(p.column_blocks[i]);
    call.job[call.jobs++] = job;
  }
  by_type(type, [&](auto zero) { launch_products<decltype(zero)>(call, stream); });
}

}  // namespace

size_t dy_gradients_workspace(const DyProjection* of, int projections, int64_t M, int R, Type type,
                              Examples examples) {
  return plan(of, projections, M, R, type, examples).floats * sizeof(float);
}

void dy_gradients(const DyProjection* of, int projections, int64_t M, int R, float scale, Type type,
                  Examples examples, void* workspace, cudaStream_t stream) {
  DyPlan p = plan(of, projections, M, R, type, examples);
  auto* partial = static_cast<float*>(workspace);
  if (examples.bounds) {  // dS has all rows, dB those of examples
    products(of, projections, p, M, R, type, true, false, partial, stream);
    products(of, projections, p, M, R, type, false, true, partial, stream);
  } else {
    products(of, projections, p, M, R, type, true, true, partial, stream);
  }
  FinishCall rest;
  for (int i = 0; i < projections; ++i) {
    if (of[i].ds.data)
      rest.add_ds(of[i].ds, type, of[i].valid, scale, partial + p.ds[i],
                  static_cast<int>(p.column_blocks[i]), R, M);
    if (wanted(of[i].db) && (p.partial_db || !p.makes_db[i]))
      rest.add_gradient(of[i].db, partial + p.db[i], p.makes_db[i] ? p.of_db.count : 0, R, of[i].n,
                        false);
  }
  finish(rest, stream);
}

}  // namespace lorapar

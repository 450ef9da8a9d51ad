// Few rows, as decoding has them: the adapter on top of a base layer's output, in one launch.
//
// Computes  S = drop(x) A^T / (1-p), rounded to x's type        out += scale * S B^T
//           A and B are read as they are, and rounded to x's type in registers; live columns alone
// Shapes    x [M, K], M <= kDecodeRows   A [r, K]   B [N, r]   S [M, r]   out [M, N]
// Cost      bound by latency: M r (K + N) products are nothing. A block owns 64 columns of out
//           and needs all of S. On sm_90 the blocks of a cluster split K and read each other's sums
//           from shared memory, so that x and A are read from L2 once a cluster; elsewhere a
//           cluster is one block, which reads all of x and A. Dropout takes a Philox call for
//           eight elements of x, in every cluster anew: its bits are never in global memory.
//
// A pass takes up to 64 of the r columns; its S stays in shared memory. The order of every sum is
// fixed.
#include <algorithm>
#include <type_traits>

#include "cluster.h"
#include "kernels.h"
#include "ptx.h"
#include "tile.h"

namespace lorapar {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSlice = 64;             // columns of out of a block
constexpr int kRanks = 64;             // rank columns of a pass
constexpr int kStride = kRanks + 8;    // of a row of S or B in shared memory: no bank conflicts
constexpr int kBlocksOfCluster = 8;
constexpr int kDepth = 32;             // of K that a warp takes at a time: a piece
constexpr int kDrawn = 512;            // of K: the columns that 64 Philox calls draw for one row
constexpr int kPieces = kDrawn / kDepth;

struct Call {
  DecodeProjection of[kMaxProjections];
  int end[kMaxProjections];  // the block past each projection's last
  Matrix x;
  int64_t M, K;
  DecodeDropout dropout;
  uint32_t number[kMaxProjections];  // among all projections of x, as dropout counts them
};

// From and to the bits of a 16-bit number in the lower half of a word.
template <typename T>
__device__ __forceinline__ T as_16(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    return __ushort_as_half(static_cast<unsigned short>(word));
  } else {
    return __ushort_as_bfloat16(static_cast<unsigned short>(word));
  }
}
template <typename T>
__device__ __forceinline__ uint32_t bits_16(T v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(v);
  } else {
    return __bfloat16_as_ushort(v);
  }
}

// One element, by the bits that `load_raw` found, as T.
template <typename T>
__device__ __forceinline__ T converted(uint32_t raw, Type type) {
  if (type == Type::f32) return from_float<T>(__uint_as_float(raw));
  if (type == Type::f16) return from_float<T>(__half2float(as_16<__half>(raw)));
  return from_float<T>(__bfloat162float(as_16<__nv_bfloat16>(raw)));
}
__device__ __forceinline__ uint32_t load_raw(const void* data, int64_t i, Type type) {
  if (type == Type::f32) return static_cast<const uint32_t*>(data)[i];
  return static_cast<const uint16_t*>(data)[i];
}

// What a warp takes of K: a turn of those of its block's warps that have the same rank columns, and
// of the cluster's blocks.
struct Share {
  int rank, size;   // of the block in its cluster
  int part, parts;  // of the warp in its block
};

// Elements 2 i and 2 i + 1 in one register.
template <typename T>
__device__ __forceinline__ uint32_t pair(const Eight<T>& of, int i) {
  return reinterpret_cast<const uint32_t*>(of.v)[i];
}

// Of one warp: d [16 rank columns, 8 kTiles rows of x] += A x^T for one piece of K, of which a lane
// has eight columns of two rows of A and of kTiles rows of x. The k of a product come in an order
// of their own, the same for A and x, in which eight neighbours lie in one lane.
template <typename T, typename S, int kTiles>
__device__ __forceinline__ void add_piece(float (&d)[kTiles][4], const Eight<S> (&read)[2],
                                          const Eight<T> (&b)[kTiles]) {
  Eight<T> a[2] = {convert<T>(read[0]), convert<T>(read[1])};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t left[4] = {pair(a[0], 2 * half), pair(a[1], 2 * half), pair(a[0], 2 * half + 1),
                        pair(a[1], 2 * half + 1)};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t right[2] = {pair(b[i], 2 * half), pair(b[i], 2 * half + 1)};
      mma(d[i], left, right, T());
    }
  }
}

// Over the pieces of K from `piece` on, `step` apart.
template <typename T, typename S, int kTiles>
__device__ __forceinline__ void shrink(float (&d)[kTiles][4], const S* low, const S* high,
                                       const Call& call, int64_t piece, int64_t step,
                                       bool aligned_a, bool aligned_x) {
  [[maybe_unused]] constexpr int kUnroll = kTiles == 1 ? 2 : 1;
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const T* x = static_cast<const T*>(call.x.data);
#pragma unroll kUnroll
  for (; piece * kDepth < call.K; piece += step) {
    int64_t k = piece * kDepth + 8 * t;
    Eight<S> read[2] = {load_8(low, k, low == nullptr ? 0 : call.K, aligned_a),
                        load_8(high, k, high == nullptr ? 0 : call.K, aligned_a)};
    Eight<T> b[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      int m = 8 * i + g;
      b[i] = load_8(x + m * call.x.stride, k, m < call.M ? call.K : 0, aligned_x);
    }
    add_piece(d, read, b);
  }
}

// Dropout's bits for the columns of x from k on, a multiple of kDrawn: bit j of word (m, l) keeps
// element (m, k + 64 j + l). The halves of every other row are exchanged: no bank conflicts.
using Words = int16_t[64];
__device__ __forceinline__ int place_of(int m, int l) { return l ^ m % 2 * 32; }

struct Drawing {
  uint64_t seed;
  uint32_t projection;
  Words* words;  // [2][rows]: those of one round may be read while the next are drawn
};

template <int kRows>
__device__ __forceinline__ void draw(Words* words, const Drawing& of, const Call& call, int64_t k) {
  int rows = k >= call.K ? 0 : call.M < kRows ? static_cast<int>(call.M) : kRows;
#pragma unroll 1
  for (int i = Cluster<kThreads>::thread(); i < rows * 64; i += kThreads) {
    int m = i / 64, l = i % 64;
    uint32_t drawn[4], word = 0;
    philox(drawn, of.seed, static_cast<uint32_t>(k / 8) + l, m, of.projection);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t one = j % 2 == 0 ? drawn[j / 2] << 16 : drawn[j / 2];
      if (one >= call.dropout.drop_below) word |= 1u << j;
    }
    words[m][place_of(m, l)] = static_cast<int16_t>(word);
  }
}

// Eight neighbours of row m, from column 64 `bit` + l on of those drawn for, times 0 or 1.
template <typename T>
__device__ __forceinline__ void drop(Eight<T>& x, const Words* words, int m, int bit, int l) {
  uint4 of = *reinterpret_cast<const uint4*>(&words[m][place_of(m, l)]);
  uint32_t word[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    reinterpret_cast<uint32_t*>(x.v)[i] = times_keep(pair(x, i), keep_pair(word[i], bit), T());
}

// `shrink` of drop(x). A round takes kDrawn columns a block: all of its threads draw the bits,
// while the first loads are on their way, and its warps take turns at the pieces. As many rounds,
// and barriers, for every block of a cluster.
template <typename T, typename S, int kTiles>
__device__ __forceinline__ void shrink_dropped(float (&d)[kTiles][4], const S* low, const S* high,
                                               const Call& call, const Share& share,
                                               bool aligned_a, bool aligned_x, const Drawing& of) {
  constexpr int kAhead = kTiles == 1 ? 2 : 1;  // pieces whose loads are in flight together
  static_assert(kPieces % (kAhead * kWarps) == 0, "every warp has as many pieces of a round");
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const T* x = static_cast<const T*>(call.x.data);
  Words* words = of.words;
  int next = 8 * kTiles;
  for (int64_t begin = 0; begin < call.K; begin += share.size * kDrawn) {
    int64_t first = begin + share.rank * kDrawn;
#pragma unroll 1
    for (int piece = share.part; piece < kPieces; piece += kAhead * share.parts) {
      Eight<S> read[kAhead][2];
      Eight<T> b[kAhead][kTiles];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        int64_t k = first + (piece + j * share.parts) * kDepth + 8 * t;
        read[j][0] = load_8(low, k, low == nullptr ? 0 : call.K, aligned_a);
        read[j][1] = load_8(high, k, high == nullptr ? 0 : call.K, aligned_a);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          int m = 8 * i + g;
          b[j][i] = load_8(x + m * call.x.stride, k, m < call.M ? call.K : 0, aligned_x);
        }
      }
      if (piece == share.part) {
        draw<8 * kTiles>(words, of, call, first);
        __syncthreads();
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        int at = (piece + j * share.parts) * kDepth;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) drop(b[j][i], words, 8 * i + g, at / 64, at % 64 + 8 * t);
        add_piece(d, read[j], b[j]);
      }
    }
    words += next, next = -next;
  }
}

// A warp's share of the sums for rank columns c to c + 15 of the live ones, whatever A's type.
template <typename T, bool kDrop, int kTiles>
__device__ __forceinline__ void shrink_any(float (&d)[kTiles][4], const DecodeProjection& p, int c,
                                           const Call& call, const Share& share,
                                           const Drawing& of) {
  int64_t piece = static_cast<int64_t>(share.rank) * share.parts + share.part;
  int64_t step = static_cast<int64_t>(share.size) * share.parts;
  bool aligned_x = aligned_16<T>(call.x.data, call.x.stride);
  auto with = [&](auto zero) {
    using S = decltype(zero);
    const S* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int column = c + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * i;
      rows[i] = nullptr;
      if (column < p.columns) {
        int64_t row = p.live ? p.live[column] : column;
        rows[i] = static_cast<const S*>(p.a.data) + row * p.a.stride;
      }
    }
    bool aligned_a = aligned_16<S>(p.a.data, p.a.stride);
    if constexpr (kDrop) {
      shrink_dropped<T>(d, rows[0], rows[1], call, share, aligned_a, aligned_x, of);
    } else {
      shrink<T>(d, rows[0], rows[1], call, piece, step, aligned_a, aligned_x);
    }
  };
  if (p.a_type == Type::f32) {
    with(float());
  } else if (p.a_type == Type::f16) {
    with(__half());
  } else {
    with(__nv_bfloat16());
  }
}

// What a block has in shared memory.
template <int kRows, bool kDrop>
struct SharedWords {};
template <int kRows>
struct SharedWords<kRows, true> {
  alignas(16) Words words[2][kRows];
};
template <typename T, int kTiles, bool kDrop>
struct Shared : SharedWords<8 * kTiles, kDrop> {
  static constexpr int kRows = 8 * kTiles;               // of x
  static constexpr int kRowsOfS = kRows < 16 ? 16 : kRows;  // of S: tiles of 16
  float partial[kWarps][16][kRows];   // of each warp: rank columns, rows of x
  float sum[kRanks][kRows];           // of this block; the others of the cluster read it
  T s[kRowsOfS][kStride];
  T b[kSlice][kStride];
};

// Column n of the slice, 0 to 63, lies in this row of Shared.b: a lane of a product then has eight
// neighbouring columns of out.
__device__ __forceinline__ int place_of(int n) {
  return n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2;
}

template <typename T, int kTiles, bool kDrop>
__global__ void __launch_bounds__(kThreads, kTiles <= 2 ? 2 : 1)
    decode_kernel(const __grid_constant__ Call call) {
  wait_for_previous();
  using Blocks = Cluster<kThreads>;
  using Memory = Shared<T, kTiles, kDrop>;
  constexpr int kRows = Memory::kRows;
  Memory& shared = *reinterpret_cast<Memory*>(Blocks::shared());
  int thread = Blocks::thread(), warp = thread / 32, lane = thread % 32;
  int rank = Blocks::rank(), size = Blocks::size();
  int i_projection = 0, begin = 0;
  while (Blocks::block() >= call.end[i_projection]) begin = call.end[i_projection++];
  const DecodeProjection& p = call.of[i_projection];
  int64_t n0 = static_cast<int64_t>(Blocks::block() - begin) * kSlice;
  Drawing drawing = {};
  if constexpr (kDrop) {
    drawing = {static_cast<uint64_t>(*call.dropout.seed), call.number[i_projection],
               shared.words[0]};
  }

  // The warp's part of out: rows m0 to m0 + 15, columns 32 of the slice.
  int m0 = warp / 2 * 16, g = lane / 4;
  int64_t n = n0 + warp % 2 * 32 + lane % 4 * 8;
  float out[4][4] = {};

  for (int c0 = 0; c0 < p.columns; c0 += kRanks) {
    int ranks = p.columns - c0 < kRanks ? p.columns - c0 : kRanks;
    int log = ranks <= 16 ? 0 : ranks <= 32 ? 1 : 2;
    int tiles = 1 << log, width = 16 << log;  // tiles of 16 rank columns
    // B is on its way while S is computed.
    uint32_t raw[kSlice * kRanks / kThreads];
#pragma unroll
    for (int i = 0; i < kSlice * kRanks / kThreads; ++i) {
      raw[i] = 0;
      int c = (i * kThreads + thread) & (width - 1);
      int64_t row = n0 + ((i * kThreads + thread) >> (4 + log));
      if (i < 4 * tiles && c < ranks && row < p.n) {
        int column = p.live ? p.live[c0 + c] : c0 + c;
        raw[i] = load_raw(p.b.data, row * p.b.stride + column, p.b_type);
      }
    }

    // The warps of a block, and the blocks of a cluster, take turns at the pieces of K.
    int parts = kWarps >> log, part = warp >> log, tile = warp & (tiles - 1);
    float d[kTiles][4] = {};
    shrink_any<T, kDrop>(d, p, c0 + 16 * tile, call, {rank, size, part, parts}, drawing);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      int m = 8 * i + 2 * (lane % 4);
      shared.partial[warp][g][m] = d[i][0];
      shared.partial[warp][g][m + 1] = d[i][1];
      shared.partial[warp][g + 8][m] = d[i][2];
      shared.partial[warp][g + 8][m + 1] = d[i][3];
    }
#pragma unroll
    for (int i = 0; i < kSlice * kRanks / kThreads; ++i) {
      int at = i * kThreads + thread;
      if (i < 4 * tiles)
        shared.b[place_of(at >> (4 + log))][at & (width - 1)] = converted<T>(raw[i], p.b_type);
    }
    __syncthreads();
    for (int i = thread; i < width * kRows; i += kThreads) {
      int c = i / kRows, m = i % kRows;
      float sum = 0.0f;
      for (int j = 0; j < parts; ++j) sum += shared.partial[j * tiles + c / 16][c % 16][m];
      shared.sum[c][m] = sum;
    }
    Blocks::barrier();
    for (int i = thread; i < width * kRows; i += kThreads) {
      int c = i / kRows, m = i % kRows;
      float sum = 0.0f;
      for (int j = 0; j < size; ++j) sum += *Blocks::of_rank(&shared.sum[c][m], j);
      if constexpr (kDrop) sum *= call.dropout.scale;
      shared.s[m][c] = from_float<T>(c < ranks ? sum : 0.0f);
    }
    Blocks::barrier();  // also: nobody's sums are needed any longer
    if (m0 < kRows) {
      for (int c = 0; c < width; c += 16) {
        Fragment<T> s;
        load_fragment<false>(s, &shared.s[m0][c], kStride);
        multiply<false>(out, s, &shared.b[warp % 2 * 32][c], kStride);
      }
    }
    __syncthreads();
  }

  if (n >= p.n) return;
  bool whole = aligned_16<T>(p.out.data, p.out.stride) && n + 8 <= p.n;
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    int m = m0 + g + 8 * high;
    if (m >= call.M) continue;
    T* to = static_cast<T*>(p.out.data) + m * p.out.stride + n;
    auto value = [&](int j, T base) {
      return from_float<T>(to_float(base) + p.scale * out[j / 2][2 * high + j % 2]);
    };
    if (whole) {
      uint4 v = *reinterpret_cast<uint4*>(to);
      uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = bits_16(value(2 * i, as_16<T>(words[i]))) |
                   bits_16(value(2 * i + 1, as_16<T>(words[i] >> 16))) << 16;
      *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (n + j < p.n) to[j] = value(j, to[j]);
    }
  }
}

template <typename T, int kTiles>
void run(const Call& call, int blocks, int size, cudaStream_t stream) {
  auto with = [&](auto drops) {
    constexpr bool kDrop = decltype(drops)::value;
    launch_cluster<kThreads>(&decode_kernel<T, kTiles, kDrop>, blocks, size,
                             sizeof(Shared<T, kTiles, kDrop>), stream, call);
  };
  if (call.dropout.seed != nullptr) return with(std::true_type());
  with(std::false_type());
}

template <typename T>
void by_rows(const Call& call, int blocks, int size, cudaStream_t stream) {
  if (call.M <= 8) return run<T, 1>(call, blocks, size, stream);
  if (call.M <= 16) return run<T, 2>(call, blocks, size, stream);
  if (call.M <= 32) return run<T, 4>(call, blocks, size, stream);
  run<T, 8>(call, blocks, size, stream);
}

}  // namespace

void decode(const DecodeProjection* of, int projections, Matrix x, int64_t M, int64_t K, Type type,
            const DecodeDropout& dropout, cudaStream_t stream) {
  int size = cluster_size(kBlocksOfCluster), blocks = 0;
  Call call = {};
  call.x = x, call.M = M, call.K = K, call.dropout = dropout;
  int kept = 0;
  for (int i = 0; i < projections; ++i) {
    if (of[i].n == 0 || of[i].columns == 0) continue;
    call.of[kept] = of[i];
    call.number[kept] = static_cast<uint32_t>(i);
    int64_t slices = divide_up<int64_t>(of[i].n, kSlice);
    blocks += static_cast<int>(divide_up<int64_t>(slices, size)) * size;
    call.end[kept++] = blocks;
  }
  if (blocks == 0 || M == 0) return;
  if (type == Type::f16) {
    by_rows<__half>(call, blocks, size, stream);
  } else {
    by_rows<__nv_bfloat16>(call, blocks, size, stream);
  }
}

}  // namespace lorapar

// The compute copies of the adapters of one x: live columns only, the compute dtype, zeros up to R.
// And the bits of dropout for the same projections.
//
// Computes    a_pack[i·R + c, k] = A_i[live[c], k]               for c < columns, else 0
//             b_pack[c, first_i + n] = scale · B_i[n, live[c]]   for c < columns, else 0
//             valid[i·R + c] = c < columns
//             bits[i, m, w] by Philox, as tile.h says
//
// Shapes      A [r, K], B [N, r] in any type   a_pack [P·R, K], b_pack [R, sum N] in one
// Cost        one launch; r·(K+N) elements read and R·(K+N) written a projection: bound by latency.
//             Eight bits take one Philox call: with many rows its arithmetic binds.
//
// The blocks of A and B come first; they wait for memory while those of the bits compute.
#include "tile.h"

namespace lorapar {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockN = 128, kBlockR = 16;  // of a tile of B, turned in shared memory
static_assert(kBlockN * kBlockR == kThreads * 8, "each thread stores eight elements of a tile");
constexpr int kStride = kBlockN + 8;

struct Packing {
  PackProjection of[kMaxProjections];
  int64_t first_n[kMaxProjections];   // of b_pack
  int first_block[kMaxProjections];
  int projections, blocks_a;
  int64_t K, stride_b_pack;
  int R;
  Draw draw;
  int first_draw;  // block from which on bits are drawn
};

// f of a zero of an adapter's type: one switch, so that what f loads is in flight together.
template <typename F>
__device__ __forceinline__ void as_type(Type type, F&& f) {
  if (type == Type::f32) {
    f(float());
  } else if (type == Type::f16) {
    f(__half());
  } else {
    f(__nv_bfloat16());
  }
}

__device__ __forceinline__ int live_column(const PackProjection& p, int c) {
  return p.live == nullptr ? c : p.live[c];
}

template <typename T>
__device__ __forceinline__ void pack_a(const Packing& all, const PackProjection& p, int block,
                                       T* out) {
  int chunks = static_cast<int>(divide_up<int64_t>(all.K, 8));
  int i = block * kThreads + static_cast<int>(threadIdx.x);
  if (i >= all.R * chunks) return;
  int c = i / chunks;
  int64_t k = static_cast<int64_t>(i % chunks) * 8;
  Eight<T> v = {};
  if (c < p.columns) {
    as_type(p.a_type, [&](auto zero) {
      using S = decltype(zero);
      const S* row = static_cast<const S*>(p.a.data) + live_column(p, c) * p.a.stride;
      v = convert<T>(load_8(row, k, all.K, aligned_16<S>(p.a.data, p.a.stride)));
    });
  }
  store_8(out + c * all.K, k, all.K, aligned_16<T>(out, all.K), v);
}

template <typename T>
__device__ __forceinline__ void pack_b(const Packing& all, const PackProjection& p, int block,
                                       T* out, T* tile) {
  constexpr int kRows = kThreads / kBlockR, kEach = kBlockN / kRows;
  int blocks_r = all.R / kBlockR;
  int64_t first_n = static_cast<int64_t>(block / blocks_r) * kBlockN;
  int first_c = block % blocks_r * kBlockR;
  int c = threadIdx.x % kBlockR, first = threadIdx.x / kBlockR;  // neighbours in a row of B
  bool inside = first_c + c < p.columns;
  int column = inside ? live_column(p, first_c + c) : 0;
  int rows = !inside ? 0 : p.n - first_n < kBlockN ? static_cast<int>(p.n - first_n) : kBlockN;
  as_type(p.b_type, [&](auto zero) {
    using S = decltype(zero);
    const S* from = static_cast<const S*>(p.b.data) + (first_n + first) * p.b.stride + column;
    S v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      v[i] = i * kRows + first < rows ? from[i * kRows * p.b.stride] : from_float<S>(0.0f);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float product = i * kRows + first < rows ? p.scale * to_float(v[i]) : 0.0f;
      tile[c * kStride + i * kRows + first] = from_float<T>(product);
    }
  });
  __syncthreads();
  int row = threadIdx.x / (kBlockN / 8), n = threadIdx.x % (kBlockN / 8) * 8;
  store_8(out + (first_c + row) * all.stride_b_pack, first_n + n, p.n,
          aligned_16<T>(out, all.stride_b_pack), load_8(tile + row * kStride, n, kBlockN, true));
}

// ---- Bits. A thread draws eight neighbouring words of a row, 16 bytes.
// One call's eight bits of a word, from kFirst on, onto `kept`, which is 2^23 and the word: floats
// add them up in a pipe that Philox leaves idle.
template <int kFirst>
__device__ __forceinline__ void add_kept(float& kept, const uint32_t (&drawn)[4], uint32_t below) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    uint32_t draw = j % 2 == 0 ? drawn[j / 2] << 16 : drawn[j / 2];
    if (draw >= below) kept += static_cast<float>(1 << (kFirst + j));
  }
}

__device__ __forceinline__ void draw_words(const Draw& draw, int projections, int64_t K,
                                           int block) {
  uint32_t chunks = static_cast<uint32_t>(draw.words / 8);
  uint64_t i = static_cast<uint64_t>(block) * kThreads + threadIdx.x;
  if (i >= static_cast<uint64_t>(projections) * draw.M * chunks) return;
  uint64_t row;  // of all projections
  uint32_t chunk;
  if (i >> 32 == 0) {  // the division of 64 bits is slow
    row = static_cast<uint32_t>(i) / chunks;
    chunk = static_cast<uint32_t>(i) % chunks;
  } else {
    row = i / chunks;
    chunk = static_cast<uint32_t>(i % chunks);
  }
  uint32_t projection = 0, m = 0;
  for (uint64_t first = 0; first <= row; first += draw.M, ++projection)
    m = static_cast<uint32_t>(row - first);
  projection += draw.first - 1;
  uint64_t seed = static_cast<uint64_t>(*draw.seed);
  uint32_t column = chunk / 8 * 128 + chunk % 8 * 8;  // of the first 512 of 1024
  uint32_t mask = static_cast<int64_t>(chunk / 8) * 1024 + 512 < K ? 0xFFFFu : 0xFFu;
  uint32_t pairs[4] = {};
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    uint32_t two[2];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t word[2];
#pragma unroll
      for (int of = 0; of < 2; ++of) {
        uint32_t at = column + 4 * half + 2 * pair + of, drawn[4];
        float kept = 8388608.0f;
        philox(drawn, seed, at, m, projection);
        add_kept<0>(kept, drawn, draw.drop_below);
        philox(drawn, seed, at + 64, m, projection);
        add_kept<8>(kept, drawn, draw.drop_below);
        word[of] = __float_as_uint(kept) & mask;
      }
      two[pair] = word[0] | word[1] << 16;
    }
    pairs[0] = pairs[2];  // which register is never a variable
    pairs[1] = pairs[3];
    pairs[2] = two[0];
    pairs[3] = two[1];
  }
  *reinterpret_cast<uint4*>(draw.bits + row * draw.words + chunk * 8) = {pairs[0], pairs[1],
                                                                        pairs[2], pairs[3]};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ Packing all, T* a_pack, T* b_pack, int8_t* valid) {
  wait_for_previous();
  LORAPAR_SHARED(T, tile);
  if (static_cast<int>(blockIdx.x) >= all.first_draw)
    return draw_words(all.draw, all.projections, all.K, blockIdx.x - all.first_draw);
  int i = 0;
  while (i + 1 < all.projections && static_cast<int>(blockIdx.x) >= all.first_block[i + 1]) ++i;
  const PackProjection& p = all.of[i];
  int block = blockIdx.x - all.first_block[i];
  if (block == 0)
    for (int c = threadIdx.x; c < all.R; c += kThreads) valid[i * all.R + c] = c < p.columns;
  if (block < all.blocks_a) {
    pack_a(all, p, block, a_pack + static_cast<int64_t>(i) * all.R * all.K);
  } else {
    pack_b(all, p, block - all.blocks_a, b_pack + all.first_n[i], tile);
  }
}

}  // namespace

void pack(const PackProjection* of, int projections, int64_t K, int R, Type type, void* a_pack,
          void* b_pack, int64_t stride_b_pack, int8_t* valid, const Draw& draw,
          cudaStream_t stream) {
  if (projections == 0 || R == 0) return;
  Packing all = {};
  all.projections = projections;
  all.K = K;
  all.R = R;
  all.stride_b_pack = stride_b_pack;
  int64_t blocks_a = divide_up<int64_t>(R * divide_up<int64_t>(K, 8), kThreads);
  all.blocks_a = static_cast<int>(blocks_a > 0 ? blocks_a : 1);  // one writes `valid`
  int64_t blocks = 0, n = 0;
  for (int i = 0; i < projections; ++i) {
    all.of[i] = of[i];
    all.first_n[i] = n;
    all.first_block[i] = static_cast<int>(blocks);
    n += of[i].n;
    blocks += all.blocks_a + divide_up<int64_t>(of[i].n, kBlockN) * (R / kBlockR);
  }
  all.draw = draw;
  all.first_draw = static_cast<int>(blocks);
  if (draw.bits != nullptr)
    blocks += divide_up<int64_t>(projections * draw.M * (draw.words / 8), kThreads);
  by_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch(pack_kernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads,
           kBlockR * kStride * sizeof(T), stream, all, static_cast<T*>(a_pack),
           static_cast<T*>(b_pack), valid);
  });
}

}  // namespace lorapar

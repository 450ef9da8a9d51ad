// What several kernels share: types, 16-byte copies, products of small tiles in shared memory, and
// the bits of dropout.
#pragma once
#include "kernels.h"
#include "ptx.h"

namespace lorapar {

// ---- Types.
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// On the host: f(float()), f(__half()) or f(__nv_bfloat16()).
template <typename F>
inline void by_type(Type type, F&& f) {
  switch (type) {
    case Type::f32:
      return f(float());
    case Type::f16:
      return f(__half());
    case Type::bf16:
      return f(__nv_bfloat16());
  }
}

template <typename T>
__host__ __device__ constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

// Whether every row of a matrix begins at a multiple of 16 bytes.
template <typename T>
__host__ __device__ __forceinline__ bool aligned_16(const void* data, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * sizeof(T))) % 16 == 0;
}

// ---- Eight neighbours of a row that ends at `end`, from `first` on, a multiple of 8; nothing past
// the end. `aligned`: every row begins at a multiple of 16 bytes.
template <typename T>
struct alignas(16) Eight {
  T v[8];
};

template <typename T>
__device__ __forceinline__ Eight<T> load_8(const T* row, int64_t first, int64_t end, bool aligned) {
  Eight<T> out;
  if (aligned && first + 8 <= end) {
#pragma unroll
    for (size_t i = 0; i < sizeof(out) / 16; ++i)
      reinterpret_cast<uint4*>(&out)[i] = reinterpret_cast<const uint4*>(row + first)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      out.v[i] = first + i < end ? row[first + i] : from_float<T>(0.0f);
  }
  return out;
}
template <typename T>
__device__ __forceinline__ void store_8(T* row, int64_t first, int64_t end, bool aligned,
                                        const Eight<T>& from) {
  if (aligned && first + 8 <= end) {
#pragma unroll
    for (size_t i = 0; i < sizeof(from) / 16; ++i)
      reinterpret_cast<uint4*>(row + first)[i] = reinterpret_cast<const uint4*>(&from)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + i < end) row[first + i] = from.v[i];
  }
}

template <typename To, typename From>
__device__ __forceinline__ Eight<To> convert(const Eight<From>& from) {
  Eight<To> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.v[i] = from_float<To>(to_float(from.v[i]));
  return out;
}

// The same where the type is known at run time only.
__device__ __forceinline__ size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }
__device__ __forceinline__ const void* row_of(const Matrix& of, Type type, int64_t row) {
  return static_cast<const char*>(of.data) + row * of.stride * size_of(type);
}
__device__ __forceinline__ bool aligned_16(const void* data, int64_t stride, Type type) {
  return type == Type::f32 ? aligned_16<float>(data, stride) : aligned_16<__half>(data, stride);
}
__device__ __forceinline__ float load_float(const void* row, Type type, int64_t i) {
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(row)[i];
    case Type::f16:
      return to_float(static_cast<const __half*>(row)[i]);
    default:
      return to_float(static_cast<const __nv_bfloat16*>(row)[i]);
  }
}
__device__ __forceinline__ Eight<float> load_8(const void* row, Type type, int64_t first,
                                               int64_t end, bool aligned) {
  switch (type) {
    case Type::f32:
      return load_8(static_cast<const float*>(row), first, end, aligned);
    case Type::f16:
      return convert<float>(load_8(static_cast<const __half*>(row), first, end, aligned));
    default:
      return convert<float>(load_8(static_cast<const __nv_bfloat16*>(row), first, end, aligned));
  }
}
__device__ __forceinline__ void store_8(void* row, Type type, int64_t first, int64_t end,
                                        bool aligned, const Eight<float>& from) {
  switch (type) {
    case Type::f32:
      return store_8(static_cast<float*>(row), first, end, aligned, from);
    case Type::f16:
      return store_8(static_cast<__half*>(row), first, end, aligned, convert<__half>(from));
    default:
      return store_8(static_cast<__nv_bfloat16*>(row), first, end, aligned,
                     convert<__nv_bfloat16>(from));
  }
}

// ---- 16 bytes, 8 or 4 elements, to shared memory: by cp.async where `aligned`. Zeros past the
// first `count` elements, which may be negative or more than there are.
template <typename T>
__device__ __forceinline__ void copy_16(T* shared, const T* global, int64_t count, bool aligned) {
  constexpr int kElements = 16 / sizeof(T);
  int n = count < 0 ? 0 : count < kElements ? static_cast<int>(count) : kElements;
  if (aligned) {
    cp_async(shared, global, n * static_cast<int>(sizeof(T)));
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) shared[i] = i < n ? global[i] : from_float<T>(0.0f);
  }
}

// A tile [kRows, kColumns] to shared memory, by a block of kThreads; zeros past the first `rows`
// and `columns`, which may be negative. `shared` and its stride: multiples of 16 bytes. The caller
// commits and waits, then needs a barrier.
template <int kRows, int kColumns, int kThreads, typename T>
__device__ __forceinline__ void copy_tile(T* shared, int stride_shared, const T* global,
                                          int64_t stride, int64_t rows, int64_t columns,
                                          bool aligned) {
  constexpr int kElements = 16 / sizeof(T), kPerRow = kColumns / kElements;
#pragma unroll
  for (int first = 0; first < kRows * kPerRow; first += kThreads) {
    int i = first + static_cast<int>(threadIdx.x);
    int row = i / kPerRow, column = i % kPerRow * kElements;
    if ((kRows * kPerRow) % kThreads == 0 || i < kRows * kPerRow) {
      bool inside = row < rows && column < columns;  // else the address may be no one's
      copy_16(shared + row * stride_shared + column,
              inside ? global + row * stride + column : global, inside ? columns - column : 0,
              aligned);
    }
  }
}

// ---- Products of tiles in shared memory, by one warp, in the layout of m16n8k16:
// lane l = 4 g + t holds of d [16, 8 kBlocks] in d[block][0..3] the elements (g, 2t), (g, 2t+1),
// (g+8, 2t), (g+8, 2t+1) of that block of 8 columns.
template <typename T>
struct Fragment {  // of a [16, 16]
  uint32_t r[4];
};

// a lies as [m][k], or as [k][m] where kByK. Rows begin at multiples of 16 bytes. A stride of 8
// more than a multiple of 64 elements has no bank conflicts.
template <bool kByK, typename T>
__device__ __forceinline__ void load_fragment(Fragment<T>& f, const T* a, int stride) {
  int lane = threadIdx.x % 32, i = lane / 8;
  if constexpr (kByK) {
    ldmatrix_transposed(f.r, a + (i / 2 * 8 + lane % 8) * stride + i % 2 * 8);
  } else {
    ldmatrix(f.r, a + (lane % 16) * stride + lane / 16 * 8);
  }
}

// d [16, 8 kBlocks] += a [16, 16] b [16, 8 kBlocks], kBlocks even; b lies as [n][k], or as [k][n]
// where kByK.
template <bool kByK, int kBlocks, typename T>
__device__ __forceinline__ void multiply(float (&d)[kBlocks][4], const Fragment<T>& a, const T* b,
                                         int stride) {
  static_assert(kBlocks % 2 == 0, "two blocks of columns come with one ldmatrix");
  int lane = threadIdx.x % 32, i = lane / 8;
#pragma unroll
  for (int block = 0; block < kBlocks; block += 2) {
    uint32_t r[4];
    if constexpr (kByK) {
      ldmatrix_transposed(r, b + (i % 2 * 8 + lane % 8) * stride + block * 8 + i / 2 * 8);
    } else {
      ldmatrix(r, b + (block * 8 + i / 2 * 8 + lane % 8) * stride + i % 2 * 8);
    }
    uint32_t left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
    mma(d[block], a.r, left, T());
    mma(d[block + 1], a.r, right, T());
  }
}

// fp32: the same products in float64, slow and exact. A fragment is where the tile lies.
template <>
struct Fragment<float> {
  const float* a;
  int stride_m, stride_k;
};
template <bool kByK>
__device__ __forceinline__ void load_fragment(Fragment<float>& f, const float* a, int stride) {
  f = {a, kByK ? 1 : stride, kByK ? stride : 1};
}
template <bool kByK, int kBlocks>
__device__ __forceinline__ void multiply(float (&d)[kBlocks][4], const Fragment<float>& a,
                                         const float* b, int stride) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  int stride_n = kByK ? 1 : stride, stride_k = kByK ? stride : 1;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const float* at = b + (block * 8 + 2 * t) * stride_n;
    double part[4] = {};  // of sixteen products, rounded once
#pragma unroll 4
    for (int k = 0; k < 16; ++k) {
      double low = a.a[g * a.stride_m + k * a.stride_k];
      double high = a.a[(g + 8) * a.stride_m + k * a.stride_k];
      double left = at[k * stride_k], right = at[k * stride_k + stride_n];
      part[0] += low * left;
      part[1] += low * right;
      part[2] += high * left;
      part[3] += high * right;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) d[block][i] += static_cast<float>(part[i]);
  }
}

// ---- Dropout (dropout.py). Element (m, k) is kept by bit k / 64 % 16 of word
// (m, k / 1024 * 64 + k % 64), so that neighbouring elements have neighbouring words and one bit.
__device__ __forceinline__ int bit_of(int64_t k) { return static_cast<int>(k / 64 % 16); }
__device__ __forceinline__ int64_t word_of(int64_t k) { return k / 1024 * 64 + k % 64; }

// The `keep` of ptx.h's times_keep for two neighbours, from their two words.
__device__ __forceinline__ uint32_t keep_pair(uint32_t words, int bit) {
  return (words >> bit) & 0x00010001u;
}

// Two neighbouring elements, in one register where they have 16 bit, times 0 or 1.
__device__ __forceinline__ void drop_pair(float& low, float& high, uint32_t words, int bit) {
  low *= static_cast<float>(words >> bit & 1);
  high *= static_cast<float>(words >> (bit + 16) & 1);
}

// A tile [16, 16] in registers, its rows those of words [16][stride] in shared memory, whose column
// 0 is the tile's.
template <typename T>
__device__ __forceinline__ void drop_fragment(Fragment<T>& f, const int16_t* words, int stride,
                                              int bit) {
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int16_t* at = words + (g + i % 2 * 8) * stride + 2 * t + i / 2 * 8;
    f.r[i] = times_keep(f.r[i], keep_pair(*reinterpret_cast<const uint32_t*>(at), bit), T());
  }
}

// Philox4x32-7 as tl.philox has it. c[j / 2], its lower half first, draws column 512 b + 64 j + l,
// j = 0 ... 7, of row m, where column = 64 b + l: kept where it is at least drop_below >> 16.
__device__ __forceinline__ void philox(uint32_t (&c)[4], uint64_t seed, uint32_t column, uint32_t m,
                                       uint32_t projection) {
  constexpr uint32_t kRoundA = 0xD2511F53u, kRoundB = 0xCD9E8D57u;
  constexpr uint32_t kKeyA = 0x9E3779B9u, kKeyB = 0xBB67AE85u;
  uint32_t key_a = static_cast<uint32_t>(seed), key_b = static_cast<uint32_t>(seed >> 32);
  c[0] = column, c[1] = m, c[2] = projection, c[3] = 0;
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    Wide a = multiply_wide(kRoundA, c[0]), b = multiply_wide(kRoundB, c[2]);
    c[0] = b.high ^ c[1] ^ key_a;
    c[2] = a.high ^ c[3] ^ key_b;
    c[1] = b.low;
    c[3] = a.low;
    key_a += kKeyA;
    key_b += kKeyB;
  }
}

}  // namespace lorapar

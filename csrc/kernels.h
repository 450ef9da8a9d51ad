// What the host calls: one function a step of the forward or backward, for all projections of one
// x at once. No torch here. All matrices are row-major with a row stride in elements and contiguous
// columns, unless said otherwise. Every function enqueues on `stream` and returns; none allocates,
// waits, or reads anything on the host.
//
// Formats are those of lorapar_kernels: a_pack [P*R, K], b_pack [R, sum N] with the scale in it,
// valid int8 [P*R], S and dS [M, P*R], bits int16 [P, M, ceil(K/1024)*64] (see dropout.py). Bits and
// workspaces begin at multiples of 16 bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace lorapar {

enum class Type : int { f32, f16, bf16 };

constexpr int kMaxProjections = 8;  // of one call
constexpr int kDecodeRows = 64;     // most rows of `decode`

struct Matrix {
  const void* data = nullptr;  // null: absent
  int64_t stride = 0;          // of a row, in elements
};

struct Output {
  void* data = nullptr;  // null: not wanted
  int64_t stride = 0;
};

// ---- pack.cu: live columns of A and B in the compute dtype, zeros up to R, and the bits of dropout
// for these projections. One launch.
struct PackProjection {
  Matrix a, b;           // [r, K], [N, r]
  Type a_type, b_type;
  const int32_t* live;   // [columns], or null: 0, 1, 2 ...
  int columns;           // how many are live, at most R
  int64_t n;             // N
  float scale;
};
struct Draw {
  int16_t* bits = nullptr;  // [projections, M, words], written; null: no dropout
  int64_t M = 0, words = 0;       // words of a row
  const int64_t* seed = nullptr;  // [1] on the device
  uint32_t drop_below = 0;        // dropout.drop_below
  int first = 0;                  // of these projections, among all of x
};
void pack(const PackProjection* of, int projections, int64_t K, int R, Type type, void* a_pack,
          void* b_pack, int64_t stride_b_pack, int8_t* valid, const Draw& draw,
          cudaStream_t stream);

// ---- shrink.cu: s[m, c] = scale * sum_k x[m, k] keep(m, k) a[c, k], 0 where valid[c] is 0.
// C = P*R.
struct Shrink {
  Matrix x, a;           // [M, K], [C, K]
  const int8_t* valid;   // [C]
  Output s;              // [M, C] in the compute dtype
  int64_t M, K;
  int C, R;
  float scale;           // 1 / (1-p) with dropout
  bool drops;            // whether there is dropout
  const int16_t* bits;   // [C/R, M, words], with dropout; shrink_workspace does not ask
  int64_t words;         // of a row
};
size_t shrink_workspace(const Shrink& call, Type type);  // bytes
void shrink(const Shrink& call, Type type, void* workspace, cudaStream_t stream);

// ---- expand.cu: out_i = [base_i +] S_i b_i [+ bias_i]; all projections in one launch.
struct ExpandProjection {
  Matrix s, b;           // [M, R], [R, N]; data null: no adapter part (R = 0)
  Matrix base;           // [M, N] of out's dtype, or absent
  const void* bias;      // [N], or null
  Type bias_type;
  Output out;            // [M, N]
  Type out_type;         // the compute dtype, or that of base
  int64_t n;
};
void expand(const ExpandProjection* of, int projections, int64_t M, int R, Type type,
            cudaStream_t stream);

// out [M, K] = sum_i keep_i * (dS_i A_i)
struct ExpandDx {
  Matrix ds, a;          // [M, P*R], [P*R, K]
  const int16_t* bits;   // null: no dropout
  int64_t words;
  Output out;            // in the compute dtype
  int64_t M, K;
  int projections, R;
};
void expand_dx(const ExpandDx& call, Type type, cudaStream_t stream);

// ---- dy_gradients.cu, x_gradients.cu. Where the gradient of one A [r, K] or B [N, r] goes.
struct Gradient {
  void* out = nullptr;             // contiguous, in `type`; null: not wanted, or sums
  Type type = Type::f32;           // of the adapter
  int rank = 0;                    // r
  const int32_t* index = nullptr;  // [trained] where trained columns stand among the live; null: all
  int trained = 0;                 // columns to compute: of `index`, or all live ones
  const int32_t* slot = nullptr;   // [r] place among the computed ones, -1: exact 0; null: 0, 1, 2 ...
  const bool* trainable = nullptr; // like out; null: all
  float scale = 1.0f;
  float *sum = nullptr, *square = nullptr;  // scoring: += g and += g*g of every example, like out
};

// dS_i = dY_i b_i^T * scale (0 where not valid), and dB_i = scale_i * dY_i^T S_i, reading dY once
// where that pays. All projections; as few launches as possible (two, or three with many rows).
struct DyProjection {
  Matrix dy, b, s;       // [M, N]; [R, N]; [M, R] (absent where dB is not wanted)
  Output ds;             // [M, R] in the compute dtype; null where not wanted
  const int8_t* valid;   // [R]
  int64_t n;
  Gradient db;           // of B [N, r]
};
// dA_i = dS_i^T (keep_i * x): all projections of one x.
struct XProjection {
  Matrix ds;             // [M, R]; absent: no dA for this one
  const int16_t* bits;   // [M, words] of this projection, or null
  Gradient da;           // of A [r, K]
};
// Scoring: example e owns the rows bounds[e] up to bounds[e+1].
struct Examples {
  const int32_t* bounds = nullptr;  // [count + 1] on the device; null: training
  int count = 0;
};
size_t dy_gradients_workspace(const DyProjection* of, int projections, int64_t M, int R, Type type,
                              Examples examples);
void dy_gradients(const DyProjection* of, int projections, int64_t M, int R, float scale, Type type,
                  Examples examples, void* workspace, cudaStream_t stream);
size_t x_gradients_workspace(const XProjection* of, int projections, int64_t M, int64_t K, int R,
                             Type type, Examples examples);
void x_gradients(const XProjection* of, int projections, Matrix x, int64_t words, int64_t M,
                 int64_t K, int R, Type type, Examples examples, void* workspace,
                 cudaStream_t stream);

// ---- few_rows.cu: dS, dA and dB of one x in two launches, where M is small and everything lies in
// vectors of 16 bytes. For sm_90 on, and not for scoring.
struct FewRows {
  const DyProjection* dy;
  int dys;               // at most kMaxProjections
  const XProjection* of_x;
  int xs;                // likewise; the dS of these are made before, or by this call
  Matrix x;              // [M, K]
  int64_t words, M, K;
  int R;
  float scale;           // of dS
};
bool takes_few_rows(const FewRows& call, Type type);
void few_rows(const FewRows& call, Type type, cudaStream_t stream);  // only where it takes them

// ---- decode.cu: out_i += scale_i * (drop_i(x) A_i^T) B_i^T for at most kDecodeRows rows, straight
// from A and B in their own dtype. One launch for all projections; those without rank columns or
// outputs count among the projections that dropout's bits are drawn for.
struct DecodeProjection {
  Matrix a, b;           // [r, K], [N, r]
  Type a_type, b_type;
  const int32_t* live;   // [columns], or null
  int columns;
  Output out;            // [M, N] in `type`; holds the base layer's output
  int64_t n;
  float scale;
};
struct DecodeDropout {
  const int64_t* seed = nullptr;  // [1] on the device; null: no dropout
  uint32_t drop_below = 0;        // as in Draw
  float scale = 1.0f;             // 1 / (1-p)
};
void decode(const DecodeProjection* of, int projections, Matrix x, int64_t M, int64_t K, Type type,
            const DecodeDropout& dropout, cudaStream_t stream);

}  // namespace lorapar

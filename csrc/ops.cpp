// The forward and backward of a group of projections: kernels.h and cuBLAS in turn.
//
// Forward     S = drop(x) A^T once for all    y_i = S_i B_i + bias_i, then += x W_i^T
// Backward    dS_i = dY_i B_i^T / (1-p)       dX = sum_i keep_i (dS_i A_i), then += dY_i W_i in turn
//             dA_i = dS_i^T (keep_i x)        dB_i = scale * dY_i^T S_i
//
// Cost        the host's: 4 launches forward, 6 backward (4 with few rows), and an allocation for
//             each tensor that lives on, one for all that the backward needs, and one for what ends
//             with the call.
#include "ops.h"

#include <ATen/Context.h>
#include <ATen/ops/_to_copy.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/random.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/TensorImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "device.h"
#include "kernels.h"

namespace lorapar {
namespace {

// Of partial sums in a scoring pass; more examples go in several rounds, as in fused.py.
#ifdef LORAPAR_EMULATE
constexpr int64_t kRoundBytes = 3 * 16 * 70 * 4;  // few, so that tests take several
#else
constexpr int64_t kRoundBytes = 1 << 28;
#endif
constexpr int64_t kCublasRank = 128;      // from here on cuBLAS makes S and dS in 16 bit

Type type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Type::f32;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    default: TORCH_CHECK_TYPE(false, "lorapar_cuda: no kernels for ", type);
  }
}

bool narrow(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

at::Tensor as_type(const at::Tensor& t, at::ScalarType type) {
  if (!t.defined() || t.scalar_type() == type) return t;
  return at::_to_copy(t, t.options().dtype(type));
}

// In a dtype that the kernels read: float64 adapters, biases and bases come as fp32.
at::Tensor readable(const at::Tensor& t) {
  return t.defined() && t.scalar_type() == at::kDouble ? as_type(t, at::kFloat) : t;
}

// Rows of a matrix contiguous.
at::Tensor with_rows(const at::Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

Matrix matrix(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.data_ptr(), t.stride(0)};
}

Matrix columns(const at::Tensor& t, int64_t from) {
  return {static_cast<const char*>(t.data_ptr()) + from * t.element_size(), t.stride(0)};
}

Output output(const at::Tensor& t, int64_t from = 0) {
  return {static_cast<char*>(t.data_ptr()) + from * t.element_size(), t.stride(0)};
}

template <typename T>
const T* pointer(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.data_ptr()) : nullptr;
}

// A view of a storage without autograd: what at::as_strided gives, in a tenth of the time.
at::Tensor view_of(const at::Tensor& of, int64_t offset, at::IntArrayRef sizes,
                   at::IntArrayRef strides, at::ScalarType type) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(of.storage()), of.key_set(), c10::scalarTypeToTypeMeta(type));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return t;
}

// `torch.utils.deterministic.fill_uninitialized_memory` fills ours too.
at::Tensor filled(at::Tensor t) {
  const auto& context = at::globalContext();
  if (C10_UNLIKELY(context.deterministicAlgorithms() &&
                   context.deterministicFillUninitializedMemory()) &&
      t.numel() > 0) {
    view_of(t, 0, {t.numel() * t.element_size()}, {1}, at::kByte).fill_(0xFF);  // NaN
  }
  return t;
}

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  return filled(allocate(sizes, type, device));
}

// Tensors and workspaces that share one allocation: told of first, then made, or found in `memory`.
class Arena {
 public:
  explicit Arena(at::Device device) : device_(device) {}
  explicit Arena(const at::Tensor& memory)
      : device_(memory.device()),
        memory_(memory),
        begin_(memory.storage_offset() * static_cast<int64_t>(memory.element_size())) {}
  int64_t bytes() const { return bytes_; }

  int64_t reserve(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return at;
  }
  int64_t reserve(at::IntArrayRef sizes, at::ScalarType type) {
    return reserve(c10::multiply_integers(sizes) * c10::elementSize(type));
  }
  void make() { memory_ = empty({bytes_}, at::kByte, device_); }
  void* pointer(int64_t at) const {
    return bytes_ == 0 ? nullptr : static_cast<char*>(memory_.data_ptr()) + at;
  }
  at::Tensor whole(at::ScalarType type) const {
    const int64_t count = bytes_ / static_cast<int64_t>(c10::elementSize(type));
    return view_of(memory_, 0, {count}, {1}, type);
  }
  at::Tensor tensor(int64_t at, at::IntArrayRef sizes, at::ScalarType type) const {
    const auto size = static_cast<int64_t>(c10::elementSize(type));
    const int64_t columns = std::max<int64_t>(sizes.back(), 1);
    at::Tensor t = view_of(memory_, (begin_ + at) / size, {0, 0}, {columns, 1}, type);
    t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    return t;
  }

 private:
  at::Device device_;
  int64_t bytes_ = 0;
  at::Tensor memory_;
  int64_t begin_ = 0;  // of it in its storage, in bytes
};

// What both passes derive from x, the adapters and p.
struct Sizes {
  int64_t M, K, P, N = 0, R = 0, words;
  c10::SmallVector<int64_t, 4> first;  // column of b_pack where each projection begins

  Sizes(int64_t M, int64_t K, const Adapters& of, int64_t R)
      : M(M), K(K), P(static_cast<int64_t>(of.size())), R(R), words((K + 1023) / 1024 * 64) {
    for (const Adapter& one : of) {
      first.push_back(N);
      N += one.b.size(0);
    }
  }
  int64_t C() const { return P * R; }
};

int64_t padded_rank(int64_t columns) {
  if (columns == 0) return 0;
  if (columns > 128) return (columns + 127) / 128 * 128;
  int64_t R = 16;
  while (R < columns) R *= 2;
  return R;
}

int64_t live_columns(const Adapter& of) {
  return of.live.defined() ? of.live.numel() : of.a.size(0);
}

bool by_cublas(at::ScalarType type, int64_t R) { return narrow(type) && R >= kCublasRank; }

// s [M, C] = scale * x [M, K] a [C, K]^T, then zeros in each projection's columns past the live.
void shrink_by_cublas(const at::Tensor& x, const at::Tensor& a, const at::Tensor& s, double scale,
                      int64_t R, c10::ArrayRef<int64_t> live) {
  at::Tensor out = s;
  at::addmm_out(out, s, x, a.t(), 0, scale);
  for (size_t i = 0; i < live.size(); ++i) {
    if (live[i] < R) out.slice(1, i * R + live[i], (i + 1) * R).zero_();
  }
}

void pack_all(const Adapters& of, const Sizes& size, at::ScalarType type, const Packed& packed,
              Draw draw, cudaStream_t stream) {
  Tensors alive;  // copies, until the launch
  for (int64_t begin = 0; begin < size.P; begin += kMaxProjections) {
    PackProjection part[kMaxProjections];
    const int count = static_cast<int>(std::min<int64_t>(kMaxProjections, size.P - begin));
    for (int i = 0; i < count; ++i) {
      const Adapter& one = of[begin + i];
      const at::Tensor a = with_rows(readable(one.a)), b = with_rows(readable(one.b));
      part[i] = {matrix(a), matrix(b), type_of(a.scalar_type()), type_of(b.scalar_type()),
                 pointer<int32_t>(one.live), static_cast<int>(live_columns(one)), b.size(0),
                 static_cast<float>(one.scale)};
      alive.push_back(a);
      alive.push_back(b);
    }
    const int64_t row = begin * size.R;
    pack(part, count, size.K, static_cast<int>(size.R), type_of(type),
         output(packed.a_pack, row * size.K).data, output(packed.b_pack, size.first[begin]).data,
         packed.b_pack.stride(0), static_cast<int8_t*>(packed.valid.data_ptr()) + row, draw, stream);
    draw.first += count;
    if (draw.bits != nullptr) draw.bits += count * draw.M * draw.words;
  }
}

void expand_all(const ExpandProjection* of, int64_t count, int64_t M, int64_t R, Type type,
                cudaStream_t stream) {
  for (int64_t i = 0; i < count; i += kMaxProjections) {
    expand(of + i, static_cast<int>(std::min<int64_t>(kMaxProjections, count - i)), M,
           static_cast<int>(R), type, stream);
  }
}

}  // namespace

void gemm_by_torch(const Gemm& of) {
  at::Tensor out = of.out;
  const at::Tensor w = of.transposed ? of.w.t() : of.w;
  if (of.accumulate) {
    at::addmm_out(out, out, of.x, w);
  } else {
    at::mm_out(out, of.x, w);
  }
}

at::Tensor as_rows(const at::Tensor& t) {
  const int64_t columns = t.size(-1);
  if (t.dim() == 2) return with_rows(t);
  // The rows are one run where each leading dimension steps over the ones within.
  int64_t rows = 1, stride = std::max<int64_t>(columns, 1), within = -1;
  bool one_run = columns <= 1 || t.stride(-1) == 1;
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    const int64_t size = t.size(i);
    rows *= size;
    if (size == 1) continue;
    if (within < 0) stride = t.stride(i);
    one_run &= within < 0 || t.stride(i) == within;
    within = t.stride(i) * size;
  }
  if (!one_run) return t.contiguous().view({rows, columns});
  return view_of(t, t.storage_offset(), {rows, columns}, {stride, 1}, t.scalar_type());
}

at::Tensor draw_seed(at::Device device) {
  at::Tensor seed = allocate({1}, at::kLong, device);
  return seed.random_(0, int64_t{1} << 62);  // all that randint does, with one dispatch for three
}

Tensors forward(const at::Tensor& x, const Adapters& of, const at::Tensor& seed, double p,
                bool owns_base, Keep keep, Packed& packed) {
  const c10::DeviceGuard guard(x.device());
  const at::Device device = x.device();
  const cudaStream_t stream = current_stream(device);
  const at::ScalarType dtype = x.scalar_type();
  const Type type = type_of(dtype);

  c10::SmallVector<int64_t, 4> live;
  for (const Adapter& one : of) live.push_back(live_columns(one));
  const Sizes size(x.size(0), x.size(1), of,
                   padded_rank(*std::max_element(live.begin(), live.end())));
  const int64_t M = size.M, K = size.K, P = size.P, R = size.R, C = size.C();
  const bool drops = p > 0.0;

  Tensors ys, weights;
  for (const Adapter& one : of) {
    const auto out = owns_base ? dtype : one.base.scalar_type();
    ys.push_back(empty({M, one.b.size(0)}, out, device));
    weights.push_back(owns_base ? as_type(one.base, dtype) : at::Tensor());
  }
  const auto adapts = [&](int64_t i) { return R > 0 || of[i].bias.defined(); };
  const auto base_gemm = [&](int64_t i) { return Gemm{x, weights[i], ys[i], true, adapts(i)}; };

  // Where everything lies.
  const std::array<int64_t, 2> s_sizes{M, C}, a_sizes{C, K}, b_sizes{R, size.N};
  std::array<int64_t, 3> drawn{P, M, size.words};
  if (!drops) drawn = {0, 0, 0};
  Shrink call{matrix(x), {},   nullptr, {},      M,       K, static_cast<int>(C), static_cast<int>(R),
              1.0f,      drops, nullptr, size.words};
  if (drops) call.scale = static_cast<float>(1.0 / (1.0 - p));
  const bool cublas = by_cublas(dtype, R) && !drops;
  Arena kept(device), passing(device);
  int64_t workspace_bytes = 0;
  if (M > 0) {
    if (C > 0 && !cublas) workspace_bytes = static_cast<int64_t>(shrink_workspace(call, type));
    for (int64_t i = 0; owns_base && i < P; ++i) {
      workspace_bytes = std::max(workspace_bytes, static_cast<int64_t>(gemm_workspace(base_gemm(i))));
    }
  }
  const int64_t workspace = passing.reserve(workspace_bytes);
  Arena& packs = keep.packs ? kept : passing;
  Arena& of_s = keep.s ? kept : passing;
  Arena& of_bits = keep.bits ? kept : passing;
  const int64_t bits_at = of_bits.reserve(drawn, at::kShort);  // the order of kept.py
  const int64_t a_at = packs.reserve(a_sizes, dtype), b_at = packs.reserve(b_sizes, dtype);
  const int64_t valid_at = packs.reserve(C), s_at = of_s.reserve(s_sizes, dtype);
  if (keep.packs) kept.make();
  passing.make();
  Packed all;
  all.a_pack = packs.tensor(a_at, a_sizes, dtype);
  all.b_pack = packs.tensor(b_at, b_sizes, dtype);
  all.valid = packs.tensor(valid_at, {C}, at::kChar);
  all.s = of_s.tensor(s_at, s_sizes, dtype);
  all.bits = of_bits.tensor(bits_at, drawn, at::kShort);

  Draw draw;
  if (drops) {
    draw = {static_cast<int16_t*>(all.bits.data_ptr()), M, size.words,
            seed.const_data_ptr<int64_t>(), drop_below(p)};
  }
  if (R > 0) pack_all(of, size, dtype, all, draw, stream);
  if (M > 0 && C > 0) {
    call.a = matrix(all.a_pack);
    call.valid = pointer<int8_t>(all.valid);
    call.s = output(all.s);
    call.bits = draw.bits;
    if (cublas) {
      shrink_by_cublas(x, all.a_pack, all.s, 1.0, R, live);
    } else {
      shrink(call, type, passing.pointer(workspace), stream);
    }
  }
  if (M > 0) {
    c10::SmallVector<ExpandProjection, 4> adding;
    Tensors alive, wide(P);  // wide: an output that the kernels cannot write
    for (int64_t i = 0; i < P; ++i) {
      if (owns_base && !adapts(i)) continue;
      ExpandProjection one{};
      if (R > 0) one.s = columns(all.s, i * R), one.b = columns(all.b_pack, size.first[i]);
      at::Tensor bias = readable(of[i].bias), base, out = ys[i];
      if (bias.defined()) {
        bias = bias.contiguous();
        one.bias = bias.data_ptr();
        one.bias_type = type_of(bias.scalar_type());
      }
      if (!owns_base) {
        base = with_rows(readable(of[i].base));
        one.base = matrix(base);
        if (out.scalar_type() == at::kDouble) {
          out = wide[i] = empty(out.sizes(), at::kFloat, device);
        }
      }
      one.out = output(out);
      one.out_type = type_of(out.scalar_type());
      one.n = out.size(1);
      adding.push_back(one);
      alive.push_back(bias);
      alive.push_back(base);
    }
    expand_all(adding.data(), static_cast<int64_t>(adding.size()), M, R, type, stream);
    for (int64_t i = 0; i < P; ++i) {
      if (owns_base) gemm(base_gemm(i), passing.pointer(workspace), stream);
      if (wide[i].defined()) ys[i].copy_(wide[i]);
    }
  }
  check_launches("lora_forward");
  if (keep.packs) {
    packed.a_pack = std::move(all.a_pack);
    packed.b_pack = std::move(all.b_pack);
    packed.valid = std::move(all.valid);
    packed.whole = kept.whole(dtype);
  }
  if (keep.s) packed.s = std::move(all.s);
  if (keep.bits) packed.bits = std::move(all.bits);
  return ys;
}

namespace {

// A gradient that a kernel makes: fp32 where the adapter is float64.
at::Tensor room_for(const at::Tensor& like, at::Device device) {
  return empty(like.sizes(), like.scalar_type() == at::kDouble ? at::kFloat : like.scalar_type(),
               device);
}

Gradient training(const at::Tensor& out, const MaskLists& mask, int64_t rank, int64_t live,
                  double scale, Tensors& alive) {
  Gradient g{};
  g.out = out.data_ptr();
  g.type = type_of(out.scalar_type());
  g.rank = static_cast<int>(rank);
  g.index = pointer<int32_t>(mask.index);
  g.trained = static_cast<int>(mask.index.defined() ? mask.index.numel() : live);
  g.slot = pointer<int32_t>(mask.slot);
  if (mask.trainable.defined()) {
    alive.push_back(mask.trainable.contiguous());
    g.trainable = pointer<bool>(alive.back());
  }
  g.scale = static_cast<float>(scale);
  return g;
}

Gradient scoring(const at::Tensor& sum, const at::Tensor& square, int64_t rank, double scale) {
  Gradient g{};
  g.rank = g.trained = static_cast<int>(rank);
  g.scale = static_cast<float>(scale);
  g.sum = static_cast<float*>(sum.data_ptr());
  g.square = static_cast<float*>(square.data_ptr());
  return g;
}

// Examples in as many rounds as kRoundBytes of partial sums need: `work(examples, first round)`.
template <typename Work>
void in_rounds(const at::Tensor& bounds, int64_t width, Work work) {
  const int64_t most = std::max<int64_t>(1, kRoundBytes / (4 * std::max<int64_t>(1, width)));
  const int64_t step = std::min<int64_t>(65535, most), count = bounds.numel() - 1;
  for (int64_t at = 0; at < count; at += step) {
    work(Examples{pointer<int32_t>(bounds) + at, static_cast<int>(std::min(step, count - at))},
         at == 0);
  }
}

bool same_memory(const at::Tensor& one, const at::Tensor& other) {
  return one.data_ptr() == other.data_ptr() && one.numel() == other.numel();
}

}  // namespace

Gradients backward(const at::Tensor& x, const Tensors& dys_given, const Adapters& of,
                   c10::ArrayRef<int64_t> live, const Packed& packed, double p, bool owns_base,
                   const Wanted& wanted) {
  const at::Device device = packed.a_pack.device();
  const c10::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const at::ScalarType dtype = packed.a_pack.scalar_type();
  const Type type = type_of(dtype);

  int64_t M = 0;
  Tensors dys;
  for (const at::Tensor& dy : dys_given) {
    dys.push_back(dy.defined() ? with_rows(as_type(dy, dtype)) : dy);
    if (dy.defined()) M = dy.size(0);
  }
  const Sizes size(M, packed.a_pack.size(1), of, packed.b_pack.size(0));
  const int64_t K = size.K, P = size.P, R = size.R;
  const int rank = static_cast<int>(R);
  const bool drops = p > 0.0, some = R > 0 && M > 0;
  const float inverse = static_cast<float>(1.0 / (1.0 - p));
  const bool cublas = by_cublas(dtype, R);

  // The outputs.
  Gradients made;
  Tensors da(P), db(P);  // as the kernels write them
  c10::SmallVector<bool, 4> trains_a(P), trains_b(P);
  for (int64_t i = 0; i < P; ++i) {
    const Adapter& one = of[i];
    const bool a = !wanted.sums && wanted.a[i], b = !wanted.sums && wanted.b[i];
    const bool used = some && dys[i].defined();
    trains_a[i] = used && (wanted.sums || (a && one.mask_a.trains()));
    trains_b[i] = used && (wanted.sums || (b && one.mask_b.trains()));
    if (a && trains_a[i]) da[i] = room_for(one.a, device);
    if (b && trains_b[i]) db[i] = room_for(one.b, device);
    const auto zeros = [&](const at::Tensor& like) {
      return at::zeros(like.sizes(), like.options().device(device));
    };
    made.da.push_back(a && !trains_a[i] ? zeros(one.a) : da[i]);
    made.db.push_back(b && !trains_b[i] ? zeros(one.b) : db[i]);
  }
  Tensors weights;
  bool by_gemm = false;
  if (wanted.x) {
    made.dx = empty({M, K}, dtype, device);
    for (int64_t i = 0; i < P; ++i) {
      const bool used = owns_base && dys[i].defined();
      weights.push_back(used ? as_type(of[i].base, dtype) : at::Tensor());
      by_gemm |= used;
    }
  }
  const bool expands = wanted.x && some;

  // dS of all projections side by side, then what the kernels are told.
  const auto ds_wanted = [&](int64_t i) { return wanted.x || trains_a[i]; };
  const bool any_a = std::find(trains_a.begin(), trains_a.end(), true) != trains_a.end();
  at::Tensor ds;
  if (some && (wanted.x || any_a)) ds = empty({M, P * R}, dtype, device);
  Tensors alive;
  c10::SmallVector<DyProjection, 4> of_dy;
  c10::SmallVector<XProjection, 4> of_x(any_a ? P : 0);
  c10::SmallVector<const Sums*, 4> sums_of_dy;
  for (int64_t i = 0; some && i < P; ++i) {
    const int64_t r = of[i].b.size(1), n = of[i].b.size(0);
    if (ds_wanted(i) && (cublas || !dys[i].defined())) {
      at::Tensor part = view_of(ds, i * R, {M, R}, {P * R, 1}, dtype);
      if (!dys[i].defined()) {
        part.zero_();
      } else {
        const at::Tensor b = view_of(packed.b_pack, packed.b_pack.storage_offset() + size.first[i],
                                     {R, n}, {packed.b_pack.stride(0), 1}, dtype);
        shrink_by_cublas(dys[i], b, part, inverse, R, live.slice(i, 1));
      }
    }
    const bool makes_ds = ds_wanted(i) && !cublas;
    if (dys[i].defined() && (makes_ds || trains_b[i])) {
      DyProjection one{};
      one.dy = matrix(dys[i]);
      one.b = columns(packed.b_pack, size.first[i]);
      one.valid = pointer<int8_t>(packed.valid) + i * R;
      one.n = n;
      if (makes_ds) one.ds = output(ds, i * R);
      if (trains_b[i]) {
        one.s = columns(packed.s, i * R);
        one.db = wanted.sums ? scoring(of[i].sums.b, of[i].sums.b_squared, r, of[i].scale)
                             : training(db[i], of[i].mask_b, r, live[i], of[i].scale, alive);
      }
      of_dy.push_back(one);
      sums_of_dy.push_back(&of[i].sums);
    }
    if (trains_a[i]) {
      of_x[i].ds = columns(ds, i * R);
      if (drops) of_x[i].bits = pointer<int16_t>(packed.bits) + i * M * size.words;
      of_x[i].da = wanted.sums ? scoring(of[i].sums.a, of[i].sums.a_squared, r, 1.0)
                               : training(da[i], of[i].mask_a, r, live[i], 1.0, alive);
    }
  }

  // Examples told by one tensor share a launch; else each projection has its own.
  bool together = true;
  for (int64_t i = 0; wanted.sums && i < P; ++i) {
    together &= same_memory(of[i].sums.bounds, of[0].sums.bounds);
  }
  const auto batch = together ? int64_t{kMaxProjections} : 1;

  // One workspace for all, one after the other.
  int64_t bytes = 0;
  const auto at_least = [&](size_t n) { bytes = std::max(bytes, static_cast<int64_t>(n)); };
  const auto each_dy = [&](auto work) {  // work(projections, count, examples)
    for (size_t i = 0; i < of_dy.size(); i += batch) {
      DyProjection* part = of_dy.data() + i;
      const int count = static_cast<int>(std::min<size_t>(batch, of_dy.size() - i));
      if (!wanted.sums) {
        work(part, count, Examples{});
        continue;
      }
      int64_t width = 0;
      for (int j = 0; j < count; ++j) width += R * part[j].n;
      c10::SmallVector<Output, 4> ds;
      in_rounds(sums_of_dy[i]->bounds, width, [&](Examples examples, bool first) {
        if (!first) {  // dS is there already
          for (int j = 0; j < count; ++j) ds.push_back(part[j].ds), part[j].ds = {};
        }
        work(part, count, examples);
        for (size_t j = 0; j < ds.size(); ++j) part[j].ds = ds[j];
        ds.clear();
      });
    }
  };
  const auto each_x = [&](auto work) {
    for (size_t i = 0; i < of_x.size(); i += batch) {
      const int count = static_cast<int>(std::min<size_t>(batch, of_x.size() - i));
      if (!wanted.sums) {
        work(of_x.data() + i, count, Examples{});
      } else {
        in_rounds(of[i].sums.bounds, count * R * K,
                  [&](Examples examples, bool) { work(of_x.data() + i, count, examples); });
      }
    }
  };
  const auto each_few = [&](auto work) {  // work(FewRows), of a dA not before its dS
    for (size_t i = 0; i < std::max(of_dy.size(), of_x.size()); i += kMaxProjections) {
      const auto count = [&](size_t size) {
        return static_cast<int>(std::min<size_t>(kMaxProjections, size > i ? size - i : 0));
      };
      work(FewRows{of_dy.data() + i, count(of_dy.size()), of_x.data() + i, count(of_x.size()),
                   any_a ? matrix(x) : Matrix{}, size.words, M, K, rank, inverse});
    }
  };
  bool few = some && !wanted.sums;
  each_few([&](const FewRows& call) { few = few && takes_few_rows(call, type); });
  const auto base_gemm = [&](int64_t i) {
    return Gemm{dys[i], weights[i], made.dx, false, true};
  };
  if (!few) {
    each_dy([&](const DyProjection* part, int count, Examples examples) {
      at_least(dy_gradients_workspace(part, count, M, rank, type, examples));
    });
    each_x([&](const XProjection* part, int count, Examples examples) {
      at_least(x_gradients_workspace(part, count, M, K, rank, type, examples));
    });
  }
  for (int64_t i = 0; wanted.x && M > 0 && i < P; ++i) {
    if (weights[i].defined()) at_least(gemm_workspace(base_gemm(i)));
  }
  const at::Tensor room = empty({bytes}, at::kByte, device);
  void* workspace = room.data_ptr();

  if (few) {
    each_few([&](const FewRows& call) { few_rows(call, type, stream); });
  } else {
    each_dy([&](const DyProjection* part, int count, Examples examples) {
      dy_gradients(part, count, M, rank, inverse, type, examples, workspace, stream);
    });
  }
  if (any_a && !few) {
    const Matrix rows = matrix(x);
    each_x([&](const XProjection* part, int count, Examples examples) {
      x_gradients(part, count, rows, size.words, M, K, rank, type, examples, workspace, stream);
    });
  }
  if (expands) {
    ExpandDx call{};
    call.ds = matrix(ds);
    call.a = matrix(packed.a_pack);
    call.bits = drops ? pointer<int16_t>(packed.bits) : nullptr;
    call.words = size.words;
    call.out = output(made.dx);
    call.M = M;
    call.K = K;
    call.projections = static_cast<int>(P);
    call.R = rank;
    expand_dx(call, type, stream);
  } else if (wanted.x && M > 0 && !by_gemm) {
    made.dx.zero_();
  }
  bool written = expands;
  for (int64_t i = 0; wanted.x && M > 0 && i < P; ++i) {
    if (!weights[i].defined()) continue;
    gemm({dys[i], weights[i], made.dx, false, written}, workspace, stream);
    written = true;
  }
  check_launches("lora_backward");
  for (int64_t i = 0; i < P; ++i) {  // float64 adapters
    if (da[i].defined()) made.da[i] = as_type(da[i], of[i].a.scalar_type());
    if (db[i].defined()) made.db[i] = as_type(db[i], of[i].b.scalar_type());
  }
  return made;
}

// ---- The raw ops, of the schemas that torch.ops.lorapar has.
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

at::Tensor get(const OptionalTensors& list, size_t i) {
  const std::optional<at::Tensor> t = list.get(i);
  return t.has_value() ? *t : at::Tensor();
}

std::vector<at::Tensor> lora_forward(const at::Tensor& x, at::TensorList bases,
                                     const OptionalTensors& biases, at::TensorList a,
                                     at::TensorList b, const OptionalTensors& live,
                                     c10::ArrayRef<double> scales,
                                     const std::optional<at::Tensor>& seed, double p,
                                     bool owns_base) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Adapters of(a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    of[i].base = bases[i];
    of[i].bias = get(biases, i);
    of[i].a = a[i];
    of[i].b = b[i];
    of[i].live = get(live, i);
    of[i].scale = scales[i];
  }
  Packed packed;
  const Tensors ys = forward(with_rows(x), of, seed.value_or(at::Tensor()), p, owns_base,
                             {true, true, true}, packed);
  std::vector<at::Tensor> out(ys.begin(), ys.end());
  out.push_back(std::move(packed.whole));
  return out;
}

// The parts of `kept`, as lorapar_kernels/kept.py lays them out.
Packed parts_of(const at::Tensor& given, const OptionalTensors& dys, int64_t K, const Adapters& of,
                at::IntArrayRef live, double p) {
  int64_t M = 0;
  for (size_t i = 0; i < dys.size(); ++i) {
    if (const at::Tensor dy = get(dys, i); dy.defined()) M = dy.size(0);
  }
  const Sizes size(M, K, of, padded_rank(*std::max_element(live.begin(), live.end())));
  const at::ScalarType type = given.scalar_type();
  // Hooks of saved tensors may bring it back as a part of something else.
  const bool aligned = reinterpret_cast<uintptr_t>(given.data_ptr()) % 16 == 0;
  const at::Tensor kept = aligned && given.is_contiguous()
                              ? given
                              : given.clone(at::MemoryFormat::Contiguous);
  std::array<int64_t, 3> bits{size.P, M, size.words};
  if (p == 0.0) bits = {0, 0, 0};
  const int64_t C = size.C();
  Arena parts(kept);
  const int64_t bits_at = parts.reserve(bits, at::kShort), a_at = parts.reserve({C, K}, type);
  const int64_t b_at = parts.reserve({size.R, size.N}, type), valid_at = parts.reserve(C);
  const int64_t s_at = parts.reserve({M, C}, type);
  TORCH_CHECK(kept.numel() * static_cast<int64_t>(kept.element_size()) == parts.bytes(),
              "lorapar_cuda: kept has ", kept.numel(), " elements, but dys of ", M,
              " rows need ", parts.bytes(), " bytes; pass what lora_forward gave for these shapes");
  Packed packed;
  packed.bits = parts.tensor(bits_at, bits, at::kShort);
  packed.a_pack = parts.tensor(a_at, {C, K}, type);
  packed.b_pack = parts.tensor(b_at, {size.R, size.N}, type);
  packed.valid = parts.tensor(valid_at, {C}, at::kChar);
  packed.s = parts.tensor(s_at, {M, C}, type);
  return packed;
}

// `shapes` are fused.py's: K, then of each adapter r, N and the dtypes of A and B by number. Its
// tensors have these and no memory.
Adapters adapters_of(at::TensorList weights, at::IntArrayRef shapes, c10::ArrayRef<double> scales,
                     const OptionalTensors& dys, Tensors& gradients) {
  constexpr at::ScalarType kTypes[] = {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble};
  const auto shape = [&](int64_t rows, int64_t columns, int64_t type) {
    return at::empty({rows, columns}, at::device(at::kMeta).dtype(kTypes[type]));
  };
  Adapters of(dys.size());
  for (size_t i = 0; i < of.size(); ++i) {
    const at::IntArrayRef one = shapes.slice(1 + 4 * i, 4);
    if (!weights.empty()) of[i].base = weights[i];
    of[i].a = shape(one[0], shapes[0], one[2]);
    of[i].b = shape(one[1], one[0], one[3]);
    of[i].scale = scales[i];
    gradients.push_back(get(dys, i));
  }
  return of;
}

at::Tensor or_nothing(const at::Tensor& t, at::ScalarType type, const at::Tensor& kept) {
  return t.defined() ? t : allocate({0}, type, kept.device());
}

std::vector<at::Tensor> lora_backward(
    const std::optional<at::Tensor>& x, const OptionalTensors& dys, at::TensorList weights,
    at::IntArrayRef adapters, const OptionalTensors& masks, at::IntArrayRef live,
    const at::Tensor& kept, c10::ArrayRef<double> scales, double p, bool need_x,
    const c10::List<bool>& need_a, const c10::List<bool>& need_b) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Tensors gradients;
  Adapters of = adapters_of(weights, adapters, scales, dys, gradients);
  Wanted wanted;
  wanted.x = need_x;
  for (size_t i = 0; i < of.size(); ++i) {
    of[i].mask_a = {get(masks, 6 * i), get(masks, 6 * i + 1), get(masks, 6 * i + 2)};
    of[i].mask_b = {get(masks, 6 * i + 3), get(masks, 6 * i + 4), get(masks, 6 * i + 5)};
    wanted.a.push_back(need_a.get(i));
    wanted.b.push_back(need_b.get(i));
  }
  const Packed packed = parts_of(kept, dys, adapters[0], of, live, p);
  const at::Tensor rows = x.has_value() ? with_rows(*x) : at::Tensor();
  const Gradients made =
      backward(rows, gradients, of, live, packed, p, !weights.empty(), wanted);
  std::vector<at::Tensor> out{or_nothing(made.dx, kept.scalar_type(), kept)};
  for (size_t i = 0; i < of.size(); ++i) {
    out.push_back(or_nothing(made.da[i], of[i].a.scalar_type(), kept));
  }
  for (size_t i = 0; i < of.size(); ++i) {
    out.push_back(or_nothing(made.db[i], of[i].b.scalar_type(), kept));
  }
  return out;
}

at::Tensor lora_backward_sums(
    const at::Tensor& x, const OptionalTensors& dys, at::TensorList weights,
    at::IntArrayRef adapters, at::TensorList sums, at::TensorList bounds, at::IntArrayRef live, const at::Tensor& kept,
    c10::ArrayRef<double> scales, double p, bool need_x) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Tensors gradients;
  Adapters of = adapters_of(weights, adapters, scales, dys, gradients);
  for (size_t i = 0; i < of.size(); ++i) {
    of[i].sums = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3], bounds[i]};
  }
  Wanted wanted;
  wanted.x = need_x;
  wanted.sums = true;
  const Packed packed = parts_of(kept, dys, adapters[0], of, live, p);
  const Gradients made =
      backward(with_rows(x), gradients, of, live, packed, p, !weights.empty(), wanted);
  return or_nothing(made.dx, kept.scalar_type(), kept);
}

}  // namespace

TORCH_LIBRARY(lorapar_cuda, m) {
  m.def(
      "lora_forward(Tensor x, Tensor[] bases, Tensor?[] biases, Tensor[] a, Tensor[] b, "
      "Tensor?[] live, float[] scales, Tensor? seed, float p, bool owns_base) -> Tensor[]");
  m.def(
      "lora_backward(Tensor? x, Tensor?[] dys, Tensor[] weights, int[] adapters, Tensor?[] masks, "
      "int[] live, Tensor kept, float[] scales, float p, bool need_x, bool[] need_a, "
      "bool[] need_b) -> Tensor[]");
  m.def(
      "lora_backward_sums(Tensor x, Tensor?[] dys, Tensor[] weights, int[] adapters, "
      "Tensor(a!)[] sums, Tensor[] bounds, int[] live, Tensor kept, float[] scales, float p, "
      "bool need_x) -> Tensor");
}

TORCH_LIBRARY_IMPL(lorapar_cuda, LORAPAR_DISPATCH_KEY, m) {
  m.impl("lora_forward", &lora_forward);
  m.impl("lora_backward", &lora_backward);
  m.impl("lora_backward_sums", &lora_backward_sums);
}

}  // namespace lorapar

// The forward and backward of all projections of one x on tensors, without autograd: what the raw
// ops and the autograd node share. Named as in lorapar_kernels/fused.py.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace lorapar {

// What LoraMask.tensors holds for one matrix; undefined where that is None.
struct MaskLists {
  at::Tensor trainable, index, slot;
  bool trains() const { return !index.defined() || index.numel() > 0; }
};

struct Sums {  // ImportanceSums and the bounds of its examples
  at::Tensor a, a_squared, b, b_squared, bounds;
};

// One projection. `base` is W where the op owns the base layer, else the output made elsewhere.
struct Adapter {
  at::Tensor base, bias, a, b;
  at::Tensor live;  // int32, or undefined: all
  double scale = 1.0;
  MaskLists mask_a, mask_b;
  Sums sums;
};
using Adapters = c10::SmallVector<Adapter, 4>;
using Tensors = c10::SmallVector<at::Tensor, 4>;

// For the backward. In the padded rank R: a_pack [P*R, K], b_pack [R, sum N], s [M, P*R]. `whole`:
// where all of them lie, one tensor of the compute dtype, laid out as lorapar_kernels/kept.py has it
// if all are kept.
struct Packed {
  at::Tensor s, bits, a_pack, b_pack, valid, whole;
};

// Which tensors of `Packed` are kept, in one allocation. The rest, left undefined, lies in another
// that ends with the call.
struct Keep {
  bool packs = false, s = false, bits = false;
};

// x [M, K]; fills `packed`, gives y [M, N] of each. The seed is undefined without dropout.
Tensors forward(const at::Tensor& x, const Adapters& of, const at::Tensor& seed, double p,
                bool owns_base, Keep keep, Packed& packed);

// What is wanted of the backward.
struct Wanted {
  bool x = false, sums = false;  // sums: of importance, instead of dA and dB
  c10::SmallVector<bool, 4> a, b;
};
struct Gradients {
  at::Tensor dx;  // undefined where not wanted, like the rest
  Tensors da, db;
};
// `x` and `packed.s` may be undefined where nothing needs them; a dy where that output had no use.
// `live` counts the live columns. At least one dy is defined.
Gradients backward(const at::Tensor& x, const Tensors& dys, const Adapters& of,
                   c10::ArrayRef<int64_t> live, const Packed& packed, double p, bool owns_base,
                   const Wanted& wanted);

// t as a matrix [rows, columns] with contiguous rows, over the same memory where that can be.
at::Tensor as_rows(const at::Tensor& t);

// One int64, drawn as torch.randint does for the other backends.
at::Tensor draw_seed(at::Device device);

// dropout.drop_below: an element is dropped if its draw, in the upper half of a word, is below it.
inline uint32_t drop_below(double p) {  // as Python's round: half to even
  const auto limit = static_cast<int64_t>(std::nearbyint(p * 65536));
  return static_cast<uint32_t>(std::min<int64_t>(limit, 65535)) << 16;
}

}  // namespace lorapar

// All projections of one x with autograd, and whether the extension may serve them.
#pragma once
#include "ops.h"

namespace lorapar {

// A call as it comes from Python. x [..., K] is not cast yet.
struct Call {
  at::Tensor x;
  Adapters of;
  double p = 0.0;
  bool owns_base = true;
};

// The dtype of the products: autocast's where that is on.
at::ScalarType compute_type(const at::Tensor& x);

// Whether everything is as the kernels need it. Where not, Python's checks say what is wrong, or
// something else serves.
bool fits(const Call& call);

// The outputs [..., N], recorded where something requires grad.
Tensors apply(Call call);

}  // namespace lorapar

// Few rows without autograd: the base layer and its adapter in one call from Python, two launches.
//
// `decode(x, base, bias, lora_a, lora_b, scale, live, p, owns_base)` of lorapar_kernels._C gives
// None where the call is not for it. `lorapar_cuda::lora_decode`, for torch.compile, adds the
// adapter. Dropout draws its seed, and the bits from it, as lora_linear does.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "bind.h"
#include "device.h"
#include "kernels.h"

namespace lorapar {

void bind_decode(pybind11::module_& m);

namespace {

// Below autograd, and as if there were no autocast.
struct Plainly {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

bool narrow(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

Type type_of(at::ScalarType type) {
  return type == at::kFloat ? Type::f32 : type == at::kHalf ? Type::f16 : Type::bf16;
}

Matrix matrix(const at::Tensor& rows) { return {rows.data_ptr(), rows.stride(0)}; }

// y [M, N] += scale * (drop(x) A^T) B^T for all projections. The seed is undefined without dropout.
void add_adapters(const at::Tensor& x, const Adapters& of, const at::Tensor& seed, double p,
                  at::ArrayRef<at::Tensor> ys) {
  if (x.size(0) == 0) return;
  DecodeDropout dropout;
  if (seed.defined()) {
    dropout = {seed.const_data_ptr<int64_t>(), drop_below(p), static_cast<float>(1.0 / (1.0 - p))};
  }
  DecodeProjection part[kMaxProjections];
  Tensors alive;  // copies, until the launch
  for (size_t i = 0; i < of.size(); ++i) {
    const at::Tensor a = as_rows(of[i].a), b = as_rows(of[i].b);
    const at::Tensor& live = of[i].live;
    part[i] = {matrix(a), matrix(b), type_of(a.scalar_type()), type_of(b.scalar_type()),
               live.defined() ? live.const_data_ptr<int32_t>() : nullptr,
               static_cast<int>(live.defined() ? live.numel() : a.size(0)),
               {ys[i].data_ptr(), ys[i].stride(0)}, b.size(0), static_cast<float>(of[i].scale)};
    alive.push_back(a);
    alive.push_back(b);
  }
  decode(part, static_cast<int>(of.size()), matrix(x), x.size(0), x.size(1),
         type_of(x.scalar_type()), dropout, current_stream(x.device()));
  check_launches("lora_decode");
}

// x W^T + bias.
void base_layer(const at::Tensor& x, const Adapter& of, const at::Tensor& y) {
  if (x.size(0) == 0) return;
  if (of.bias.defined()) {
    at::Tensor out = y;
    at::addmm_out(out, of.bias.to(y.scalar_type()), x, of.base.t());
    return;
  }
  const Gemm product{x, of.base, y, true, false};
  const auto bytes = static_cast<int64_t>(gemm_workspace(product));
  const at::Tensor workspace = bytes > 0 ? allocate({bytes}, at::kByte, x.device()) : at::Tensor();
  gemm(product, bytes > 0 ? workspace.data_ptr() : nullptr, current_stream(x.device()));
}

}  // namespace

bool decodes(const at::Tensor& x) {
  if (at::GradMode::is_enabled() || x.dim() < 1 || !narrow(x.scalar_type())) return false;
  return x.numel() <= kDecodeRows * x.size(-1);
}

at::Tensor serve_decoding(const Call& call) {
  const Adapter& one = call.of[0];
  const at::ScalarType type = call.x.scalar_type();
  if (!decodes(call.x) || compute_type(call.x) != type) return {};
  if (one.base.scalar_type() != type || !fits(call)) return {};
  const c10::DeviceGuard guard(call.x.device());
  const Plainly plainly;
  const at::Tensor x = as_rows(call.x);
  at::Tensor y;
  if (call.owns_base) {
    y = allocate({x.size(0), one.b.size(0)}, type, x.device());
    base_layer(x, one, y);
  } else {
    y = as_rows(one.base).clone(at::MemoryFormat::Contiguous);
  }
  add_adapters(x, call.of, call.p > 0.0 ? draw_seed(x.device()) : at::Tensor(), call.p, {y});
  c10::SmallVector<int64_t, 5> sizes(call.x.sizes().begin(), call.x.sizes().end());
  sizes.back() = y.size(1);
  y.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return y;
}

namespace {

PyObject* decode_call(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "decode takes 9 arguments");
  try {
    Call call;
    call.x = tensor(of[0]);
    Adapter& one = call.of.emplace_back();
    one.base = tensor(of[1]);
    one.bias = tensor_or_none(of[2]);
    one.a = tensor(of[3]);
    one.b = tensor(of[4]);
    one.scale = number(of[5]);
    one.live = tensor_or_none(of[6]);
    call.p = number(of[7]);
    call.owns_base = of[8] == Py_True;
    const at::Tensor y = serve_decoding(call);
    if (y.defined()) return THPVariable_Wrap(y);
  } catch (const Odd&) {
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// The registered op: outs[i] [..., N] += scales[i] * (drop(x) A^T) B^T.
void lora_decode(at::TensorList outs, const at::Tensor& x, at::TensorList a, at::TensorList b,
                 const c10::List<std::optional<at::Tensor>>& live, c10::ArrayRef<double> scales,
                 const std::optional<at::Tensor>& seed, double p) {
  const size_t P = outs.size();
  TORCH_CHECK(P >= 1 && P <= kMaxProjections && a.size() == P && b.size() == P &&
                  live.size() == P && scales.size() == P,
              "lorapar_cuda::lora_decode: lists of different lengths, or of more than ",
              kMaxProjections);
  TORCH_CHECK_TYPE(narrow(x.scalar_type()), "lorapar_cuda::lora_decode: x must have 16 bits");
  TORCH_CHECK_VALUE(p >= 0.0 && p < 1.0 && seed.has_value() == (p > 0.0),
                    "lorapar_cuda::lora_decode: p must lie in [0, 1), with a seed if it is not 0");
  const c10::DeviceGuard guard(x.device());
  const Plainly plainly;
  const at::Tensor rows = as_rows(x);
  TORCH_CHECK(rows.size(0) <= kDecodeRows, "lorapar_cuda::lora_decode: x has ", rows.size(0),
              " rows, more than ", kDecodeRows);
  Adapters of(P);
  c10::SmallVector<at::Tensor, 4> ys;
  for (size_t i = 0; i < P; ++i) {
    TORCH_CHECK(a[i].dim() == 2 && b[i].dim() == 2 && a[i].size(1) == rows.size(1) &&
                    a[i].size(0) == b[i].size(1) && outs[i].scalar_type() == x.scalar_type() &&
                    outs[i].size(-1) == b[i].size(0) &&
                    outs[i].numel() == rows.size(0) * b[i].size(0),
                "lorapar_cuda::lora_decode: shapes or dtypes disagree");
    of[i].a = a[i];
    of[i].b = b[i];
    for (at::Tensor* t : {&of[i].a, &of[i].b}) {
      if (t->scalar_type() == at::kDouble) *t = t->to(at::kFloat);
    }
    of[i].scale = scales[i];
    const std::optional<at::Tensor> columns = live.get(i);
    if (columns.has_value()) of[i].live = *columns;
    ys.push_back(outs[i].contiguous().view({rows.size(0), b[i].size(0)}));
  }
  add_adapters(rows, of, seed.value_or(at::Tensor()), p, ys);
  for (size_t i = 0; i < P; ++i) {
    if (!outs[i].is_contiguous()) outs[i].copy_(ys[i].view(outs[i].sizes()));
  }
}

void lora_decode_fake(at::TensorList, const at::Tensor&, at::TensorList, at::TensorList,
                      const c10::List<std::optional<at::Tensor>>&, c10::ArrayRef<double>,
                      const std::optional<at::Tensor>&, double) {}

PyMethodDef methods[] = {
    {"decode", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(decode_call)),
     METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_decode(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

TORCH_LIBRARY_FRAGMENT(lorapar_cuda, m) {
  m.def(
      "lora_decode(Tensor(a!)[] outs, Tensor x, Tensor[] a, Tensor[] b, Tensor?[] live, "
      "float[] scales, Tensor? seed, float p) -> ()");
}
TORCH_LIBRARY_IMPL(lorapar_cuda, LORAPAR_DISPATCH_KEY, m) { m.impl("lora_decode", &lora_decode); }
TORCH_LIBRARY_IMPL(lorapar_cuda, Meta, m) { m.impl("lora_decode", &lora_decode_fake); }

}  // namespace lorapar

// Few rows without autograd: the base layer and its adapter in one call from Python, two launches.
//
// `decode(x, base, bias, lora_a, lora_b, scale, live, p, owns_base)` of lorapar_kernels._C gives
// None where the call is not for it. `decode_planned(plan, state, x)` is the same for a module
// whose parts Python found before, and finds out whether they are still what they were (see
// `unchanged`).
// `lorapar_cuda::lora_decode`, for torch.compile, adds the adapter. Dropout draws its seed, and the
// bits from it, as lora_linear does.
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
#include <cstdlib>
#include <cstring>
#include <utility>

#include "device.h"
#include "function.h"
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

bool few_rows(const at::Tensor& x) {
  if (at::GradMode::is_enabled() || x.dim() < 1 || !narrow(x.scalar_type())) return false;
  return x.numel() <= kDecodeRows * x.size(-1);
}

bool serves(const Call& call) {
  const at::Tensor& x = call.x;
  const Adapter& one = call.of[0];
  if (!few_rows(x) || compute_type(x) != x.scalar_type()) return false;
  return one.base.scalar_type() == x.scalar_type() && fits(call);
}

at::Tensor serve(const Call& call) {
  const c10::DeviceGuard guard(call.x.device());
  const Plainly plainly;
  const at::Tensor x = as_rows(call.x);
  const Adapter& one = call.of[0];
  at::Tensor y;
  if (call.owns_base) {
    y = allocate({x.size(0), one.b.size(0)}, x.scalar_type(), x.device());
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

// False where an argument is neither a plain tensor nor None.
bool read(PyObject* object, at::Tensor& to) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  to = THPVariable_Unpack(object);
  return true;
}

double read_number(PyObject* object) {
  const double number = PyFloat_AsDouble(object);
  if (number == -1.0 && PyErr_Occurred()) throw python_error();
  return number;
}

PyObject* decode_call(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "decode takes 9 arguments");
  Call call;
  call.of.emplace_back();
  Adapter& one = call.of[0];
  const bool read_all = read(of[0], call.x) && read(of[1], one.base) && read(of[2], one.bias) &&
                        read(of[3], one.a) && read(of[4], one.b) && read(of[6], one.live);
  one.scale = read_number(of[5]);
  call.p = read_number(of[7]);
  call.owns_base = of[8] == Py_True;
  const bool given = call.x.defined() && one.base.defined() && one.a.defined() && one.b.defined();
  if (!read_all || !given || !serves(call)) Py_RETURN_NONE;
  return THPVariable_Wrap(serve(call));
  END_HANDLE_TH_ERRORS
}

// extension.serves(): os.environ writes through to what getenv reads.
bool environment_lets() {
  const char* backend = std::getenv("LORAPAR_BACKEND");
  return backend == nullptr || *backend == 0 || std::strcmp(backend, "cuda") == 0;
}

// What `dict` holds, borrowed, or null; None stands for `state`. Of a list: its only item.
PyObject* held(PyObject* dict, PyObject* state, PyObject* key) {
  if (dict == Py_None) dict = state;
  if (PyList_Check(dict)) return PyList_GET_SIZE(dict) == 1 ? PyList_GET_ITEM(dict, 0) : nullptr;
  PyObject* found = PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key) : nullptr;
  if (found == nullptr && PyErr_Occurred()) throw python_error();
  return found;
}

// Whether all that a plan was made of is as it was. Its first parts are flat tuples:
//   (dict, key, value, ...)   dict[key] is value
//   (dict, key, ...)          dict has no key
//   (dict, key, ...)          dict[key] is an empty container
//   (object, type, ...)       type(object) is type
bool unchanged(PyObject* plan, PyObject* state) {
  const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(plan, i); };
  const auto at = [](PyObject* of, Py_ssize_t i) { return PyTuple_GET_ITEM(of, i); };
  PyObject *same = part(0), *absent = part(1), *empty = part(2), *types = part(3);
  for (Py_ssize_t i = 0; i + 3 <= PyTuple_GET_SIZE(same); i += 3) {
    if (held(at(same, i), state, at(same, i + 1)) != at(same, i + 2)) return false;
  }
  for (Py_ssize_t i = 0; i + 2 <= PyTuple_GET_SIZE(absent); i += 2) {
    if (held(at(absent, i), state, at(absent, i + 1)) != nullptr) return false;
  }
  for (Py_ssize_t i = 0; i + 2 <= PyTuple_GET_SIZE(types); i += 2) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(at(types, i))) != at(types, i + 1)) return false;
  }
  for (Py_ssize_t i = 0; i + 2 <= PyTuple_GET_SIZE(empty); i += 2) {
    PyObject* container = held(at(empty, i), state, at(empty, i + 1));
    if (container == nullptr) return false;
    const Py_ssize_t size = PyObject_Size(container);
    if (size < 0) throw python_error();
    if (size > 0) return false;
  }
  return true;
}

// decode_planned(plan, state, x): y, or None. The last parts of a plan are the `_parameters` of the
// base layer, of A's and of B's, where weights are looked up in every call, the scale, the live
// columns with the rank that they are of, and p. `state` is the module's __dict__, which the plan
// must not hold: it lies in there.
PyObject* decode_planned(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && PyTuple_Check(of[0]) && PyTuple_GET_SIZE(of[0]) == 11,
                   "decode_planned takes a plan of eleven parts, a dict and x");
  PyObject *plan = of[0], *state = of[1];
  Call call;
  if (!read(of[2], call.x) || !call.x.defined() || !few_rows(call.x)) Py_RETURN_NONE;
  if (!environment_lets() || !unchanged(plan, state)) Py_RETURN_NONE;
  call.of.emplace_back();
  Adapter& one = call.of[0];
  const auto read_part = [&](Py_ssize_t part, PyObject* key, at::Tensor& to) {
    PyObject* found = held(PyTuple_GET_ITEM(plan, part), state, key);
    return found != nullptr && read(found, to);
  };
  static PyObject* const weight = PyUnicode_InternFromString("weight");
  static PyObject* const bias = PyUnicode_InternFromString("bias");
  const bool read_all = read_part(4, weight, one.base) && read_part(4, bias, one.bias) &&
                        read_part(5, weight, one.a) && read_part(6, weight, one.b) &&
                        read(PyTuple_GET_ITEM(plan, 8), one.live);
  one.scale = read_number(PyTuple_GET_ITEM(plan, 7));
  call.p = read_number(PyTuple_GET_ITEM(plan, 10));
  const bool given = one.base.defined() && one.a.defined() && one.b.defined();
  if (!read_all || !given || !serves(call)) Py_RETURN_NONE;
  if (one.live.defined() && one.a.size(0) != PyLong_AsLong(PyTuple_GET_ITEM(plan, 9))) {
    Py_RETURN_NONE;
  }
  return THPVariable_Wrap(serve(call));
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
    {"decode_planned",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(decode_planned)), METH_FASTCALL,
     nullptr},
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

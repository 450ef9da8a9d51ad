// lorapar_kernels._C: one function a public op, each one Python call. They give None where the call
// is not for them: Python's checks then say what is wrong, or another backend serves.
//
// `choose(rows, K, sum N, bytes of an element, projections, rank)` says whether a call of that size
// is the extension's; None says that all are.
#include <Python.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <utility>

#include "bind.h"

namespace lorapar {

__attribute__((weak)) void bind_decode(pybind11::module_& m);  // decode_ops.cpp
__attribute__((weak)) void bind_plan(pybind11::module_& m);    // plan.cpp
__attribute__((weak)) void bind_state(pybind11::module_& m);   // state.cpp

namespace {

// A name of an attribute, made once. A reference is kept for ever.
class Name {
 public:
  explicit Name(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  pybind11::object of(PyObject* object) const {
    PyObject* value = PyObject_GetAttr(object, name_);
    if (value == nullptr) throw python_error();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

 private:
  PyObject* name_;
};

}  // namespace

at::Tensor tensor(PyObject* object) {
  if (object == nullptr || !THPVariable_CheckExact(object)) throw Odd();
  return THPVariable_Unpack(object);
}

at::Tensor tensor_or_none(PyObject* object) {
  return object == Py_None ? at::Tensor() : tensor(object);
}

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw python_error();
  return value;
}

void read_mask(PyObject* mask, Adapter& to) {
  static const Name tensors("_tensors"), live("_live_columns"), live_flags("_live");
  if (mask == Py_None) return;
  const pybind11::object six = tensors.of(mask);
  if (!PyTuple_Check(six.ptr()) || PyTuple_GET_SIZE(six.ptr()) != 6) throw Odd();
  const auto get = [&](int i) { return tensor_or_none(PyTuple_GET_ITEM(six.ptr(), i)); };
  to.mask_a = {get(0), get(1), get(2)};
  to.mask_b = {get(3), get(4), get(5)};
  to.live = tensor_or_none(live.of(mask).ptr());
  if (to.live.defined()) {  // the mask may be of another adapter
    const at::Tensor flags = tensor_or_none(live_flags.of(mask).ptr());
    if (flags.numel() != to.a.size(0)) throw Odd();
  }
}

namespace {

void read_sums(PyObject* sums, const at::Tensor& x, Adapter& to) {
  static const Name a("a"), a_squared("a_squared"), b("b"), b_squared("b_squared");
  static const Name bounds("cu_seqlens"), rows("rows");
  if (sums == Py_None) return;
  to.sums.bounds = tensor(bounds.of(sums).ptr());
  const int64_t columns = x.dim() == 0 ? 0 : x.size(-1);
  if (columns == 0 || PyLong_AsLongLong(rows.of(sums).ptr()) != x.numel() / columns) throw Odd();
  to.sums.a = tensor(a.of(sums).ptr());
  to.sums.a_squared = tensor(a_squared.of(sums).ptr());
  to.sums.b = tensor(b.of(sums).ptr());
  to.sums.b_squared = tensor(b_squared.of(sums).ptr());
}

Adapter adapter(const at::Tensor& x, PyObject* base, PyObject* bias, PyObject* a, PyObject* b,
                PyObject* scale, PyObject* mask, PyObject* sums) {
  Adapter one;
  one.base = tensor(base);
  one.bias = tensor_or_none(bias);
  one.a = tensor(a);
  one.b = tensor(b);
  one.scale = number(scale);
  if (one.a.dim() != 2) throw Odd();
  read_mask(mask, one);
  read_sums(sums, x, one);
  return one;
}

bool chosen(PyObject* choose, const Call& call) {
  if (choose == Py_None) return true;
  const int64_t K = call.x.size(-1);
  int64_t rows = 1, N = 0, rank = 0;
  for (const int64_t size : call.x.sizes().slice(0, call.x.dim() - 1)) rows *= size;
  for (const Adapter& one : call.of) {
    N += one.b.size(0);
    rank = std::max(rank, one.a.size(0));
  }
  const auto size = static_cast<int64_t>(c10::elementSize(compute_type(call.x)));
  const auto P = static_cast<int64_t>(call.of.size());
  const pybind11::object answer =
      pybind11::handle(choose)(rows, K, N, size, P, rank);
  return answer.ptr() == Py_True;
}

}  // namespace

Tensors serve(PyObject* choose, Call call) {
  if (!fits(call) || !chosen(choose, call)) throw Odd();
  return apply(std::move(call));
}

namespace {

PyObject* none() { Py_RETURN_NONE; }

// linear(choose, x, weight, bias, lora_a, lora_b, scale, mask, dropout_p, sums)
PyObject* linear(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 10, "linear takes 10 arguments");
  try {
    Call call;
    call.x = tensor(of[1]);
    call.p = number(of[8]);
    call.of.push_back(adapter(call.x, of[2], of[3], of[4], of[5], of[6], of[7], of[9]));
    return THPVariable_Wrap(serve(of[0], std::move(call))[0]);
  } catch (const Odd&) {
    return none();
  }
  END_HANDLE_TH_ERRORS
}

// add(choose, base, x, lora_a, lora_b, scale, mask, dropout_p, sums)
PyObject* add(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 9, "add takes 9 arguments");
  try {
    Call call;
    call.owns_base = false;
    call.x = tensor(of[2]);
    call.p = number(of[7]);
    call.of.push_back(adapter(call.x, of[1], Py_None, of[3], of[4], of[5], of[6], of[8]));
    return THPVariable_Wrap(serve(of[0], std::move(call))[0]);
  } catch (const Odd&) {
    return none();
  }
  END_HANDLE_TH_ERRORS
}

// group(choose, x, projections, dropout_p)
PyObject* group(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "group takes 4 arguments");
  static const Name weight("weight"), bias("bias"), lora_a("lora_a"), lora_b("lora_b");
  static const Name scale("scale"), mask("mask"), sums("sums");
  try {
    Call call;
    call.x = tensor(of[1]);
    call.p = number(of[3]);
    const auto projections = pybind11::reinterpret_steal<pybind11::object>(
        PySequence_Fast(of[2], "projections must be a sequence"));
    if (!projections) throw python_error();
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(projections.ptr()); ++i) {
      PyObject* one = PySequence_Fast_GET_ITEM(projections.ptr(), i);
      call.of.push_back(adapter(call.x, weight.of(one).ptr(), bias.of(one).ptr(),
                                lora_a.of(one).ptr(), lora_b.of(one).ptr(), scale.of(one).ptr(),
                                mask.of(one).ptr(), sums.of(one).ptr()));
    }
    const Tensors ys = serve(of[0], std::move(call));
    pybind11::tuple out(ys.size());
    for (size_t i = 0; i < ys.size(); ++i) {
      PyTuple_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(ys[i]));
    }
    return out.release().ptr();
  } catch (const Odd&) {
    return none();
  }
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL,
     nullptr},
    {"add", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(add)), METH_FASTCALL,
     nullptr},
    {"group", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(group)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
  if (bind_decode != nullptr) bind_decode(m);
  if (bind_plan != nullptr) bind_plan(m);
  if (bind_state != nullptr) bind_state(m);
}

}  // namespace lorapar

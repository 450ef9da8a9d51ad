// A call of a layer whose parts Python found before (lorapar_kernels/plan.py).
//
// `planned(plan, state, x, choose)` of lorapar_kernels._C gives y if all that the plan was made of
// is as it was and the call is the extension's; False if something has changed; else True, also
// where a look at x was enough. `state` is the module's __dict__, which the plan must not hold: it
// lies in there. Weights are looked up in every call.
#include <Python.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "bind.h"

namespace lorapar {

void bind_plan(pybind11::module_& m);

namespace {

// Of lorapar_kernels.plan.Plan.
enum Part : Py_ssize_t {
  kSame, kAbsent, kEmpty, kTypes, kAlone, kBase, kA, kB, kScale, kMask, kP, kParts
};

PyObject* at(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }

// What `dict` holds, borrowed, or null; None stands for `state`. Of a list: its only item.
PyObject* held(PyObject* dict, PyObject* state, PyObject* key) {
  if (dict == Py_None) dict = state;
  if (PyList_Check(dict)) return PyList_GET_SIZE(dict) == 1 ? PyList_GET_ITEM(dict, 0) : nullptr;
  PyObject* found = PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key) : nullptr;
  if (found == nullptr && PyErr_Occurred()) throw python_error();
  return found;
}

bool all_absent(PyObject* of, PyObject* state) {
  for (Py_ssize_t i = 0; i + 2 <= PyTuple_GET_SIZE(of); i += 2) {
    if (held(at(of, i), state, at(of, i + 1)) != nullptr) return false;
  }
  return true;
}

bool unchanged(PyObject* plan, PyObject* state) {
  PyObject *same = at(plan, kSame), *empty = at(plan, kEmpty), *types = at(plan, kTypes);
  for (Py_ssize_t i = 0; i + 3 <= PyTuple_GET_SIZE(same); i += 3) {
    if (held(at(same, i), state, at(same, i + 1)) != at(same, i + 2)) return false;
  }
  if (!all_absent(at(plan, kAbsent), state)) return false;
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

at::Tensor parameter(PyObject* plan, Part part, PyObject* name) {
  PyObject* found = held(at(plan, part), Py_None, name);
  if (found == nullptr) throw Odd();  // it is elsewhere
  return tensor_or_none(found);
}

Call call_of(PyObject* plan, const at::Tensor& x) {
  static PyObject* const weight = PyUnicode_InternFromString("weight");
  static PyObject* const bias = PyUnicode_InternFromString("bias");
  Call call;
  call.x = x;
  call.p = number(at(plan, kP));
  Adapter& one = call.of.emplace_back();
  one.base = parameter(plan, kBase, weight);
  one.bias = parameter(plan, kBase, bias);
  one.a = parameter(plan, kA, weight);
  one.b = parameter(plan, kB, weight);
  one.scale = number(at(plan, kScale));
  if (!one.base.defined() || !one.a.defined() || !one.b.defined() || one.a.dim() != 2) throw Odd();
  read_mask(at(plan, kMask), one);
  return call;
}

PyObject* planned(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4 && PyTuple_Check(of[0]) && PyTuple_GET_SIZE(of[0]) == kParts,
                   "planned takes a plan, a dict, x and a function");
  PyObject *plan = of[0], *state = of[1];
  // os.environ writes through to what getenv reads.
  const char* backend = std::getenv("LORAPAR_BACKEND");
  const bool named = backend != nullptr && *backend != 0;
  if (named && std::strcmp(backend, "cuda") != 0) Py_RETURN_TRUE;
  if (!THPVariable_CheckExact(of[2])) Py_RETURN_TRUE;
  const at::Tensor& x = THPVariable_Unpack(of[2]);
  const bool decoding = decodes(x);
  if (!decoding && !all_absent(at(plan, kAlone), state)) Py_RETURN_TRUE;
  if (!unchanged(plan, state)) Py_RETURN_FALSE;
  try {
    Call call = call_of(plan, x);
    if (!decoding) return THPVariable_Wrap(serve(named ? Py_None : of[3], std::move(call))[0]);
    const at::Tensor y = serve_decoding(call);
    if (y.defined()) return THPVariable_Wrap(y);
  } catch (const Odd&) {
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"planned", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(planned)),
     METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_plan(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace lorapar

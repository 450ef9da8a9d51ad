// Whether Python objects are as they were, for lorapar/shortcuts.py, which says why.
//
// `describe(tensor, place)` of lorapar_kernels._C gives bytes of all that compiled code depends on
// in a tensor but its values, with `place` also where they are. `same_tensors(tensors,
// descriptions)` and `same_state(plan)` compare with what was before; no two of `tensors` may share
// memory. A plan is made of flat tuples:
//   (object, type, dict, ...)       its type, and its __dict__, or None
//   (dict, (key, value, ...), ...)  these items, in this order
//   (list, (item, ...), ...)
//   (set, (item, ...), ...)         items whose hashes run no code of Python's
//   (cell, value, ...)              of closures
//   (function, code, defaults, defaults of keywords, ...)
//   (tensor, ...) and (description, ...)
// and of a bytearray of zeros, 8 for each dict.
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>

namespace lorapar {

void bind_state(pybind11::module_& m);

namespace {

using Words = c10::SmallVector<int64_t, 32>;

PyObject* part(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }

// False where it is no plain tensor.
bool describe_to(Words& to, PyObject* object, bool place) {
  if (!THPVariable_Check(object)) return false;
  const at::Tensor& t = THPVariable_Unpack(object);
  if (!t.defined() || t.layout() != at::kStrided || t.is_nested()) return false;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  to.push_back(reinterpret_cast<int64_t>(Py_TYPE(object)));
  const auto keys = (t.key_set() | local.included_) - local.excluded_;
  to.push_back(static_cast<int64_t>(keys.raw_repr()));
  to.push_back(static_cast<int64_t>(t.scalar_type()));
  to.push_back(static_cast<int64_t>(t.device().type()) * 256 + t.device().index());
  to.push_back(t.requires_grad());
  to.append(t.sizes().begin(), t.sizes().end());
  to.append(t.strides().begin(), t.strides().end());
  if (place && t.has_storage()) {  // one without memory has a place, too
    to.push_back(reinterpret_cast<int64_t>(t.storage().data_ptr().get()));
    to.push_back(t.storage_offset());
  }
  return true;
}

bool is_as(PyObject* object, PyObject* description, bool place) {
  Words now;
  if (!describe_to(now, object, place)) return false;
  const auto bytes = static_cast<Py_ssize_t>(now.size() * sizeof(int64_t));
  return PyBytes_GET_SIZE(description) == bytes &&
         std::memcmp(PyBytes_AS_STRING(description), now.data(), bytes) == 0;
}

bool all_as(PyObject* tensors, PyObject* descriptions, bool place) {
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  if (PyTuple_GET_SIZE(descriptions) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!is_as(part(tensors, i), part(descriptions, i), place)) return false;
  }
  return true;
}

bool same_objects(PyObject* of) {
  for (Py_ssize_t i = 0; i + 3 <= PyTuple_GET_SIZE(of); i += 3) {
    PyObject *object = part(of, i), *dict = part(of, i + 2);
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != part(of, i + 1)) return false;
    if (dict == Py_None) continue;
    PyObject* now = PyObject_GenericGetDict(object, nullptr);
    if (now == nullptr) throw python_error();
    Py_DECREF(now);  // the object holds it
    if (now != dict) return false;
  }
  return true;
}

// Changes with every change of a dict, and is no other dict's; 0: not to be had.
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

// `versions`: of each dict, when its items were last compared.
bool same_dicts(PyObject* of, uint64_t* versions) {
  constexpr Py_ssize_t ahead = 32;
  const Py_ssize_t count = PyTuple_GET_SIZE(of);
  for (Py_ssize_t i = 0; i + 2 <= count; i += 2) {
    PyObject* dict = part(of, i);
    if (i + ahead < count) __builtin_prefetch(part(of, i + ahead));
    const uint64_t version = version_of(dict);
    if (version != 0 && version == versions[i / 2]) continue;
    PyObject *items = part(of, i + 1), *key = nullptr, *value = nullptr;
    if (2 * PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(items)) return false;
    if (PyTuple_GET_SIZE(items) > 0) {
      for (Py_ssize_t at = 0, next = 0; PyDict_Next(dict, &next, &key, &value); at += 2) {
        if (key != part(items, at) || value != part(items, at + 1)) return false;
      }
    }
    versions[i / 2] = version;
  }
  return true;
}

bool same_lists(PyObject* of) {
  for (Py_ssize_t i = 0; i + 2 <= PyTuple_GET_SIZE(of); i += 2) {
    PyObject *list = part(of, i), *items = part(of, i + 1);
    const Py_ssize_t count = PyTuple_GET_SIZE(items);
    if (PyList_GET_SIZE(list) != count) return false;
    for (Py_ssize_t at = 0; at < count; ++at) {
      if (PyList_GET_ITEM(list, at) != part(items, at)) return false;
    }
  }
  return true;
}

bool same_sets(PyObject* of) {
  for (Py_ssize_t i = 0; i + 2 <= PyTuple_GET_SIZE(of); i += 2) {
    PyObject *set = part(of, i), *items = part(of, i + 1);
    const Py_ssize_t count = PyTuple_GET_SIZE(items);
    if (PySet_GET_SIZE(set) != count) return false;
    for (Py_ssize_t at = 0; at < count; ++at) {
      const int has = PySet_Contains(set, part(items, at));
      if (has < 0) throw python_error();
      if (has == 0) return false;
    }
  }
  return true;
}

bool same_cells(PyObject* of) {
  for (Py_ssize_t i = 0; i + 2 <= PyTuple_GET_SIZE(of); i += 2) {
    if (PyCell_GET(part(of, i)) != part(of, i + 1)) return false;
  }
  return true;
}

bool same_functions(PyObject* of) {
  const auto is = [](PyObject* now, PyObject* was) {
    return (now == nullptr ? Py_None : now) == was;
  };
  for (Py_ssize_t i = 0; i + 4 <= PyTuple_GET_SIZE(of); i += 4) {
    PyObject* function = part(of, i);
    if (!is(PyFunction_GET_CODE(function), part(of, i + 1)) ||
        !is(PyFunction_GET_DEFAULTS(function), part(of, i + 2)) ||
        !is(PyFunction_GET_KW_DEFAULTS(function), part(of, i + 3))) {
      return false;
    }
  }
  return true;
}

bool none_shares(PyObject* tensors) {
  c10::SmallVector<const void*, 16> storages;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    const at::Tensor& t = THPVariable_Unpack(part(tensors, i));
    const void* storage = t.has_storage() ? t.storage().unsafeGetStorageImpl() : nullptr;
    if (std::find(storages.begin(), storages.end(), storage) != storages.end()) return false;
    storages.push_back(storage);
  }
  return true;
}

PyObject* describe(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "describe takes a tensor and whether its place counts");
  Words words;
  if (!describe_to(words, of[0], of[1] == Py_True)) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()),
                                   static_cast<Py_ssize_t>(words.size() * sizeof(int64_t)));
  END_HANDLE_TH_ERRORS
}

PyObject* same_tensors(PyObject*, PyObject* const* of, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyTuple_Check(of[0]) && PyTuple_Check(of[1]),
                   "same_tensors takes tuples of tensors and of descriptions");
  return PyBool_FromLong(all_as(of[0], of[1], false) && none_shares(of[0]));
  END_HANDLE_TH_ERRORS
}

PyObject* same_state(PyObject*, PyObject* plan) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyTuple_Check(plan) && PyTuple_GET_SIZE(plan) == 9 &&
                       PyByteArray_Check(part(plan, 8)) &&
                       PyByteArray_GET_SIZE(part(plan, 8)) * 2 >=
                           PyTuple_GET_SIZE(part(plan, 1)) * Py_ssize_t{sizeof(uint64_t)},
                   "same_state takes a plan of nine parts");
  auto* versions = reinterpret_cast<uint64_t*>(PyByteArray_AS_STRING(part(plan, 8)));
  const bool same = same_dicts(part(plan, 1), versions) && same_objects(part(plan, 0)) &&
                    same_lists(part(plan, 2)) && same_sets(part(plan, 3)) &&
                    same_cells(part(plan, 4)) && same_functions(part(plan, 5)) &&
                    all_as(part(plan, 6), part(plan, 7), true);
  return PyBool_FromLong(same);
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"describe", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(describe)),
     METH_FASTCALL, nullptr},
    {"same_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(same_tensors)),
     METH_FASTCALL, nullptr},
    {"same_state", same_state, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void bind_state(pybind11::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace lorapar

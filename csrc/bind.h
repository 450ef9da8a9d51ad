// What the bindings share.
#pragma once
#include <Python.h>

#include <exception>

#include "function.h"

namespace lorapar {

// Thrown by all here for what only Python's checks know.
struct Odd : std::exception {};

// The tensor itself, if it is no subclass.
at::Tensor tensor(PyObject* object);
at::Tensor tensor_or_none(PyObject* object);

double number(PyObject* object);

// Of a LoraMask or None. The adapter's a is known.
void read_mask(PyObject* mask, Adapter& to);

// The outputs with autograd. Throws Odd where the call is not for us, `choose` says so, or None.
Tensors serve(PyObject* choose, Call call);

// Whether decode.cu is for x: few rows of 16 bits, without autograd.
bool decodes(const at::Tensor& x);

// The output by decode.cu for such an x, or an undefined tensor where the call is not for it.
at::Tensor serve_decoding(const Call& call);

}  // namespace lorapar

// The autograd node of a layer or group. One Python call in the forward, none in the backward.
//
// Saved       x where some A trains, S where some B trains, the dropout bits where A or x needs
//             them, the packed A and B in the compute dtype, and references to W, A and B.
#include "function.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/sum.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device.h"

namespace lorapar {
namespace {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

constexpr int64_t kMostRank = 512;

// Nodes are held by std::shared_ptr, or from some version of PyTorch on by c10::intrusive_ptr.
template <typename T, typename Pointer>
struct Made;
template <typename T>
struct Made<T, std::shared_ptr<Node>> {
  static auto make() { return std::shared_ptr<T>(new T, [](T* node) { deleteNode(node); }); }
};
template <typename T>
struct Made<T, c10::intrusive_ptr<Node>> {
  static auto make() { return c10::make_intrusive<T>(); }
};

// x and each projection's base, bias, A and B.
constexpr size_t kFirst = 1, kEach = 4, kBase = 0, kBias = 1, kA = 2, kB = 3;

constexpr size_t place(size_t projection, size_t what) { return kFirst + kEach * projection + what; }

// Below autograd, and as if there were no autocast.
struct Plainly {
  at::AutoGradMode no_grad{false};
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

void reshape(const at::Tensor& fresh, at::IntArrayRef leading, int64_t columns) {
  c10::SmallVector<int64_t, 5> sizes(leading.begin(), leading.end());
  sizes.back() = columns;
  fresh.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
}

struct CudaLoraBackward : public Node {
  struct Projection {
    SavedVariable weight, a, b;
    at::ScalarType bias_type = at::kFloat;
    double scale = 1.0;
    int64_t live = 0;
    MaskLists mask_a, mask_b;
    Sums sums;
  };
  SavedVariable x, s, bits, a_pack, b_pack, valid;
  std::vector<Projection> of;
  c10::SmallVector<int64_t, 5> x_sizes;
  double p = 0.0;
  bool owns_base = true, scores = false;

  std::string name() const override { return "CudaLoraBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* t : {&x, &s, &bits, &a_pack, &b_pack, &valid}) t->reset_data();
    for (Projection& one : of) {
      for (SavedVariable* t : {&one.weight, &one.a, &one.b}) t->reset_data();
    }
  }

  variable_list apply(variable_list&& dys) override;
  variable_list first_derivatives(const variable_list& dys);
};

variable_list CudaLoraBackward::apply(variable_list&& dys) {
  const std::lock_guard<std::mutex> lock(mutex_);
  variable_list grads = first_derivatives(dys);
  if (!at::GradMode::is_enabled()) return grads;
  for (at::Tensor& g : grads) {
    if (g.defined()) g = g.detach().set_requires_grad(true);
  }
  torch::autograd::DelayedError refusal(
      "trying to differentiate twice a function that was marked with @once_differentiable: "
      "lorapar_kernels has first derivatives only",
      static_cast<int64_t>(grads.size()));
  return refusal.apply(std::move(grads));
}

variable_list CudaLoraBackward::first_derivatives(const variable_list& dys) {
  const size_t P = of.size();
  variable_list grads(place(P, 0));
  bool used = false;
  for (const at::Tensor& dy : dys) used |= dy.defined();
  if (!used) return grads;

  // Hooks may run anything here, a checkpoint's recomputation too.
  const at::Tensor saved_x = x.unpack();
  const Packed packed{s.unpack(), bits.unpack(), a_pack.unpack(), b_pack.unpack(), valid.unpack()};
  Adapters adapters(P);
  Wanted wanted;
  wanted.x = task_should_compute_output(0);
  wanted.sums = scores;
  bool any = wanted.x || scores;
  c10::SmallVector<int64_t, 4> live;
  for (size_t i = 0; i < P; ++i) {
    const Projection& one = of[i];
    Adapter& to = adapters[i];
    to.base = one.weight.unpack();
    to.a = one.a.unpack();
    to.b = one.b.unpack();
    to.scale = one.scale;
    to.mask_a = one.mask_a;
    to.mask_b = one.mask_b;
    to.sums = one.sums;
    live.push_back(one.live);
    // An output that was not used gives its adapter no gradient at all.
    const bool trains = !scores && dys[i].defined();
    wanted.a.push_back(trains && task_should_compute_output(place(i, kA)));
    wanted.b.push_back(trains && task_should_compute_output(place(i, kB)));
    any |= wanted.a.back() || wanted.b.back();
  }

  const Plainly guard;
  Tensors rows;
  for (const at::Tensor& dy : dys) rows.push_back(dy.defined() ? as_rows(dy) : dy);
  if (any) {
    Gradients made = backward(saved_x.defined() ? as_rows(saved_x) : saved_x, rows, adapters, live,
                              packed, p, owns_base, wanted);
    if (wanted.x) {
      reshape(made.dx, x_sizes, x_sizes.back());
      grads[0] = std::move(made.dx);
    }
    for (size_t i = 0; i < P; ++i) {
      grads[place(i, kA)] = std::move(made.da[i]);
      grads[place(i, kB)] = std::move(made.db[i]);
    }
  }
  for (size_t i = 0; i < P; ++i) {
    if (!dys[i].defined()) continue;
    if (!owns_base && task_should_compute_output(place(i, kBase))) grads[place(i, kBase)] = dys[i];
    if (task_should_compute_output(place(i, kBias))) {
      grads[place(i, kBias)] =
          at::sum(rows[i], at::IntArrayRef{0}, false, at::kFloat).to(of[i].bias_type);
    }
  }
  return grads;
}

bool requires_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }

Edge edge(const at::Tensor& t) {
  return requires_grad(t) ? torch::autograd::impl::gradient_edge(t) : Edge();
}

// Keys of a tensor that is just memory: no subclass that dispatches, no lazy view, no wrapper.
#ifdef LORAPAR_EMULATE
constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutogradCPU,
                                      c10::DispatchKey::AutocastCPU});
#else
constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CUDA, c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutogradCUDA,
                                      c10::DispatchKey::AutocastCUDA});
#endif

bool plain(const at::Tensor& t, at::Device device) {
  return (t.key_set().raw_repr() & ~kPlain.raw_repr()) == 0 && t.device() == device;
}

bool plain_if_any(const at::Tensor& t, at::Device device) {
  return !t.defined() || plain(t, device);
}

// Modes, functorch and tracers put keys of theirs here; they have to see PyTorch's ops.
bool nobody_watches() {
  constexpr auto kUsual = c10::default_included_set | c10::autocast_dispatch_keyset;
  const uint64_t now = c10::impl::tls_local_dispatch_key_set().included_.raw_repr();
  return (now & ~kUsual.raw_repr()) == 0;
}

bool narrow_or_float(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 || type == at::kFloat;
}

bool has_shape(const at::Tensor& t, int64_t rows, int64_t columns) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

bool fits_mask(const MaskLists& mask, int64_t rows, int64_t columns, at::Device device) {
  return (!mask.trainable.defined() || has_shape(mask.trainable, rows, columns)) &&
         plain_if_any(mask.trainable, device) && plain_if_any(mask.index, device) &&
         plain_if_any(mask.slot, device);
}

bool fits_sums(const Sums& sums, int64_t r, int64_t K, int64_t N, at::Device device) {
  const auto good = [&](const at::Tensor& t, int64_t rows, int64_t columns) {
    return has_shape(t, rows, columns) && plain(t, device) && t.scalar_type() == at::kFloat &&
           t.is_contiguous();
  };
  return good(sums.a, r, K) && good(sums.a_squared, r, K) && good(sums.b, N, r) &&
         good(sums.b_squared, N, r) && sums.bounds.defined() && plain(sums.bounds, device) &&
         sums.bounds.is_contiguous();
}

bool fits_one(const Adapter& one, const Call& call, at::ScalarType type) {
  const at::Device device = call.x.device();
  if (one.a.dim() != 2 || one.b.dim() != 2) return false;
  const int64_t K = call.x.size(-1), r = one.a.size(0), N = one.b.size(0);
  if (one.a.size(1) != K || one.b.size(1) != r || r < 1 || r > kMostRank) return false;
  if (!narrow_or_float(one.a.scalar_type()) || !narrow_or_float(one.b.scalar_type())) return false;
  if (!plain(one.a, device) || !plain(one.b, device) || !plain(one.base, device)) return false;
  if (!plain_if_any(one.live, device) || !fits_mask(one.mask_a, r, K, device) ||
      !fits_mask(one.mask_b, N, r, device)) {
    return false;
  }
  if (call.owns_base) {
    if (!has_shape(one.base, N, K) || one.base.requires_grad()) return false;
    const at::ScalarType weight = one.base.scalar_type();
    const bool autocast = at::autocast::is_autocast_enabled(kDevice);
    if (weight != type && !(autocast && at::isFloatingType(weight))) return false;
    if (one.bias.defined()) {
      if (one.bias.dim() != 1 || one.bias.size(0) != N || !plain(one.bias, device)) return false;
      const at::ScalarType bias = one.bias.scalar_type();
      if (!narrow_or_float(bias) && bias != at::kDouble) return false;
    }
  } else {
    const auto base = one.base.sizes(), x = call.x.sizes();
    if (base.size() != x.size() || base.back() != N) return false;
    if (base.slice(0, base.size() - 1) != x.slice(0, x.size() - 1)) return false;
    const at::ScalarType out = one.base.scalar_type();
    if (!narrow_or_float(out) && out != at::kDouble) return false;
  }
  if (!one.sums.a.defined()) return true;
  const bool dead = one.live.defined();
  const bool filled =
      !at::GradMode::is_enabled() || one.a.requires_grad() || one.b.requires_grad();
  return !dead && filled && fits_sums(one.sums, r, K, N, device);
}

}  // namespace

at::ScalarType compute_type(const at::Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  if (!at::autocast::is_autocast_enabled(kDevice) || type == at::kDouble ||
      !at::isFloatingType(type)) {
    return type;
  }
  return at::autocast::get_autocast_dtype(kDevice);
}

bool fits(const Call& call) {
  const at::Tensor& x = call.x;
  const at::ScalarType type = compute_type(x);
  if (x.device().type() != kDevice || !plain(x, x.device()) || !nobody_watches()) return false;
  if (x.dim() < 1 || !narrow_or_float(type) || !at::isFloatingType(x.scalar_type())) return false;
  if (!(call.p >= 0.0 && call.p < 1.0)) return false;
  if (call.of.empty() || call.of.size() > kMaxProjections) return false;
  for (const Adapter& one : call.of) {
    if (one.sums.a.defined() != call.of[0].sums.a.defined()) return false;
    if (!fits_one(one, call, type)) return false;
  }
  return true;
}

Tensors apply(Call call) {
  RECORD_FUNCTION("lorapar_cuda::lora_forward", c10::ArrayRef<const c10::IValue>{});
  const at::ScalarType type = compute_type(call.x);
  const at::Tensor x = call.x.scalar_type() == type ? call.x : call.x.to(type);  // recorded
  const size_t P = call.of.size();
  const bool scores = call.of[0].sums.a.defined();
  bool any = x.requires_grad(), trains_a = scores, trains_b = scores;
  for (const Adapter& one : call.of) {
    const bool a = one.a.requires_grad(), b = one.b.requires_grad();
    any |= a || b || requires_grad(one.bias) || (!call.owns_base && one.base.requires_grad());
    trains_a |= a && one.mask_a.trains();
    trains_b |= b && one.mask_b.trains();
  }
  const bool records = any && at::GradMode::is_enabled();
  Keep keep;
  keep.packs = records;
  keep.s = records && trains_b;
  keep.bits = records && call.p > 0.0 && (trains_a || x.requires_grad());

  Packed packed;
  Tensors ys;
  {
    const Plainly guard;
    at::Tensor seed;
    if (call.p > 0.0) seed = draw_seed(x.device());
    if (call.owns_base) {
      ys = forward(as_rows(x), call.of, seed, call.p, true, keep, packed);
    } else {
      Adapters rows = call.of;
      for (Adapter& one : rows) one.base = as_rows(one.base);
      ys = forward(as_rows(x), rows, seed, call.p, false, keep, packed);
    }
    for (const at::Tensor& y : ys) reshape(y, x.sizes(), y.size(1));
  }
  if (!records) return ys;

  const auto node = Made<CudaLoraBackward, decltype(Edge::function)>::make();
  torch::autograd::edge_list edges(place(P, 0));
  edges[0] = edge(x);
  node->of.resize(P);
  for (size_t i = 0; i < P; ++i) {
    Adapter& one = call.of[i];
    CudaLoraBackward::Projection& to = node->of[i];
    if (call.owns_base) {
      to.weight = SavedVariable(one.base, false);
    } else {
      edges[place(i, kBase)] = edge(one.base);
    }
    edges[place(i, kBias)] = edge(one.bias);
    edges[place(i, kA)] = edge(one.a);
    edges[place(i, kB)] = edge(one.b);
    to.a = SavedVariable(one.a, false);
    to.b = SavedVariable(one.b, false);
    if (one.bias.defined()) to.bias_type = one.bias.scalar_type();
    to.scale = one.scale;
    to.live = one.live.defined() ? one.live.numel() : one.a.size(0);
    to.mask_a = std::move(one.mask_a);
    to.mask_b = std::move(one.mask_b);
    to.sums = std::move(one.sums);
  }
  if (trains_a) node->x = SavedVariable(x, false);
  if (keep.s) node->s = SavedVariable(packed.s, false);
  if (keep.bits) node->bits = SavedVariable(packed.bits, false);
  node->a_pack = SavedVariable(packed.a_pack, false);
  node->b_pack = SavedVariable(packed.b_pack, false);
  node->valid = SavedVariable(packed.valid, false);
  node->x_sizes.assign(x.sizes().begin(), x.sizes().end());
  node->p = call.p;
  node->owns_base = call.owns_base;
  node->scores = scores;
  node->set_next_edges(std::move(edges));
  for (const at::Tensor& y : ys) torch::autograd::set_history(y, node);
  return ys;
}

}  // namespace lorapar

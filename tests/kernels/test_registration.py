"""The raw ops are registered well; the public ones work with the rest of PyTorch."""

import pytest
import torch
from cases import DROPOUT, OPS, Case, Inputs, leaves_of, make, saving, with_grads
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from lorapar_kernels import (
    Projection,
    _backend,
    _library,
    fused,
    lora_add,
    lora_linear,
    lora_linear_group,
)
from lorapar_kernels.fused import shapes_of
from lorapar_kernels.kept import Sizes, parts_of
from lorapar_kernels.pack import padded_rank
from lorapar_kernels.testing import assert_as_accurate, assert_close

RAW = torch.ops.lorapar


@pytest.fixture
def raw(kernels):
    """The raw ops of either backend."""
    return torch.ops.lorapar_cuda if kernels == "cuda" else RAW


def raw_forward(inputs: Inputs, device, raw=RAW):
    """The arguments of the raw forward of this case, and what it gives."""
    p, x = inputs.projections, inputs.x.reshape(-1, inputs.x.shape[-1])
    drop = inputs.case.dropout_p
    bases = [t.reshape(-1, t.shape[-1]) for t in inputs.bases] or [q.weight for q in p]
    live = [None if q.mask is None else q.mask.live_columns for q in p]
    arguments = (
        x, bases, [q.bias for q in p], [q.lora_a for q in p], [q.lora_b for q in p], live,
        [q.scale for q in p], torch.tensor([7], device=device) if drop else None, drop,
        not inputs.bases,
    )  # fmt: skip
    return arguments, raw.lora_forward(*arguments)


def raw_backward(inputs: Inputs, device, raw=RAW):
    """The arguments of the raw backward of this case."""
    (x, bases, _, a, b, live, scales, _, p, owns), out = raw_forward(inputs, device, raw)
    P = len(a)
    masks = [t for q in inputs.projections for t in (q.mask.tensors if q.mask else [None] * 6)]
    dys = [dy.reshape(-1, dy.shape[-1]) for dy in inputs.dys]
    head = (x, dys, bases if owns else [])
    lives = [t.shape[0] if q is None else q.shape[0] for t, q in zip(a, live)]
    return head, (a, b), masks, (lives, *out[P:]), scales, p, [True] * P


class TestRawOps:
    @pytest.mark.parametrize(
        "op,dropout_p,mask",
        [
            ("linear", 0.0, "none"), ("linear", DROPOUT, "dead"), ("group", DROPOUT, "random"),
            ("group", 0.0, "dead"), ("add", 0.0, "empty"), ("add", DROPOUT, "none"),
        ],
    )  # fmt: skip
    def test_forward_and_backward(self, op, dropout_p, mask, device, raw):
        inputs = Inputs(Case(op=op, dropout_p=dropout_p, mask=mask, shape=((9,), 12, 20)), device)
        arguments, _ = raw_forward(inputs, device, raw)
        # All but a comparison of outputs: `kept` has gaps, and bits that are no numbers.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(raw.lora_forward.default, arguments, test_utils=checks)
        head, adapters, masks, shared, scales, p, yes = raw_backward(inputs, device, raw)
        arguments = (*head, shapes_of(*adapters), masks, *shared, scales, p, True, yes, yes)
        torch.library.opcheck(raw.lora_backward.default, arguments)

    @pytest.mark.parametrize("op,dropout_p", [("linear", DROPOUT), ("group", 0.0)])
    def test_the_forward_in_two_halves(self, op, dropout_p, device, triton_backend):
        inputs = Inputs(Case(op=op, dropout_p=dropout_p, shape=((9,), 12, 20)), device)
        arguments, (*expected, _) = raw_forward(inputs, device)
        x, bases, biases, a, b, live, scales, seed, p, _ = arguments
        first = (x, a, b, live, scales, seed, p)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(RAW.lora_kept.default, first, test_utils=checks)
        widths, lives = [t.shape[0] for t in b], [t.shape[0] for t in a]
        second = (x, bases, biases, widths, lives, RAW.lora_kept(*first), p)
        torch.library.opcheck(RAW.lora_outputs.default, second)
        for y, other in zip(RAW.lora_outputs(*second), expected, strict=True):
            assert torch.equal(y, other)

    @pytest.mark.parametrize("op", OPS)
    def test_backward_of_what_is_needed_alone(self, op, device, raw):
        inputs = Inputs(Case(op=op, shape=((9,), 12, 20)), device)
        head, adapters, masks, shared, scales, p, yes = raw_backward(inputs, device, raw)
        for need_x, need_a, need_b in (
            (True, False, False),
            (False, True, False),
            (False, False, True),
        ):
            arguments = (
                *head, shapes_of(*adapters), masks, *shared, scales, p,
                bool(need_x), [bool(need_a)] * len(yes), [bool(need_b)] * len(yes),
            )  # fmt: skip
            torch.library.opcheck(raw.lora_backward.default, arguments)

    def test_kept_may_come_back_as_a_part_of_something(self, device, raw):
        """As hooks of saved tensors may have it; but not from a call of other shapes."""
        inputs = Inputs(Case(op="group", dropout_p=DROPOUT, shape=((9,), 12, 20)), device)
        head, adapters, masks, (lives, kept), scales, p, yes = raw_backward(inputs, device, raw)

        def run(kept, head=head):
            tail = (lives, kept, scales, p, True, yes, yes)
            return raw.lora_backward(*head, shapes_of(*adapters), masks, *tail)

        for skipped in (3, 64):
            within = torch.cat([kept.new_full((skipped,), torch.nan), kept])[skipped:]
            for one, other in zip(run(kept), run(within), strict=True):
                assert torch.equal(one, other)
        x, dys, weights = head
        with pytest.raises(RuntimeError):
            run(kept, (x, [torch.cat([dy] * 9) for dy in dys], weights))

    def test_an_unused_output_has_a_gradient_of_zeros(self, device, raw, poisoned):
        inputs = Inputs(Case(op="group", shape=((9,), 12, 20)), device)
        (x, dys, *rest), adapters, masks, shared, scales, p, yes = raw_backward(inputs, device, raw)
        head = (x, [dys[0], None, dys[2]], *rest)
        arguments = (*head, shapes_of(*adapters), masks, *shared, scales, p, True, yes, yes)
        _, *found = raw.lora_backward(*arguments)
        assert not found[1].any() and not found[4].any() and found[3].any()

    @pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
    @pytest.mark.parametrize("op", OPS)
    def test_sums(self, op, dropout_p, device, raw):
        inputs = Inputs(Case(op=op, dropout_p=dropout_p, shape=((9,), 12, 20)), device)
        (x, dys, weights), (a, b), _, shared, scales, p, _ = raw_backward(inputs, device, raw)
        sums = [torch.zeros_like(t) for pair in zip(a, b) for t in pair for _ in "12"]
        bounds = [torch.tensor([0, 4, 9], dtype=torch.int32, device=device)] * len(a)
        arguments = (x, dys, weights, shapes_of(a, b), sums, bounds, *shared, scales, p, True)
        torch.library.opcheck(raw.lora_backward_sums.default, arguments)

    def test_reference_dropout(self, device):
        arguments = (torch.randn(4, 3, device=device), 0.5, torch.tensor([5], device=device), 0)
        torch.library.opcheck(RAW.reference_dropout_keep.default, arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p, backend, device):
    """float64 is always served by the reference."""

    def double(*shape, grad=True):
        return torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=grad)

    x, a, b = (double(*s) for s in ((4, 5), (3, 5), (6, 3)))
    w, base = double(6, 5, grad=False), double(4, 6)

    def op(x, a, b):
        torch.manual_seed(7)  # the same dropout bits in every call
        return lora_linear(x, w, a, b, 0.7, dropout_p=dropout_p)

    def add(base, x, a, b):
        torch.manual_seed(7)
        return lora_add(base, x, a, b, 0.7, dropout_p=dropout_p)

    def group(x, a, b):
        torch.manual_seed(7)
        two = [Projection(w, a, b, 0.7), Projection(w[:4], a, b[:4], -1.5)]
        return lora_linear_group(x, two, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(op, (x, a, b))
    assert torch.autograd.gradcheck(add, (base, x, a, b))
    assert torch.autograd.gradcheck(group, (x, a, b))


@pytest.mark.parametrize("dropout_p,mask", [(0.0, "random"), (DROPOUT, "none"), (DROPOUT, "dead")])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_break(op, dropout_p, mask, backend, device):
    inputs = Inputs(Case(op=op, dropout_p=dropout_p, mask=mask, shape=((5, 3), 8, 6)), device)
    torch._dynamo.reset()
    compiled = torch.compile(inputs.op, fullgraph=True, backend="aot_eager")
    results = []
    for f in (inputs.op, compiled):
        torch.manual_seed(1)
        results.append(with_grads(f, leaves_of(inputs.leaves), inputs.dys))
    for name, one, other in zip(inputs.names(), *results):
        assert torch.equal(one, other), name


class TestAutocast:
    def narrow(self, device, backend):
        return torch.bfloat16 if device == "cuda" or backend == "reference" else torch.float16

    @pytest.mark.parametrize("x_dtype", ["fp32", "same"])
    def test_behaves_as_linear_does(self, x_dtype, backend, device):
        narrow = self.narrow(device, backend)
        x, w, a, b, bias = make(((40, 7), 16, 12, 4), torch.float32, device)
        x = x.to(narrow) if x_dtype == "same" else x
        dy = torch.randn(40, 7, 12, device=device)

        def plain(x, a, b):
            return linear(x, w, bias) + 2.0 * linear(linear(x, a), b)

        def ours(x, a, b):
            return lora_linear(x, w, a, b, 2.0, bias=bias)

        results = []
        for f in (ours, plain):
            leaves = leaves_of([x, a, b])
            with torch.autocast(device, dtype=narrow):
                y = f(*leaves)
                assert y.dtype == narrow
            y.backward(dy.to(narrow))
            results.append([y.detach(), *(t.grad for t in leaves)])
        w, bias = w.double(), bias.double()
        exact = with_grads(plain, leaves_of([x, a, b], torch.float64), dy.to(narrow))
        for name, *three in zip(("y", "dX", "dA", "dB"), results[0], exact, results[1]):
            assert_as_accurate(name, *three)

    @pytest.mark.parametrize("base", ["fp32", "narrow"])
    def test_lora_add_keeps_the_dtype_of_base(self, base, backend, device):
        narrow = self.narrow(device, backend)
        x, _, a, b, _ = make(((5,), 16, 12, 4), torch.float32, device)
        base = torch.randn(5, 12, device=device).to(torch.float32 if base == "fp32" else narrow)
        leaves = leaves_of([base, x, a, b])
        with torch.autocast(device, dtype=narrow):
            y = lora_add(*leaves, 1.0)
        assert y.dtype == base.dtype
        y.sum().backward()
        assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]

    def test_saves_no_copy_of_the_weight(self, backend, device):
        x, w, a, b, _ = make(((5, 7), 16, 12, 4), torch.float32, device)
        narrow = self.narrow(device, backend)
        with torch.autocast(device, dtype=narrow):
            _, saved = saving(lambda *t: lora_linear(t[0], w, *t[1:], 2.0), *leaves_of([x, a, b]))
        assert not [t for t in saved if t.shape == w.shape and t.dtype == narrow]


class TestDispatch:
    """Eager calls on plain tensors go past the dispatcher; whoever has to see the op sees it."""

    def arguments(self, device):
        return raw_forward(Inputs(Case(shape=((9,), 12, 20)), device), device)[0]

    def test_a_mode_sees_the_op(self, device, triton_backend):
        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        seen, arguments = [], self.arguments(device)
        with Recorder():
            fused.lora_forward(*arguments)
        assert RAW.lora_forward.default in seen

    def test_a_subclass_sees_the_op(self, device, triton_backend):
        """As DTensor would: by its own __torch_dispatch__."""

        class Wrapped(Tensor):
            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                seen.append(func)
                raise NotImplementedError

        seen, (x, *rest) = [], self.arguments(device)
        x = Tensor._make_subclass(Wrapped, x)
        with pytest.raises((NotImplementedError, TypeError)):
            fused.lora_forward(x, *rest)
        assert seen == [RAW.lora_forward.default]

    def test_the_profiler_sees_the_op(self, device, triton_backend):
        arguments = self.arguments(device)
        with torch.profiler.profile() as profiled:
            fused.lora_forward(*arguments)
        assert "lorapar::lora_forward" in {event.name for event in profiled.events()}

    def test_lazy_negation_is_resolved(self, device, triton_backend):
        x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, device)
        lazy = torch._neg_view(x)
        assert lazy.is_neg()
        assert_close("y", lora_linear(lazy, w, a, b, 2.0), lora_linear(-x, w, a, b, 2.0))

    def test_both_ways_give_the_same(self, device, triton_backend):
        arguments = self.arguments(device)
        x, _, _, a, b, *_ = arguments
        sizes = Sizes(*x.shape, len(a), padded_rank(a[0].shape[0]), b[0].shape[0], False)

        def found():
            y, kept = fused.lora_forward(*arguments)
            return y, *parts_of(kept, sizes)

        expected = found()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_library, "_plain", lambda arguments: False)
            for one, other in zip(expected, found(), strict=True):
                assert torch.equal(one, other)


class TestTransforms:
    """torch.func goes through no autograd.Function of this kind, so it is refused."""

    def test_grad(self, backend, device):
        x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, device)
        with pytest.raises(RuntimeError, match=r"lora_linear: torch.func .* not supported"):
            torch.func.grad(lambda x: lora_linear(x, w, a, b, 2.0).sum())(x)

    def test_vmap(self, backend, device):
        x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, device)
        base = torch.zeros(5, 12, device=device)
        with pytest.raises(RuntimeError, match=r"lora_add: torch.func .* not supported"):
            torch.func.vmap(lambda base, x: lora_add(base, x, a, b, 2.0))(base, x)


@pytest.mark.gpu
@pytest.mark.parametrize("forks", [False, True], ids=["one stream", "two streams"])
@pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
@pytest.mark.parametrize("op", OPS)
def test_cuda_graph(op, dropout_p, forks, device, kernels, monkeypatch):
    """Replays equal eager calls on new inputs; dropout draws anew at each replay."""
    if forks:
        monkeypatch.setattr("lorapar_kernels.fused.FORK_FLOPS", 0)
    case = Case(torch.bfloat16, 16, op=op, dropout_p=dropout_p, shape=((256,), 256, 128))
    inputs = Inputs(case, device)
    leaves = leaves_of(inputs.leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            with_grads(inputs.op, leaves, inputs.dys)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_grads(inputs.op, leaves, inputs.dys)
    draws = []
    for _ in range(3):
        with torch.no_grad():
            for t in (*leaves, *inputs.dys):
                t.normal_()
        if dropout_p:
            for _ in "12":
                graph.replay()
                draws.append(captured[0].clone())
            continue
        graph.replay()
        eager = with_grads(inputs.op, leaves, inputs.dys)
        for name, one, other in zip(inputs.names(), captured, eager):
            assert_close(name, one, other)
    for first, second in zip(draws[::2], draws[1::2]):
        assert first.isfinite().all() and not torch.equal(first, second)


class TestBackend:
    def call(self, device="cpu"):
        x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, device)
        return lora_linear(x, w, a, b, 2.0)

    def test_unknown_name(self, monkeypatch):
        monkeypatch.setenv("LORAPAR_BACKEND", "fast")
        with pytest.raises(RuntimeError, match="'fast', but .* has only reference, triton, cuda"):
            self.call()

    def test_triton_needs_a_gpu_or_the_interpreter(self, monkeypatch):
        monkeypatch.setenv("LORAPAR_BACKEND", "triton")
        monkeypatch.setattr(_backend, "INTERPRETED", False)
        with pytest.raises(RuntimeError, match="are on cpu; move .* set TRITON_INTERPRET=1"):
            self.call()

    def test_default(self, device, monkeypatch):
        """Kernels on a GPU, the reference elsewhere, and for float64 anywhere."""
        monkeypatch.delenv("LORAPAR_BACKEND", raising=False)
        for dtype in (torch.float32, torch.float64):
            x, w, a, b, _ = make(((5,), 16, 12, 4), dtype, device)
            y = lora_linear(x, w, *leaves_of([a, b]), 2.0)
            kernels = device == "cuda" and dtype == torch.float32
            made_by = y.grad_fn.name()
            assert made_by == ("FusedLoraBackward" if kernels else "ReferenceLoraBackward")

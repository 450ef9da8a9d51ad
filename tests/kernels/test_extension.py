"""The C++ extension: its schemas, its one call, its autograd node, its build. On a CPU emulated."""

import copy
import csv
import gc
import json
import pickle
import re
import subprocess
import sys
import weakref

import pytest
import torch
from cases import DROPOUT, OPS, Case, Inputs, bits_of, leaves_of, make, saving, with_grads
from conftest import DEVICE, REPO
from test_fused import judge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lorapar_kernels import (
    LoraMask,
    Projection,
    _backend,
    extension,
    lora_add,
    lora_linear,
    lora_linear_group,
)
from lorapar_kernels.testing import assert_close

NODE = "CudaLoraBackward"
SMALL = ((5, 3), 16, 12)
BENCHMARKED = r"M=(\d+) (\d+)->(?:(\d)x)?(\d+) r=(\d+) "  # rows, K, projections, N, r


def node_of(case: Case = Case(shape=SMALL)) -> tuple[Inputs, list, tuple]:  # noqa: B008
    inputs = Inputs(case, DEVICE)
    leaves = leaves_of(inputs.leaves)
    return inputs, leaves, inputs.op(*leaves)


@pytest.mark.parametrize("name", ["lora_forward", "lora_backward", "lora_backward_sums"])
def test_ops_have_the_schemas_of_ours(name, cuda_backend):
    ours, its = (getattr(ns, name).default for ns in (torch.ops.lorapar, torch.ops.lorapar_cuda))
    assert str(its._schema) == str(ours._schema).replace("lorapar::", "lorapar_cuda::")


class TestOneCall:
    @pytest.mark.parametrize("op", OPS)
    def test_a_call_is_one_node(self, op, cuda_backend):
        """Its inputs are the leaves themselves: no view, no cast between."""
        _, leaves, ys = node_of(Case(op=op, shape=SMALL, dropout_p=DROPOUT))
        assert {y.grad_fn.name() for y in ys} == {NODE}
        found = {f.variable for f, _ in ys[0].grad_fn.next_functions if f is not None}
        assert found == set(leaves)

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
    def test_gives_what_the_raw_ops_give(self, op, dropout_p, cuda_backend, monkeypatch):
        """The autograd function in Python, which compiled graphs take, over the same kernels."""
        inputs = Inputs(Case(op=op, shape=SMALL, dropout_p=dropout_p, mask="random"), DEVICE)
        results = []
        for served in (True, False):
            monkeypatch.setattr(extension, "serves", lambda served=served: served)
            torch.manual_seed(1)
            leaves = leaves_of(inputs.leaves)
            ys = inputs.op(*leaves)
            grads = torch.autograd.grad(ys, leaves, inputs.dys)
            results.append([*ys, *grads])
            assert (ys[0].grad_fn.name() == NODE) == served
        assert all(torch.equal(one, other) for one, other in zip(*results))

    @pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("op,rank,mask", [("group", 8, "dead"), ("linear", 256, "random")])
    @pytest.mark.parametrize("dropout_p", [0.0, DROPOUT])
    def test_bf16(self, op, rank, mask, adapter, dropout_p, poisoned, cuda_backend):
        """Which Triton's interpreter has not; rank 256 goes to cuBLAS in 16 bit."""
        case = Case(torch.bfloat16, rank, mask, dropout_p, op, ((19,), 72, 64), adapter)
        judge(case, DEVICE)

    def test_adapters_in_float64(self, cuda_backend):
        """Not the one call's, but served all the same, by the raw ops."""
        x, w, a, b, _ = make(((7,), 16, 12, 4), torch.float32, DEVICE, torch.float64)
        y, *grads = with_grads(
            lambda x, a, b: lora_linear(x, w, a, b, 2.0), leaves_of([x, a, b]),
            torch.ones(7, 12, device=DEVICE),
        )  # fmt: skip
        want, *wanted = with_grads(
            lambda x, a, b: lora_linear(x, w, a, b, 2.0), leaves_of([x, a.float(), b.float()]),
            torch.ones(7, 12, device=DEVICE),
        )  # fmt: skip
        assert_close("y", y, want)
        for name, got, g in zip(("dX", "dA", "dB"), grads, wanted):
            assert_close(name, got.float(), g)
        assert grads[1].dtype == grads[2].dtype == torch.float64

    @pytest.mark.parametrize("count", [8, 9])
    def test_more_projections_than_one_launch_takes(self, count, cuda_backend):
        x, w, a, b, bias = make(((5,), 16, 12, 4), torch.float32, DEVICE)
        x.requires_grad_()
        ys = lora_linear_group(x, [Projection(w, a, b, 1.0 + i, bias) for i in range(count)])
        assert (ys[0].grad_fn.name() == NODE) == (count == 8)
        (dx,) = torch.autograd.grad(ys, x, [torch.ones_like(y) for y in ys])
        want = 0
        for i, y in enumerate(ys):
            one = lora_linear(x, w, a, b, 1.0 + i, bias=bias)
            assert_close(f"y{i}", y.detach(), one.detach())
            want = want + torch.autograd.grad(one, x, torch.ones_like(one))[0]
        assert_close("dX", dx, want)

    def test_a_mask_of_another_adapter_is_refused(self, cuda_backend):
        x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, DEVICE)
        live = torch.arange(8, device=DEVICE) < 4
        for mask in (
            LoraMask(torch.ones(3, 16, dtype=torch.bool, device=DEVICE), None),
            LoraMask(live[:, None].expand(8, 16), live.expand(12, 8), live=live),
        ):
            with pytest.raises(ValueError, match="the adapter needs"):
                lora_linear(x, w, a, b, 1.0, mask=mask)

    def test_what_is_no_tensor_is_refused_by_python(self, cuda_backend):
        x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, DEVICE)
        with pytest.raises(TypeError):
            lora_linear(x, w, a, b, "two")
        with pytest.raises(AttributeError):
            lora_linear(x.tolist(), w, a, b, 2.0)
        with pytest.raises(AttributeError):
            lora_linear_group(x, [w])

    def test_a_mode_sees_the_raw_ops(self, cuda_backend):
        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.add(func)
                return func(*args, **(kwargs or {}))

        seen = set()
        inputs = Inputs(Case(shape=SMALL), DEVICE)
        with Recorder():
            with_grads(inputs.op, leaves_of(inputs.leaves), inputs.dys)
        ops = torch.ops.lorapar_cuda
        assert {ops.lora_forward.default, ops.lora_backward.default} <= seen

    def test_the_profiler_sees_it(self, cuda_backend):
        inputs, leaves, _ = node_of()
        with torch.profiler.profile() as profiled:
            with_grads(inputs.op, leaves, inputs.dys)
        names = {event.name for event in profiled.events()}
        assert {"lorapar_cuda::lora_forward", NODE} <= names

    def test_bits_are_those_of_triton(self, device, monkeypatch, request):
        """Of three projections, several words of a lane and rows that are no multiple of a tile."""
        x = torch.randn(18, 1100, device=device, requires_grad=True)
        _, w, a, b, _ = make(((1,), 1100, 6, 4), torch.float32, device)
        found = []
        for backend in ("triton_backend", "cuda_backend"):
            request.getfixturevalue(backend)
            torch.manual_seed(3)
            group = [Projection(w, a, b, 1.0)] * 3
            _, saved = saving(lambda x, g=group: lora_linear_group(x, g, dropout_p=0.3), x)
            found.append(bits_of(saved, x, 3))
        assert torch.equal(*found)


class TestNode:
    def test_hooks_see_all_that_is_saved(self, cuda_backend):
        """Packed and unpacked once each; what comes back is what is used."""
        inputs = Inputs(Case(op="group", shape=SMALL, dropout_p=DROPOUT), DEVICE)
        want, got = [], []
        for doubled in (False, True):
            leaves, packed = leaves_of(inputs.leaves), []

            def pack(t, packed=packed):
                packed.append(t)
                return t.clone()

            torch.manual_seed(1)
            if doubled:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
                    ys = inputs.op(*leaves)
            else:
                ys = inputs.op(*leaves)
            (got if doubled else want).extend(torch.autograd.grad(ys, leaves, inputs.dys))
        assert len(packed) == 6 + 3 * len(inputs.projections)
        assert all(torch.equal(one, other) for one, other in zip(want, got))

    @pytest.mark.parametrize("which", range(3), ids=["x", "A", "B"])
    def test_a_write_to_what_is_saved_is_noticed(self, which, cuda_backend):
        _, leaves, (y,) = node_of()
        with torch.no_grad():
            leaves[which].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_a_second_backward_is_refused_after_the_first(self, cuda_backend):
        _, _, (y,) = node_of()
        y.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.sum().backward()

    def test_what_is_saved_is_freed_by_the_backward(self, cuda_backend):
        x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, DEVICE)
        kept = x * 1
        gone = weakref.ref(kept)
        y = lora_linear(kept, w, *leaves_of([a, b]), 2.0)
        del kept
        assert gone() is not None  # the node has it
        y.sum().backward()
        gc.collect()
        assert gone() is None and y.grad_fn is not None

    def test_only_what_is_asked_of_grad_is_computed(self, cuda_backend):
        inputs, leaves, ys = node_of()
        every = torch.autograd.grad(ys, leaves, inputs.dys, retain_graph=True)
        for leaf, want in zip(leaves, every):
            (got,) = torch.autograd.grad(ys, leaf, inputs.dys, retain_graph=True)
            assert torch.equal(got, want)

    def test_gradients_are_stolen_not_copied(self, cuda_backend):
        """The accumulator takes dA and dB as they are: each owns its memory alone."""
        _, leaves, ys = node_of(Case(op="group", shape=SMALL))
        sum(y.sum() for y in ys).backward()
        for leaf in leaves[1:]:
            assert leaf.grad.untyped_storage().nbytes() == leaf.grad.nbytes

    def test_anomaly_mode(self, cuda_backend):
        inputs = Inputs(Case(shape=SMALL), DEVICE)
        with torch.autograd.detect_anomaly(check_nan=True):
            leaves = leaves_of(inputs.leaves)
            (y,) = inputs.op(*leaves)
            with pytest.raises(RuntimeError, match=rf"'{NODE}' returned nan"):
                y.backward(torch.full_like(y, torch.nan))

    def test_double_backward_is_refused_even_where_dy_is_constant(self, cuda_backend):
        _, leaves, (y,) = node_of()
        (dx,) = torch.autograd.grad(y.sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            dx.sum().backward()

    def test_inference_mode(self, cuda_backend):
        inputs, leaves, (y,) = node_of()
        with torch.inference_mode():
            (other,) = inputs.op(*leaves)
        assert other.is_inference() and torch.equal(other, y)

    def test_autocast_casts_x_as_linear_does(self, cuda_backend):
        x, w, a, b, _ = make(((5, 7), 16, 12, 4), torch.float32, DEVICE)
        leaves = leaves_of([x, a, b])
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = lora_linear(leaves[0], w, *leaves[1:], 2.0)
        assert y.dtype == torch.bfloat16 and y.grad_fn.name() == NODE
        assert "ToCopy" in y.grad_fn.next_functions[0][0].name()

    def test_checkpointed_through_an_exception(self, cuda_backend):
        """A backward that fails leaves the next as it would have been."""
        inputs = Inputs(Case(shape=SMALL, dropout_p=DROPOUT), DEVICE)
        grads = []
        for fails in (False, True):
            leaves = leaves_of(inputs.leaves)
            if fails:
                (y,) = inputs.op(*leaves)
                y.register_hook(lambda g: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    y.sum().backward()
            torch.manual_seed(4)
            (y,) = checkpoint(inputs.op, *leaves, use_reentrant=False)
            grads.append(torch.autograd.grad(y, leaves, inputs.dys))
        assert all(torch.equal(one, other) for one, other in zip(*grads))


class TestChoice:
    def test_by_size(self, cuda_backend, monkeypatch):
        """Without LORAPAR_BACKEND the table is asked, with the size of the call."""
        asked = []

        def chosen(*size):
            asked.append(size)
            return False

        monkeypatch.delenv("LORAPAR_BACKEND")
        monkeypatch.setattr(extension, "chosen", chosen)
        x, w, a, b, _ = make(((5, 3), 16, 12, 4), torch.float16, DEVICE)
        group = [Projection(w, a, b, 1.0), Projection(w[:7], a[:2], b[:7, :2], 1.0)]
        lora_linear_group(x, group)  # on another backend
        assert asked[0] == (15, 16, 19, 2, 2, 4)

    def test_few_rows_alone_where_a_graph_hides_the_host(self, monkeypatch):
        assert extension.chosen(2048, 4096, 4096, 2, 1, 8)
        assert extension.chosen(4096, 4096, 3 * 4096, 2, 3, 8)
        assert not extension.chosen(4096, 4096, 3 * 4096, 2, 1, 8)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert extension.chosen(1024, 11008, 4096, 2, 1, 8)
        assert not extension.chosen(1025, 64, 64, 2, 1, 8)
        assert not extension.chosen(512, 4096, 4096, 2, 1, 65)

    @pytest.mark.parametrize("ratio", ["ratio", "wall_ratio"])
    def test_no_measured_call_is_slower_than_triton(self, ratio, monkeypatch):
        """By the GPU's time in graphs, by that of the caller in eager."""
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: ratio == "ratio")
        taken = 0
        with open(REPO / "benchmarks" / "results" / "backends.csv") as f:
            for row in csv.DictReader(line for line in f if line[0] != "#"):
                m, k, count, n, r = map(int, re.match(BENCHMARKED, row["case"]).groups(default=1))
                if extension.chosen(m, k, count * n, 2, count, r):
                    taken += 1
                    assert float(row[ratio]) <= 1.03, row["case"]
        assert taken > 70

    def test_small_16_bit_work(self):
        assert extension.chosen(512, 4096, 4096, 2, 1, 8)
        assert not extension.chosen(512, 4096, 4096, 4, 1, 8)
        assert not extension.chosen(512, 4096, 4096, 2, 9, 8)
        assert not extension.chosen(65536, 4096, 4096, 2, 1, 8)

    def test_wide_adapters(self):
        assert extension.chosen(2048, 4096, 4096, 2, 1, 128)
        assert extension.chosen(1024, 4096, 3 * 4096, 2, 3, 129)
        assert not extension.chosen(1025, 4096, 3 * 4096, 2, 3, 129)

    def test_triton_where_it_is_named(self, cuda_backend, monkeypatch):
        monkeypatch.setenv("LORAPAR_BACKEND", "triton")
        _, _, (y,) = node_of(Case(shape=((5,), 16, 12)))
        assert y.grad_fn.name() == "FusedLoraBackward"

    def test_named_but_absent(self, monkeypatch):
        monkeypatch.setenv("LORAPAR_BACKEND", "cuda")
        monkeypatch.setattr(extension, "module", None)
        monkeypatch.setattr(extension, "why_not", "it is not built; build it")
        x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, DEVICE)
        with pytest.raises(RuntimeError, match="no CUDA extension: it is not built; build it; or"):
            lora_linear(x, w, a, b, 1.0)

    def test_named_on_another_device(self, cuda_backend):
        other = "cpu" if DEVICE == "cuda" else "meta"
        with pytest.raises(RuntimeError, match=f"the tensors are on {other}"):
            _backend.backend(other)

    @pytest.mark.parametrize("named", ["", "cuda"])
    def test_what_it_has_no_kernels_for_is_tritons(self, named, monkeypatch):
        """Selection and the optimiser, on a GPU, whether it is built or not."""
        monkeypatch.setenv("LORAPAR_BACKEND", named)
        for module in (None, object()):
            monkeypatch.setattr(extension, "module", module)
            assert _backend.triton_serves("cuda") and not _backend.triton_serves("cpu")
            assert not _backend.triton_serves("cuda", torch.float64)

    def test_float64_is_the_references(self, cuda_backend):
        _, _, (y,) = node_of(Case(torch.float64, shape=((5,), 16, 12)))
        assert y.grad_fn.name() == "ReferenceLoraBackward"


def test_masks_travel(cuda_backend):
    """What a call reads of a mask is no obstacle to a copy or a pickle of it."""
    inputs = Inputs(Case(shape=SMALL, mask="random"), DEVICE)
    want = with_grads(inputs.op, leaves_of(inputs.leaves), inputs.dys)
    (p,) = inputs.projections
    for mask in (copy.deepcopy(p.mask), pickle.loads(pickle.dumps(p.mask))):
        inputs.projections = [Projection(p.weight, p.lora_a, p.lora_b, p.scale, p.bias, mask)]
        got = with_grads(inputs.op, leaves_of(inputs.leaves), inputs.dys)
        assert all(torch.equal(one, other) for one, other in zip(got, want))


def test_a_base_that_another_makes_stays_differentiable(cuda_backend):
    """`base` is not a leaf: its own node gets dy."""
    x, w, a, b, _ = make(((5,), 16, 12, 4), torch.float32, DEVICE)
    x.requires_grad_()
    base = torch.nn.functional.linear(x, w)
    one = lora_add(base, x, a, b, 2.0)
    two = lora_linear(x, w, a, b, 2.0)
    grads = [
        torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0] for y in (one, two)
    ]
    assert_close("dX", *grads)


class TestBuild:
    """An extension of another build is never imported; one that cannot be built says why."""

    @pytest.fixture
    def files(self, tmp_path, monkeypatch):
        """A folder that stands for the package's, with a module that must not be loaded."""
        (tmp_path / "_C.so").write_bytes(b"not a library")
        monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
        monkeypatch.setattr(extension, "module", None)
        monkeypatch.setattr(extension, "why_not", "")
        return tmp_path

    def test_for_another_torch(self, files):
        was = extension.built_for() | {"torch": "2.99.0+cu990"}
        (files / "_built.json").write_text(json.dumps(was))
        with pytest.warns(UserWarning, match="is left out"):
            extension.load()
        assert not extension.available()
        assert f"torch 2.99.0+cu990, here is {torch.__version__}" in extension.why_not
        assert "build it again" in extension.why_not

    def test_without_a_record(self, files, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: "something")
        with pytest.warns(UserWarning, match="torch unknown, here is"):
            extension.load()

    def test_record_without_a_module(self, files):
        """As of a build by another Python: its file has another name."""
        (files / "_built.json").write_text(json.dumps(extension.built_for()))
        if DEVICE == "cpu":
            with pytest.warns(UserWarning, match="is left out"):
                extension.load()
            assert "_C" in extension.why_not

    def test_setup_refuses_loudly(self):
        if torch.version.cuda is not None:
            pytest.skip("this torch is a CUDA build")
        made = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            capture_output=True, text=True, cwd=REPO, env={"LORAPAR_CUDA": "1", "PATH": "/usr/bin"},
        )  # fmt: skip
        assert made.returncode != 0
        assert f"torch {torch.__version__} is a CPU build. Install a CUDA build" in made.stderr


class TestCheck:
    """csrc/check.py, by what ptxas says."""

    SAID = (
        "ptxas info    : Function properties for _Z6kernelv\n"
        "    0 bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    )

    @pytest.fixture
    def check(self, monkeypatch):
        monkeypatch.syspath_prepend(str(REPO / "csrc"))
        import check

        return check

    def test_finds_spills(self, check):
        assert check.spills(self.SAID.format(0, 0)) == {}
        assert check.spills(self.SAID.format(8, 12)) == {"_Z6kernelv": 20}

    def test_a_spill_needs_a_reason(self, check):
        assert check.allowed("# x\na.cu sm_80 20 1 µs faster\n") == {("a.cu", "sm_80"): 20}
        with pytest.raises(SystemExit, match="has no reason"):
            check.allowed("a.cu sm_80 20\n")

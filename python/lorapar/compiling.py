"""Compiles a model's decoder layers one by one with torch.compile, and records CUDA graphs of them.

A step of few tokens is bound by the host. A layer that is compiled costs one call of it, and with
`reduce-overhead` one replay of a CUDA graph (`recording.py`). All layers of one kind share one
compiled function.

At most `max_shapes` shapes are compiled and recorded. Calls of others run eagerly, and so do calls
with a key-value cache, which differ in every token.

Nothing is added to the model but `_compiled_call_impl`, which nn.Module leaves out of pickles and
copies.
"""

import functools
import inspect
import os
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Cache

from lorapar.calls import MASKS, SUMS
from lorapar.groups import HOOK
from lorapar.recording import RECORDER
from lorapar.shortcuts import Shortcuts

MODES = ("default", "reduce-overhead")
_CALL = "_compiled_call_impl"  # what nn.Module calls instead of itself
_CHECKPOINTS = "gradient_checkpointing"  # attribute of transformers' layers
_LIMITS = ("recompile_limit", "accumulated_recompile_limit")  # of torch._dynamo.config
_raised: dict[str, int] = {}  # limits that are raised now, as they were before
_compilations: "weakref.WeakSet[Compilation]" = weakref.WeakSet()


class Compilation:
    """What `accelerate(compile=...)` compiled, and what became of it. Its text says so.

    Attributes:
        mode: of torch.compile.
        max_shapes: how many shapes of hidden states may be compiled.
        layers: names of the compiled layers.
        shapes: shape of the hidden states → calls of compiled layers with it.
        eager: reason → calls of these layers that ran eagerly.
        failed: why compiling was given up, or None.
        recorder: what makes the CUDA graphs of this process, or None.
    """

    def __init__(self, mode: str, max_shapes: int):
        self.mode, self.max_shapes = mode, max_shapes
        self.layers: list[str] = []
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.eager: Counter[str] = Counter()
        self.failed: str | None = None
        self.recorder = RECORDER if mode == "reduce-overhead" else None
        options = {} if self.recorder is None else {"backend": self.recorder}
        self._call = torch.compile(_call_layer, dynamic=False, **options)

    def pool_bytes(self) -> int:
        """What the CUDA graphs of this process hold."""
        return 0 if self.recorder is None else self.recorder.bytes()

    def __str__(self) -> str:
        text = f"compiled {len(self.layers)} layers one by one, mode {self.mode}"
        if self.failed:
            return f"{text}; given up, all runs eagerly: {self.failed}"
        shapes = ", ".join("x".join(map(str, s)) for s in self.shapes)
        text += f"; {len(self.shapes)} of {self.max_shapes} shapes{': ' * bool(shapes)}{shapes}"
        if self.recorder is not None:
            text += f"; {self.recorder}"
        eager = [f"\n  {n} calls ran eagerly: {reason}" for reason, n in self.eager.items()]
        return text + "".join(eager)

    def run(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The layer's output, by the compiled function where that serves."""
        if torch.compiler.is_compiling():  # the whole model, by somebody else
            return layer._call_impl(*args, **kwargs)
        reason = self._why_eager(layer, args, kwargs)
        if reason is None:
            try:
                if _checkpoints_inside(layer):
                    inner = functools.partial(self._compiled, layer, **kwargs)
                    return layer._gradient_checkpointing_func(inner, *args)
                return self._compiled(layer, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as e:
                self.failed = f"{type(e).__name__}: {str(e).strip().splitlines()[0]}"
                warnings.warn(f"lorapar: {self}", stacklevel=2)
                reason = "compiling failed"
        self.eager[reason] += 1
        return layer._call_impl(*args, **kwargs)

    def _compiled(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, without the checkpoint that its forward makes."""
        checkpoints = layer.__dict__.get(_CHECKPOINTS)
        if checkpoints:
            layer.__dict__[_CHECKPOINTS] = False
        call = layer.__dict__[_CALL]
        if self.recorder is not None:  # sums are filled in the backward, wherever they lie then
            self.recorder.paused = any(SUMS in d for d in call.states)

        def through() -> Any:
            return self._call(layer, _set_on(layer), *args, **kwargs)

        try:
            if call.shortcuts is None:
                return through()
            return call.shortcuts.call(through, args, kwargs)
        finally:
            if checkpoints:
                layer.__dict__[_CHECKPOINTS] = True

    def _why_eager(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
        if self.failed:
            return "compiling failed"
        hooks = layer._forward_hooks.keys() - {HOOK}
        if hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return "the layer has hooks (of FSDP or an offload, say)"
        if any(isinstance(t, Cache) for t in (*args, *kwargs.values())):
            return "a key-value cache was passed (use_cache=False in training)"
        hidden = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if hidden is None:
            return "no tensor was passed"
        shape = tuple(hidden.shape)
        if shape not in self.shapes and len(self.shapes) >= self.max_shapes:
            return f"more shapes than max_shapes={self.max_shapes} (pad to a few lengths)"
        self.shapes[shape] += 1
        return None


class _Layer:
    """Stands in the place of a layer's call."""

    def __init__(self, layer: nn.Module, compilation: Compilation):
        self.layer, self.compilation = layer, compilation
        self.states = [m.__dict__ for m in layer.modules() if isinstance(m, LoraLayer)]
        self.shortcuts = None
        if compilation.recorder is not None:
            self.shortcuts = Shortcuts(compilation.recorder, layer, _call_layer.__code__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compilation.run(self.layer, args, kwargs)


class _Root:
    """Stands in the place of the call of the module that holds the layers."""

    def __init__(self, root: nn.Module, compilation: Compilation):
        self.root, self.compilation = root, compilation
        self.caches = "use_cache" in inspect.signature(type(root).forward).parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # transformers makes a key-value cache by default, which no training reads; what wants one,
        # as `generate` does, says so.
        if self.caches and self.root.training and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        if torch.compiler.is_compiling():
            return self.root._call_impl(*args, **kwargs)
        RECORDER.forwards += 1
        RECORDER.inside += 1
        try:
            return self.root._call_impl(*args, **kwargs)
        finally:
            RECORDER.inside -= 1


def compile_layers(model: nn.Module, mode: str, max_shapes: int) -> Compilation:
    """Compiles what holds LoRA layers in the model's lists of layers, in place of an earlier one.

    Raises:
        ValueError: no such mode, max_shapes below 1, or the model has no list of layers.
    """
    if mode not in MODES:
        raise ValueError(f"accelerate: compile={mode!r} is none of {', '.join(MODES)}, None")
    if max_shapes < 1:
        raise ValueError(f"accelerate: max_shapes must be at least 1, got {max_shapes}")
    uncompile(model)
    lists = dict(_lists(model, ""))
    if not lists:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no nn.ModuleList of layers with LoRA inside; "
            f"leave compile out"
        )
    found = {f"{name}.{n}": m for name, some in lists.items() for n, m in some.named_children()}
    root = _root(model, list(lists))
    for name, module in [*found.items(), (type(root).__name__, root)]:
        if module.__dict__.get(_CALL) is not None:
            raise ValueError(f"accelerate: {name} is compiled already; leave compile out")
    compilation, addresses = Compilation(mode, max_shapes), set()
    for name, layer in found.items():
        layer.__dict__[_CALL] = _Layer(layer, compilation)
        compilation.layers.append(name)
        addresses.update(p.data_ptr() for p in layer.parameters())
    root.__dict__[_CALL] = _Root(root, compilation)
    _raise_limits(4 * max_shapes * len(compilation.layers))
    _compilations.add(compilation)
    compilation.forget = weakref.finalize(compilation, RECORDER.forget, addresses)
    return compilation


def uncompile(model: nn.Module) -> None:
    """Undoes `compile_layers`; the last one to go puts PyTorch's limits back."""
    for module in model.modules():
        call = module.__dict__.get(_CALL)
        if isinstance(call, (_Layer, _Root)):
            del module.__dict__[_CALL]
            if isinstance(call, _Layer):
                call.shortcuts = None  # they hold the layer's state
            _compilations.discard(call.compilation)
            call.compilation.forget()
    if not _compilations:
        for name, before in _raised.items():
            setattr(torch._dynamo.config, name, before)
        _raised.clear()


def compilation_of(model: nn.Module) -> Compilation | None:
    """The model's `Compilation`, if it has one."""
    calls = (m.__dict__.get(_CALL) for m in model.modules())
    return next((c.compilation for c in calls if isinstance(c, _Layer)), None)


def _set_on(layer: nn.Module) -> str:
    """Whether masks and sums are set, of each LoRA layer inside. What is compiled reads it, since
    guards see what is in a module's `__dict__`, but not what comes into it."""
    return "".join("-MSB"[(MASKS in d) + 2 * (SUMS in d)] for d in layer.__dict__[_CALL].states)


def _call_layer(layer: nn.Module, state: str, *args: Any, **kwargs: Any) -> Any:
    if state is None:  # read, hence guarded
        raise TypeError("state")
    return layer._call_impl(*args, **kwargs)


def _checkpoints_inside(layer: nn.Module) -> bool:
    """Whether the layer's forward is about to checkpoint itself, as in newer transformers; older
    ones do it in `__call__`, around what is compiled, where a checkpoint belongs."""
    return (
        layer.__dict__.get(_CHECKPOINTS, False)
        and type(layer).__call__ is nn.Module.__call__
        and layer.training
        and torch.is_grad_enabled()
    )


def _lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Outermost lists of modules that are called, some of which hold LoRA layers."""
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _holds_layers(child):
            yield path, child
        else:
            yield from _lists(child, path)


def _holds_layers(layers: nn.Module) -> bool:
    called = all(type(m).forward is not nn.Module.forward for m in layers.children())
    inside = (m for layer in layers.children() for m in layer.modules() if m is not layer)
    return called and any(isinstance(m, LoraLayer) for m in inside)


def _root(model: nn.Module, names: list[str]) -> nn.Module:
    """The innermost module that holds all lists and is called."""
    path = os.path.commonprefix([name.split(".")[:-1] for name in names])
    while path and type(model.get_submodule(".".join(path))).forward is nn.Module.forward:
        path = path[:-1]
    return model.get_submodule(".".join(path))


def _raise_limits(needed: int) -> None:
    """Recompilations that these layers may need are not too many."""
    for name in _LIMITS:
        before = getattr(torch._dynamo.config, name)
        if before < needed:
            _raised.setdefault(name, before)
            setattr(torch._dynamo.config, name, needed)

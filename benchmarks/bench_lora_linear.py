"""One LoRA layer, forward and backward, bf16: frozen, PEFT, its rivals, and lorapar.accelerate.

PEFT's default is fp32 adapters under bf16 autocast. Ours is the same layer after `accelerate`.
Rollouts are forward alone; time the small one with --host, since the host binds there.
"""

from collections.abc import Callable

import harness
import layers
import torch
from torch import Tensor, nn

from lorapar_kernels import LoraMask

# (M tokens, K, N, r, dropout): attention and MLP of LLaMA-7B, few tokens, and GQA's k and v
SHAPES = [
    (8192, 4096, 4096, 16, 0.0),
    (8192, 4096, 4096, 16, 0.05),
    (8192, 4096, 4096, 64, 0.0),
    (8192, 4096, 4096, 64, 0.05),
    (8192, 4096, 4096, 256, 0.0),
    (8192, 4096, 11008, 16, 0.0),
    (8192, 4096, 11008, 16, 0.05),
    (8192, 4096, 11008, 64, 0.0),
    (8192, 11008, 4096, 16, 0.0),
    (8192, 11008, 4096, 16, 0.05),
    (8192, 11008, 4096, 64, 0.0),
    (2048, 4096, 4096, 16, 0.0),
    (2048, 4096, 4096, 16, 0.05),
    (8192, 4096, 1024, 16, 0.0),
    (8192, 4096, 1024, 16, 0.05),
]
LIVE_SHAPE, LIVE_SHARE = (8192, 4096, 4096, 256), 0.4
ROLLOUT_SHAPES = [(8, 4096, 4096, 16), (8192, 4096, 4096, 16)]  # decoding 8 sequences, a prompt


def label(m: int, k: int, n: int, r: int, p: float) -> str:
    return f"M={m} {k}->{n} r={r} p={p:g}"


def live_label(m: int, k: int, n: int, r: int) -> str:
    return f"{label(m, k, n, r, 0.0)} {100 * LIVE_SHARE:.0f} % live"


def tensors(m: int, k: int, n: int) -> tuple[Tensor, nn.Linear, Tensor]:
    """x, the frozen layer and dY, random."""
    return layers.randn(m, k).requires_grad_(), layers.frozen_linear(k, n), layers.randn(m, n)


def rank_share(k: int, n: int, r: int) -> float:
    return 1.5 * r * (k + n) / (k * n)


def case(m: int, k: int, n: int, r: int, p: float) -> harness.Case:
    x, base, dy = tensors(m, k, n)
    a, b = layers.random_adapter(k, n, r)
    default = layers.peft_layer(base, a, b, p)
    bf16 = layers.peft_layer(base, a, b, p, layers.DTYPE)
    ours = layers.peft_layer(base, a, b, p)
    layers.accelerate(nn.ModuleDict({"layer": ours}))
    compiled = layers.compiled(default)

    def run(call, layer, cast):
        leaves = [x, *(layers.adapters([layer]) if layer else ())]
        return layers.forward_backward(lambda: [call(x)], leaves, [dy], cast=cast)

    def train(on: bool) -> None:
        for layer in (default, bf16, ours):
            layer.train(on)

    rivals = _rivals(x, base.weight, a, b, p, dy)
    return harness.Case(
        label=label(m, k, n, r, p),
        providers={
            "frozen": lambda: run(base, None, False),
            "PEFT": lambda: run(default, default, True),
            "PEFT bf16": lambda: run(bf16, bf16, False),
            "PEFT compiled": lambda: run(compiled, default, True),
            **rivals,
            "lorapar": lambda: run(ours, ours, True),
        },
        exact=lambda: layers.exact(x, [base.weight], [(a, b)], [dy]),
        checked=("PEFT", "PEFT bf16", *(rivals if p == 0.0 else ()), "lorapar"),
        rank_share=rank_share(k, n, r),
        train=train if p > 0.0 else None,
    )


def live_case(m: int, k: int, n: int, r: int) -> harness.Case:
    """40 % of the rank columns live, and trained, against all of them.

    Dead columns are zero in A and in B, so that every provider computes the same function.
    """
    x, base, dy = tensors(m, k, n)
    a, b = layers.random_adapter(k, n, r)
    live = torch.zeros(r, dtype=torch.bool, device=layers.DEVICE)
    live[torch.randperm(r, device=layers.DEVICE)[: round(LIVE_SHARE * r)]] = True
    a[~live], b[:, ~live] = 0.0, 0.0
    trained = (live[:, None].expand(r, k).contiguous(), live.expand(n, r).contiguous())
    mask = LoraMask(*trained, live=live)
    default, full, part = (layers.peft_layer(base, a, b, 0.0) for _ in range(3))
    layers.accelerate(nn.ModuleDict({"layer": full}))
    layers.accelerate(nn.ModuleDict({"layer": part}), {"layer": mask})

    def run(layer):
        leaves = [x, *layers.adapters([layer])]
        return layers.forward_backward(lambda: [layer(x)], leaves, [dy], cast=True)

    def frozen():
        return layers.forward_backward(lambda: [base(x)], [x], [dy], cast=False)

    return harness.Case(
        label=live_label(m, k, n, r),
        providers={
            "frozen": frozen,
            "PEFT": lambda: run(default),
            "lorapar all live": lambda: run(full),
            "lorapar live": lambda: run(part),
        },
        exact=lambda: layers.exact(x, [base.weight], [(a, b)], [dy]),
        checked=("PEFT", "lorapar all live", "lorapar live"),
        rank_share=rank_share(k, n, int(live.sum())),
        baselines={"ratio": "frozen", "ratio_all_live": "lorapar all live"},
    )


def rollout_label(m: int, k: int, n: int, r: int) -> str:
    return f"rollout {label(m, k, n, r, 0.0)}"


def rollout_case(m: int, k: int, n: int, r: int) -> harness.Case:
    """The forward alone, as in TRL's rollouts: no gradient, no autocast, fp32 adapters."""
    x, base, _ = tensors(m, k, n)
    a, b = layers.random_adapter(k, n, r)
    default, ours = (layers.peft_layer(base, a, b, 0.0).eval() for _ in range(2))
    layers.accelerate(nn.ModuleDict({"layer": ours}))

    def run(layer):
        with torch.no_grad():
            return [layer(x)]

    def exact():
        y = x.detach().double() @ base.weight.double().T
        return [y + layers.SCALE * (x.detach().double() @ a.double().T) @ b.double().T]

    return harness.Case(
        label=rollout_label(m, k, n, r),
        providers={
            "frozen": lambda: run(base),
            "PEFT": lambda: run(default),
            "lorapar": lambda: run(ours),
        },
        exact=exact,
        checked=("PEFT", "lorapar"),
        rank_share=r * (k + n) / (k * n),
    )


def _rivals(x, weight, a, b, p, dy) -> dict[str, Callable]:
    """Unsloth and Axolotl where they can be imported and run; who cannot is printed."""
    u, v = (t.clone().requires_grad_() for t in (a, b))

    def run(apply):
        return layers.forward_backward(lambda: [apply()[0]], [x, u, v], [dy], cast=True)

    def unsloth():
        from unsloth.kernels.fast_lora import LoRA_W

        return run(lambda: LoRA_W.apply(x[None], weight, None, u, v, layers.SCALE))

    def axolotl():
        from axolotl.kernels.lora import LoRA_O

        dropped = nn.functional.dropout(x[None], p) if p > 0.0 else None
        base = (weight, None, None)
        return run(lambda: LoRA_O.apply(x[None], dropped, *base, u, v, layers.SCALE, None, None))

    found = {}
    for name, call in {"Axolotl": axolotl, **({} if p else {"Unsloth": unsloth})}.items():
        try:
            call()
            found[name] = call
        except Exception as e:
            print(f"left out: {name} ({type(e).__name__}: {e})".splitlines()[0])
    return found


def cases() -> dict[str, Callable[[], harness.Case]]:
    made = {label(*shape): lambda shape=shape: case(*shape) for shape in SHAPES}
    made[live_label(*LIVE_SHAPE)] = lambda: live_case(*LIVE_SHAPE)
    rollouts = {rollout_label(*s): lambda s=s: rollout_case(*s) for s in ROLLOUT_SHAPES}
    return {**made, **rollouts}


def smoke() -> list[Callable[[], harness.Case]]:
    return [
        lambda: case(33, 40, 24, 4, 0.0),
        lambda: case(256, 128, 96, 8, 0.05),
        lambda: live_case(33, 40, 24, 8),
        lambda: rollout_case(3, 40, 24, 4),
    ]


if __name__ == "__main__":
    harness.main("lora_linear", cases(), smoke)

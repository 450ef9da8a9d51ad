"""Compiles the kernels for cards that are not here, with the configurations they would get there.

Run without TRITON_INTERPRET. Prints a line for each kernel that asks for more shared memory than a
block may have on the card, or keeps registers in memory. Needs no GPU: Triton brings ptxas.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorapar_kernels import dropout, dy_gradients, expand, extended_gemm, gradient, pack, shrink

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KILOBYTE = 1024
SPILL = 1024  # bytes a thread; a card reserves them for all of its threads, 0.3 GB on an H100
# arch, shared memory a block may have, whether the `hopper` configurations are used
CARDS = [(80, 99, False), (90, 227, True)]  # 99 KB: sm_86 and sm_89 compile as sm_80 does
FLOATS = ("scale", "inverse_keep")


def compiled(kernel, target, pointers, constants, cfg, none=()):
    """The kernel for aligned tensors of the given dtypes and sizes divisible by 16."""
    meta = {k: v for k, v in cfg.items() if k not in ("num_warps", "num_stages")} | constants
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in meta or name in none:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name], attributes[(i,)] = pointers[name], [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name], attributes[(i,)] = "i32", [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(k),): v for k, v in meta.items()}
    values |= {(kernel.arg_names.index(k),): None for k in none}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": cfg.get("num_warps", 4), "num_stages": cfg.get("num_stages", 3)}
    return triton.compile(source, target=target, options=options)


def kernels(dtype: str, hopper: bool, R: int):
    """(name, kernel, pointers, constants, configuration, arguments that are None)."""
    t, words, f32 = f"*{dtype}", "*i16", "*fp32"
    wide, narrow = R > 64, dtype == "fp32"

    def pick(module, large, name=""):
        return getattr(module, large if hopper and not narrow else f"_SAFE{name}")

    yield (
        "pack", pack._pack_kernel,
        {"a_ptr": t, "b_ptr": t, "a_out_ptr": t, "b_out_ptr": t, "valid_ptr": "*i8"},
        {"BLOCK_R": min(R, 64), "BLOCK": 64}, {}, ("live_ptr",),
    )  # fmt: skip
    tensors = {"x_ptr": t, "a_ptr": t, "valid_ptr": "*i8", "s_ptr": t}
    cfg = pick(shrink, "_HOPPER_WIDE" if wide else "_HOPPER")
    yield "shrink", shrink._shrink_kernel, tensors, {"BLOCK_R": R, "PRECISION": "ieee"}, cfg, ()
    cfg = pick(shrink, "_HOPPER_DROPOUT_WIDE" if wide else "_HOPPER_DROPOUT", "_DROPOUT")
    yield (
        "shrink with dropout", shrink._shrink_dropout_kernel,
        {**tensors, "bits_ptr": words, "seed_ptr": "*i64"},
        {"R": R, "BLOCK_R": 16 if narrow else R, "PRECISION": "ieee", "PACKED": True}, cfg, (),
    )  # fmt: skip
    for bits in (None, words):
        more, none = ({"bits_ptr": bits}, ()) if bits else ({}, ("bits_ptr",))
        names = ["_HOPPER_WIDE"] if wide else ["_HOPPER", "_HOPPER_BESIDE"]
        for name in names if hopper and not narrow else ["_SAFE"]:
            cfg = dict(pick(gradient, name)) | ({"BLOCK_K": 64} if bits else {})
            yield (
                f"gradient {name} bits={bool(bits)}", gradient._gradient_kernel,
                {"s_ptr": t, "x_ptr": t, "partial_ptr": f32, **more},
                {"BLOCK_R": R, "PRECISION": "ieee", "PACKED": True}, cfg,
                ("index_ptr", "bounds_ptr", *none),
            )  # fmt: skip
        cfg = dict(pick(expand, "_HOPPER")) | ({"BLOCK_N": 64} if bits else {})
        yield (
            f"expand bits={bool(bits)}", expand._expand_kernel,
            {"s_ptr": t, "a_ptr": t, "out_ptr": t, **more},
            {"BLOCK_R": min(R, 32 if narrow else 64), "PRECISION": "ieee", "PACKED": True}, cfg,
            ("bias_ptr", "base_ptr", *none),
        )  # fmt: skip
    if R <= (dy_gradients.MAX_RANK_FP32 if narrow else dy_gradients.MAX_RANK):
        yield (
            "dy_gradients", dy_gradients._dy_gradients_kernel,
            {"dy_ptr": t, "b_ptr": t, "s_ptr": t, "ds_ptr": f32, "db_ptr": f32},
            {"R": R, "BLOCK_C": R, "PRECISION": "ieee"}, pick(dy_gradients, "_HOPPER"),
            ("index_ptr",),
        )  # fmt: skip
    yield (
        "keep",
        dropout._keep_kernel,
        {"seed_ptr": "*i64", "out_ptr": t},
        {"BLOCK_M": 16},
        {},
        (),
    )
    if hopper and not narrow:
        cfg = extended_gemm._DEFAULT
        m, n, k = (cfg[f"BLOCK_{axis}"] for axis in "MNK")
        described = {
            "x_desc": f"tensordesc<{dtype}[{m},{k}]>", "w_desc": f"tensordesc<{dtype}[{n},{k}]>",
            "out_desc": f"tensordesc<{dtype}[{m},{n}]>", "s_ptr": t, "a_ptr": t,
        }  # fmt: skip
        yield (
            "extended_gemm", extended_gemm._extended_gemm_kernel, described,
            {"BLOCK_R": min(R, 64), "TRANSPOSED": True, "PACKED": True}, cfg,
            ("bias_ptr", "bits_ptr"),
        )  # fmt: skip


def stack(binary: bytes) -> int:
    """Bytes a thread that hold spilled registers, as cuobjdump tells them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary), file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", told))


def main() -> None:
    count = 0
    for arch, room, hopper in CARDS:
        target = GPUTarget("cuda", arch, 32)
        for dtype in ("bf16", "fp32"):
            for R in (16, 64, 128):
                for name, kernel, pointers, constants, cfg, none in kernels(dtype, hopper, R):
                    made = compiled(kernel, target, pointers, constants, cfg, none)
                    count += 1
                    where = f"{name} {dtype} R={R} sm_{arch}"
                    if made.metadata.shared > room * KILOBYTE:
                        print(f"{where}: {made.metadata.shared} bytes of shared memory")
                    if (spilled := stack(made.asm["cubin"])) > SPILL:
                        print(f"{where}: {spilled} bytes of registers in memory")
    print(f"{count} compiled")


if __name__ == "__main__":
    main()

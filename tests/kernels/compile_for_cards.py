"""Compiles the kernels for cards that are not here, with the configurations they would get there.

Run without TRITON_INTERPRET, with 80 and 90 or one of them. Prints a line for each kernel that asks
for more shared memory than a block may have on the card, keeps registers in memory, or touches
memory before it waits for the kernel before it. Needs no GPU: Triton brings ptxas.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorapar_kernels import (
    _tuned,
    adamw,
    dropout,
    dy_gradients,
    expand,
    extended_gemm,
    gradient,
    histogram,
    pack,
    shrink,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KILOBYTE = 1024
SPILL = 1024  # bytes a thread; a card reserves them for all of its threads, 0.3 GB on an H100
# arch, shared memory a block may have, whether the `hopper` configurations are used
CARDS = [(80, 99, False), (90, 227, True)]  # 99 KB: sm_86 and sm_89 compile as sm_80 does
FLOATS = ("scale", "inverse_keep")


def compiled(kernel, target, pointers, constants, cfg, none=()):
    """The kernel for aligned tensors of the given dtypes and sizes divisible by 16."""
    meta = {k: v for k, v in cfg.items() if k not in ("num_warps", "num_stages")} | constants
    meta["PDL"] = target.arch >= 90
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


def kernel_of(op: str, dtype: str, R: int, *, bits: bool = False):
    """(kernel, pointers, constants, arguments that are None) of an op at a padded rank."""
    t, words, f32, itemsize = f"*{dtype}", "*i16", "*fp32", 4 if dtype == "fp32" else 2
    more, none = ({"bits_ptr": words}, ()) if bits else ({}, ("bits_ptr",))
    precise = {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}  # as `precision` says
    tensors = {"x_ptr": t, "a_ptr": t, "valid_ptr": "*i8", "s_ptr": t}
    match op:
        case "pack":
            pointers = {"a_ptr": t, "b_ptr": t, "a_out_ptr": t, "b_out_ptr": t, "valid_ptr": "*i8"}
            constants = {"BLOCK_R": min(R, 64), "BLOCK": 64}
            return pack._pack_kernel, pointers, constants, ("live_ptr",)
        case "shrink":
            return shrink._shrink_kernel, tensors, {"BLOCK_R": R, **precise}, ()
        case "shrink_dropout":
            constants = {
                "R": R,
                "BLOCK_R": shrink.dropout_block(R, itemsize),
                "PACKED": True,
                **precise,
            }
            pointers = {**tensors, "bits_ptr": words, "seed_ptr": "*i64"}
            return shrink._shrink_dropout_kernel, pointers, constants, ()
        case "gradient" | "gradient_dropout":
            pointers = {"s_ptr": t, "x_ptr": t, "partial_ptr": f32, **more}
            constants = {"BLOCK_R": R, "PACKED": True, **precise}
            return (
                gradient._gradient_kernel,
                pointers,
                constants,
                ("index_ptr", "bounds_ptr", *none),
            )
        case "expand" | "expand_dropout":
            pointers = {"s_ptr": t, "a_ptr": t, "out_ptr": t, **more}
            constants = {"BLOCK_R": expand.rank_block(R, itemsize), "PACKED": True, **precise}
            return expand._expand_kernel, pointers, constants, ("bias_ptr", "base_ptr", *none)
        case "dy_gradients":
            pointers = {"dy_ptr": t, "b_ptr": t, "s_ptr": t, "ds_ptr": f32, "db_ptr": f32}
            constants = {"R": R, "BLOCK_C": R, **precise}
            return dy_gradients._dy_gradients_kernel, pointers, constants, ("index_ptr",)
        case "sum":
            pointers = {"partial_ptr": f32, "valid_ptr": "*i8", "out_ptr": t}
            return dy_gradients._sum_kernel, pointers, {"R": R, "BLOCK_M": 32}, ()
        case "finish":
            pointers = {"partial_ptr": f32, "out_ptr": f32}
            none = ("slot_ptr", "trainable_ptr", "sum_ptr", "square_ptr")
            return gradient._finish_kernel, pointers, {"BLOCK_R": 16, "BLOCK": 64}, none
        case "keep":
            return dropout._keep_kernel, {"seed_ptr": "*i64", "out_ptr": t}, {"BLOCK_M": 16}, ()
    m, n, k = (extended_gemm._DEFAULT[f"BLOCK_{axis}"] for axis in "MNK")
    transposed = op == "extended_gemm y"
    w = f"[{n},{k}]" if transposed else f"[{k},{n}]"
    pointers = {
        "x_desc": f"tensordesc<{dtype}[{m},{k}]>", "w_desc": f"tensordesc<{dtype}{w}>",
        "out_desc": f"tensordesc<{dtype}[{m},{n}]>", "s_in": t, "a_in": t, **more,
    }  # fmt: skip
    block = expand.rank_block(R, itemsize)
    if block > extended_gemm.AHEAD.value:
        pointers["s_in"] = f"tensordesc<{dtype}[{m},{block}]>"
        pointers["a_in"] = f"tensordesc<{dtype}[{block},{n}]>"
    constants = {"BLOCK_R": block, "TRANSPOSED": transposed, "PACKED": True}
    return extended_gemm._extended_gemm_kernel, pointers, constants, ("bias_ptr", *none)


def defaults(dtype: str, hopper: bool, R: int):
    """(name, op, bits, configuration) where nothing was measured."""
    wide, narrow = "_WIDE" if R > 64 else "", dtype == "fp32"
    roomy = hopper and not narrow
    yield "pack", "pack", False, {}
    yield "keep", "keep", False, {}
    yield "sum", "sum", False, {}
    yield "finish", "finish", False, {}
    yield "shrink", "shrink", False, getattr(shrink, f"_HOPPER{wide}" if roomy else "_SAFE")
    name = f"_HOPPER_DROPOUT{wide}" if roomy else "_SAFE_DROPOUT"
    yield "shrink with dropout", "shrink_dropout", False, getattr(shrink, name)
    for bits in (False, True):
        names = ["_HOPPER", "_HOPPER_BESIDE", "_HOPPER_BESIDE_WIDE"]
        names = ["_HOPPER_DROPOUT"] if bits else names
        names = ["_SAFE"] if not roomy else ["_HOPPER_WIDE"] if wide else names
        for name in names:
            yield f"gradient {name}", "gradient", bits, getattr(gradient, name)
        name = "_SAFE" if not roomy else "_HOPPER_DROPOUT" if bits else "_HOPPER"
        yield "expand", "expand", bits, getattr(expand, name)
        if roomy:
            yield "plan b dX", "extended_gemm dX", bits, extended_gemm._DEFAULT
    if R <= (dy_gradients.MAX_RANK_FP32 if narrow else dy_gradients.MAX_RANK):
        cfg = dy_gradients._HOPPER if roomy else dy_gradients._SAFE
        yield "dy_gradients", "dy_gradients", False, cfg
    if roomy:
        yield "plan b y", "extended_gemm y", False, extended_gemm._DEFAULT


def over_many():
    """(name, what `kernel_of` gives, configuration) of the kernels over many tensors."""
    table = dict.fromkeys(("scores_ptr", "within_ptr", "sizes_ptr"), "*i64")
    table |= dict.fromkeys(("tensor_ptr", "place_ptr"), "*i32")
    more = dict.fromkeys(("counts_ptr", "sums_ptr", "upper_ptr", "cut_ptr", "before_ptr"), "*i64")
    more |= {"starts_ptr": "*i64", "ties_ptr": "*i32", "out_ptr": "*i1"}
    for name in ("upper", "lower", "ties", "mask"):
        kernel = getattr(histogram, f"_{name}_kernel")
        pointers = {n: t for n, t in (table | more).items() if n in kernel.arg_names}
        for none in ((), ("within_ptr",)):
            constants = {"BLOCK": histogram._CHUNK}
            yield f"{name} without {none}", (kernel, pointers, constants, none), {"num_warps": 8}
    pointers = dict.fromkeys(("tensor_ptr", "place_ptr", "before_ptr"), "*i32")
    pointers |= {"addresses_ptr": "*i64", "factors_ptr": "*fp32", "bits_ptr": "*u8"}
    for dtype in ("fp32", "bf16", "fp16"):
        one = (adamw._adamw_kernel, pointers | {"like_ptr": f"*{dtype}"}, {"BLOCK": adamw._CHUNK})
        yield f"adamw {dtype}", (*one, ()), {"num_warps": 4}


def measured():
    """(name, op, R, bits, configuration) of every entry of every table, once."""
    seen = set()
    for file in Path(_tuned.__file__).parent.glob("tuned/*.json"):
        for op, keys in json.loads(file.read_text())["ops"].items():
            for key, by_m in keys.items() if op != "extended_gemm" else ():
                R = int(re.search(r"R=(\d+)", key)[1])
                for cfg in by_m.values():
                    bits = op in ("expand_dropout", "gradient_dropout")
                    if (one := (op, R, json.dumps(cfg))) not in seen:
                        seen.add(one)
                        yield f"measured {op} {one[2]}", op, R, bits, cfg


def stack(binary: bytes) -> int:
    """Bytes a thread that hold spilled registers, as cuobjdump tells them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary), file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", told))


def waits_too_late(ptx: str) -> bool:
    """Whether a kernel of Hopper touches memory before it has waited for the one before it."""
    memory = re.search(r"(ld|st|red|atom)\.(volatile\.)?global|cp\.async|prefetch", ptx)
    return not 0 <= ptx.find("griddepcontrol.wait") < memory.start()


def check(where: str, card: tuple[int, int, bool], one: tuple, cfg: dict) -> None:
    """Compiles one kernel and complains."""
    arch, room, _ = card
    kernel, pointers, constants, none = one
    made = compiled(kernel, GPUTarget("cuda", arch, 32), pointers, constants, cfg, none)
    if made.metadata.shared > room * KILOBYTE:
        print(f"{where}: {made.metadata.shared} bytes of shared memory")
    if arch >= 90 and waits_too_late(made.asm["ptx"]):
        print(f"{where}: touches memory before it waits for the kernel before it")
    if (spilled := stack(made.asm["cubin"])) > SPILL:
        print(f"{where}: {spilled} bytes of registers in memory")


def main(*archs: str) -> None:
    count = 0
    for card in (card for card in CARDS if str(card[0]) in archs):
        for dtype in ("bf16", "fp32"):
            for R in (16, 64, 128):
                for name, op, bits, cfg in defaults(dtype, card[2], R):
                    where = f"{name} {dtype} R={R} bits={bits} sm_{card[0]}"
                    check(where, card, kernel_of(op, dtype, R, bits=bits), cfg)
                    count += 1
        for name, one, cfg in over_many():
            check(f"{name} sm_{card[0]}", card, one, cfg)
            count += 1
    for name, op, R, bits, cfg in measured() if "90" in archs else ():
        check(f"{name} R={R}", CARDS[-1], kernel_of(op, "bf16", R, bits=bits), cfg)
        count += 1
    print(f"{count} compiled")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Compiles the Triton kernels for every supported architecture, without a GPU, and reports what they use.

`python tests/kernels/aot.py` writes the table beside it, resources.json; tests/kernels/test_aot.py compares. Peers'
kernels are compiled the same way where they are installed, and stand beside ours. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vlmfast.kernels import (
    gated_residual,
    info_nce,
    linear_cross_entropy,
    media_attention,
    pairs,
    patch_embed,
    sigmoid_loss,
)

TABLE = Path(__file__).with_name("resources.json")
CAPABILITIES = (80, 86, 89, 90, 100, 120)
POINTERS = {
    "x_hi": "*fp16", "x_lo": "*fp16", "y_hi": "*fp16", "y_lo": "*fp16", "row_codes": "*i32", "col_codes": "*i32",
    "keep": "*i64", "media_lo": "*i32", "media_hi": "*i32", "media_len": "*i32", "first": "*i32", "last": "*i32",
    "tile_first": "*i32", "tile_last": "*i32", "row_mask": "*i1",
}  # fmt: skip
INTEGERS = (
    "n", "m", "dim", "label_offset", "first_row", "first_col", "chunk_cols",
    "stride", "row_stride", "col_stride", "row_tiles", "col_tiles", "other_count",
    "total", "per_split", "taken", "columns", "height", "width", "embed", "prefix", "sb", "sc", "sh", "sw",
    "position_image", "position_token", "position_embed", "grad_image", "grad_token", "grad_embed",
    "words", "first_word", "chunk_words",
    "heads", "group", "length", "num_media", "tokens_per_media", "count", "per_program",
    *(f"{name}_{axis}" for name in "goqkv" for axis in "bhl"), *(f"{name}_row" for name in "ghr"),
)  # fmt: skip
ALIGNED = (
    "dim",
    "chunk_cols",
    "embed",
    "per_split",
    "sb",
    "sc",
    "sh",
    "position_image",
    "position_token",
    "grad_image",
    "grad_token",
    *(f"{name}_{axis}" for name in "goqkv" for axis in "bhl"),
    *(f"{name}_row" for name in "ghr"),
)


@dataclass(frozen=True)
class Kernel:
    function: Any
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)


def kernels(capability: int) -> dict[str, tuple[Kernel, pairs.Config]]:
    """Every kernel as its launcher would compile it, for float16 products and for split ones."""
    found = {}
    for split, groups in itertools.product((False, True), repeat=2):
        wide = pairs.config_for(capability, split, groups)
        narrow = pairs.config_for(capability, split, groups, sigmoid_loss.MAX_BLOCK_N)
        for name, function, config, knobs in (
            ("info_nce exp_sums", info_nce.exp_sums_kernel, wide, {"COLUMNS": True, "KEEP": groups}),
            ("info_nce online", info_nce.online_kernel, info_nce.online_config(wide), {}),
            ("info_nce gradient", info_nce.gradient_kernel, wide, {"KEPT": False}),
            ("sigmoid_loss", sigmoid_loss.sigmoid_kernel, narrow, {"GRADIENT": True}),
        ):
            constants = {name: value for name, value in config.options.items() if name in function.arg_names}
            types = {"out": "*fp16"}
            if config.descriptors:
                for side, rows in (("x", config.block_m), ("y", config.block_n)):
                    descriptor = f"tensordesc<fp16[{rows},{config.block_k}]>"
                    types |= {f"{side}_hi": descriptor} | ({f"{side}_lo": descriptor} if split else {})
            kernel = Kernel(function, {**constants, "SPLIT": split, "GROUPS": groups, **knobs}, types)
            found[name + (", float32" if split else "") + (", groups" if groups else "")] = (kernel, config)
    side = pairs.Config(64, 0, 0, 4, 3)
    found["info_nce sums"] = (Kernel(info_nce.sums_kernel, {"BLOCK": info_nce.SUMMED, "TILES": 32}), side)
    types = dict.fromkeys(("row_weight", "col_weight", "losses"), "*fp64") | dict.fromkeys(
        ("row_counts", "col_counts"), "*i64"
    )
    flags = {"COUNTS": False, "EXCLUDE_POSITIVE": False, "BLOCK": info_nce.NORMALISED}
    found["info_nce normalise"] = (Kernel(info_nce.normalise_kernel, flags, types), side)
    types = dict.fromkeys(("features", "out", "other_out"), "*bf16")
    found["info_nce finish"] = (Kernel(pairs.finish_kernel, {"BLOCK": pairs.FINISHED, "STORE": True}, types), side)
    found |= linear_cross_entropy_kernels(capability)
    return found | patch_embed_kernels(capability) | media_attention_kernels(capability) | gated_residual_kernels()


def linear_cross_entropy_kernels(capability: int) -> dict[str, tuple[Kernel, linear_cross_entropy.Config]]:
    """bfloat16, and float32 by TF32 or in float32."""
    found = {}
    for pointer, precision in (("*bf16", "ieee"), ("*fp32", "tf32"), ("*fp32", "bf16x6")):
        config = linear_cross_entropy.config_for(capability, pointer == "*fp32")
        constants = {name: value for name, value in config.options.items() if name.startswith("BLOCK")}
        constants |= {"BIAS": True, "PRECISION": precision}
        types = dict.fromkeys(("x", "weight", "out"), pointer) | {"labels": "*i64"}
        for name, function in (
            ("sums", linear_cross_entropy.sums_kernel),
            ("gradient", linear_cross_entropy.gradient_kernel),
        ):
            title = f"linear_cross_entropy {name}, {'bf16' if pointer == '*bf16' else precision}"
            found[title] = (Kernel(function, constants, types), config)
    return found


def patch_embed_kernels(capability: int) -> dict[str, tuple[Kernel, pairs.Config]]:
    """uint8 (B, H, W, C) by bfloat16, float32 (B, C, H, W) by TF32 or float32; /14 also with keep and ragged."""
    found = {}
    for (products, precision), patch in itertools.product(
        ((tl.bfloat16, "tf32"), (tl.float32, "tf32"), (tl.float32, "bf16x6")), (16, 14)
    ):
        wide = products == tl.float32
        constants = {
            "CHANNELS": 3, "PATCH_H": patch, "PATCH_W": patch, "PACKED": not wide, "NORMALISE": True,
            "PAD": patch == 14, "KEEP": patch == 14, "PRECISION": precision, "sw" if wide else "sc": 1,
        }  # fmt: skip
        types = dict.fromkeys(("weight", "bias", "position", "tokens", "grad"), "*fp32" if wide else "*bf16")
        types["pixels"] = "*fp32" if wide else "*u8"
        for name, function, backward, more in (
            (
                "tokens",
                patch_embed.tokens_kernel,
                False,
                {"BIAS": True, "POSITION": True, "position_embed": 1, "PRODUCTS": products},
            ),
            ("weight_grad", patch_embed.weight_grad_kernel, True, {"PRODUCTS": products, "grad_embed": 1}),
        ):
            config = patch_embed.config_for(capability, wide, backward)
            tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
            own = dict(types)
            if not backward:
                tile["DESCRIPTORS"] = config.descriptors
                if config.descriptors:
                    own["weight"] = f"tensordesc<bf16[{config.block_n},{config.block_k}]>"
            title = f"patch_embed {name}, /{patch}, {precision if wide else products}"
            found[title] = (Kernel(function, {**constants, **tile, **more}, own), config)
    return found


def media_attention_kernels(capability: int) -> dict[str, tuple[Kernel, media_attention.Config]]:
    """bfloat16, and float32 by TF32 or in float32, of head dims 32 to 128; with media_len, and at 64 all there is."""
    found = {}
    for products, dim in itertools.product(("half", "tf32", "ieee"), (32, 64, 128)):
        if dim > media_attention.MAX_DIM[products]:
            continue
        constants = {
            "DIM": dim, "WIDTH": dim, "V_DIM": dim, "V_WIDTH": dim, "LENGTHS": True, "BIAS": dim == 64,
            "EMPTY_ALL": dim == 64, "PRECISION": "tf32" if products == "tf32" else "ieee",
            **{f"{name}_d": 1 for name in "gqkvo"},
        }  # fmt: skip
        tensors = ("q", "k", "v", "out", "grad", "query_grad", "key_grad", "value_grad")
        types = dict.fromkeys(tensors, "*bf16" if products == "half" else "*fp32") | {"scale": "fp32"}
        for name, function, backward in (
            ("forward", media_attention.forward_kernel, False),
            ("query_grad", media_attention.query_grad_kernel, True),
            ("key_grad", media_attention.key_grad_kernel, True),
        ):
            config = media_attention.config_for(capability, products, dim, backward)
            known = {key: value for key, value in constants.items() if key in function.arg_names}
            tile = {"ROWS": config.rows, "KEYS": config.keys}
            found[f"media_attention {name}, {dim}, {products}"] = (Kernel(function, {**known, **tile}, types), config)
    flags = {"INTERVALS": True, "LENGTHS": True, "EMPTY_ALL": True}
    found["media_attention rows"] = (Kernel(media_attention.rows_kernel, {"ROWS": 128, **flags}), config)
    dims = {"V_DIM": 128, "V_WIDTH": 128, "g_d": 1, "o_d": 1, "ROWS": 64}
    found["media_attention delta"] = (
        Kernel(media_attention.delta_kernel, dims, {"grad": "*bf16", "out": "*bf16"}), config,
    )  # fmt: skip
    return found


def gated_residual_kernels() -> dict[str, tuple[Kernel, media_attention.Config]]:
    """bfloat16 with float32 residuals, gates of both kinds, and a mask."""
    found = {}
    config = media_attention.Config(gated_residual.ROWS, gated_residual.COLUMNS, 4, 3)
    for per_channel, mask in ((False, False), (True, True)):
        constants = {"ROWS": config.rows, "COLUMNS": config.keys, "PER_CHANNEL": per_channel, "MASK": mask}
        types = {"hidden": "*bf16", "hidden_grad": "*bf16"}
        name = "per channel, masked" if mask else "scalar"
        found[f"gated_residual forward, {name}"] = (
            Kernel(gated_residual.forward_kernel, {**constants, "r_column": 1, "h_column": 1}, types), config,
        )  # fmt: skip
        more = {"g_column": 1, "h_column": 1, "HIDDEN_GRAD": True, "GATE_GRAD": True}
        found[f"gated_residual backward, {name}"] = (
            Kernel(gated_residual.backward_kernel, {**constants, **more}, types), config,
        )  # fmt: skip
    return found


def compile_kernel(kernel: Kernel, target: GPUTarget, num_warps: int, num_stages: int) -> Any:
    names = kernel.function.arg_names
    types = {
        name: "constexpr" if name in kernel.constants
        else "i32" if name in INTEGERS
        else kernel.types.get(name) or POINTERS.get(name, "*fp32")
        for name in names
    }  # fmt: skip
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, name in enumerate(names)
        if types[name][0] == "*" or (name in ALIGNED and types[name] == "i32")
    }
    source = ASTSource(kernel.function, types, kernel.constants, aligned)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def resources(compiled: Any) -> dict[str, int | str]:
    """Registers, bytes of stack and spills, shared memory, matrix instruction, and exponentials per thread."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    matrix = next(name for name in ("wgmma", "tcgen05", "mma.sync", "none") if name in ptx or name == "none")
    return {
        "registers": numbers["REG"], "stack": numbers["STACK"], "spills": numbers["LOCAL"],
        "shared": compiled.metadata.shared, "matrix": matrix, "exps_per_thread": ptx.count("ex2.approx"),
    }  # fmt: skip


def cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def table(capability: int) -> dict[str, dict[str, int | str]]:
    target = GPUTarget("cuda", capability, 32)
    found = {}
    for name, (kernel, config) in kernels(capability).items():
        found[name] = resources(compile_kernel(kernel, target, config.num_warps, config.num_stages))
        if "GROUPS" in kernel.constants:  # of a loss
            found[name]["logits_per_thread"] = config.block_m * config.block_n // (32 * config.num_warps)
    return found


def peers(capability: int) -> Iterator[tuple[str, dict[str, int | str]]]:
    """The forward kernels of memeff and inf-cl at D = 256 in float16, as their launchers choose, where installed."""
    for name, build in (("memeff", _memeff), ("inf-cl", _inf_cl)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed: no row")
            continue
        kernel, warps, stages = build()
        compiled = compile_kernel(kernel, GPUTarget("cuda", capability, 32), warps, stages)
        yield f"{name} {version} forward", resources(compiled)


def _memeff() -> tuple[Kernel, int, int]:
    from memeff.distributed_clip_loss import INPUT_PRECISION, clip_denom_kernel

    constants = {"BLOCK_SIZE_I": 128, "BLOCK_SIZE_J": 128, "BLOCK_SIZE_D": 64, "D_MODEL": 256}
    types = {name: "*fp16" if name in ("X_ptr", "Y_ptr") else "i32" for name in clip_denom_kernel.arg_names}
    types |= {"sum_exp_row_ptr": "*fp32", "sum_exp_col_ptr": "*fp32", "inv_temperature": "fp32"}
    return Kernel(clip_denom_kernel, {**constants, "INPUT_PRECISION": INPUT_PRECISION}, types), 4, 3


def _inf_cl() -> tuple[Kernel, int, int]:
    from inf_cl.flash import _prob_fwd_kernel

    types = {"Q": "*fp16", "K": "*fp16", "LSE": "*fp32", "nheads": "i32", "seqlen_q": "i32", "seqlen_k": "i32"}
    return Kernel(_prob_fwd_kernel, {"BLOCK_HEADDIM": 256, "BLOCK_M": 64, "BLOCK_N": 64}, types), 8, 1


def compile_for_amd() -> dict[str, int]:
    """Bytes of each kernel's code for gfx942, which is compiled and not looked into."""
    target = GPUTarget("hip", "gfx942", 64)
    found = {}
    for name, (kernel, config) in kernels(80).items():
        code = compile_kernel(kernel, target, config.num_warps, 2).asm["hsaco"]
        found[name] = len(code)
    return found


def main() -> None:
    found: dict[str, Any] = {"triton": triton.__version__}
    for capability in CAPABILITIES:
        found[f"sm_{capability}"] = {**table(capability), **dict(peers(capability))}
        print(f"sm_{capability}", json.dumps(found[f"sm_{capability}"], indent=1), flush=True)
    TABLE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""The CPU kernels against float64, in a process whose torch was told an instruction set by ATEN_CPU_CAPABILITY.

`python tests/helpers/instruction_sets.py` ends with the name of the set that the kernels used.
"""

from __future__ import annotations

import itertools

import media
import torch
from torch.nn import functional as F

from vlmfast.ops import gated_residual, info_nce, media_attention, patch_embed
from vlmfast.ops._dispatch import core
from vlmfast.ops.gated_residual import reference as gated_residual_reference
from vlmfast.ops.info_nce import reference as info_nce_reference
from vlmfast.ops.media_attention import reference as media_attention_reference
from vlmfast.ops.patch_embed import reference as patch_embed_reference


def losses() -> None:
    x, y = (F.normalize(torch.randn(300, 70), dim=1).requires_grad_() for _ in range(2))
    s = torch.tensor(60.0, requires_grad=True)
    exact = torch.autograd.grad(info_nce_reference(x.double(), y.double(), s.double()), (x, y, s))
    for recompute in (False, True):
        ours = torch.autograd.grad(info_nce(x, y, s, recompute=recompute), (x, y, s))
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-7)


def patches() -> None:
    """With and without bfloat16 products, patches of a width that no vector divides."""
    layouts = (("NHWC", (3, 27, 40, 3)), ("NCHW", (3, 3, 27, 40)))
    bounds = ((torch.float32, 1e-6), (torch.bfloat16, 2e-2))
    for schedule, (dtype, bound), (layout, shape) in itertools.product(("", "bfloat16", "brgemm"), bounds, layouts):
        core.force_schedule(schedule)
        for pixels in (torch.randint(0, 256, shape).byte(), torch.randn(shape).to(dtype)):
            weight, bias = (torch.randn(130, 3, 14, 7) / 17).to(dtype), torch.randn(130).to(dtype)
            results = []
            for op, kind in ((patch_embed, dtype), (patch_embed_reference, torch.float64)):
                leaves = [t.to(kind).requires_grad_() for t in (weight, bias)]
                x = pixels if pixels.dtype == torch.uint8 else pixels.to(kind)
                tokens = op(x, *leaves, layout=layout, pad=True, mean=(0.4,) * 3, std=(0.3,) * 3)
                cotangent = torch.arange(tokens.numel()).view_as(tokens).remainder(11).to(kind) - 4
                results.append([tokens, *torch.autograd.grad(tokens, leaves, cotangent)])
            for ours, exact in zip(*results, strict=True):
                error = (ours.double() - exact).abs().max() / exact.abs().max()
                assert error < bound, (schedule, dtype, layout, pixels.dtype, error)
    core.force_schedule("")


def attention() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for queries in (1, 70):
            options = media.any_media(2, queries, 3) | {"media_len": torch.randint(0, 31, (2, 3))}
            for empty in ("zero", "all"):
                media.check(
                    media_attention, media_attention_reference, media.qkv(2, 4, 2, queries, 90, 40, 27), dtype,
                    tokens_per_media=30, empty=empty, **options,
                )  # fmt: skip
        x, h, g = torch.randn(9, 43).to(dtype), torch.randn(9, 43).to(dtype), torch.randn(43)
        exact = gated_residual_reference(x.double(), h.double(), g.double())
        torch.testing.assert_close(gated_residual(x, h, g).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


if __name__ == "__main__":
    torch.manual_seed(0)
    losses()
    patches()
    attention()
    print(core.build_info()["cpu_isa"])

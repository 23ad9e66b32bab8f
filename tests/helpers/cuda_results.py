"""Every op's results on the CUDA backend, compiled for the processor, over odd shapes.

`python tests/helpers/cuda_results.py MODULE` computes them with a module of the host build: under sanitizers, what a
kernel reads or writes beyond its tensors and its shared memory ends the program.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import _dispatch, gated_residual, info_nce, media_attention, patch_embed, sigmoid_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def results() -> Iterator[tuple[str, list[Tensor]]]:
    """Name of a case, and outputs and gradients of it."""
    for dtype in DTYPES:
        torch.manual_seed(0)
        image, text = (F.normalize(torch.randn(n, 37), dim=1).to(dtype).requires_grad_() for n in (131, 201))
        square = text[:131].detach().requires_grad_()
        scale, bias = torch.tensor(30.0, requires_grad=True), torch.tensor(-5.0, requires_grad=True)
        ids = (torch.randint(0, 40, (131,)), torch.randint(0, 40, (131,)))
        for name, loss in (
            ("info_nce kept", info_nce(image, square, scale)),
            ("info_nce streamed, rectangular", info_nce(image, text, scale, label_offset=3, recompute=True)),
            ("info_nce groups", info_nce(image, square, scale, groups=ids, recompute=True)),
            ("sigmoid_loss", sigmoid_loss(image, square, scale, bias)),
            ("sigmoid_loss groups", sigmoid_loss(image, square, scale, bias, groups=ids)),
        ):
            yield f"{name}, {dtype}", [loss.detach(), *gradients(loss, (image, square, text, scale, bias))]
        yield from patches(dtype)
        yield from attention(dtype)


def patches(dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    for patch, sides in ((14, (28, 45)), (8, (16, 24))):
        n = -(-sides[0] // patch) * -(-sides[1] // patch)
        shapes = ((70, 3, patch, patch), (70,), (2, 70), (n + 2, 70))
        weight, bias, prefix, position = leaves = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
        per_image = torch.randn(3, n + 2, 70).to(dtype).requires_grad_()
        for layout, shape in (("NCHW", (3, 3, *sides)), ("NHWC", (3, *sides, 3))):
            floats = [torch.randn(shape).to(kind).requires_grad_() for kind in DTYPES]
            for pixels in (torch.randint(0, 256, shape).byte(), *floats):
                wanted = leaves + [pixels] * pixels.requires_grad
                for keep in (None, torch.randint(0, n, (3, 2))):
                    tokens = patch_embed(
                        pixels, weight, bias, layout=layout, mean=(0.4,) * 3, std=(0.3,) * 3,
                        prefix=prefix, position=position, keep=keep, pad=True,
                    )  # fmt: skip
                    found = [tokens.detach(), *gradients((tokens.float() ** 2).sum(), wanted)]
                    yield f"patch_embed /{patch} {layout} {pixels.dtype} keep {keep is not None}, {dtype}", found
        tokens = patch_embed(pixels, weight, layout="NHWC", prefix=prefix, position=per_image, keep=keep, pad=True)
        found = [tokens.detach(), *gradients((tokens.float() ** 2).sum(), [per_image])]
        yield f"patch_embed /{patch} positions per image, {dtype}", found


def attention(dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor]]]:
    lo = torch.randint(-1, 4, (2, 67))
    media = {"media_lo": lo, "media_hi": torch.randint(-1, 4, (2, 67)), "media_len": torch.randint(0, 38, (2, 3))}
    for dim in (40, 128):
        q, k, v = leaves = [
            torch.randn(2, heads, length, dim).to(dtype).requires_grad_()
            for heads, length in ((4, 67), (2, 111), (2, 111))
        ]
        for empty in ("zero", "all"):
            bias = torch.randn(2, 111)
            out = media_attention(q, k, v, empty=empty, key_bias=bias, tokens_per_media=37, **media)
            found = [out.detach(), *gradients(out.float().pow(2).sum(), leaves)]
            yield f"media_attention {dim} {empty}, {dtype}", found
    for dim, channels in itertools.product((130, 132), (1, None)):
        residual, hidden = (torch.randn(67, dim).to(dtype).requires_grad_() for _ in range(2))
        gate = torch.randn(channels or dim).to(dtype).requires_grad_()
        out = gated_residual(residual, hidden, gate, row_mask=torch.rand(67) < 0.5)
        found = [out.detach(), *gradients(out.float().pow(2).sum(), (residual, hidden, gate))]
        yield f"gated_residual {dim}, gate of {len(gate)}, {dtype}", found


def gradients(value: Tensor, leaves: Any) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def main(path: str) -> int:
    spec = importlib.util.spec_from_file_location("_cuda_host", path)
    assert spec is not None
    assert spec.loader is not None
    _dispatch.cuda_core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_dispatch.cuda_core)
    os.environ["VLMFAST_BACKEND"] = "cuda"
    for chunk in (0, 64):
        _dispatch.cuda_core.set_chunk(chunk)
        for name, found in results():
            assert all(t.isfinite().all() for t in found), name
            print(name, flush=True)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

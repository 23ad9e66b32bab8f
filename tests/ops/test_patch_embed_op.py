"""patch_embed as an operator: registration, autograd, memory, messages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from backends import use_backend
from torch import Tensor

import vlmfast
from vlmfast.ops import patch_embed, patch_embed_packed
from vlmfast.ops._dispatch import core
from vlmfast.ops.patch_embed import IMPLS, reference

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


def arguments(pixels: torch.dtype = torch.uint8, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two images of 2 x 3 patches, one prefix token, four patches kept."""
    images = (
        torch.randint(0, 256, (2, 3, 8, 12)).byte() if pixels == torch.uint8 else torch.randn(2, 3, 8, 12).to(pixels)
    )
    sizes = {"weight": (10, 3, 4, 4), "bias": (10,), "prefix": (1, 10), "position": (7, 10)}
    tensors = {name: torch.randn(size).to(dtype).requires_grad_() for name, size in sizes.items()}
    return {"pixels": images, **tensors, "keep": torch.stack([torch.randperm(6)[:4] for _ in range(2)])}


def flat(given: dict[str, Any]) -> tuple[Any, ...]:
    return (*given.values(), list(MEAN), list(STD), False, torch.float32, torch.float32)


def test_gradcheck_of_the_definition() -> None:
    given = arguments(torch.float64, torch.float64)
    pixels = given.pop("pixels").requires_grad_()
    keep = given.pop("keep")
    names = list(given)

    def function(image: Tensor, *values: Tensor) -> Tensor:
        return reference(image, keep=keep, mean=MEAN, std=STD, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, (pixels, *(t.detach().double().requires_grad_() for t in given.values())))


def test_gradients_of_two_calls_are_apart(backend: str) -> None:
    """No call writes into what an earlier one returned, whatever memory it works in."""
    weight = torch.randn(24, 3, 4, 4, requires_grad=True)
    gradients = []
    for _ in range(2):
        tokens = patch_embed(torch.randint(0, 256, (2, 3, 8, 12)).byte(), weight)
        gradients.append(torch.autograd.grad(tokens, weight, torch.randn_like(tokens))[0])
        if len(gradients) == 1:
            first = gradients[0].clone()
    assert torch.equal(gradients[0], first)
    assert not torch.equal(gradients[1], first)


def test_tokens_are_the_callers(backend: str) -> None:
    """Memory of earlier tokens may serve again, but not while anything refers to it, nor where other processes may."""
    weight = torch.randn(24, 3, 4, 4)

    def tokens() -> Tensor:
        return patch_embed(torch.randint(0, 256, (2, 3, 8, 12)).byte(), weight)

    first, second = tokens(), tokens()
    array, copy = first.numpy(), first.clone()
    del first
    second.share_memory_()
    del second
    later = [tokens() for _ in range(4)]
    assert torch.equal(torch.from_numpy(array), copy)
    assert not any(t.is_shared() for t in later)
    assert len({t.data_ptr() for t in later}) == len(later)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_memory_is_read_before_it_is_written(backend: str, threads: int, dtype: torch.dtype) -> None:
    """PyTorch's deterministic mode fills what `empty` returns with NaN."""
    weight, bias = (torch.randn(size).to(dtype).requires_grad_() for size in ((10, 3, 3, 3), (10,)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        tokens = patch_embed(torch.randint(0, 256, (11, 3, 9, 15)).byte(), weight, bias)
        gradients = torch.autograd.grad(tokens, (weight, bias), torch.randn_like(tokens))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    assert all(t.isfinite().all() for t in (tokens, *gradients))


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_opcheck(backend: str, pixels: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.vlmfast.patch_embed_forward.default, flat(arguments(pixels)))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_scatter(backend: str, dtype: torch.dtype, kept: bool) -> None:
    """2 x 3 patches of 3 x 4 x 4 entries, the last ones beyond the image."""
    keep = arguments()["keep"] if kept else None
    rows = torch.randn(2, 4 if kept else 6, 48).to(dtype)
    torch.library.opcheck(
        torch.ops.vlmfast.patch_embed_scatter.default, (rows, keep, [3, 4, 4], [7, 10], list(STD), torch.float32)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    given = arguments()
    weights = [given[name] for name in ("weight", "bias", "prefix", "position")]

    def step(pixels: Tensor) -> list[Tensor]:
        tokens = patch_embed(pixels, *weights[:2], mean=MEAN, std=STD, prefix=weights[2], position=weights[3])
        return [tokens, *torch.autograd.grad((tokens * tokens).sum(), weights)]

    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: patch_embed(x, *weights[:2], mean=MEAN, std=STD, prefix=weights[2], position=weights[3]),
        fullgraph=True, backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    for batch in (2, 5, 3):
        pixels = torch.randint(0, 256, (batch, 3, 8, 12)).byte()
        tokens = compiled(pixels)
        found = [tokens, *torch.autograd.grad((tokens * tokens).sum(), weights)]
        for ours, eager in zip(found, step(pixels), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("position", [torch.float32, torch.bfloat16])
def test_autocast_promotes_as_the_definition_does(backend: str, position: torch.dtype) -> None:
    given = arguments()
    given["position"] = given["position"].to(position)
    given["prefix"] = given["prefix"].to(position)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = (op(**given, mean=MEAN, std=STD) for op in (patch_embed, reference))
    assert ours.dtype == position
    double = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
    exact = reference(**double, mean=MEAN, std=STD)
    error, allowed = ((tokens.double() - exact).abs().max() for tokens in (ours, eager))
    assert error <= 2 * allowed + 2.0**-8 * exact.abs().max()
    ours.float().sum().backward()
    assert given["weight"].grad.dtype == torch.float32


def test_frozen_inputs_cost_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    name = next(name for name in IMPLS if name == backend)
    impl = IMPLS[name]

    def spy(grad: Tensor, pixels: Tensor, weight: Tensor, keep: Any, prefix: int, *rest: Any) -> Any:
        asked.append(rest[:2])
        return impl.backward(grad, pixels, weight, keep, prefix, *rest)

    monkeypatch.setitem(IMPLS, name, dataclasses.replace(impl, backward=spy))
    for trained in (("weight",), ("bias",), ("prefix",), ("position",), ("weight", "position")):
        given = arguments()
        for other in ("weight", "bias", "prefix", "position"):
            given[other].requires_grad_(other in trained)
        patch_embed(**given, mean=MEAN, std=STD).sum().backward()
        assert asked.pop() == ("weight" in trained, trained != ("weight",))
        assert all((given[other].grad is not None) == (other in trained) for other in ("weight", "bias", "prefix"))
    with torch.no_grad():
        assert patch_embed(**given, mean=MEAN, std=STD).grad_fn is None


def test_backward_keeps_the_pixels_and_no_copy_of_them(backend: str) -> None:
    given = arguments()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        patch_embed(**given, mean=MEAN, std=STD)
    known = {given[name].untyped_storage().data_ptr() for name in ("pixels", "weight", "keep")}
    assert saved
    assert {t.untyped_storage().data_ptr() for t in saved} <= known


def test_a_second_derivative_raises(backend: str) -> None:
    given = arguments()
    (grad,) = torch.autograd.grad(
        (patch_embed(**given, mean=MEAN, std=STD) ** 2).sum(), given["weight"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.skipif(core is None, reason="the C++ core was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_threads_than_splits_of_the_sum(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Beyond eight threads shares of the gradient's rows are split too; the gradient is that of one thread."""
    monkeypatch.setenv("VLMFAST_BACKEND", "cpu")
    pixels = torch.randint(0, 256, (5, 3, 56, 56)).byte()
    weight = torch.randn(300, 3, 4, 4).to(dtype).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 17):
            torch.set_num_threads(threads)
            tokens = patch_embed(pixels, weight, mean=MEAN, std=STD)
            found.append((tokens, torch.autograd.grad((tokens.float() ** 2).sum(), weight)[0]))
    finally:
        torch.set_num_threads(before)
    for tokens, grad in found[1:]:
        torch.testing.assert_close(tokens, found[0][0])
        exact = found[0][1].float()
        assert (grad.float() - exact).abs().max() <= (1e-6 if dtype == torch.float32 else 8e-3) * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layout": "CHWN"}, ValueError, "layout must be NCHW or NHWC; got 'CHWN'"),
        ({"pixels": torch.zeros(3, 8, 12)}, ValueError, r"pixels must have 4 dimensions, NCHW; got \(3, 8, 12\)"),
        ({"pixels": torch.zeros(2, 3, 8, 12).double()}, TypeError, "pixels must be uint8, float32.*got torch.float64"),
        ({"pixels": torch.zeros(2, 8, 12, 3)}, ValueError, "pixels must have weight's 3 channels; got 8; see layout"),
        ({"pixels": torch.zeros(0, 3, 8, 12)}, ValueError, "pixels must not be empty; got 0 images"),
        ({"pixels": torch.zeros(2, 3, 9, 12)}, ValueError, r"sides that the patch \(4, 4\) divides, or pad"),
        ({"weight": torch.zeros(10, 3, 4, 4).double()}, TypeError, "weight must be float32, float16 or bfloat16"),
        ({"weight": torch.zeros(10, 48)}, ValueError, r"weight must be \(O, C, p, q\) and not empty; got \(10, 48\)"),
        ({"bias": torch.zeros(10).half()}, TypeError, "bias must have weight's dtype torch.float32; got torch.float16"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias must be \(10,\); got \(9,\)"),
        ({"mean": None}, ValueError, "mean and std must be given together; got mean None"),
        ({"mean": (0.5,)}, ValueError, "mean must have 3 values, one per channel; got 1"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std must not be 0"),
        ({"prefix": torch.zeros(10)}, ValueError, r"prefix must be \(tokens, 10\); got \(10,\)"),
        ({"prefix": torch.zeros(1, 10).int()}, TypeError, "prefix must be float32.*got torch.int32"),
        ({"position": torch.zeros(6, 10)}, ValueError, r"position must be \(7, 10\) or \(2, 7, 10\); got \(6, 10\)"),
        ({"keep": torch.zeros(2, 4).int()}, TypeError, "keep must be int64; got torch.int32"),
        ({"keep": torch.zeros(2, 0).long()}, ValueError, r"keep must be \(2, patches to keep\) and not empty"),
        ({"keep": torch.full((2, 1), 6)}, IndexError, r"keep must be in \[0, 6\); got 6 to 6"),
        ({"keep": torch.full((2, 1), -1)}, IndexError, r"keep must be in \[0, 6\); got -1 to -1"),
        ({"weight": torch.zeros(10, 3, 4, 4, device="meta")}, ValueError, "weight must be on pixels' device"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"patch_embed: .*{message}"):
        patch_embed(**{**arguments(), "mean": MEAN, "std": STD, **changes})


def test_bad_packed_input_is_named() -> None:
    weight = torch.zeros(5, 3, 4, 4)
    image = torch.zeros(3, 8, 8)
    for images, options, message in (
        ([], {}, "images must hold at least one image"),
        ([image, image[0]], {}, r"images\[1\] must be CHW; got \(8, 8\)"),
        ([image, image.byte()], {}, r"images\[1\] must be torch.float32 on cpu as the first; got torch.uint8"),
        ([image[:, :7]], {}, "or pad"),
        ([image], {"layout": "HWC"}, "layout must be NCHW or NHWC"),
        ([image], {"position": torch.zeros(3, 5)}, r"position must be \(4, 5\); got \(3, 5\)"),
    ):
        with pytest.raises(ValueError, match=f"patch_embed_packed: .*{message}"):
            patch_embed_packed(images, weight, **options)


def test_explain_names_the_op() -> None:
    reasons = vlmfast.explain("patch_embed", torch.zeros(1, 3, 4, 4))
    assert list(reasons) == list(IMPLS)
    assert reasons["torch"] is None

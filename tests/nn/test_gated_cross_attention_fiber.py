"""FIBER and VisualGPT are not on PyPI: their modules are held against the papers' equations, written out eagerly."""

from __future__ import annotations

import math

import pytest
import torch
from modules import check_module, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.nn import ImageToTextFusion, SelfResurrectingGate, TextToImageFusion
from vlmfast.nn.srau import srau


def heads(t: Tensor, number: int) -> Tensor:
    return t.unflatten(-1, (number, -1)).transpose(-3, -2)


def attend(q: Tensor, k: Tensor, v: Tensor, number: int, mask: Tensor | float = 0.0) -> Tensor:
    q, k, v = (heads(t, number) for t in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask, -1)
    return (weights @ v).transpose(-3, -2).flatten(-2)


class EagerTextToImage(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, image_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        projections = {"query": hidden_size, "key": image_size, "value": image_size}
        self.crossattention_t2i = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(size, hidden_size) for name, size in projections.items()}),
                "output": nn.ModuleDict({"dense": nn.Linear(hidden_size, hidden_size)}),
            }
        )
        self.alpha_t2i = nn.Parameter(torch.zeros(1))

    def forward(self, a: Tensor, image: Tensor) -> Tensor:
        part = self.crossattention_t2i["self"]
        c = attend(part["query"](a), part["key"](image), part["value"](image), self.num_heads)
        return a + self.alpha_t2i * self.crossattention_t2i["output"]["dense"](c)


class EagerImageToText(nn.Module):
    """In windows, the text repeated for each, as FIBER's code does it."""

    def __init__(self, dim: int, num_heads: int, dim_text: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_text_i2t, self.qkv_i2t = nn.Linear(dim_text, 2 * dim), nn.Linear(dim, dim)
        self.proj_i2t, self.norm_i2t_i = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.alpha_i2t = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor, y_mask: Tensor) -> Tensor:
        windows = len(x) // len(y)
        k, v = self.qkv_text_i2t(y).repeat_interleave(windows, 0).chunk(2, -1)
        found = attend(
            self.qkv_i2t(self.norm_i2t_i(x)), k, v, self.num_heads, y_mask.repeat_interleave(windows, 0).to(x.dtype)
        )
        return x + self.alpha_i2t * self.proj_i2t(found)


def text_to_image() -> tuple[nn.Module, nn.Module]:
    original = randomise(EagerTextToImage(64, 2, 40))
    ours = TextToImageFusion(hidden_size=64, num_attention_heads=2, image_size=40)
    ours.load_state_dict(original.state_dict())
    return ours, original


def image_to_text() -> tuple[nn.Module, nn.Module]:
    original = randomise(EagerImageToText(64, 2, 48))
    ours = ImageToTextFusion(64, 2, dim_text=48)
    ours.load_state_dict(original.state_dict())
    return ours, original


TOKENS = torch.arange(7) < torch.tensor([[7], [4]])
Y_MASK = torch.where(TOKENS, 0.0, -10000.0)[:, None, None]


def test_text_to_image() -> None:
    ours, original = text_to_image()
    check_module(ours, original, (torch.randn(2, 7, 64), torch.randn(2, 9, 40)))


@pytest.mark.parametrize("windows", [1, 3])
def test_image_to_text(windows: int) -> None:
    ours, original = image_to_text()
    given = {"y_mask": Y_MASK}
    check_module(ours, original, (torch.randn(2 * windows, 5, 64), torch.randn(2, 7, 48)), given, given)


@torch.no_grad()
def test_padding_of_the_text_and_its_masks() -> None:
    ours, _ = image_to_text()
    x, y = torch.randn(6, 5, 64), torch.randn(2, 7, 48)
    expected = ours(x, y, Y_MASK)
    for mask in (TOKENS, TOKENS.long(), TOKENS[:, None, None]):
        torch.testing.assert_close(ours(x, y, mask), expected)
    y[1, 4:] += 1
    assert torch.equal(ours(x, y, Y_MASK), expected)
    y[1, 3] += 1
    assert (ours(x, y, Y_MASK) != expected).any(-1).all(1).tolist() == [False] * 3 + [True] * 3


def test_gate_zero_is_the_backbone_s_own() -> None:
    for (ours, _), shapes in (
        (text_to_image(), ((2, 7, 64), (2, 9, 40))),
        (image_to_text(), ((2, 5, 64), (2, 7, 48))),
    ):
        gate = next(p for name, p in ours.named_parameters() if "alpha" in name)
        with torch.no_grad():
            gate.zero_()
        x, other = (torch.randn(shape) for shape in shapes)
        out = ours(x, other)
        assert torch.equal(out, x)
        out.backward(torch.randn_like(out))
        assert [name for name, p in ours.named_parameters() if p.grad.any()] == [
            name for name, p in ours.named_parameters() if p is gate
        ]


def test_fiber_s_unused_norm_is_left_out() -> None:
    ours, original = text_to_image()
    state = original.state_dict()
    state |= {f"crossattention_t2i.output.LayerNorm.{name}": torch.ones(64) for name in ("weight", "bias")}
    ours.load_state_dict(state)
    layer = nn.ModuleDict({"layer": ours})
    layer.load_state_dict({f"layer.{name}": value for name, value in state.items()})
    with pytest.raises(RuntimeError, match="LayerNorm"):
        ours.load_state_dict({**state, "crossattention_t2i.self.LayerNorm.weight": torch.ones(64)})


def test_without_norm_and_bias() -> None:
    ours = ImageToTextFusion(64, 2, qkv_bias=False, norm_layer=None)
    names = ["alpha_i2t", "qkv_text_i2t.weight", "qkv_i2t.weight", "proj_i2t.weight", "proj_i2t.bias"]
    assert list(ours.state_dict()) == names


def test_bad_input_is_named() -> None:
    ours, _ = image_to_text()
    with pytest.raises(ValueError, match=r"^ImageToTextFusion: x must be .*, y being \(2, 7, 48\); got \(5, 5, 64\)"):
        ours(torch.randn(5, 5, 64), torch.randn(2, 7, 48))
    with pytest.raises(ValueError, match=r"^ImageToTextFusion: the mask must be \(2, 7\) or .* got \(2, 6\)"):
        ours(torch.randn(2, 5, 64), torch.randn(2, 7, 48), TOKENS[:, 1:])


class EagerGate(nn.Module):
    def __init__(self, dim: int, tau: float) -> None:
        super().__init__()
        self.tau = tau
        for level in (1, 2, 3):
            self.add_module(f"fc_alpha{level}", nn.Linear(2 * dim, dim))

    def forward(self, a: Tensor, found: Tensor) -> Tensor:
        total = torch.zeros_like(a)
        for level in (1, 2, 3):
            e = found[:, level - 1]
            s = F.sigmoid(self.get_submodule(f"fc_alpha{level}")(torch.cat([a, e], -1)))
            language, vision = s * (s > self.tau), (1 - s) * (s < 1 - self.tau)
            total = total + language * a + vision * e
        return total / math.sqrt(3)


def gate(tau: float) -> tuple[nn.Module, nn.Module]:
    original = randomise(EagerGate(48, tau))
    ours = SelfResurrectingGate(48, tau=tau)
    ours.load_state_dict(original.state_dict())
    return ours, original


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_self_resurrecting_gate(tau: float) -> None:
    ours, original = gate(tau)
    check_module(ours, original, (torch.randn(2, 7, 48), torch.randn(2, 3, 7, 48)))


def test_shut_gates_are_exactly_shut_and_come_back() -> None:
    """With text 1 and vision 0, and the other way round, what comes out is the gate itself."""
    logits = (3 * torch.randn(1000)).requires_grad_()
    one, nothing = torch.ones(1000), torch.zeros(1000)
    language, vision = srau(one, nothing, logits, 0.2), srau(nothing, one, logits, 0.2)
    alpha = logits.sigmoid()
    for shut, value in ((alpha < 0.2, language), (alpha > 0.8, vision)):
        assert 0.1 < shut.float().mean() < 0.5
        assert torch.equal(value == 0, shut)
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert torch.equal(gradient == 0, shut)
    assert ((language > 0) | (vision > 0)).all()
    (gradient,) = torch.autograd.grad((2 * language + vision).sum(), logits)
    assert gradient.all()  # where one gate is shut, the other moves alpha


def test_there_is_no_residual_and_padding_is_zero() -> None:
    ours = SelfResurrectingGate(48)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    text, mask = torch.randn(2, 7, 48), torch.arange(7) < torch.tensor([[7], [4]])
    out = ours(text, torch.zeros(2, 3, 7, 48), mask)
    torch.testing.assert_close(out, (text * math.sqrt(3) / 2).masked_fill(~mask[..., None], 0))


def test_bad_gates_are_named() -> None:
    with pytest.raises(ValueError, match=r"^SelfResurrectingGate: tau must be in \[0, 0\.5\); got 0\.5"):
        SelfResurrectingGate(48, tau=0.5)
    with pytest.raises(ValueError, match=r"visual must be \(2, 3, 7, 48\); got \(2, 2, 7, 48\)"):
        SelfResurrectingGate(48)(torch.randn(2, 7, 48), torch.randn(2, 2, 7, 48))


@pytest.mark.parametrize("name", ["t2i", "i2t", "srau"])
def test_compiles_as_one_graph(name: str) -> None:
    module, inputs = {
        "t2i": lambda: (text_to_image()[0], (torch.randn(2, 7, 64), torch.randn(2, 9, 40))),
        "i2t": lambda: (image_to_text()[0], (torch.randn(6, 5, 64), torch.randn(2, 7, 48), Y_MASK)),
        "srau": lambda: (gate(0.2)[0], (torch.randn(2, 7, 48), torch.randn(2, 3, 7, 48))),
    }[name]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)

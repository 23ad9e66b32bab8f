"""CLOOB against its equations, written out in float64."""

import math

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from vlmfast.models.contrastive import cloob
from vlmfast.models.contrastive.cloob import CLOOBConfig, CLOOBModel, retrieve

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 1}


def make(**options: object) -> CLOOBModel:
    torch.manual_seed(0)
    return CLOOBModel(
        CLOOBConfig(
            vision_config=transformers.CLIPVisionConfig(**SIZE, image_size=16, patch_size=8),
            text_config=transformers.CLIPTextConfig(**SIZE, **TEXT),
            **options,
        )
    )


def features(rows: int = 9, dim: int = 16) -> tuple[Tensor, Tensor]:
    image = F.normalize(torch.randn(rows, dim), dim=-1)
    return image, F.normalize(image + 0.3 * torch.randn(rows, dim), dim=-1)


def plain_retrieve(queries: Tensor, stored: Tensor, beta: float) -> Tensor:
    return F.normalize(torch.softmax(beta * queries @ stored.T, -1) @ stored, dim=-1)


def info_loob(a: Tensor, b: Tensor, inverse: float) -> Tensor:
    k = a @ b.T * inverse
    negatives = k.masked_fill(torch.eye(len(k), dtype=torch.bool), -math.inf)
    return (-k.diagonal() + negatives.logsumexp(1)).mean() / inverse


def plain_loss(image: Tensor, text: Tensor, inverse: float = 30.0, beta: float = 8.0) -> Tensor:
    ux, uy = plain_retrieve(image, image, beta), plain_retrieve(text, image, beta)
    vx, vy = plain_retrieve(image, text, beta), plain_retrieve(text, text, beta)
    return info_loob(ux, uy, inverse) + info_loob(vy, vx, inverse)


@pytest.mark.parametrize(("inverse", "beta"), [(30.0, 8.0), (14.3, 14.3)])
def test_loss_and_gradients_are_the_equations(inverse: float, beta: float) -> None:
    model = make(logit_scale_init_value=math.log(inverse), scale_hopfield=beta)
    ours, exact = ([t.clone().to(dtype).requires_grad_() for t in features()] for dtype in (torch.float, torch.double))
    exact = [t.detach().double().requires_grad_() for t in ours]
    loss, expected = model.loss(*ours, model.logit_scale), plain_loss(*exact, inverse, beta)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, ours)
    for a, b in zip(found, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_which_pairs_and_directions_there_are() -> None:
    """The loss is the same with the modalities exchanged; another direction or pair of retrievals is another loss."""
    model, (image, text) = make(), features()
    loss = model.loss(image, text, model.logit_scale).item()
    assert model.loss(text, image, model.logit_scale).item() == pytest.approx(loss, rel=1e-5)
    x, t = image.double(), text.double()
    ux, uy, vx, vy = (plain_retrieve(q, m, 8.0) for q, m in ((x, x), (t, x), (x, t), (t, t)))
    others = [
        info_loob(uy, ux, 30) + info_loob(vy, vx, 30),
        info_loob(ux, uy, 30) + info_loob(vx, vy, 30),
        (info_loob(ux, uy, 30) + info_loob(vy, vx, 30)) * 30,
        (info_loob(ux, uy, 30) + info_loob(vy, vx, 30)) / 2,
        info_loob(x, t, 30) + info_loob(t, x, 30),
    ]
    assert all(abs(other.item() - loss) > 1e-4 for other in others)


def test_a_positive_never_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope of each term towards a positive cosine is -1 / N, however good the match; InfoNCE's would vanish.

    Without retrieval the loss is InfoLOOB of images and texts, once from each side, and the slope is read off the
    gradient of a text in the direction of its own image, one of a basis.
    """
    monkeypatch.setattr(cloob, "retrieve", lambda queries, stored, scale: queries)
    model, rows = make(), 6
    basis = torch.eye(2 * rows)
    for cosine in (0.1, 0.9, 0.999, 1.0):
        text = (cosine * basis[:rows] + math.sqrt(1 - cosine**2) * basis[rows:]).requires_grad_()
        (gradient,) = torch.autograd.grad(model.loss(basis[:rows], text, model.logit_scale), text)
        torch.testing.assert_close(gradient.diagonal(), torch.full((rows,), -2 / rows), rtol=1e-5, atol=0)


def test_retrieval_with_a_large_scale_is_no_retrieval() -> None:
    image, text = features()
    torch.testing.assert_close(retrieve(image, image, 1e4), image, rtol=1e-4, atol=1e-4)
    assert (retrieve(text, image, 8.0) - text).abs().max() > 0.05
    torch.testing.assert_close(retrieve(text, image, 8.0), plain_retrieve(text, image, 8.0))


def test_constants_are_not_trained_and_are_in_checkpoints() -> None:
    model = make()
    assert model.logit_scale.exp().item() == pytest.approx(30)
    names = {name for name, _ in model.named_parameters()}
    assert "logit_scale" not in names
    assert "logit_scale" in model.state_dict()
    assert not any("hopfield" in name for name in model.state_dict())


def test_inference_has_no_retrieval() -> None:
    model = make().eval()
    pixels = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(model.get_image_features(pixels)[:1], model.get_image_features(pixels[:1]))


def test_a_single_pair_is_refused() -> None:
    model, (image, text) = make(), features(1)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        model.loss(image, text, model.logit_scale)


def test_retrieval_keeps_no_matrix(run_python) -> None:
    """All four of 16,384 pairs, forward and backward, in a small part of one (N, N) matrix, which has 1,074 MB."""
    used = run_python(
        """
        import torch
        from vlmfast.models.contrastive.cloob import retrieve

        def memory(field):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

        def step(rows):
            x, t = (torch.nn.functional.normalize(torch.randn(rows, 32), dim=-1).requires_grad_() for _ in range(2))
            sum(retrieve(queries, stored, 8.0).square().sum() for queries in (x, t) for stored in (x, t)).backward()

        step(64)
        before = memory("VmRSS")
        step(16384)
        print(memory("VmHWM") - before)
        """
    )
    assert float(used) < 200

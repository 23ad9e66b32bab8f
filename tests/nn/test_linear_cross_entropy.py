"""The head and the loss for models, against F.cross_entropy of their logits in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import loss_and_gradients
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.nn import LinearCrossEntropy, language_model_loss

D, V = 6, 23


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    """Hidden states (*shape, D) in float64, and labels of which some are ignored."""
    labels = torch.randint(V, shape)
    labels[torch.rand(shape) < 0.3] = -100
    return torch.randn(*shape, D, dtype=torch.float64), labels


def agree(found: Callable[..., Tensor], want: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Value and every gradient, found in float32 and wanted in float64."""
    ours = loss_and_gradients(found, [t.float() for t in inputs])
    for a, b in zip(ours, loss_and_gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def eager(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_is_a_linear_layer_and_its_loss(bias: bool) -> None:
    hidden, labels = batch(3, 5)
    head = LinearCrossEntropy(D, V, bias, label_smoothing=0.1)
    linear = nn.Linear(D, V, bias)
    linear.load_state_dict(head.state_dict())
    assert torch.equal(head(hidden.float()), linear(hidden.float()))
    loss, expected = head(hidden.float(), labels), eager(linear(hidden.float()), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(head.parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    head.reduction = "none"
    each = head(hidden.float(), labels)
    assert each.shape == labels.shape
    assert torch.equal(each == 0, labels == -100)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (7,), (2, 3, 5), (4, 1), (0, 4)])
def test_one_hidden_state(shape: tuple[int, ...], shift: bool) -> None:
    hidden, labels = batch(*shape)

    def want(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits, following = F.linear(hidden, weight, bias), labels
        if shift:
            logits, following = logits[..., :-1, :], labels[..., 1:]
        return eager(logits, following, reduction="sum") / (following != -100).sum().clamp(min=1)

    def found(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = nn.Linear(D, V)
        return torch.func.functional_call(
            _Loss(head), {"head.weight": weight, "head.bias": bias}, (hidden, labels, shift)
        )

    agree(found, want, hidden, torch.randn(V, D).double(), torch.randn(V).double())


class _Loss(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, labels: Tensor, shift: bool) -> Tensor:
        return language_model_loss(hidden, self.head, labels, shift=shift)


def test_options_are_passed_on() -> None:
    hidden, labels = batch(4, 7)
    labels[labels == -100] = 0
    weight = torch.randn(V, D).double()
    options = {"ignore_index": 0, "label_smoothing": 0.2}
    agree(
        lambda h, w: language_model_loss(h, w, labels, recompute=True, **options),
        lambda h, w: eager((h @ w.T)[:, :-1], labels[:, 1:], **options),
        hidden,
        weight,
    )


def test_heads_that_share_a_weight() -> None:
    """VirTex: captions forwards and backwards, of different lengths here, by one weight tied to the embedding."""
    (one, labels_one), (other, labels_other) = batch(4, 7), batch(3, 5)
    ids = torch.randint(V, (4, 7))
    labels_other[:, 1:] = -100  # nothing to predict

    def found(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        losses = language_model_loss([one + F.embedding(ids, weight), other], weight, [labels_one, labels_other])
        assert losses.shape == (2,)
        assert losses[1] == 0
        return losses.sum()

    def want(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        hidden = one + F.embedding(ids, weight)
        return eager((hidden @ weight.T)[:, :-1], labels_one[:, 1:]) + 0 * other.sum()

    agree(found, want, one, other, torch.randn(V, D).double())


def test_an_embedding_is_a_head() -> None:
    hidden, labels = batch(2, 4)
    embedding = nn.Embedding(V, D)
    loss = language_model_loss(hidden.float(), embedding, labels)
    torch.testing.assert_close(loss, eager((hidden.float() @ embedding.weight.T)[:, :-1], labels[:, 1:]))
    loss.backward()
    assert embedding.weight.grad.abs().sum() > 0


class Adapted(nn.Module):
    """As an adapter stands in the place of a layer: with the weight of what it wraps."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.more = inner, nn.Linear(D, V, bias=False)
        self.calls = 0

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, hidden: Tensor) -> Tensor:
        assert hidden.shape[0] == self.expected
        self.calls += 1
        return self.inner(hidden) + self.more(hidden)


@pytest.mark.parametrize("several", [False, True])
def test_a_head_whose_weight_does_not_say_all_is_called(several: bool) -> None:
    """On the rows that are predicted, with its own parameters trained; beside it a plain head."""
    hidden, labels = batch(4, 7)
    hidden = hidden.float()
    adapted, plain = Adapted(nn.Linear(D, V)), nn.Linear(D, V)
    adapted.expected = (labels[:, 1:] != -100).sum()
    options = {"label_smoothing": 0.1, "num_items_in_batch": 5}
    if several:
        loss = language_model_loss([hidden, 2 * hidden], [adapted, plain], labels, **options)
    else:
        loss = language_model_loss(hidden, adapted, labels, **options)
    loss.backward()
    assert adapted.calls == 1
    gradients = [adapted.more.weight.grad, adapted.inner.weight.grad]
    logits = adapted.inner(hidden) + adapted.more(hidden) + (plain(2 * hidden) if several else 0)
    want = eager(logits[:, :-1], labels[:, 1:], label_smoothing=0.1, reduction="sum") / 5
    torch.testing.assert_close(loss, want)
    adapted.zero_grad()
    want.backward()
    for found, parameter in zip(gradients, (adapted.more.weight, adapted.inner.weight), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_hooks_of_a_head_run() -> None:
    hidden, labels = batch(2, 4)
    head = nn.Linear(D, V)
    head.register_forward_hook(lambda module, given, out: 2 * out)
    want = eager(2 * F.linear(hidden.float(), head.weight, head.bias)[:, :-1], labels[:, 1:])
    torch.testing.assert_close(language_model_loss(hidden.float(), head, labels), want)


@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
def test_the_sum_of_two_heads(biases: tuple[bool, bool]) -> None:
    """VC-GPT: logits = W_G h_G + W_fuse h_fuse, here of different widths."""
    hidden, labels = batch(4, 7)
    other = torch.randn(4, 7, D - 2).double()
    heads = [nn.Linear(dim, V, bias) for dim, bias in zip((D, D - 2), biases, strict=True)]
    language_model_loss([hidden.float(), other.float()], heads, labels).backward()
    ours = [p.grad.double() for head in heads for p in head.parameters()]
    exact = [head.double() for head in heads]
    for head in exact:
        head.zero_grad()
    logits = exact[0](hidden) + exact[1](other)
    eager(logits[:, :-1], labels[:, 1:]).backward()
    for a, b in zip(ours, (p.grad for head in exact for p in head.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_in_batch(as_tensor: bool) -> None:
    """Micro-batches with different numbers of labels add up to the loss of the whole batch."""
    hidden, labels = batch(6, 9)
    weight = torch.randn(V, D).double()
    items = (labels[:, 1:] != -100).sum()

    def found(hidden: Tensor, weight: Tensor) -> Tensor:
        given = items if as_tensor else int(items)
        parts = [
            language_model_loss(hidden[part], weight, labels[part], num_items_in_batch=given)
            for part in (slice(0, 1), slice(1, 4), slice(4, 6))
        ]
        return torch.stack(parts).sum()

    agree(found, lambda h, w: eager((h @ w.T)[:, :-1], labels[:, 1:]), hidden, weight)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, labels = batch(2, 4)
    head = LinearCrossEntropy(D, V).requires_grad_(False)
    x = hidden.float().requires_grad_()
    language_model_loss(x, head, labels).backward()
    assert head.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_autocast_takes_the_logits_in_its_dtype() -> None:
    hidden, labels = batch(2, 4)
    head = nn.Linear(D, V)
    x = hidden.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = language_model_loss([x, x.bfloat16()], [head, head], labels)
    loss.backward()
    assert loss.dtype == x.grad.dtype == head.weight.grad.dtype == torch.float32
    exact = language_model_loss([x.bfloat16()] * 2, [head.bfloat16()] * 2, labels)
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)


def test_compiled_in_one_graph() -> None:
    hidden, labels = batch(3, 5)
    head = nn.Linear(D, V)
    x = hidden.float()

    def step(x: Tensor, labels: Tensor) -> Tensor:
        return language_model_loss([x * 2, x], head, [labels, labels]).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels), step(x, labels))


@pytest.mark.parametrize(
    ("hidden", "head", "labels", "error", "message"),
    [
        ((2, 3, D), nn.ReLU(), (2, 3), TypeError, "lm_head must be a weight or a module that has one; got ReLU"),
        ((2, 3, D), nn.Linear(D, V), (2, 4), ValueError, r"labels must be \(2, 3\).*got \(2, 4\)"),
        ([(2, D)], [nn.Linear(D, V)] * 2, (2,), ValueError, "hidden must be as many as lm_head, .*got 1 and 2"),
        ([(2, D)] * 2, nn.Linear(D, V), (2,), TypeError, "labels must be a sequence as hidden is; got a tensor"),
        ((2, D), [nn.Linear(D, V)], (2,), TypeError, "hidden must be a sequence as lm_head is; got a tensor"),
        ((2, D), nn.Linear(D, V), [(2,)], TypeError, "labels must be a tensor for one hidden; got list"),
        ([(2, D)], nn.Linear(D, V), [(2,)] * 2, ValueError, "labels must be as many as hidden, .*got 2 and 1"),
    ],
)
def test_bad_input_is_named(hidden: object, head: object, labels: object, error: type[Exception], message: str) -> None:
    def tensors(shapes: object, make: Callable[[tuple[int, ...]], Tensor]) -> object:
        return [make(shape) for shape in shapes] if isinstance(shapes, list) else make(shapes)

    states = tensors(hidden, torch.randn)
    targets = tensors(labels, lambda shape: torch.zeros(shape, dtype=torch.long))
    with pytest.raises(error, match=f"^language_model_loss: {message}"):
        language_model_loss(states, head, targets)
    with pytest.raises(ValueError, match=r"^LinearCrossEntropy: labels must be \(2,\)"):
        LinearCrossEntropy(D, V)(torch.randn(2, D), torch.zeros(3).long())

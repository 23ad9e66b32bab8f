"""ASIF: the rule against dense float64, the streamed top k against a sort of all scores, anchors on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import write_pairs
from torch import Tensor
from torch.nn import functional as F

from vlmfast.cli import main
from vlmfast.cli.anchors import run as run_anchors
from vlmfast.cli.arguments import UsageError
from vlmfast.data import Collator, ImageTextDataset, eval_transform, feature_cache, load_tokenizer
from vlmfast.models.training_free import ASIFConfig, ASIFModel
from vlmfast.models.training_free import anchors as module
from vlmfast.models.training_free.anchors import Anchors, RunningTopK, relative
from vlmfast.tasks import retrieval, zero_shot

WIDTH, TEXT_WIDTH = 32, 48


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A ViT and a BERT of another width, beside its tokenizer."""
    vit, bert = (str(tmp_path_factory.mktemp(name)) for name in ("vit", "bert"))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    vision = transformers.ViTConfig(**sizes, hidden_size=WIDTH, image_size=16, patch_size=8)
    transformers.ViTModel(vision).save_pretrained(vit)
    tokenizer = load_tokenizer()
    text = transformers.BertConfig(**sizes, hidden_size=TEXT_WIDTH, vocab_size=len(tokenizer), pad_token_id=0)
    transformers.BertModel(text).save_pretrained(bert)
    tokenizer.save_pretrained(bert)
    return vit, bert


@pytest.fixture
def model(towers: tuple[str, str]) -> ASIFModel:
    return ASIFModel.from_towers(*towers)


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def dense(z: Tensor, anchors: Tensor, k: int, p: float) -> Tensor:
    """r(z; A) (B, N) as the paper writes it."""
    scores = z.double() @ anchors.double().T
    places = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    kept = torch.zeros_like(scores).scatter(1, places, scores.gather(1, places).clamp(min=0) ** p)
    return kept / kept.norm(dim=1, keepdim=True)


def sorted_scores(queries: Tensor, anchors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, places = (queries.double() @ anchors.double().T).float().sort(dim=1, descending=True, stable=True)
    return scores[:, :k], places[:, :k]


# The streamed top k


@pytest.mark.parametrize("k", [1, 7, 300])
def test_the_streamed_top_k_is_that_of_a_sort(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that do not divide N, several parts of the queries, equal anchors within and across chunks, negatives."""
    monkeypatch.setattr(module, "CHUNK", 50)
    monkeypatch.setattr(module, "QUERIES", 3)
    image, queries = unit(330, 6, seed=0), unit(8, 6, seed=1)
    image[100:110], image[329], image[3] = image[:10], image[0], image[2]
    anchors = Anchors.of(image, unit(330, 4, seed=2))
    scores, numbers = anchors.nearest("image", queries, k)
    expected, places = sorted_scores(queries, F.normalize(image, dim=1), k)
    assert torch.equal(scores, expected)
    assert torch.equal(numbers, places)


def test_equal_scores_keep_their_order_whatever_the_chunks() -> None:
    """Few different values, so that the k-th is always shared."""
    scores = torch.randint(4, (5, 400), generator=torch.Generator().manual_seed(0)).float()
    expected, places = scores.sort(dim=1, descending=True, stable=True)
    for size in (1, 13, 400):
        best = RunningTopK(5, 30)
        for start in range(0, 400, size):
            best.add(scores[:, start : start + size], torch.arange(start, min(start + size, 400)))
        found, numbers = best.result()
        assert torch.equal(found, expected[:, :30])
        assert torch.equal(numbers, places[:, :30])


def test_no_score_of_all_anchors_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the running top k is given, and what it keeps, does not grow with N."""
    monkeypatch.setattr(module, "CHUNK", 64)
    widest = []
    add = RunningTopK.add

    def watched(self: RunningTopK, scores: Tensor, numbers: Tensor) -> None:
        add(self, scores, numbers)
        widest.append(scores.shape[1] + sum(one.shape[1] for one, _ in self._waiting) + self.scores.shape[1])

    monkeypatch.setattr(RunningTopK, "add", watched)
    Anchors.of(unit(2000, 5, seed=0), unit(2000, 5, seed=1)).nearest("image", unit(4, 5, seed=2), 10)
    assert len(widest) == 32
    assert max(widest) <= 64 + 10 + 10


def test_wrong_queries() -> None:
    anchors = Anchors.of(unit(5, 6, seed=0), unit(5, 4, seed=1))
    with pytest.raises(ValueError, match=r"queries: expected \(B, 4\) as text anchors are, got \(3, 6\)"):
        anchors.nearest("text", unit(3, 6, seed=2), 2)
    with pytest.raises(ValueError, match="queries: expected finite features"):
        anchors.nearest("image", torch.full((1, 6), torch.nan), 2)
    with pytest.raises(IndexError, match="expected numbers from 0 to 4, got 5"):
        anchors.remove([5])
    anchors.remove(range(5))
    with pytest.raises(ValueError, match="expected at least one, got none"):
        anchors.nearest("image", unit(3, 6, seed=2), 2)
    with pytest.raises(ValueError, match=r"got shapes \(5, 6\) and \(4, 4\)"):
        Anchors.of(unit(5, 6, seed=0), unit(4, 4, seed=1))
    with pytest.raises(ValueError, match="unit-norm features, got 1 that are not"):
        Anchors.of(torch.cat([unit(4, 6, seed=0), torch.zeros(1, 6)]), unit(5, 4, seed=1))


# The rule


@pytest.mark.parametrize(("k", "p"), [(1, 8.0), (9, 8.0), (60, 2.5), (500, 1.0)])
def test_scores_are_the_papers(model: ASIFModel, k: int, p: float) -> None:
    """Widths differ; with k = 60 and 500 negative similarities are kept, and count as 0 to any power."""
    image, text = unit(70, WIDTH, seed=0), unit(70, TEXT_WIDTH, seed=1)
    model.anchors = Anchors.of(image, text)
    model.config.k, model.config.p = k, p
    queries, texts = unit(11, WIDTH, seed=2), unit(67, TEXT_WIDTH, seed=3)
    expected = dense(queries, image, k, p) @ dense(texts, text, k, p).T
    torch.testing.assert_close(model.similarities(queries, texts).double(), expected, rtol=1e-6, atol=1e-7)
    weights, _ = model._weights("image", queries)
    assert ((weights > 0).sum(dim=1) <= k).all()
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(11, dtype=torch.float64))


def test_all_anchors_and_the_first_power_are_the_plain_relative_representation(model: ASIFModel) -> None:
    """All similarities are positive: then it is the cosine of the two rows of similarities."""
    image, text = unit(20, WIDTH, seed=0).abs(), unit(20, TEXT_WIDTH, seed=1).abs()
    queries, texts = unit(3, WIDTH, seed=2).abs(), unit(4, TEXT_WIDTH, seed=3).abs()
    model.anchors = Anchors.of(image, text)
    model.config.k, model.config.p = 20, 1.0
    rows = F.normalize(queries @ image.T, dim=1) @ F.normalize(texts @ text.T, dim=1).T
    torch.testing.assert_close(model.similarities(queries, texts), rows)


def test_small_similarities_survive_a_high_power() -> None:
    scores = torch.tensor([[3e-30, 1e-30], [0.5, -0.5], [-0.1, -0.2]])
    found = relative(scores, 80)
    assert found[0, 0] == 1
    assert found[1].tolist() == [1, 0]
    assert found[2].tolist() == [0, 0]


def test_an_anchor_that_goes_changes_its_own_coordinate_alone(model: ASIFModel) -> None:
    image, text = unit(40, WIDTH, seed=0), unit(40, TEXT_WIDTH, seed=1)
    queries, texts = unit(5, WIDTH, seed=2), unit(6, TEXT_WIDTH, seed=3)
    model.anchors = Anchors.of(image, text)
    model.config.k, model.config.p = 40, 3.0
    before = model.similarities(queries, texts)
    model.anchors.remove([7])
    assert len(model.anchors) == 39
    after = model.similarities(queries, texts)
    assert not torch.equal(after, before)
    kept = [number for number in range(40) if number != 7]
    r, t = dense(queries, image, 40, 3.0), dense(texts, text, 40, 3.0)
    r, t = r[:, kept], t[:, kept]  # the same coordinates but one, whose norm is 1 again
    expected = (r / r.norm(dim=1, keepdim=True)) @ (t / t.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-7)
    model.anchors.restore([7])
    assert torch.equal(model.similarities(queries, texts), before)


def test_pairs_in_another_order_are_the_same_and_other_pairs_are_not(model: ASIFModel) -> None:
    """A cause seen through two random maps: images find their texts, and with the anchors' texts swapped do not."""
    hidden = unit(2000, 8, seed=5)  # no two similarities are equal in float32 where the 50 end
    views = [F.normalize(hidden @ unit(8, width, seed=width), dim=1) for width in (WIDTH, TEXT_WIDTH)]
    held, anchors = [view[:64] for view in views], [view[64:] for view in views]
    model.config.k, model.config.p = 50, 8.0

    def right(*pair: Tensor) -> float:
        model.anchors = Anchors.of(*pair)
        found = model.similarities(*held).argmax(dim=1)
        return (found == torch.arange(64)).double().mean().item()

    order = torch.randperm(len(anchors[0]), generator=torch.Generator().manual_seed(1))
    accuracy = right(*anchors)
    plain = model.similarities(*held)
    assert accuracy > 0.9
    assert right(*(side[order] for side in anchors)) == accuracy
    torch.testing.assert_close(model.similarities(*held), plain)
    assert right(anchors[0], anchors[1][order]) < 0.1


def test_contributions_of_anchors_add_up(model: ASIFModel) -> None:
    image, text = unit(30, WIDTH, seed=0), unit(30, TEXT_WIDTH, seed=1)
    queries, texts = unit(4, WIDTH, seed=2), unit(4, TEXT_WIDTH, seed=3)
    model.anchors = Anchors.of(image, text)
    model.config.k, model.config.p = 20, 2.0
    shares, numbers = model.attribution(queries, texts, 30)
    torch.testing.assert_close(shares.sum(dim=1), model.similarities(queries, texts).diagonal())
    products = dense(queries, image, 20, 2.0) * dense(texts, text, 20, 2.0)
    best = products.argmax(dim=1)
    assert torch.equal(numbers[:, 0], best)
    torch.testing.assert_close(shares[:, 0].double(), products.amax(dim=1), rtol=1e-6, atol=0)


# Encoders


def test_a_feature_does_not_depend_on_padding_and_is_what_the_encoders_say(
    model: ASIFModel, towers: tuple[str, str]
) -> None:
    collator = Collator(load_tokenizer(), max_length=12)
    texts = ["a red square", "a very much longer sentence of a square"]
    both = model.get_text_features(**collator.tokens(texts))
    alone = collator.tokens(texts[:1])
    torch.testing.assert_close(model.get_text_features(**alone), both[:1])
    states = transformers.BertModel.from_pretrained(towers[1])(**alone).last_hidden_state
    torch.testing.assert_close(both[:1], F.normalize(states.mean(dim=1), dim=1))
    model.config.text_pooling = "first"
    torch.testing.assert_close(model.get_text_features(**alone), F.normalize(states[:, 0], dim=1))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    states = transformers.ViTModel.from_pretrained(towers[0])(pixels).last_hidden_state
    torch.testing.assert_close(model.get_image_features(pixels), F.normalize(states[:, 0], dim=1))
    assert not any(parameter.requires_grad for parameter in model.train().parameters())
    assert not any(module.training for part in model.frozen_parts() for module in part.modules())


# Anchors on disk


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "pairs").mkdir()
    return str(write_pairs(tmp_path / "pairs", 24))


def opened(model: ASIFModel, pairs: str) -> tuple[ImageTextDataset, Callable[..., Any]]:
    return ImageTextDataset(pairs, transform=eval_transform(16)), Collator(load_tokenizer(), max_length=12)


def test_a_build_that_was_stopped_goes_on(
    model: ASIFModel, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK_ROWS", 10)
    dataset, collator = opened(model, pairs)
    (Path(pairs) / "013.png").write_bytes(b"no image")
    calls = []

    def stops(samples: Any) -> Any:
        calls.append(len(samples))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return collator(samples)

    folder = tmp_path / "anchors"
    with pytest.raises(KeyboardInterrupt):
        model.add_anchors(folder, dataset, stops)
    with pytest.raises(ValueError, match=r"lacks .*000001\.npy: the cache is not complete"):
        Anchors.open(folder)
    model.add_anchors(folder, dataset, stops)
    assert calls == [10, 9, 9, 4]  # the first block is not made again
    anchors = model.anchors
    assert len(anchors) == 23
    assert anchors.total == 24
    assert anchors.sample(14) == ("014", "grey square number 14")
    batch = collator([dataset[14]])
    image = model.get_image_features(batch["pixel_values"])
    scores, numbers = anchors.nearest("image", image, 23)
    assert numbers[0, 0] == 14
    assert 13 not in numbers[0].tolist()
    torch.testing.assert_close(scores[0, 0], torch.tensor(1.0))
    assert anchors.pieces[0].image.base is not None  # mapped, not read

    (tmp_path / "more").mkdir()
    more = ImageTextDataset(str(write_pairs(tmp_path / "more", 5)), transform=eval_transform(16))
    model.add_anchors(folder, more, collator)
    assert (len(model.anchors), model.anchors.total) == (28, 29)
    assert model.anchors.of_keys(["004"]) == [4, 28]
    assert torch.equal(model.anchors.nearest("image", image, 28)[0][0, :1], scores[0, :1])
    model.config.text_pooling = "first"
    with pytest.raises(ValueError, match="holds anchors of other encoders"):
        model.add_anchors(folder, more, collator)


def test_a_saved_model_finds_its_anchors(model: ASIFModel, pairs: str, tmp_path: Path) -> None:
    """Beside it, where they lay in memory, and elsewhere."""
    model.anchors = Anchors.of(unit(6, WIDTH, seed=0), unit(6, TEXT_WIDTH, seed=1))
    model.anchors.remove([2])
    model.config.k = 3
    model.save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["anchors"] == "anchors"
    loaded = ASIFModel.from_pretrained(tmp_path / "own")
    queries, texts = unit(4, WIDTH, seed=2), unit(4, TEXT_WIDTH, seed=3)
    assert torch.equal(loaded.similarities(queries, texts), model.similarities(queries, texts))
    loaded.save_pretrained(tmp_path / "other")
    again = ASIFModel.from_pretrained(tmp_path / "other")
    assert again.anchor_folder == (tmp_path / "own" / "anchors").resolve()
    assert torch.equal(again.similarities(queries, texts), loaded.similarities(queries, texts))
    with pytest.raises(ValueError, match="this model has none yet"):
        ASIFModel(ASIFConfig(model.config.vision_config, model.config.text_config)).anchors  # noqa: B018


def test_the_command_makes_changes_and_explains_anchors(
    towers: tuple[str, str], pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run, keys, report = tmp_path / "run", tmp_path / "keys.txt", tmp_path / "report.png"
    assert main(["train", "asif", f"--data={pairs}", f"--output-dir={run}"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "vlmfast train: nothing of asif is trained; 'vlmfast anchors' makes a checkpoint of it"
    new = [f"--output-dir={run}", f"--vision-tower={towers[0]}", f"--text-tower={towers[1]}", "--k=4"]
    assert run_anchors([f"--data={pairs}", *new, "--device=cpu"]) == 0
    assert run_anchors([f"--data={pairs}", *new, "--device=cpu"]) == 0  # they are there
    assert "24 anchors" in capsys.readouterr().out
    keys.write_text("003\n011\n")
    on = [f"--checkpoint={run}", "--device=cpu"]
    assert run_anchors([*on, f"--remove={keys}"]) == 0
    loaded = ASIFModel.from_pretrained(run)
    assert (len(loaded.anchors), loaded.config.k) == (22, 4)
    assert run_anchors([*on, f"--restore={keys}"]) == 0
    loaded = ASIFModel.from_pretrained(run)
    assert len(loaded.anchors) == 24
    dataset, collator = opened(loaded, pairs)
    two, said = [dataset[0], dataset[1]], tmp_path / "said.json"
    files, texts = ([f"{pairs}/{number:03}.png" for number in range(2)], [sample.caption for sample in two])
    assert main(["predict", str(run), *files, "--text", *texts, f"--output={said}", "--device=cpu"]) == 0
    batch = collator(two)
    expected = loaded.similarities(
        loaded.get_image_features(batch["pixel_values"]),
        loaded.get_text_features(batch["input_ids"], batch["attention_mask"]),
    )
    for each, row in zip(json.loads(said.read_text()), expected.tolist(), strict=True):
        (found,) = each["predictions"]
        assert dict(zip(found["lines"], found["scores"], strict=True)) == pytest.approx(
            dict(zip(texts, row, strict=True)), rel=1e-4, abs=1e-6
        )
    assert run_anchors([*on, f"--explain={pairs}", f"--report={report}"]) == 0
    assert report.stat().st_size > 10_000
    (tmp_path / "more").mkdir()
    assert run_anchors([*on, f"--data={write_pairs(tmp_path / 'more', 6)}"]) == 0
    assert len(ASIFModel.from_pretrained(run).anchors) == 30
    keys.write_text("nobody\n")
    with pytest.raises(ValueError, match=r"expected keys of anchors, got \['nobody'\], which none has"):
        run_anchors([*on, f"--remove={keys}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=x"], "one of --output-dir, for a new model, and --checkpoint is needed"),
        (["--output-dir=x"], "--data is needed"),
        (["--output-dir=x", "--data=x", "--remove=x"], "--remove needs --checkpoint"),
        (["--checkpoint=x"], "--checkpoint needs one of --data, --remove, --restore and --explain"),
        (["--checkpoint=x", "--explain=x"], "--explain and --report belong together"),
        (["--checkpoint=x", "--data=x", "--k=3"], "--k 3 has no effect beside --checkpoint x"),
        (["--output-dir=x", "--data=x", "--text-tower=y"], "asif needs --vision-tower and --text-tower"),
        (["--output-dir=x", "--data=x", "--batch-size=0"], "--batch-size: expected at least 1, got 0"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, towers: tuple[str, str]) -> None:
    arguments = [argument.replace("=y", f"={towers[1]}") for argument in arguments]
    with pytest.raises((UsageError, ValueError), match=message):
        run_anchors(arguments)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("k", 0, "k: expected a positive number, got 0"),
        ("p", -1.0, "p: expected a positive number, got -1.0"),
        ("text_pooling", "last", "text_pooling: expected 'first' or 'mean', got 'last'"),
    ],
)
def test_wrong_fields_of_the_config(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ASIFConfig(**{field: value})


# Tasks


class Scorer(torch.nn.Module):
    """Features of two widths, and scores that are not their products."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def similarities(self, image: Tensor, text: Tensor) -> Tensor:
        return self.scores


def test_a_class_has_the_highest_score_of_its_prompts() -> None:
    """The mean would say the other."""
    image, texts = unit(2, 3, seed=0), unit(4, 5, seed=1)
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.5], [0.5, 0.5, 0.0, 0.6]])
    found, classes = zero_shot._ranked(Scorer(scores), image, texts, 2)
    assert torch.equal(found @ classes.T, torch.tensor([[0.9, 0.5], [0.5, 0.6]]))


def test_retrieval_ranks_by_similarities(model: ASIFModel, pairs: str) -> None:
    dataset, collator = opened(model, pairs)
    batch = collator([dataset[index] for index in range(24)])
    found = model(**batch)
    model.anchors = Anchors.of(found.image_features.detach(), found.text_features.detach())
    model.config.k = 1  # each sample is described by itself alone, so its pair has score 1 and all others 0
    scores = retrieval.evaluate(model, dataset, collator, batch_size=7, progress=False)
    assert scores.metrics["image_to_text_R@1"] == scores.metrics["text_to_image_R@1"] == 1
    assert torch.equal(scores.features.image, torch.eye(24))
    model.anchors = Anchors.of(found.image_features.detach(), found.text_features.detach().roll(1, 0))
    scores = retrieval.evaluate(model, dataset, collator, batch_size=7, progress=False)
    assert scores.metrics["image_to_text_R@1"] < 0.2

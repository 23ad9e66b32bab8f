"""DeCLIP against CLIP, against every term written out in float64, and over processes, chunks and autocast."""

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers
from processes import run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlmfast.models.contrastive import CLIPConfig, CLIPModel
from vlmfast.models.contrastive.declip import DeCLIPConfig, DeCLIPModel
from vlmfast.training.grad_cache import forward_backward

EOS, PAD, MASK, VOCAB = 49, 0, 50, 51
LENGTHS = torch.tensor([[12, 10], [7, 8], [3, 4], [5, 5], [9, 6], [11, 12]])
ONLY_CLIP = dict.fromkeys(DeCLIPConfig.RELEASED_WEIGHTS, 0.0) | {"clip_weight": 1.0}
NO_IMAGE_SSL = {**DeCLIPConfig.RELEASED_WEIGHTS, "image_ssl_weight": 0.0}


def towers() -> dict:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 48, "eos_token_id": EOS, "pad_token_id": PAD}
    return {
        "vision_config": {**size, "image_size": 16, "patch_size": 8},
        "text_config": {**size, "vocab_size": VOCAB, "max_position_embeddings": 12, **special},
        "projection_dim": 24,
    }


def make(**options: object) -> DeCLIPModel:
    torch.manual_seed(1)
    return DeCLIPModel(DeCLIPConfig(**towers(), bank_size=20, ssl_dim=16, ssl_hidden_dim=8, **options))


def batch(seed: int = 0, rows: int = len(LENGTHS)) -> dict[str, Tensor]:
    """Two views each, padded on the right, with masked tokens in all captions but one."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = (torch.arange(12) < LENGTHS[:rows, :, None]).long()
    ids = torch.randint(1, 48, attention_mask.shape, generator=generator)
    ids.scatter_(2, LENGTHS[:rows, :, None] - 1, EOS)
    ids = ids.where(attention_mask == 1, PAD)
    chosen = (torch.rand(rows, 12, generator=generator) < 0.3) & (ids[:, 0] != EOS) & (ids[:, 0] != PAD)
    chosen[1] = False
    labels = ids[:, 0].where(chosen, -100)
    ids[:, 0] = ids[:, 0].where(~chosen, MASK)
    pixels = torch.randn(rows, 2, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": attention_mask, "mlm_labels": labels}


def filled(model: DeCLIPModel, number: int = 15) -> DeCLIPModel:
    model.bank.push(F.normalize(torch.randn(number, 24), dim=1))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clip_loss(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    logits, labels = s * x @ t.T, torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def written_out(model: nn.Module, inputs: dict[str, Tensor], bank: Tensor) -> dict[str, Tensor]:
    """Every term of a float64 model, one tower call for each view."""
    pixels = inputs["pixel_values"].double().unbind(1)
    images = [model.visual_projection(model.vision_model(view).pooler_output) for view in pixels]
    states, texts = [], []
    for view in range(2):
        out = model.text_model(inputs["input_ids"][:, view], attention_mask=inputs["attention_mask"][:, view])
        states.append(out.last_hidden_state)
        texts.append(F.normalize(model.text_projection(out.pooler_output), dim=1))
    x, s = [F.normalize(image, dim=1) for image in images], model.logit_scale.exp()
    z = [model.projector(image) for image in images]
    p = [model.predictor(view) for view in z]
    cosines = F.cosine_similarity(p[0], z[1].detach()) + F.cosine_similarity(p[1], z[0].detach())
    nearest = []
    for t in texts:
        found = bank[(t.detach() @ bank.T).argmax(1)]
        nearest += [F.cross_entropy(s * view @ found.T, torch.arange(len(view))) for view in x]
    return {
        "clip": clip_loss(x[0], texts[0], s),
        "multi_view": (clip_loss(x[0], texts[1], s) + clip_loss(x[1], texts[0], s) + clip_loss(x[1], texts[1], s)) / 3,
        "image_ssl": -cosines.mean() / 2,
        "text_ssl": F.cross_entropy(model.text_predictor(states[0]).flatten(0, 1), inputs["mlm_labels"].flatten()),
        "nearest_neighbor": torch.stack(nearest).mean(),
    }


class TestTerms:
    @pytest.mark.parametrize("preset", ["RELEASED_WEIGHTS", "RELEASED_88M_VIT_WEIGHTS", "PAPER_WEIGHTS"])
    def test_loss_terms_and_gradients(self, preset: str) -> None:
        weights = getattr(DeCLIPConfig, preset)
        model, inputs = filled(make(**weights)).train(), batch()
        reference = copy.deepcopy(model).double()
        bank = model.bank.features[:15].double()
        features = {name: value for name, value in copy.deepcopy(model)(**inputs).items() if name != "loss"}
        terms, expected = model.loss_terms(**features), written_out(reference, inputs, bank)
        assert set(terms) == set(expected) == {name.removesuffix("_weight") for name in weights}
        for name, term in terms.items():
            assert term.dtype == torch.float32
            torch.testing.assert_close(
                term.double(), expected[name], rtol=2e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        whole = sum(weights[f"{name}_weight"] * term for name, term in expected.items())
        whole.backward()
        loss = model(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=2e-6)
        ours, theirs = gradients(model), gradients(reference)
        assert set(ours) == set(theirs) == {n for n, p in model.named_parameters() if "patch_embedding" not in n}
        for name, grad in ours.items():
            bound = 1e-4 * theirs[name].abs().max().item() + 1e-6
            assert (grad - theirs[name]).abs().max() <= bound, name

    def test_presets(self) -> None:
        """0.4 times the mean of four pairs is 0.1 for each; in the paper the other three share 0.2."""
        released, paper = DeCLIPConfig.RELEASED_WEIGHTS, DeCLIPConfig.PAPER_WEIGHTS
        assert released["clip_weight"] == pytest.approx(released["multi_view_weight"] / 3) == 0.4 / 4
        large = DeCLIPConfig.RELEASED_88M_VIT_WEIGHTS
        assert large["clip_weight"] == pytest.approx(large["multi_view_weight"] / 3) == 0.6 / 4
        assert (paper["clip_weight"], paper["multi_view_weight"]) == (0.4, 0.2)
        assert {name: getattr(DeCLIPConfig(), name) for name in released} == released

    def test_with_clip_alone_and_equal_views_it_is_clip(self) -> None:
        model = make(**ONLY_CLIP)
        clip = CLIPModel(CLIPConfig(**towers()))
        assert set(model.state_dict()) == set(clip.state_dict())
        clip.load_state_dict(model.state_dict())
        inputs = batch()
        del inputs["mlm_labels"]
        one_view = {name: value[:, 0] for name, value in inputs.items()}
        twice = {name: torch.stack([value, value], 1) for name, value in one_view.items()}
        expected = clip(**one_view).loss
        for weights in (ONLY_CLIP, {**ONLY_CLIP, "clip_weight": 0.25, "multi_view_weight": 0.75}):
            model.config.clip_weight, model.config.multi_view_weight = list(weights.values())[:2]
            torch.testing.assert_close(model(**twice).loss, expected)
        torch.testing.assert_close(
            model.get_text_features(one_view["input_ids"], one_view["attention_mask"]),
            clip.get_text_features(one_view["input_ids"], one_view["attention_mask"]),
        )

    def test_each_pair_of_views_counts(self) -> None:
        """A change of one view changes the terms it is in, and no other."""
        model, inputs = filled(make()).eval(), batch()
        plain = model.loss_terms(**{n: v for n, v in model(**inputs).items() if n != "loss"})
        views = {
            ("pixel_values", 0): {"clip", "multi_view", "image_ssl", "nearest_neighbor"},
            ("pixel_values", 1): {"multi_view", "image_ssl", "nearest_neighbor"},
            ("input_ids", 0): {"clip", "multi_view", "text_ssl", "nearest_neighbor"},
            ("input_ids", 1): {"multi_view", "nearest_neighbor"},
        }
        for (name, view), expected in views.items():
            changed = {key: value.clone() for key, value in inputs.items()}
            changed[name][:, view] = (
                changed[name][:, view].roll(1, -1) if name == "pixel_values" else _other_word(changed[name][:, view])
            )
            terms = model.loss_terms(**{n: v for n, v in model(**changed).items() if n != "loss"})
            assert {n for n in terms if not torch.equal(terms[n], plain[n])} == expected

    def test_nearest_neighbours_pull_images_only(self) -> None:
        model = filled(make())
        features = {n: v.detach().requires_grad_() for n, v in model(**batch()).items() if n != "loss"}
        term = model.loss_terms(**features)["nearest_neighbor"]
        image, text = torch.autograd.grad(
            term, [features["image_features"], features["text_features"]], allow_unused=True
        )
        assert text is None
        assert (image.abs().sum(-1) > 0).all()

    def test_an_empty_bank_gives_no_gradient(self) -> None:
        model, inputs = make(), batch()
        features = {n: v.detach().requires_grad_() for n, v in model.eval()(**inputs).items() if n != "loss"}
        term = model.loss_terms(**features)["nearest_neighbor"]
        torch.testing.assert_close(term, torch.tensor(math.log(len(LENGTHS))))
        leaves = [features["image_features"], features["logit_scale"]]
        assert all((grad == 0).all() for grad in torch.autograd.grad(term, leaves))

    def test_no_masked_token_gives_zero(self) -> None:
        model, inputs = make(), batch()
        inputs["mlm_labels"].fill_(-100)
        output = model(**inputs)
        assert model.loss_terms(**{n: v for n, v in output.items() if n != "loss"})["text_ssl"] == 0
        output.loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(model).values())


def _other_word(ids: Tensor) -> Tensor:
    """Every word but masked ones replaced by another."""
    return ids.where((ids == EOS) | (ids == PAD) | (ids == MASK), ids % 47 + 1)


class TestBank:
    def test_a_training_step_pushes_both_texts_once(self) -> None:
        model, inputs = make().train(), batch()
        texts = model(**inputs).text_features
        assert model.bank.pushed == 12
        assert torch.equal(model.bank.features[:12], torch.cat([texts[:, 1], texts[:, 0]]))
        model(**inputs)
        assert model.bank.pushed == 24  # of which 20 fit
        assert torch.equal(model.bank.features[:4], torch.cat([texts[:, 1], texts[:, 0]])[8:])

    def test_neighbours_are_of_earlier_steps(self) -> None:
        """Searched before the push: a text is not its own neighbour."""
        model, inputs = make().train(), batch()
        loss, again = (copy.deepcopy(model)(**inputs).loss for _ in range(2))
        assert torch.equal(loss, again)
        model(**inputs)
        assert not torch.equal(model(**inputs).loss, loss)

    def test_evaluation_pushes_nothing(self) -> None:
        model, inputs = filled(make()).eval(), batch()
        before = copy.deepcopy(model.bank.state_dict())
        output = model(**inputs)
        model.train()
        model.loss_terms(**{n: v for n, v in output.items() if n != "loss"})
        torch.testing.assert_close(model.bank.state_dict(), before, rtol=0, atol=0)


class TestCheckpoints:
    def test_round_trip_with_the_bank(self, tmp_path: Path) -> None:
        model = filled(make(), 33)
        model.save_pretrained(tmp_path)
        loaded, info = DeCLIPModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not {key: value for key, value in info.items() if value}
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert loaded.bank.pushed == 33
        for name in (*DeCLIPConfig.RELEASED_WEIGHTS, "bank_size", "ssl_dim", "ssl_hidden_dim"):
            assert getattr(loaded.config, name) == getattr(model.config, name)

    def test_starts_from_a_checkpoint_of_clip(self, tmp_path: Path) -> None:
        clip = CLIPModel(CLIPConfig(**towers()))
        clip.save_pretrained(tmp_path)
        model, info = DeCLIPModel.from_pretrained(tmp_path, bank_size=20, ssl_dim=16, output_loading_info=True)
        parts = ("projector", "predictor", "text_predictor", "bank")
        assert {name.split(".")[0] for name in info["missing_keys"]} == set(parts)
        state = model.state_dict()
        for name, weight in clip.state_dict().items():
            assert torch.equal(state[name], weight), name
        assert model.bank.pushed == 0
        assert (model.bank.features == 0).all()
        assert (model.text_predictor.bias == 0).all()
        assert model.projector[0].weight.std() > 0.1
        assert (model.projector[1].running_var == 1).all()
        assert model.train()(**batch()).loss.isfinite()

    @pytest.mark.parametrize("eos", [EOS, 2])
    def test_a_mask_token_is_added_to_a_clip(self, tmp_path: Path, eos: int) -> None:
        """Texts without it have the features that they had, also of a tower that pools at the highest id."""
        config = towers()
        config["text_config"].update(vocab_size=MASK, eos_token_id=eos)
        CLIPModel(CLIPConfig(**config)).save_pretrained(tmp_path)
        clip = CLIPModel.from_pretrained(tmp_path)
        model = DeCLIPModel.from_pretrained(tmp_path, bank_size=20, ssl_dim=16)
        before = model.text_predictor.weight.clone()
        model.resize_vocabulary(VOCAB)
        ids, mask = batch()["input_ids"][:, 1], batch()["attention_mask"][:, 1]
        torch.testing.assert_close(model.get_text_features(ids, mask), clip.get_text_features(ids, mask))
        assert torch.equal(model.text_predictor.weight[:MASK], before)
        table = model.text_model.get_input_embeddings().weight
        torch.testing.assert_close(table[MASK], clip.text_model.get_input_embeddings().weight.mean(0))
        model.train()(**batch()).loss.backward()
        assert set(gradients(model)) == {n for n, _ in model.named_parameters() if "patch_embedding" not in n}
        model.save_pretrained(tmp_path / "larger")
        again, info = DeCLIPModel.from_pretrained(tmp_path / "larger", output_loading_info=True)
        assert not {key: value for key, value in info.items() if value}
        assert torch.equal(again(**batch()).text_features, model.eval()(**batch()).text_features)
        with pytest.raises(ValueError, match="size: expected at least the 51 tokens that there are, got 50"):
            model.resize_vocabulary(MASK)

    def test_the_patch_embedding_stays_frozen(self, tmp_path: Path) -> None:
        model = make()
        model.save_pretrained(tmp_path)
        for each in (model, DeCLIPModel.from_pretrained(tmp_path)):
            each.train()
            each(**batch()).loss.backward()
            assert {name for name, p in each.named_parameters() if p.grad is None} == {
                "vision_model.embeddings.patch_embedding.weight"
            }
        free = make(freeze_patch_embedding=False)
        free(**batch()).loss.backward()
        assert all(p.grad is not None for p in free.parameters())


class TestTraining:
    @pytest.mark.parametrize("weights", [DeCLIPConfig.RELEASED_WEIGHTS, NO_IMAGE_SSL])
    def test_chunks_give_the_gradients_of_the_plain_step(self, weights: dict[str, float]) -> None:
        """Batch norms see the whole batch, once."""
        plain, inputs = filled(make(**weights)).train(), batch()
        cached = copy.deepcopy(plain)
        expected = plain(**inputs).loss
        expected.backward()

        def encode(chunk: dict[str, Tensor]) -> dict[str, Tensor]:
            return dict(cached(**chunk, return_loss=False))

        loss = forward_backward(
            encode, lambda features: cached.loss(**features), inputs, 4, shared=cached.shared_features
        )
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradients(cached), gradients(plain), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(cached.state_dict(), plain.state_dict())

    def test_logit_scale_stays_between_its_bounds(self) -> None:
        model = make(logit_scale_min=3.0)
        for value, expected in ((2.0, 3.0), (3.5, 3.5), (9.0, math.log(100))):
            with torch.no_grad():
                model.logit_scale.fill_(value)
            model.after_optimizer_step()
            assert model.logit_scale.item() == torch.tensor(expected).item()

    def test_autocast(self) -> None:
        model, inputs = filled(make()).train(), batch()
        expected = copy.deepcopy(model)(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs)
        assert output.image_features.dtype == output.text_features.dtype == output.loss.dtype == torch.float32
        assert output.masked_token_loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, expected.loss, rtol=0.05, atol=0.02)
        output.loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(model).values())

    def test_any_towers(self) -> None:
        config = DeCLIPConfig(
            vision_config=transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
            text_config=transformers.BertConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB
            ),
            projection_dim=24,
            bank_size=20,
        )
        model = DeCLIPModel(config).train()
        model(**batch()).loss.backward()
        assert set(gradients(model)) == {name for name, _ in model.named_parameters()}


ROWS, SEEDS = [4, 2], (0, 3)


def _step_on_each_rank(rank: int, world_size: int, state: dict[str, Tensor], path: Path, chunk: int | None) -> None:
    model = filled(make()).train()
    model.load_state_dict(state)
    wrapped = DistributedDataParallel(model)
    assert not any(name.startswith("bank") for name in wrapped.named_module_buffers)  # what is broadcast in each step
    for seed in SEEDS:
        part = {name: value.split(ROWS)[rank] for name, value in batch(seed).items()}
        model.zero_grad()
        if chunk is None:
            loss = wrapped(**part).loss
            loss.backward()
        else:
            loss = forward_backward(
                lambda rows: {k: v for k, v in wrapped(**rows, return_loss=False).items() if v is not None},
                lambda features: model.loss(**features),
                part,
                chunk,
                shared=model.shared_features,
                no_sync=wrapped.no_sync,
            )
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    torch.save((loss / world_size, gradients(model), model.state_dict()), path / f"{rank}.pt")


@pytest.mark.parametrize("chunk", [None, 2])
def test_two_processes_equal_one(tmp_path: Path, chunk: int | None) -> None:
    """With 4 and 2 rows, other numbers of masked tokens, batch norms and a bank that wraps around; in chunks too."""
    model = filled(make()).train()
    state = copy.deepcopy(model.state_dict())
    run_processes(_step_on_each_rank, 2, state, tmp_path, chunk)
    for seed in SEEDS:
        model.zero_grad()
        inputs = batch(seed)
        first, second = ((part != -100).sum() for part in inputs["mlm_labels"].split(ROWS))
        assert first != second
        loss = model(**inputs).loss
        loss.backward()
    for rank in range(2):
        rank_loss, rank_gradients, rank_state = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(rank_loss, loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank_gradients, gradients(model), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(rank_state, model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "pixel_values: missing"),
        ({"mlm_labels": None}, "mlm_labels: missing"),
        ({"input_ids": torch.ones(6, 12, dtype=torch.long)}, r"input_ids: expected \(B, 2, L\), .* \(6, 12\)"),
        (
            {"pixel_values": torch.zeros(6, 3, 16, 16)},
            r"pixel_values: expected \(B, 2, H, W, 3\) or .* \(6, 3, 16, 16\)",
        ),
        ({"pixel_values": torch.zeros(5, 2, 3, 16, 16)}, "input_ids: expected 5 pairs of texts, got 6"),
        ({"attention_mask": torch.ones(6, 12)}, r"attention_mask: expected the shape \(6, 2, 12\) .* \(6, 12\)"),
        ({"mlm_labels": torch.zeros(6, 2, 12)}, r"mlm_labels: expected the shape \(6, 12\), got \(6, 2, 12\)"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(**{**batch(), **change})

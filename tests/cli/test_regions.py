"""vlmfast regions: what a detector finds, kept once, whatever stops or damages the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmfast.cli import main, regions
from vlmfast.data import ImageTextDataset, open_features
from vlmfast.models.detection import FasterRCNNConfig, FasterRCNNModel
from vlmfast.tasks import task_class

COUNT, DAMAGED = 9, 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    torch.manual_seed(0)
    for k in range(COUNT):
        pixels = torch.randint(256, (20 + 3 * k, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{k}.png")
    (folder / f"{DAMAGED}.png").write_bytes(b"no image")
    (folder / "0.json").write_text('{"objects": [{"box": [0, 0, 40, 20], "name": "all"}]}')
    return folder


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = FasterRCNNConfig(
        backbone="small", backbone_width=2, stride=8, frozen_norm=False, frozen_stages=0, image_size=32, longer_size=64,
        anchor_sizes=[8, 16], candidates=50, proposals=20, roi_size=3, id2label={0: "a", 1: "b"}, attributes=["red"],
    )  # fmt: skip
    FasterRCNNModel(config).save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "BLOCK_ROWS", 4)


def run(detector: Path, data: Path, output: Path, *more: str) -> int:
    return main([
        "regions", f"--detector={detector}", f"--data={data}", f"--output={output}", "--num-workers=0", "--device=cpu",
        "--batch-size=3", *more,
    ])  # fmt: skip


def test_every_image_s_regions_are_kept(
    detector: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(detector, data, tmp_path / "out", "--max-regions=12") == 0
    told = capsys.readouterr().out
    assert "regions: 3 of 3 files" in told
    assert f"{COUNT - 1} images in {tmp_path / 'out'}; skipped: 1" in told
    assert "of 8 images: 12 to 12 regions" in told
    assert "64 wide" in told
    assert "% of 1" in told
    model = FasterRCNNModel.from_pretrained(detector)
    dataset = ImageTextDataset(str(data), transform=model.transform(None, train=False), requires=())
    found = open_features(tmp_path / "out", dataset)
    assert found[DAMAGED] is None
    for index in {*range(COUNT)} - {DAMAGED}:
        image = dataset[index].image
        expected = model.regions([image], most=12)
        assert found[index].keys() == expected.keys()
        for name, (value,) in expected.items():
            assert found[index][name].dtype == value.dtype
            assert torch.allclose(found[index][name].float(), value.float(), atol=1e-4), name
        assert found[index]["image_size"].tolist() == [40, 20 + 3 * index]
    dataset.features = found
    assert dataset[0].features["boxes"].shape[1] == 4


def test_a_run_goes_on_where_it_stopped(
    detector: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(detector, data, tmp_path / "whole", "--min-regions=5", "--max-regions=5") == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(files) == 4
    calls, regions_of = [], FasterRCNNModel.regions

    def stopped(self: FasterRCNNModel, images: object, **how: object) -> object:
        calls.append(len(list(images)))  # type: ignore[call-overload]
        if len(calls) == 3:
            raise KeyboardInterrupt
        return regions_of(self, images, **how)

    with monkeypatch.context() as patched:
        patched.setattr(FasterRCNNModel, "regions", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(detector, data, tmp_path / "part", "--min-regions=5", "--max-regions=5")
    capsys.readouterr()
    assert run(detector, data, tmp_path / "part", "--min-regions=5", "--max-regions=5") == 0
    assert "regions: 0 of 2 files" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir()} == files
    assert run(detector, data, tmp_path / "part") == 1  # another number of regions
    assert "holds features of something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--min-regions=9", "--max-regions=3"], "--max-regions: expected at least --min-regions 9, got 3"),
        (["--threshold=2"], "--threshold: expected a probability, got 2.0"),
        (["--batch-size=0"], "--batch-size: expected at least 1, got 0"),
        (["--model=clip"], "CLIPModel finds no regions"),
    ],
)
def test_what_cannot_be(
    more: list[str], message: str, detector: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(detector, data, tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_torchvision_the_message_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(arguments: object) -> int:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(regions, "run", missing)
    assert main(["regions"]) == 1
    assert "torchvision is not installed; pip install 'vlmfast[detection]'" in capsys.readouterr().err


def test_the_task_asks_a_detector_for_boxes_alone() -> None:
    """Its names are fixed, so it cannot be asked for phrases; the task of detection does not."""
    task_class("detection")().check(FasterRCNNModel)
    assert not getattr(FasterRCNNModel, "open_vocabulary", False)

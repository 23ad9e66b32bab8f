import json
import re

import pytest

from vlmfast.data import ImageTextDataset, eval_transform


def open_dataset(source):
    return ImageTextDataset(source, transform=eval_transform(8))


def all_metadata(dataset):
    return [dataset.metadata(index) for index in range(len(dataset))]


@pytest.fixture
def table(tmp_path, png):
    """Write a table beside two images and return its path."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a b.png").write_bytes(png(0))
    (tmp_path / "c.png").write_bytes(png(1))

    def write(text, name="pairs.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


def test_csv_with_byte_order_mark_quotes_and_category(table, tmp_path):
    rows = f'category,caption,path\nfruit,"one, ""quoted""\nin two lines",images/a b.png\n, second ,{tmp_path}/c.png\n'
    dataset = open_dataset(table(b"\xef\xbb\xbf" + rows.encode()))
    assert all_metadata(dataset) == [
        ("images/a b.png", 'one, "quoted"\nin two lines', "fruit"),
        (f"{tmp_path}/c.png", "second", None),
    ]
    assert dataset[0].category == "fruit"
    assert (dataset[0].image != dataset[1].image).any()


def test_paths_are_relative_to_the_table_wherever_one_stands(table, tmp_path, monkeypatch):
    table("path,caption\nc.png,x\n")
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset("pairs.csv")
    monkeypatch.chdir("/")
    assert dataset[0].caption == "x"


def test_tsv(table):
    assert all_metadata(open_dataset(table("path\tcaption\nc.png\ta, b\n", "pairs.tsv"))) == [("c.png", "a, b", None)]


def test_empty_and_absent_cells_are_empty_captions(table):
    dataset = open_dataset(table("path,caption\nc.png,\nc.png\nc.png,  \nc.png,x\n"))
    assert [dataset[n] is None for n in range(4)] == [True, True, True, False]
    assert dataset.skipped() == {"empty caption": 3}
    assert dataset.metadata(0) == ("c.png", None, None)


@pytest.mark.parametrize("header", ["path,title", "image,caption", "caption", ""])
def test_a_table_without_the_columns_is_refused(table, header):
    with pytest.raises(ValueError, match=r"source: .*pairs\.csv needs the columns path and caption; it has \["):
        open_dataset(table(f"{header}\nc.png,x\n" if header else ""))


def test_a_table_without_rows_is_refused(table):
    with pytest.raises(ValueError, match=r"source: .*pairs\.csv has no rows"):
        open_dataset(table("path,caption\n"))


@pytest.mark.parametrize("path", ["gone.png", "", "images"])
def test_a_missing_image_is_named_with_its_row(table, path):
    with pytest.raises(FileNotFoundError, match=rf"source: .*pairs\.csv, row 2: no image file '{path}'"):
        open_dataset(table(f"path,caption\nc.png,x\n{path},y\n"))


@pytest.mark.parametrize("text", [b"path,caption\nc.png,caf\xe9\n", b'path,caption\nc.png,"' + b"x" * 140000])
def test_a_table_that_is_not_utf8_csv_is_refused(table, text):
    with pytest.raises(ValueError, match=r"source: .*pairs\.csv, line \d: not UTF-8 CSV"):
        open_dataset(table(text))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source: cannot read .*none\.csv \(No such file or directory\)"):
        open_dataset(tmp_path / "none.csv")


def test_folder_with_subfolders(tmp_path, png):
    (tmp_path / "b").mkdir()
    files = {
        "z.png": png(0),
        "z.txt": b"from txt\n",
        "z.json": b'{"caption": "from json"}',
        "b/y.v2.PNG": png(1),
        "b/y.v2.json": json.dumps({"caption": "nested é", "category": "c"}).encode(),
        "x.jpeg": png(2),
        "notes.txt": b"no image",
        "readme.md": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    dataset = open_dataset(tmp_path)
    assert all_metadata(dataset) == [("x", None, None), ("z", "from txt", None), ("b/y.v2", "nested é", "c")]
    assert dataset[0] is None
    assert dataset[1].caption == "from txt"
    assert dataset[2].category == "c"
    assert dataset.skipped() == {"missing caption": 1, "missing image": 1}


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=rf"the folder {re.escape(str(tmp_path))} holds no webp, jpg, jpeg, png"):
        open_dataset(tmp_path)


def test_an_image_deleted_after_indexing_is_counted(tmp_path, png):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("x")
    dataset = open_dataset(tmp_path)
    (tmp_path / "a.png").unlink()
    assert dataset[0] is None
    assert dataset.skipped() == {"unreadable image": 1}

import csv
import errno
import json
import os
import re
import socket

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


class TestTablesThatAreNotWhatTheySeem:
    @pytest.mark.parametrize("end", ["\n", "\r\n", ""])
    @pytest.mark.parametrize("delimiter", [",", "\t"])
    @pytest.mark.parametrize(
        "rows",
        [
            ('c.png|"Hello', "c.png|two", "c.png|three"),
            ("c.png|one", 'c.png|"two', "c.png|three"),
            ("c.png|one", "c.png|two", 'c.png|"three'),
            ('c.png|"one', 'c.png|"two"', "c.png|three"),
            ('c.png|"one', 'c.png|"two', "c.png|three"),
            ('c.png|"one"x', "c.png|two", "c.png|three"),
        ],
    )
    def test_an_unclosed_quote_is_named_with_the_line_of_its_row(self, table, rows, delimiter, end):
        text = (end or "\n").join(["path|caption", *rows]).replace("|", delimiter) + end
        first = next(number for number, row in enumerate(rows, start=2) if '"' in row)
        with pytest.raises(ValueError, match=rf"source: .*pairs\..sv, line {first}: not UTF-8 CSV"):
            open_dataset(table(text, "pairs.csv" if delimiter == "," else "pairs.tsv"))

    @pytest.mark.parametrize("row", ["c.png,a cat, a dog and a bird", "c.png,x,,y", "c.png,x,y,z"])
    def test_surplus_cells_are_named_with_their_row(self, table, row):
        with pytest.raises(ValueError, match=r"source: .*pairs\.csv, row 2: [34] cells, the header has 2; .*quotes"):
            open_dataset(table(f"path,caption\nc.png,good\n{row}\n"))

    def test_surplus_cells_that_are_empty_do_no_harm(self, table):
        dataset = open_dataset(table("path,caption\nc.png,x,\nc.png,y,,  \n"))
        assert [caption for _, caption, _ in all_metadata(dataset)] == ["x", "y"]

    def test_a_column_that_is_named_twice_is_refused(self, table):
        with pytest.raises(ValueError, match=r"pairs\.csv names a column twice: \['path', 'caption', 'caption'\]"):
            open_dataset(table("path,caption,caption\nc.png,x,y\n"))

    @pytest.fixture
    def limit(self):
        """The csv module's limit on a cell, as another part of the program has set it."""
        before = csv.field_size_limit(12345)
        yield 12345
        csv.field_size_limit(before)

    @pytest.mark.parametrize("quoted", [False, True])
    def test_a_caption_has_any_length(self, table, quoted, limit):
        caption = "long " * 200_000
        row = f'c.png,"{caption}"' if quoted else f"c.png,{caption}"
        dataset = open_dataset(table(f"path,caption\n{row}\nc.png,x\n"))
        assert dataset[0].caption == caption.strip()
        assert dataset[1].caption == "x"
        assert csv.field_size_limit() == limit

    def test_the_limit_of_csv_is_put_back_after_an_error(self, table, limit):
        with pytest.raises(ValueError, match="not UTF-8 CSV"):
            open_dataset(table('path,caption\nc.png,"x\n'))
        assert csv.field_size_limit() == limit

    @pytest.mark.parametrize("path", ["gone\0.png", "\0"])
    def test_a_path_with_a_zero_byte_is_a_missing_image(self, table, path):
        with pytest.raises((FileNotFoundError, ValueError), match=r"source: .*pairs\.csv"):
            open_dataset(table(f"path,caption\n{path},x\n"))


@pytest.fixture
def special(tmp_path):
    """Make a path that is no regular file, of a kind."""
    sockets = []

    def make(kind, path):
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "socket":
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(str(path))
        elif kind == "link to a FIFO":
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
        else:
            path.symlink_to("/dev/zero")
        return path

    yield make
    for each in sockets:
        each.close()


KINDS = {"FIFO": "FIFO", "socket": "socket", "device": "device", "link to a FIFO": "FIFO"}


@pytest.mark.parametrize("kind", KINDS)
class TestWhatIsNoRegularFileIsRefusedByName:
    @pytest.mark.parametrize("name", ["b.png", "b.txt", "b.json", "b.1.jpg", "sub/b.webp"])
    def test_in_a_folder(self, kind, name, tmp_path, png, special):
        (tmp_path / "d" / "sub").mkdir(parents=True)
        (tmp_path / "d" / "a.png").write_bytes(png(0))
        special(kind, tmp_path / "d" / name)
        with pytest.raises(ValueError, match=rf"source: .*{re.escape(name)} is a {KINDS[kind]}; expected a regular"):
            open_dataset(tmp_path / "d")

    def test_of_another_extension_it_does_no_harm(self, kind, tmp_path, png, special):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "a.png").write_bytes(png(0))
        special(kind, tmp_path / "d" / "b.log")
        assert len(open_dataset(tmp_path / "d")) == 1

    def test_in_a_table(self, kind, table, tmp_path, special):
        special(kind, tmp_path / "b.png")
        with pytest.raises(ValueError, match=r"pairs\.csv, row 2: a FIFO, socket or device, .* at 'b\.png'"):
            open_dataset(table("path,caption\nc.png,x\nb.png,y\n"))

    @pytest.mark.parametrize("name", ["b.csv", "b.tsv", "b.tar"])
    def test_as_the_source(self, kind, name, tmp_path, special):
        with pytest.raises(ValueError, match=rf"source: .*{name} is a {KINDS[kind]}"):
            open_dataset(special(kind, tmp_path / name))

    def test_a_file_that_becomes_one_after_indexing_is_counted(self, kind, tmp_path, png, special):
        (tmp_path / "d").mkdir()
        for name, data in {"a.png": png(0), "a.txt": b"x", "b.png": png(1), "b.txt": b"y"}.items():
            (tmp_path / "d" / name).write_bytes(data)
        dataset = open_dataset(tmp_path / "d")
        (tmp_path / "d" / "a.png").unlink()
        (tmp_path / "d" / "b.txt").unlink()
        special(kind, tmp_path / "d" / "a.png")
        (tmp_path / "d" / "b.txt").symlink_to(tmp_path / "d" / "a.png")
        assert [dataset[0], dataset[1]] == [None, None]
        assert dataset.skipped() == {"unreadable image": 1, "missing caption": 1}


class TestWhatCannotBeRead:
    @pytest.fixture(params=["folder", "table"])
    def source(self, request, tmp_path, png):
        """Two pairs, a and b; the image of b is made by the test."""
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "a.png").write_bytes(png(0))
        for stem in "ab":
            (tmp_path / "d" / f"{stem}.txt").write_text(stem)
        (tmp_path / "d" / "t.csv").write_text("path,caption\na.png,a\nb.png,b\n")
        return tmp_path / "d" if request.param == "folder" else tmp_path / "d" / "t.csv"

    @pytest.mark.parametrize("target", ["gone.png", "b.png", "loop1.png"])
    def test_a_link_that_leads_nowhere_is_counted(self, source, tmp_path, target):
        folder = tmp_path / "d"
        (folder / "b.png").symlink_to(target)
        (folder / "loop1.png").symlink_to("loop2.png") if target == "loop1.png" else None
        (folder / "loop2.png").symlink_to("loop1.png") if target == "loop1.png" else None
        dataset = open_dataset(source)
        usable = [dataset[n] for n in range(len(dataset)) if dataset[n] is not None]
        assert [sample.caption for sample in usable] == ["a"]
        assert dataset.skipped()["unreadable image"] == 1
        assert dataset.fingerprint() == dataset.fingerprint()
        assert dataset.image_fingerprint() == dataset.image_fingerprint()

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ELOOP])
    def test_an_image_that_the_system_does_not_give_is_counted(self, source, tmp_path, monkeypatch, png, number):
        (tmp_path / "d" / "b.png").write_bytes(png(1))
        dataset = open_dataset(source)

        def refuse(path, *args, opened=os.open, **options):
            if str(path).endswith("b.png"):
                raise OSError(number, os.strerror(number), path)
            return opened(path, *args, **options)

        monkeypatch.setattr(os, "open", refuse)  # root, who runs tests in containers, may read all
        assert [dataset[0].caption, dataset[1]] == ["a", None]
        assert dataset.skipped()["unreadable image"] == 1

    def test_a_process_without_file_descriptors_is_not_a_fault_of_the_data(self, source, tmp_path, monkeypatch, png):
        (tmp_path / "d" / "b.png").write_bytes(png(1))
        dataset = open_dataset(source)

        def refuse(path, *args, **options):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            dataset[0]

    def test_a_text_that_vanishes_is_a_missing_caption(self, tmp_path, png):
        for stem in "ab":
            (tmp_path / f"{stem}.png").write_bytes(png(0))
            (tmp_path / f"{stem}.json").write_text('{"caption": "x"}')
        (tmp_path / "b.json").unlink()
        (tmp_path / "b.json").symlink_to("gone.json")
        dataset = open_dataset(tmp_path)
        (tmp_path / "a.json").unlink()
        assert [dataset[0], dataset[1]] == [None, None]
        assert dataset.skipped() == {"missing caption": 2}


class TestLinksBelowAFolder:
    @pytest.fixture
    def folder(self, tmp_path, png):
        (tmp_path / "d" / "sub").mkdir(parents=True)
        (tmp_path / "other" / "deep").mkdir(parents=True)
        for n, name in enumerate(["d/a", "d/sub/b", "other/c", "other/deep/e"]):
            (tmp_path / f"{name}.png").write_bytes(png(n))
            (tmp_path / f"{name}.txt").write_text(name)
        return tmp_path / "d"

    def keys(self, folder):
        return [key for key, _, _ in all_metadata(open_dataset(folder))]

    def test_are_followed_to_files_and_folders_as_torchvision_follows_them(self, folder):
        (folder / "link").symlink_to("../other")
        (folder / "again").symlink_to("../other/deep")
        (folder / "z.png").symlink_to("sub/b.png")
        (folder / "z.txt").symlink_to("sub/b.txt")
        assert self.keys(folder) == ["a", "z", "again/e", "link/c", "link/deep/e", "sub/b"]
        assert len({key for key in self.keys(folder) if key.endswith("/e")}) == 2
        walked = sorted(
            os.path.relpath(os.path.join(parent, name), folder)[:-4]
            for parent, _, names in os.walk(folder, followlinks=True)
            for name in names
            if name.endswith("png")
        )
        assert sorted(self.keys(folder)) == walked

    @pytest.mark.parametrize(
        ("link", "target", "keys", "loops"),
        [
            ("loop", ".", ["a", "sub/b"], 1),
            ("sub/up", "..", ["a", "sub/b"], 1),
            ("sub/self", "../sub", ["a", "sub/b"], 1),
            ("up", "..", ["a", "sub/b", "up/other/c", "up/other/deep/e"], 1),
        ],
    )
    def test_do_not_lead_in_circles(self, folder, link, target, keys, loops):
        (folder / link).symlink_to(target)
        dataset = open_dataset(folder)
        assert sorted(key for key, _, _ in all_metadata(dataset)) == keys
        assert dataset.skipped() == {"link to a folder above": loops}

    def test_do_not_lead_in_circles_through_each_other(self, folder):
        (folder / "sub" / "link").symlink_to("../../other")
        (folder.parent / "other" / "back").symlink_to("../d/sub")
        dataset = open_dataset(folder)
        assert sorted(key for key, _, _ in all_metadata(dataset)) == ["a", "sub/b", "sub/link/c", "sub/link/deep/e"]
        assert dataset.skipped() == {"link to a folder above": 1}


def test_of_several_images_of_one_stem_the_first_is_used_and_the_others_are_counted(tmp_path, png):
    for n, name in enumerate(["a.jpg.png", "a.PNG", "a.png", "a.webp", "a.txt", "a.TXT", "b.png", "b.txt"]):
        (tmp_path / name).write_bytes(png(n) if n < 4 or n == 6 else b"x")
    dataset = open_dataset(tmp_path)
    assert [key for key, _, _ in all_metadata(dataset)] == ["a", "a.jpg", "b"]
    assert dataset.skipped() == {"second image": 2, "duplicate key": 1}
    assert (dataset[0].image == open_dataset(tmp_path)[0].image).all()


@pytest.mark.parametrize("stem", ["22.05", "a.", "Mr. Smith", "v1.2.3", "ü.é"])
def test_names_with_dots_are_those_of_pairs(tmp_path, png, stem):
    (tmp_path / f"{stem}.png").write_bytes(png(0))
    (tmp_path / f"{stem}.txt").write_text("x")
    assert all_metadata(open_dataset(tmp_path)) == [(stem, "x", None)]

"""Folders and datasets as sequences of raw samples: captions, lists of captions, columns, what is refused."""

import io
import json
import pickle
import sys

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from brisk import samples
from brisk.options import UserError
from brisk.samples import Skip

pytestmark = pytest.mark.quick


def picture(number=0):
    return Image.new("RGB", (12, 10), (number, 0, 0))


def number_of(raw):
    """What `picture` wrote."""
    return samples.decode_image(raw).getpixel((0, 0))[0]


def caption_of(raw, seed=0):
    return samples.caption_of(raw, samples.metadata_of(raw), np.random.default_rng(seed))


def folder_of(tmp_path, *names):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)
    return tmp_path


def test_folder_with_jsonl_csv_and_sidecar_captions(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.jpg", "sub/c.png", "sub/d.PNG", "e.png")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one"}\n\n{"file_name": "b.jpg", "caption": "two"}\n'
    )
    (folder / "sub/metadata.csv").write_text('file_name,text\nc.png,"three, with a comma"\n')
    (folder / "sub/d.txt").write_text("four\n")
    listed = [(path.name, caption) for path, caption in samples.list_folder(folder)]
    assert listed == [
        ("a.png", "one"),
        ("b.jpg", "two"),
        ("e.png", None),
        ("c.png", "three, with a comma"),
        ("d.PNG", "four"),
    ]


def test_folder_captions_with_line_separators_newlines_and_a_byte_order_mark(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png", "sub/c.png")
    rows = [{"file_name": "a.png", "text": "one\u2028two\u0085three"}, {"file_name": "b.png", "text": "x\ny"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    (folder / "sub/metadata.csv").write_text('file_name,text\nc.png,"first\nsecond"\n', encoding="utf-8-sig")
    captions = dict((path.name, caption) for path, caption in samples.list_folder(folder))
    assert captions == {"a.png": "one\u2028two\u0085three", "b.png": "x\ny", "c.png": "first\nsecond"}


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.jsonl", "{"), ("metadata.jsonl", '{"text": "x"}'), ("metadata.jsonl", "3"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}'), ("metadata.csv", "name,text\na.png,x\n"),
        ("metadata.jsonl", '{"file_name": ["a.png"], "text": "x"}'),
    ],
)  # fmt: skip
def test_broken_metadata_is_one_sentence_naming_the_file(tmp_path, name, content):
    folder = folder_of(tmp_path, "a.png")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        samples.list_folder(folder)


def test_useless_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        samples.list_folder(tmp_path / "none")
    with pytest.raises(UserError, match="holds no images"):
        samples.list_folder(tmp_path)
    with pytest.raises(UserError, match="1 images and no caption"):
        samples.list_folder(folder_of(tmp_path, "a.png"))


def test_a_vanished_file_is_skipped(tmp_path):
    rows = samples.FolderRows([(tmp_path / "gone.png", "x")])
    with pytest.raises(Skip, match="unreadable image"):
        rows[0]


def write_metadata(folder, kind, rows):
    """metadata.jsonl, .csv or .parquet of a list of dicts."""
    path = folder / f"metadata.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))


def captions(folder, *columns):
    return {path.name: caption for path, caption in samples.list_folder(folder, *columns)}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_columns_can_be_chosen(tmp_path, kind):
    folder = folder_of(tmp_path, "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": "A", "name": "b.png", "alt": "beta"},
            {"file_name": "b.png", "text": "B", "name": "a.png", "alt": "alpha"}]  # fmt: skip
    write_metadata(folder, kind, rows)
    assert captions(folder) == {"a.png": "A", "b.png": "B"}
    assert captions(folder, None, "alt") == {"a.png": "beta", "b.png": "alpha"}
    assert captions(folder, "name", None) == {"b.png": "A", "a.png": "B"}
    assert captions(folder, "name", "alt") == {"b.png": "beta", "a.png": "alpha"}
    for columns, missing in ((("gone", None), "gone"), ((None, "gone"), "gone")):
        with pytest.raises(UserError, match=f"metadata.{kind} cannot be read: every row needs .*{missing}"):
            samples.list_folder(folder, *columns)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_caption_lists_are_kept_whole_and_empty_ones_are_none(tmp_path, kind):
    folder = folder_of(tmp_path, "a.png", "b.png", "c.png", "sub/d.png")
    rows = [{"file_name": "a.png", "text": ["one", "two"]}, {"file_name": "b.png", "text": []},
            {"file_name": "c.png", "text": None}]  # fmt: skip
    write_metadata(folder, kind, rows)
    write_metadata(folder / "sub", kind, [{"file_name": "d.png", "caption": ["three"]}])
    assert captions(folder) == {"a.png": ["one", "two"], "b.png": None, "c.png": None, "d.png": ["three"]}


@pytest.mark.parametrize("text", [["one", 2], [None], {"a": "b"}])
def test_captions_that_are_no_text_are_refused(tmp_path, text):
    folder = folder_of(tmp_path, "a.png")
    write_metadata(folder, "jsonl", [{"file_name": "a.png", "text": text}])
    with pytest.raises(UserError, match="metadata.jsonl cannot be read"):
        samples.list_folder(folder)


def test_broken_parquet_and_a_missing_pyarrow_are_one_sentence(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "a.png")
    (folder / "metadata.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="metadata.parquet cannot be read"):
        samples.list_folder(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        samples.list_folder(folder)


def test_folder_rows_are_raw_samples_with_text_or_a_list_in_their_json(tmp_path):
    folder = folder_of(tmp_path, "a.PNG", "b.png", "c.png")
    content = (folder / "a.PNG").read_bytes()
    files = [(folder / "a.PNG", "Größe"), (folder / "b.png", ["one", "two"]), (folder / "c.png", None)]
    rows = samples.FolderRows(files)
    assert len(rows) == 3 and rows.captions() == ["Größe", ["one", "two"], None]
    assert rows[0] == {"png": content, "txt": "Größe".encode()}
    assert set(rows[1]) == {"png", "json"} and set(rows[2]) == {"png"}
    assert {caption_of(rows[1], seed) for seed in range(30)} == {"one", "two"}
    with pytest.raises(Skip, match="no caption"):
        caption_of(rows[2])
    assert len(rows.first(2)) == 2 and rows.first(2)[1] == rows[1]
    assert rows.first(0).captions() == [] and rows.first(99).captions() == rows.captions()


FEATURES = datasets.Features({
    "image": datasets.Image(), "text": datasets.Value("string"), "alt": datasets.Value("string"),
    "many": datasets.List(datasets.Value("string")), "second": datasets.Image(),
})  # fmt: skip


def make_dataset():
    """Four rows; the second picture's number is ten higher."""
    return datasets.Dataset.from_dict({
        "image": [picture(number) for number in range(4)], "text": ["a", "b", None, " d "],
        "alt": ["A", "B", "C", "D"], "many": [["x", "y"], [], None, ["z"]],
        "second": [picture(10 + number) for number in range(4)],
    }, features=FEATURES)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of `save_to_disk`: a dataset, and splits of it."""
    folder = tmp_path_factory.mktemp("datasets")
    made = make_dataset()
    made.save_to_disk(folder / "one")
    datasets.DatasetDict({"test": made.select([3]), "train": made}).save_to_disk(folder / "splits")
    datasets.DatasetDict({"test": made}).save_to_disk(folder / "no-train")
    made.remove_columns("text").rename_column("alt", "caption").save_to_disk(folder / "caption")
    return folder


@pytest.mark.parametrize("name", ["one", "splits"])
def test_a_saved_dataset_gives_its_training_rows(saved, name):
    rows = samples.open_dataset(str(saved / name))
    assert len(rows) == 4 and rows.captions() == ["a", "b", None, " d "]
    assert [number_of(rows[n]) for n in range(4)] == [0, 1, 2, 3]
    assert rows[1]["txt"] == b"b" and caption_of(rows[3]) == "d"
    with pytest.raises(Skip, match="no caption"):
        caption_of(rows[2])
    assert len(rows.first(2)) == 2 and rows.first(2).captions() == ["a", "b"] and rows.first(2)[1] == rows[1]
    assert len(rows.first(99)) == 4


def test_images_of_a_dataset_are_handed_over_as_they_are_stored(saved):
    stored = io.BytesIO()
    picture(1).save(stored, "PNG")
    assert samples.open_dataset(str(saved / "one"))[1]["png"] == stored.getvalue()


def test_dataset_columns_can_be_chosen_and_caption_follows_text(saved):
    rows = samples.open_dataset(str(saved / "one"), None, "second", "alt")
    assert rows.captions() == ["A", "B", "C", "D"] and [number_of(rows[n]) for n in range(4)] == [10, 11, 12, 13]
    assert samples.open_dataset(str(saved / "caption")).captions() == ["A", "B", "C", "D"]
    many = samples.open_dataset(str(saved / "one"), caption_column="many")
    assert many.captions() == [["x", "y"], [], None, ["z"]]
    assert {caption_of(many[0], seed) for seed in range(30)} == {"x", "y"} and caption_of(many[3]) == "z"
    for number in (1, 2):
        with pytest.raises(Skip, match="no caption"):
            caption_of(many[number])


def test_dataset_rows_can_be_sent_to_loader_workers(saved):
    rows = samples.open_dataset(str(saved / "one"), caption_column="alt")
    again = pickle.loads(pickle.dumps(rows))
    assert [again[n] for n in range(4)] == [rows[n] for n in range(4)]


def test_an_image_folder_is_a_dataset(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for number in range(3):
        picture(number).save(folder / "sub" / f"{number}.png")
    lines = [{"file_name": f"sub/{n}.png", "text": f"number {n}"} for n in range(3)]
    write_metadata(folder, "jsonl", lines)
    rows = samples.open_dataset(str(folder), cache_dir=tmp_path / "cache")
    assert sorted((number_of(rows[n]), caption_of(rows[n])) for n in range(3)) == [
        (n, f"number {n}") for n in range(3)
    ]  # fmt: skip
    assert (tmp_path / "cache").is_dir(), "--cache_dir is used"
    (folder / "sub/1.png").unlink()
    gone = next(n for n, caption in enumerate(rows.captions()) if caption == "number 1")
    with pytest.raises(Skip, match="unreadable image"):
        rows[gone]
    assert number_of(rows[(gone + 1) % 3]) != 1


def test_a_row_without_an_image_is_skipped():
    columns = {"image": [None, picture(5)], "text": ["a", "b"]}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(
        {"image": datasets.Image(decode=False), "text": datasets.Value("string")}))  # fmt: skip
    rows = samples.DatasetRows(made, "image", "text")
    with pytest.raises(Skip, match="unreadable image"):
        rows[0]
    assert number_of(rows[1]) == 5


@pytest.mark.parametrize(
    "columns, message",
    [
        (("gone", None), "--image_column gone is no column"), ((None, "gone"), "--caption_column gone is no column"),
    ],
)  # fmt: skip
def test_a_missing_column_is_one_sentence_that_lists_the_columns(saved, columns, message):
    with pytest.raises(UserError, match=message) as error:
        samples.open_dataset(str(saved / "one"), None, *columns)
    assert "it has image, text, alt, many, second." in str(error.value) and "\n" not in str(error.value)


def test_datasets_without_the_usual_columns_are_one_sentence(tmp_path):
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "plain")
    with pytest.raises(UserError, match="--image_column image is no column"):
        samples.open_dataset(str(tmp_path / "plain"))
    made = make_dataset().remove_columns(["text", "alt"])
    made.save_to_disk(tmp_path / "silent")
    with pytest.raises(UserError, match="--caption_column text is no column"):
        samples.open_dataset(str(tmp_path / "silent"))


def test_a_dataset_that_cannot_be_had_is_one_sentence(saved, tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route\n\n  to the hub " + 1000 * "x")

    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "none", tmp_path / "empty", saved / "no-train"):
        with pytest.raises(UserError, match=f"--dataset_name {name} cannot be loaded: .") as error:
            samples.open_dataset(str(name), cache_dir=tmp_path / "cache")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="--dataset_name some/thing cannot be loaded: no route to the hub x") as error:
        samples.open_dataset("some/thing")
    assert len(str(error.value)) < 400
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        samples.open_dataset("some/thing")


def test_name_configuration_and_cache_reach_the_library(monkeypatch, tmp_path):
    asked = []

    def answer(name, config, cache_dir=None):
        asked.append((name, config, cache_dir))
        return datasets.DatasetDict({"train": make_dataset()})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    rows = samples.open_dataset("some/thing", "large", caption_column="alt", cache_dir=str(tmp_path))
    assert asked == [("some/thing", "large", str(tmp_path))] and rows.captions() == ["A", "B", "C", "D"]

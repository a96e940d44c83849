"""Hub datasets: names by a stand-in for `load_dataset`, reading by real local folders."""

import json

import datasets
import pytest

from halos_pl.data.records import DataError
from halos_pl.data.sources import Source, copy_rows, count_rows, fingerprint, hub, load_records, read_rows
from halos_pl.data.sources.hub import Place

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(4)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my_data"
    path.mkdir()
    for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        rows = ROWS[: 0 if name == "org/empty" else 2]
        data = datasets.Dataset.from_list(rows)
        return data.to_iterable_dataset() if options.get("streaming") else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_names_splits_and_revisions_go_to_datasets(asked):
    loaded = load_records("org/name")
    assert [str(x.origin) for x in loaded.records] == ["org/name[train]:1", "org/name[train]:2"]
    assert [x.prompt for x in load_records("name", "test").records] == ["p0", "p1"]
    load_records("org/name@v2.1")
    load_records(Source(reader="kto-mix", split="test"))
    assert asked == [
        ("org/name", {"split": "train"}),
        ("name", {"split": "test"}),
        ("org/name", {"split": "train", "revision": "v2.1"}),
        ("trl-lib/kto-mix-14k", {"split": "test"}),
    ]
    with pytest.raises(DataError, match=r"org/empty: no rows in split 'train'"):
        load_records("org/empty")


def test_a_streamed_dataset_gives_its_first_rows(asked):
    rows = list(read_rows(Source("org/name", streaming=True, limit=1)))
    assert [row for _, row in rows] == ROWS[:1]
    assert asked == [("org/name", {"split": "train", "streaming": True})]
    assert len(list(read_rows(Source("org/name", limit=1)))) == 2  # else a limit is drawn by the seed
    assert count_rows(Source("org/name", streaming=True)) is None
    assert count_rows(Source("org/name")) == 2


def test_nothing_is_asked_for_that_may_run_code(asked):
    list(read_rows("org/name"))
    assert not any("trust" in key for _, options in asked for key in options)


def test_real_folders_are_read_and_streamed(folder):
    for streaming in (False, True):
        rows = list(hub.read(Place(str(folder), "train", streaming=streaming)))
        assert [row for _, row in rows] == ROWS[:3]
        assert rows[2][0].row == 3
    assert [row for _, row in hub.read(str(folder), "test")] == ROWS[3:]
    with pytest.raises(DataError, match="split 'dev' of a hub dataset of this name could not be loaded: ValueError"):
        list(hub.read(str(folder), "dev"))


def test_scripts_in_a_folder_are_never_run(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "my_data.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(DataError, match="Dataset scripts are no longer supported"):
        list(hub.read(str(folder), "train"))
    assert len(list(read_rows(str(folder), "train"))) == 3
    for name in [*folder.glob("*.jsonl")]:
        name.unlink()
    for read in (hub.read, read_rows):
        with pytest.raises(DataError):
            list(read(str(folder), "train"))
    assert not ran.exists()


def test_the_fingerprint_changes_with_the_data(folder, monkeypatch):
    for streaming in (False, True):
        place = Place(str(folder), "train", streaming=streaming)
        before = hub.fingerprint(place)
        assert hub.fingerprint(place) == before
    changed = json.dumps(ROWS[3]) + "\n"
    (folder / "train.jsonl").write_text(changed * 7)
    for streaming in (False, True):
        assert hub.fingerprint(Place(str(folder), "train", streaming=streaming)) != before
    plain = hub.fingerprint(Place(str(folder), "train"))
    assert hub.fingerprint(Place(str(folder), "test")) != plain
    with pytest.raises(DataError, match="could not be loaded"):
        hub.fingerprint(Place(str(folder / "nothing"), streaming=True))
    monkeypatch.setattr("halos_pl.data.sources.hub.fingerprint", lambda place: "same")
    one = Source("org/name", streaming=True)
    assert fingerprint(Source("org/name", streaming=True, limit=2)) != fingerprint(one)
    assert fingerprint(Source("org/name", limit=3)) == fingerprint(Source("org/name"))


def test_rows_of_the_hub_are_copied_as_json(asked, tmp_path):
    with (tmp_path / "out").open("wb") as out:
        assert copy_rows(Source("org/name"), {("org/name[train]", 2), ("other", 1)}, out) == {("org/name[train]", 2)}
    assert [json.loads(x) for x in (tmp_path / "out").read_text().splitlines()] == [ROWS[1]]


def test_a_connection_that_breaks_is_told(monkeypatch):
    def broken():
        yield ROWS[0]
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: broken())
    rows = read_rows(Source("org/name", streaming=True))
    assert next(rows)[1] == ROWS[0]
    with pytest.raises(DataError, match=r"org/name\[train\]: stopped after row 1: ConnectionError: gone"):
        next(rows)


def test_unreachable_hub_is_rephrased(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for spec in ("no-such-org/no-such-data", "no-such-data"):
        with pytest.raises(
            DataError, match=f"'{spec}' is not a local file or folder, and split 'train' of a hub dataset"
        ):
            load_records(spec)

"""Parquet files that are damaged, or hold what Python does not."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos_pl.data.records import DataError
from halos_pl.data.sources import formats, load_records


def parquet(path, kind):
    """A file that Arrow writes without a word, and that cannot become rows."""
    if kind == "text":
        offsets, text = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
        column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, text])
    else:
        number, to = {"time": (2**40, pa.timestamp("s")), "zone": (1, pa.timestamp("s", tz="Mars/Olympus"))}[kind]
        column = pa.array([number], pa.int64()).cast(to)
    pq.write_table(pa.table({"prompt": ["p"], "completion": ["c"], "other": column}), path)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [("text", "'utf-8' codec can't decode"), ("time", "days=|date value"), ("zone", "a time zone that is not known")],
)
def test_parquet_values_that_python_has_not(tmp_path, kind, says):
    path = parquet(tmp_path / "a.parquet", kind)
    with pytest.raises(DataError, match=rf"^{path}: not Parquet that can be read: ({says})"):
        load_records(str(path))


@pytest.mark.parametrize("use", [lambda path: list(formats.read_file(path)), formats.count_parquet])
def test_a_damaged_footer_is_named_in_one_line(tmp_path, use):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "completion": ["c"]}), path)
    content = path.read_bytes()
    size = int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[: -8 - size] + b"\x1e" * size + content[-8:])
    with pytest.raises(DataError, match=rf"^{path}: not Parquet that can be read: Couldn't deserialize thrift.*\Z"):
        use(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=rf"^{path}: cannot be read: not a regular file\Z"):
        use(path)

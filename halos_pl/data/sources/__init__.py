"""Sources: from a file, a folder or a hub dataset to rows and records."""

from halos_pl.data.sources.copying import copy_rows, count_rows
from halos_pl.data.sources.fingerprints import fingerprint
from halos_pl.data.sources.loading import Loaded, load_records
from halos_pl.data.sources.reading import read_rows
from halos_pl.data.sources.rows import Rows, parsed
from halos_pl.data.sources.source import Source, as_sources

__all__ = [
    "Loaded",
    "Rows",
    "Source",
    "as_sources",
    "copy_rows",
    "count_rows",
    "fingerprint",
    "load_records",
    "parsed",
    "read_rows",
]

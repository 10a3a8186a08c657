"""The tables of a report folder by name, as its records have them; nothing here knows what a table says."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynamoe_lab.workbench.files import sha256
from dynamoe_lab.workbench.records import Record

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ReportTables"]


class ReportTables(Mapping):
    """`<notebook>/<stem>` -> the csv of that figure or table as a DataFrame, read when it is asked for.

    A file that is gone, or is not the one that was written, counts as not there: KeyError. So do the tables of a run that did not end well.

    Args:
        folder: the report folder.
        records: of its notebooks.
    """

    def __init__(self, folder: Path, records: list[Record]):
        self._places = {
            f"{record.run.name}/{artifact.stem}": (folder / record.run.name / entry.name, entry.sha256)
            for record in records
            if record.run.status == "ok"
            for artifact in (*record.results.figures, *record.results.tables)
            for entry in artifact.files
            if entry.name.endswith(".csv")
        }
        self._frames: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> "pd.DataFrame":
        import pandas as pd

        if name not in self._frames:
            path, digest = self._places[name]
            if not path.is_file() or sha256(path) != digest:
                raise KeyError(name)
            self._frames[name] = pd.read_csv(path)
        return self._frames[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

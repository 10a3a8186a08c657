"""`build_report`: one page from the records of a report folder; a pure function of them, so the same records give the same bytes.

It reads `record.json`, the csv of figures and tables and the sanitized texts, and measures nothing: no torch, no clock. First the headline
findings, in the order in which a reader asks, each linked to the figure it was computed from; then what every setting costs and saves, and
the papers' claims with a verdict each, both computed from those csv; then a section a notebook with its question, other findings, figures,
tables, numbers and steps; then what it all ran on.
"""

import csv
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamoe_lab.errors import InputError
from dynamoe_lab.workbench.files import locked, remove_leftovers, sha256, told_when_full, write_atomic
from dynamoe_lab.workbench.records import RECORD_NAME, Artifact, Finding, Record, StoredFile, effective_status, load_records, place_text
from dynamoe_lab.workbench.report_tables import ReportTables
from dynamoe_lab.workbench.terminal import duration_text, number_text, size_text

if TYPE_CHECKING:
    from dynamoe_lab.analysis.findings.claims import Claim

__all__ = ["build_report"]

RANDOM_MODEL = "smollm2-pico"  # of the smoke profile
TABLE_ROWS = 40  # more than a page shows no one reads; the csv has them all
CLAIMS_NAME = "claims.csv"  # beside the page: its table of claims
FINDINGS = 8  # more in one list drown the reader: the rest is folded
READING_ORDER = ("01", "06", "04", "07", "02", "03", "05", "20")  # of the headlines: what it is, what it costs, where it errs, what else
WIDE = 1_400  # pixels of a figure that is given more than the column of text
STATUS_WORDS = {"ok": "done", "failed": "failed", "interrupted": "interrupted", "running": "running", "stale": "stale"}


@dataclass
class _Table:
    header: list[str]
    rows: list[list[tuple[str, bool]]]  # text of a cell, and whether it is a number
    omitted: int
    caption: str = ""


@dataclass
class _Item:
    """A figure or a table as the page shows it."""

    stem: str
    caption: str
    csv: str
    image: str = ""
    vector: str = ""
    width: int = 0
    height: int = 0
    table: _Table | None = None
    html: str = ""  # sanitized when it was written

    @property
    def wide(self) -> bool:
        return self.width >= WIDE

    missing: list[str] = field(default_factory=list)


@dataclass
class _Section:
    name: str
    title: str
    record: Record
    status: str
    figures: list[_Item]
    tables: list[_Item]
    texts: list[_Item]
    findings: list[Finding]  # those that do not open the page
    page: str  # the executed notebook, if it is there and of this run


def build_report(folder: str | Path, *, expected: Sequence[str] | None = None) -> Path:
    """Write `folder/index.html` from the records below `folder`; returns its path.

    Args:
        folder: a report folder, e.g. `reports/quick`.
        expected: names of the notebooks that belong in it, to say which are missing; None: those of the project the folder lies in.

    Raises:
        InputError: the folder holds no record, or one that cannot be read.
    """
    folder = Path(folder)
    if not any(folder.glob(f"*/{RECORD_NAME}")):
        raise InputError(f"{folder}: no records in this folder; make some with: dynamoe-lab run --profile quick")
    with locked(folder / "report.lock", waits_for=f"the report of {folder}"), told_when_full(folder, "free some, and build it again"):
        remove_leftovers(folder)
        return _build(folder, expected)


def _build(folder: Path, expected: Sequence[str] | None) -> Path:
    """`build_report`, alone: of two at a time the later one must not write a page of older records."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from dynamoe_lab.analysis.findings.claims import FAILS, HOLDS, RULE, UNDECIDED, claims_frame

    records = load_records(folder)
    sections, tables = [_section(record, folder) for record in records], ReportTables(folder, records)
    names = _project_notebooks(folder) if expected is None else expected
    profiles = sorted({section.record.run.profile for section in sections})
    made = {section.name for section in sections}
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    pages.filters |= {"unbroken": _unbroken, "number": number_text, "duration": duration_text, "memory": size_text, "place": place_text}
    claims = _claims(tables)
    if claims:
        frame = claims_frame(claim for _, group in claims for claim in group)
        write_atomic(folder / CLAIMS_NAME, frame.to_csv(index=False, lineterminator="\n"))
    html = pages.get_template("index.html.j2").render(
        profiles=profiles,
        facts=_facts(sections),
        random_model=any(section.record.run.config.get("model") == RANDOM_MODEL for section in sections),
        sections=sections,
        words=STATUS_WORDS,
        headlines=_headlines(sections),
        settings=_settings(tables),
        claims=claims,
        rule=RULE,
        verdict_classes={HOLDS: "holds", FAILS: "fails", UNDECIDED: "undecided"},
        most=FINDINGS,
        troubled=[section for section in sections if section.status not in ("ok", "running")],
        missing=[(name, f"dynamoe-lab run {name} --profile {profiles[0]}") for name in names if name not in made],
        environment=_environment(sections),
    )
    path = folder / "index.html"
    write_atomic(path, html)
    return path


def _project_notebooks(folder: Path) -> list[str]:
    """Names of the notebooks of the checkout that a report folder lies in; none if it lies elsewhere."""
    for place in folder.resolve().parents:
        if (place / "configs" / "defaults.yaml").is_file():
            return sorted(path.stem for path in (place / "notebooks").glob("*.ipynb") if not path.name.startswith("."))
    return []


# --- a notebook's section ----------------------------------------------------------------------------------------------------------


def _section(record: Record, folder: Path) -> _Section:
    name = record.run.name
    pages = [entry.name for entry in record.results.notebook if entry.name == "notebook.html" and _is_there(entry, folder / name)]
    return _Section(
        name=name,
        title=record.run.title or name,
        record=record,
        status=effective_status(record),
        figures=[_item(artifact, folder, name) for artifact in record.results.figures],
        tables=[_item(artifact, folder, name) for artifact in record.results.tables],
        texts=[_item(artifact, folder, name) for artifact in record.results.fragments],
        findings=[finding for finding in record.results.findings if not finding.headline],
        page=f"{name}/{pages[0]}" if pages else "",
    )


def _item(artifact: Artifact, folder: Path, name: str) -> _Item:
    files = {Path(entry.name).suffix: entry.name for entry in artifact.files}
    missing = [entry.name for entry in artifact.files if not _is_there(entry, folder / name)]
    present = {suffix: f"{name}/{file}" for suffix, file in files.items() if file not in missing}
    item = _Item(
        artifact.stem, artifact.caption, present.get(".csv", ""), present.get(".png", ""), present.get(".svg", ""), missing=missing
    )
    if item.image:
        item.width, item.height = _png_size(folder / item.image)
    elif item.csv:
        item.table = _table(folder / item.csv)
        missing += [] if item.table is not None else [files[".csv"]]
    elif ".html" in present:
        from dynamoe_lab.workbench.export import clean_fragment

        # Sanitized when it was written, and again: a record that came from elsewhere has the digest of whatever came with it.
        item.html = clean_fragment((folder / present[".html"]).read_text(encoding="utf-8", errors="replace"))
    return item


def _is_there(entry: StoredFile, folder: Path) -> bool:
    """Whether a file is there, and the very one that was written."""
    path = folder / entry.name
    return path.is_file() and sha256(path) == entry.sha256


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, so that the page does not jump while it loads."""
    with path.open("rb") as stream:
        header = stream.read(24)
    return struct.unpack(">II", header[16:24]) if header[12:16] == b"IHDR" and len(header) == 24 else (0, 0)


def _table(path: Path) -> _Table | None:
    """The table in a csv, cut to what a page shows; None if it is none."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
    except (ValueError, csv.Error):
        return None
    if any(len(row) != len(header) for row in rows):
        return None
    filled = [place for place, _ in enumerate(header) if not rows or any(row[place] for row in rows)]  # an empty column says nothing
    header, rows = [header[place] for place in filled], [[row[place] for place in filled] for row in rows]
    shown = [[_cell(text) for text in row] for row in rows[:TABLE_ROWS]]
    return _Table(header, shown, max(len(rows) - TABLE_ROWS, 0))


def _cell(text: str) -> tuple[str, bool]:
    """The text as it stands in the csv, floats cut to what can be read, and whether it is a number."""
    try:
        number = float(text)
    except ValueError:
        return text, False
    return (text if text.lstrip("-").isdigit() or number != number else f"{number:.5g}"), True


def _headlines(sections: list[_Section]) -> list[tuple[_Section, Finding]]:
    """The findings that open the page, with their sections; notebooks that a reader asks for first come first."""
    rank = {number: place for place, number in enumerate(READING_ORDER)}
    ordered = sorted(sections, key=lambda section: rank.get(section.name[:2], len(rank)))  # stable: the others keep their order
    return [(section, finding) for section in ordered for finding in section.record.results.findings if finding.headline]


def _settings(tables: ReportTables) -> _Table | None:
    """What every setting costs and saves; None without a frontier."""
    from dynamoe_lab.analysis.findings.claims import UNMEASURED
    from dynamoe_lab.analysis.findings.settings import SETTINGS_HEADER, settings_note, settings_rows, settings_table

    try:
        table = settings_table(tables["06_pareto/pareto"])
        rows = [[(text, place > 0) for place, text in enumerate(row)] for row in settings_rows(table)]
        return _Table(SETTINGS_HEADER, rows, 0, settings_note(table)) if len(rows) > 1 else None
    except UNMEASURED:
        return None


def _claims(tables: ReportTables) -> "list[tuple[str, list[Claim]]]":
    """The papers' claims, a group a paper and one for what was left open; none if no table of theirs is there."""
    from dynamoe_lab.analysis.findings.claims import ORIGINS, measured_claims

    found = measured_claims(tables)
    groups = [(title, [claim for claim in found if claim.origin == origin]) for origin, title in ORIGINS.items()]
    return [(title, claims) for title, claims in groups if claims]


def _unbroken(text: str) -> str:
    """A sentence whose numbers keep their signs and units on one line."""
    return text.replace(" %", "\u00a0%").replace(" = ", "\u00a0=\u00a0")


# --- the page as a whole -----------------------------------------------------------------------------------------------------------


def _facts(sections: list[_Section]) -> list[tuple[str, str]]:
    """What was converted, from the resolved experiments; where notebooks differ, all values stand there."""
    wanted = (
        ("Model", ("model",)),
        ("Expert sizes", ("dynamoe", "experts")),
        ("Label", ("dynamoe", "label")),
        ("θ, unless named", ("dynamoe", "theta")),
        ("λ LM, λ router", ("dynamoe", "lambda_lm"), ("dynamoe", "lambda_router")),
        ("Held-out tokens", ("data", "heldout_tokens")),
        ("Text", ("data", "train")),
        ("Context, tokens", ("data", "context")),
        ("Seed", ("seed",)),
    )
    facts = []
    for label, *paths in wanted:
        values: list[str] = []
        for section in sections:
            parts = [_plain(_at(section.record.run.config, path)) for path in paths]
            text = ", ".join(parts)
            if all(parts) and text not in values:
                values.append(text)
        if values:
            facts.append((label, " | ".join(values)))
    trained = [(f"{name} trained on", _budgets(sections, part)) for name, part in (("DynaMoE", "train"), ("ToMoE", "tomoe_train"))]
    place = next((number for number, (label, _) in enumerate(facts) if label == "Held-out tokens"), len(facts))
    return facts[:place] + [(label, text) for label, text in trained if text] + facts[place:]


def _budgets(sections: list[_Section], part: str) -> str:
    """Training tokens of a method by its notebooks' settings: the commonest budget, and which notebooks have another."""
    budgets: dict[str, int] = {}
    for section in sections:
        config = section.record.run.config
        sizes = [_at(config, (part, name)) for name in ("steps", "batch_size", "accumulation")] + [_at(config, ("data", "context"))]
        trains = any(use.function == "train" for use in section.record.results.steps) and (part == "train") != ("tomoe" in section.name)
        if trains and all(isinstance(size, int) for size in sizes):
            budgets[section.name] = math.prod(sizes)
    if not any(budgets.values()):
        return ""
    from dynamoe_lab.analysis.frames import list_names

    (usual, _), *_ = Counter(budgets.values()).most_common(1)
    named: dict[int, list[str]] = {}
    for name, tokens in budgets.items():
        named.setdefault(tokens, []).append(name)
    other = [f"{tokens:,} in {list_names(names, 12)}" for tokens, names in named.items() if tokens != usual]
    return f"{usual:,} tokens{f' ({list_names(other, 12)})' if other else ''}"


def _at(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return "" if value is None else number_text(value) if isinstance(value, (int, float)) else str(value)


def _environment(sections: list[_Section]) -> list[tuple[str, str]]:
    rows: dict[str, list[str]] = {}
    for section in sections:
        env = section.record.env
        commit = f"{env.commit[:12]}{' with uncommitted changes' if env.dirty else ''}" if env.commit else ""
        pairs = [
            ("commit", commit),
            ("code digest", env.code[:12]),
            ("Python", env.python),
            ("platform", env.platform),
            ("torch threads", "" if env.threads is None else str(env.threads)),
            ("packages", ", ".join(f"{name} {version}" for name, version in env.packages.items())),
            ("seeds", ", ".join(f"{name} {seed}" for name, seed in env.seeds.items())),
        ]
        for name, value in pairs:
            if value and value not in rows.setdefault(name, []):
                rows[name].append(value)
    return [(name, " | ".join(values)) for name, values in rows.items() if values]

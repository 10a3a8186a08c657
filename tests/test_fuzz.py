"""Whatever is written into configs, parameters, sweeps, task files and texts: it works, or it is refused in one line, and it ends.

A few examples with `make test`, always the same ones; for thousands of new ones, shared out among the fuzzers:

    DYNAMOE_LAB_FUZZ=2000 python -m pytest tests/test_fuzz.py
"""

import gzip
import json
import math
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamoe_lab.config import field_names, load_experiment
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation.task_sources import foreign_code, read_definition, task_sources
from dynamoe_lab.texts import find_sources
from dynamoe_lab.workbench.parameters import Parameter, parse_value
from dynamoe_lab.workbench.records import Record, RunInfo, load_record
from dynamoe_lab.workbench.report import build_report
from dynamoe_lab.workbench.sweep_file import SweepFile, load_sweep

ASKED = int(os.environ.get("DYNAMOE_LAB_FUZZ", "0"))
FUZZERS = 9


def fuzz(share: float = 1.0):
    """Settings of a fuzzer: `share` of what each of them gets on average."""
    examples = max(8, math.ceil((ASKED or 90) * share / FUZZERS))
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=20_000, derandomize=not ASKED, database=None, suppress_health_check=quiet)


def told(call, *arguments, **options):
    """What it gives; None if it refuses, which it has to do in one line."""
    try:
        return call(*arguments, **options)
    except InputError as error:
        line = str(error)
    assert line
    assert line.isprintable()
    return None


# Pieces that mean something to YAML, OmegaConf, jinja and Python, among any characters.
PIECES = [
    "",
    "~",
    "null",
    "true",
    ".nan",
    ".inf",
    "-.inf",
    "1e400",
    "-1",
    "0x_",
    "0b",
    "1_0",
    "1:60",
    "2001-13-45",
    "2020-01-01",
    "9" * 5000,
]
PIECES += [
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!binary x",
    "!!binary aGk=",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!python/none",
    "!!merge x",
]
PIECES += [
    "&a [*a]",
    "*a",
    "<<: {a: 1}",
    "=",
    "? a",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "#",
    "'",
    '"',
    "|\n a",
    "%TAG",
    "---\n",
    "...\n",
    "\t",
]
PIECES += [
    "${",
    "${x}",
    "${a.b}",
    "${oc.env:HOME}",
    "${.}",
    "???",
    "{{ x }}",
    "{% for",
    "\0",
    "\x1b[31m",
    "\ud800",
    "\u2028",
    "é",
    "²",
    "$",
    "<b>",
]
PIECES += ["[" * 2000, "{a: " * 500, "dynamoe.theta", "../..", "/etc/passwd", "~x/y", "c4", "smollm2-pico", "quick", "a+b", "[0.5, 1.0]"]
TEXT = st.one_of(st.text(max_size=20), st.sampled_from(PIECES), st.lists(st.sampled_from(PIECES), max_size=4).map("".join))
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from([0, 1, 2, 0.5, "router", 10**30, -(2**63), 1e308])
)
VALUE = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXT, SCALAR), inner, max_size=3)), max_leaves=6
)


@st.composite
def keys(draw, known: list[str]):
    """A known name, often with a slip of the pen."""
    name = draw(st.sampled_from(known))
    place = draw(st.integers(0, len(name)))
    changed = name[:place] + draw(TEXT) + name[place + draw(st.integers(0, 2)) :]
    return draw(st.sampled_from([name, name, name, changed, name.partition(".")[0], name.rpartition(".")[2]]))


def nested(pairs: list[tuple[str, object]]) -> dict:
    """Dotted names as maps within maps."""
    tree: dict = {}
    for name, value in pairs:
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place[parent] if isinstance(place.get(parent), dict) else place.setdefault(parent, {})
            if not isinstance(place, dict):
                break
        else:
            place[last] = value
    return tree


def dumped(value: object) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


BYTES = st.one_of(st.binary(max_size=200), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")), st.builds(dumped, VALUE))
FIELDS = field_names()


@fuzz(1.5)
@given(pairs=st.lists(st.tuples(keys(FIELDS), st.one_of(TEXT, SCALAR.map(str), VALUE.map(repr))), min_size=1, max_size=3))
def test_overrides(pairs):
    experiment = told(load_experiment, "quick", [f"{name}={value}" for name, value in pairs])
    if experiment is not None:
        assert all(map(math.isfinite, experiment.dynamoe.experts))
        assert 0 <= experiment.seed < 2**32


@fuzz(1.5)
@given(pairs=st.lists(st.tuples(keys(FIELDS), VALUE), min_size=1, max_size=4))
def test_profiles(tmp_path, pairs):
    (tmp_path / "mine.yaml").write_bytes(dumped(nested(pairs)))
    told(load_experiment, str(tmp_path / "mine.yaml"))


@fuzz()
@given(content=BYTES, name=st.sampled_from(["profile", "sweep"]))
def test_files_that_may_be_no_yaml(tmp_path, content, name):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    told(load_experiment, str(path)) if name == "profile" else told(load_sweep, path)


@fuzz(0.7)
@given(
    entries=st.dictionaries(keys(list(vars(SweepFile()))), VALUE, max_size=3),
    axes=st.dictionaries(keys(FIELDS), st.lists(VALUE, max_size=3), max_size=2),
    cells=st.lists(st.dictionaries(keys(FIELDS), VALUE, max_size=2), max_size=2),
)
def test_sweeps(tmp_path, entries, axes, cells):
    path = tmp_path / "mine.yaml"
    path.write_bytes(dumped({"axes": axes, "cells": cells, **entries}))
    sweep = told(load_sweep, path)
    if sweep is not None:
        told(sweep.resolve)


ANNOTATIONS = ["int", "float", "str", "bool", "list", "dict", "list[float]", "list[str | int]", "int | None", "Optional[int]", "NoneType"]


@fuzz(1.5)
@given(annotation=st.sampled_from([*ANNOTATIONS, "Literal['a', 1]", "'int'", "Any"]), text=st.one_of(TEXT, VALUE.map(repr)))
def test_parameters(annotation, text):
    """What fits is a value that papermill writes into a notebook as it is: no text becomes code."""
    import ast

    from papermill.translators import PythonTranslator

    value = told(parse_value, Parameter("x", annotation, None), text)
    if isinstance(value, (str, bool, int, list)) and "nan" not in repr(value) and "inf" not in repr(value):
        written = PythonTranslator.translate(value)
        assert ast.literal_eval(written) == value


@fuzz()
@given(content=BYTES, kind=st.sampled_from([".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz"]), zipped=st.booleans())
def test_text_files(tmp_path, content, kind, zipped):
    path = tmp_path / f"mine{kind}"
    path.write_bytes(gzip.compress(content) if zipped and kind.endswith(".gz") else content)
    documents = told(lambda: [document for source in find_sources(path) for document in source.read()])
    for document in documents or ():
        assert document.strip()
        document.encode()


@fuzz()
@given(
    rows=st.lists(st.one_of(st.dictionaries(st.sampled_from(["text", "txt", "id"]), VALUE, max_size=2), VALUE), max_size=4),
    slip=st.integers(0, 60),
)
def test_rows_of_jsonl(tmp_path, rows, slip):
    lines = "\n".join(json.dumps(row, default=str, skipkeys=True) for row in rows)
    path = tmp_path / "mine.jsonl"
    path.write_text(lines[:slip] + lines[slip + (slip % 3 == 0) :], encoding="utf-8", errors="surrogatepass")
    documents = told(lambda: [document for source in find_sources(path) for document in source.read()])
    if documents is not None:
        assert documents


TASK_FIELDS = ["task", "include", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text", "metric_list", "group"]


@fuzz(0.8)
@given(content=st.one_of(BYTES, st.dictionaries(keys(TASK_FIELDS), VALUE, max_size=5).map(dumped)))
def test_task_files(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    definition = told(read_definition, path)
    if definition is not None:
        foreign_code(definition)
        told(task_sources, path)


RECORD_PLACES = [("run", name) for name in ("name", "status", "pid", "seconds", "finished", "config", "error", "peak_memory_bytes")]
RECORD_PLACES += [("results", name) for name in ("scalars", "tables", "figures", "fragments", "findings", "steps")] + [("env", "packages")]


@fuzz(0.3)
@given(changes=st.lists(st.tuples(st.sampled_from(RECORD_PLACES), VALUE), min_size=1, max_size=3))
def test_records(tmp_path, changes):
    folder = tmp_path / "report" / "01_a"
    folder.mkdir(parents=True, exist_ok=True)
    Record(RunInfo("01_a", status="ok")).write(folder)
    content = json.loads((folder / "record.json").read_text())
    for (section, name), value in changes:
        content[section][name] = value
    (folder / "record.json").write_text(json.dumps(content, default=str, skipkeys=True))
    if told(load_record, folder) is not None:
        told(build_report, folder.parent, expected=[])


def test_the_fuzzers_are_counted():
    """So that DYNAMOE_LAB_FUZZ=2000 means 2,000."""
    found = [function for name, function in globals().items() if name.startswith("test_") and hasattr(function, "hypothesis")]
    assert len(found) == FUZZERS
    assert sum(function._hypothesis_internal_use_settings.max_examples for function in found) >= (ASKED or 72)


@pytest.mark.parametrize("text", ['"; open("ran", "w") #', "'''", "\\", "\\'", "\r\n", "{x}", "\u2028", "\x00"])
def test_a_text_for_a_notebook_stays_a_text(text):
    import ast

    from papermill.translators import PythonTranslator

    assert ast.literal_eval(PythonTranslator.translate(parse_value(Parameter("x", "str", ""), text))) == text

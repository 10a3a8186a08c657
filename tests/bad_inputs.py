"""Bad inputs that need no model: name -> (what is called with a project's folder, what its one line must say).

A call raises `InputError`, or is a command whose line on stderr is returned. Whatever in them could run code would write the file `ran`.
"""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["INPUTS", "command", "hostile_yaml", "written"]

Case = tuple[Callable[[Path], object], list[str]]
PARAMETERS = (
    "profile: str = 'quick'\noverrides: list = []\noutput: str = ''\nn: int = 3\nratio: float = 0.5\nseeds: list[int] = [0]\n"
    "how: Literal['a', 'b'] = 'a'\nlimit: int | None = None\nword: str = ''"
)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with that content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def hostile_yaml(key: str) -> str:
    """YAML that would run a shell command where python tags are obeyed."""
    return f"{key}: !!python/object/apply:os.system ['touch ran']"


def alias_bomb() -> str:
    """Nine lines that stand for 9 ** 8 values."""
    lines = ["a: &a [" + ", ".join("x" * 9) + "]"]
    for before, name in zip("abcdefg", "bcdefgh", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


def profile(content: str | bytes, name: str = "mine.yaml") -> Callable[[Path], object]:
    def call(place):
        from dynamoe_lab.config import load_experiment

        return load_experiment(str(written(place, name, content)))

    return call


def override(text: str) -> Callable[[Path], object]:
    def call(place):
        from dynamoe_lab.config import load_experiment

        return load_experiment("quick", [text])

    return call


def notebook(*given: str, source: str | None = PARAMETERS, raw: str | bytes | None = None) -> Callable[[Path], object]:
    """`run` of a project's only notebook, up to where a kernel would start."""

    def call(place):
        import nbformat

        from dynamoe_lab.workbench.notebooks import discover, prepare

        cell = nbformat.v4.new_code_cell(source or "", metadata={"tags": ["parameters"] if source is not None else []})
        content = nbformat.writes(nbformat.v4.new_notebook(cells=[cell])) if raw is None else raw
        written(place / "notebooks", "01_a.ipynb", content)
        return prepare(discover(), given=given)

    return call


def sweep(content: str | bytes, name: str = "mine.yaml") -> Callable[[Path], object]:
    def call(place):
        from dynamoe_lab.workbench.sweep_file import load_sweep

        return load_sweep(written(place, name, content)).resolve()

    return call


def text(name: str, content: str | bytes | Callable[[Path], object]) -> Callable[[Path], object]:
    def call(place):
        from dynamoe_lab.texts import find_sources

        path = place / name
        content(path) if callable(content) else written(place, name, content)
        return [document for source in find_sources(path) for document in source.read()]

    return call


def parquet(columns: dict) -> Callable[[Path], object]:
    def write(path):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return write


def no_utf8(path: Path) -> None:
    """A parquet file whose column of texts holds bytes that are none."""
    import pyarrow

    parquet({"text": pyarrow.array([b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())})(path)


def command(*words: object) -> Callable[[Path], object]:
    """The command line, in this process: exit code 2 and one line."""

    def call(place):
        from typer.testing import CliRunner

        from dynamoe_lab.workbench.cli import app

        if words[0] == "run":
            import nbformat

            cell = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
            written(place, "notebooks/01_a.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 2, (done.output, done.exception)
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("dynamoe-lab: ")
        return done.stderr.rstrip("\n")

    return call


def started(name: str) -> Callable[[Path], object]:
    def call(place):
        import dynamoe_lab as lab

        return lab.start(name, profile="smoke", output=str(place / "report"))

    return call


def stored(stem: str) -> Callable[[Path], object]:
    def call(place):
        import pandas as pd

        import dynamoe_lab as lab

        run = lab.start("01_a", profile="smoke", output=str(place / "report"))
        run.table(pd.DataFrame({"a": [1]}), stem, caption="A table.")

    return call


def bad_file(name: str, content: str) -> Callable[[Path], object]:
    """A file where a folder is wanted."""
    return lambda place: command("convert", "smollm2-pico", "--output", written(place, name, content))(place)


ROW = '{"text": "fine"}\n'
CONFIGS: dict[str, Case] = {
    "profile: unknown key": (profile("train: {stepz: 3}"), ["mine.yaml", "stepz", "did you mean train.steps"]),
    "profile: a list": (profile("- a\n- b"), ["mine.yaml", "a list", "train: {steps: 40}"]),
    "profile: one word": (profile("42"), ["mine.yaml", "not a readable YAML file"]),
    "profile: a key twice": (profile("seed: 1\nseed: 2"), ["mine.yaml", "duplicate key", "line 2"]),
    "profile: python tags": (profile(hostile_yaml("model")), ["mine.yaml", "os.system", "correct it"]),
    "profile: a bad number": (profile("seed: !!int many"), ["mine.yaml", "many", "correct it"]),
    "profile: a bad date": (profile("model: !!timestamp never"), ["mine.yaml", "correct it"]),
    "profile: holds itself": (profile("train: &t {steps: *t}"), ["mine.yaml", "recursive"]),
    "profile: an alias bomb": (profile(alias_bomb()), ["mine.yaml", "limit of 10000"]),
    "profile: too deep": (profile("train: " + "{a: " * 2000 + "}" * 2000), ["mine.yaml", "nested too deeply"]),
    "profile: huge": (profile("# " + "x" * 1_100_000), ["mine.yaml", "bytes", "give the right file"]),
    "profile: UTF-16": (profile("seed: 1".encode("utf-16")), ["mine.yaml", "utf-8"]),
    "profile: zero bytes": (profile(b"seed: \0"), ["mine.yaml", "control characters"]),
    "profile: a section that is none": (profile("train: [1]"), ["mine.yaml", "TrainConfig"]),
    "profile: reads the environment": (profile("model: ${oc.env:HOME}"), ["outside of the experiment", "write the value"]),
    "profile: notebooks are no map": (profile("notebooks: [1]"), ["mine.yaml", "notebooks is no map", "06_pareto"]),
    "profile: a name of dots": (profile("seed: 1", "...yaml"), ["...yaml", "does not begin with a dot"]),
    "profile: no such file": (lambda place: command("run", "--profile", "nowhere.yaml")(place), ["nowhere.yaml", "no such file"]),
    "profile: a name too long": (command("run", "--profile", "x" * 3000), ["unknown profile", "choose one of"]),
    "override: no value": (override("dynamoe.theta"), ["dynamoe.theta", "key=value"]),
    "override: misspelt": (override("dynamoe.tetha=0.8"), ["tetha", "did you mean dynamoe.theta"]),
    "override: wrong type": (override("train.steps=many"), ["train.steps", "Integer"]),
    "override: out of range": (override("dynamoe.theta=2"), ["theta = 2.0", "-1 to 1"]),
    "override: nan": (override("train.mlp_lr=.nan"), ["train.mlp_lr = nan", "at least 0"]),
    "override: infinite": (override("train.mlp_lr=.inf"), ["train.mlp_lr = inf", "finite"]),
    "override: nan in a list": (override("dynamoe.experts=[.nan, 1.0]"), ["dynamoe.experts", "[0.25,0.5,1.0]"]),
    "override: a list in a list": (override("dynamoe.experts=[[0.5], 1.0]"), ["dynamoe.experts", "list of fractions"]),
    "override: no deviation": (override("dynamoe.router_init_std=-1"), ["router_init_std = -1.0", "at least 0"]),
    "override: a negative seed": (override("train.seed=-1"), ["train.seed = -1", "0 to 4294967295"]),
    "override: a huge seed": (override("seed=99999999999999999999"), ["seed = 9999", "0 to 4294967295"]),
    "override: a million threads": (override("threads=1000000"), ["threads = 1000000", "at most 1024"]),
    "override: absurd memory": (override("dynamoe.router_hidden_size=999999999999"), ["router_hidden_size", "at most 1000000"]),
    "override: contradiction": (override("dynamoe.train_route=9"), ["train_route = 9", "from 0 to 3"]),
    "override: trackers": (override("train.report_to=[{a: 1}]"), ["train.report_to", "trackers by name"]),
    "override: a bad hexadecimal": (override("seed=0x_"), ["seed=0x_", "correct it"]),
    "override: brackets for a key": (override("[=1"), ["[=1", "correct it"]),
    "override: the profile": (override("profile=smoke"), ["profile=smoke", "--profile"]),
    "override: the environment": (override("model=${oc.env:HOME}"), ["outside of the experiment"]),
    "override: no UTF-8": (override("model=\udcff"), [r"model=\udcff", "not UTF-8"]),
}
NOTEBOOKS: dict[str, Case] = {
    "notebook: no JSON": (notebook(raw='{"cells": ['), ["01_a.ipynb", "not a readable notebook"]),
    "notebook: no notebook": (notebook(raw="[1, 2]"), ["01_a.ipynb", "not a readable notebook", "restore it"]),
    "notebook: UTF-16": (notebook(raw="{}".encode("utf-16")), ["01_a.ipynb", "utf-8"]),
    "notebook: too deep": (notebook(raw="[" * 100_000), ["01_a.ipynb", "nested too deeply"]),
    "notebook: a cell of numbers": (
        notebook(raw='{"nbformat":4,"nbformat_minor":4,"metadata":{},"cells":[{"cell_type":"code","metadata":{"tags":3},"source":3}]}'),
        ["01_a.ipynb", "'parameters'"],
    ),
    "notebook: no parameters": (notebook(source=None), ["01_a.ipynb", "'parameters'", "tag the first one"]),
    "notebook: no Python": (notebook(source="profile: str ="), ["01_a.ipynb", "no Python", "line 1"]),
    "notebook: too deep for Python": (notebook(source=f"{PARAMETERS}\nx = {'-' * 5000}1"), ["01_a.ipynb", "nested too deeply"]),
    "notebook: code for a value": (notebook(source=f"{PARAMETERS}\nx = open('ran', 'w')"), ["parameter x", "no literal"]),
    "notebook: a standard one lacks": (notebook(source="profile: str = 'quick'"), ["lacks overrides, output"]),
    "notebook: a name that leads out": (command("run", "../../etc/passwd"), ["../../etc/passwd", "no notebook"]),
    "notebook: a number that is none": (command("run", "²"), ["no notebook '²'", "there are"]),
    "parameter: wrong type": (notebook("n=many"), ["n is a int", "'n=4'"]),
    "parameter: not finite": (notebook("ratio=.inf"), ["ratio is a float", "'ratio=0.8'"]),
    "parameter: no YAML": (notebook("seeds=[1"), ["seeds=[1", "YAML"]),
    "parameter: a date": (notebook("seeds=[2020-01-01]"), ["seeds=", "date", "in quotes"]),
    "parameter: a month 13": (notebook("n=2001-13-45"), ["n=2001-13-45", "month"]),
    "parameter: holds itself": (notebook("seeds=&a [*a]"), ["seeds=", "Circular"]),
    "parameter: python tags": (notebook("seeds=!!python/object/apply:os.system ['touch ran']"), ["seeds=", "os.system"]),
    "parameter: a key that is no text": (notebook("seeds=[{1: 2}]"), ["seeds=", "put keys in quotes"]),
    "parameter: no choice": (notebook("how=c"), ["how is a Literal['a', 'b']"]),
    "parameter: nobody's": (notebook("nothing=1"), ["'nothing'", "known are"]),
    "parameter: no UTF-8": (notebook("word=\udcff"), ["not UTF-8", "type it again"]),
}
SWEEPS: dict[str, Case] = {
    "sweep: misspelt entry": (sweep("axis: {dynamoe.theta: [0.8]}"), ["did you mean axes"]),
    "sweep: unknown field": (sweep("axes: {dynamoe.teta: [0.8]}"), ["dynamoe.teta", "did you mean dynamoe.theta"]),
    "sweep: one value": (sweep("axes: {dynamoe.theta: 0.8}"), ["axes.dynamoe.theta", "list of values"]),
    "sweep: nothing": (sweep(""), ["nothing to do", "give axes, cells or both"]),
    "sweep: a million cells": (
        sweep("axes: {" + ", ".join(f"{name}: {list(range(1, 101))}" for name in ("seed", "train.seed", "train.steps")) + "}"),
        ["1,000,000 cells", "shorten an axis"],
    ),
    "sweep: bytes": (sweep("axes: {model: [!!binary aGk=]}"), ["cell 1", "bytes", "give numbers, texts"]),
    "sweep: python tags": (sweep(hostile_yaml("axes")), ["mine.yaml", "os.system"]),
    "sweep: keys that are numbers": (sweep("cells: [{1: 2}]"), ["cells", "Key 1"]),
    "sweep: an alias bomb": (sweep(alias_bomb()), ["limit of 10000"]),
    "sweep: too deep": (sweep("axes: " + "{a: " * 2000 + "}" * 2000), ["nested too deeply"]),
    "sweep: a mode that is none": (sweep("cells: [{seed: 1}]\nmodes: [{a: 1}]"), ["mode {'a': 1}", "give router"]),
    "sweep: a name of dots": (sweep("cells: [{seed: 1}]", "...yaml"), ["does not begin with a dot"]),
    "sweep: a name too long": (command("sweep", "x" * 3000), ["no sweep", "give a path"]),
    "sweep: a name that leads out": (command("sweep", "../../../etc/passwd"), ["no sweep '../../../etc/passwd'"]),
    "sweep: the output is a file": (
        lambda place: command("sweep", "lambda", "--output", written(place, "afile", ""))(place),
        ["afile", "is a file", "choose another"],
    ),
}
TEXTS: dict[str, Case] = {
    "text: empty": (text("a.txt", ""), ["a.txt", "holds no text", "not empty"]),
    "text: white space": (text("a.txt", " \n\t\n"), ["a.txt", "holds no text"]),
    "text: Latin-1": (text("a.txt", b"caf\xe9 au lait"), ["a.txt", "byte 0xe9 at position 3", "save it as UTF-8"]),
    "text: UTF-16": (text("a.txt", "text".encode("utf-16")), ["a.txt", "not utf-8", "save it as UTF-8"]),
    "text: UTF-16 without a mark": (text("a.txt", "text".encode("utf-16-le")), ["a.txt", "zero bytes", "save it as UTF-8"]),
    "text: binary": (text("a.txt", bytes(range(256))), ["a.txt", "zero bytes"]),
    "text: gzip cut off": (text("a.txt.gz", gzip.compress(os.urandom(9000))[:500]), ["a.txt.gz", "damaged gzip", "compress it again"]),
    "text: a pipe": (text("a.txt", os.mkfifo), ["a.txt", "not a regular file"]),
    "text: a device": (text("a.txt", lambda path: path.symlink_to("/dev/zero")), ["a.txt", "not a regular file"]),
    "text: unknown kind": (text("a.pdf", "text"), ["a.pdf", ".txt, .jsonl, .parquet"]),
    "text: a folder of nothing": (text("folder", Path.mkdir), ["folder", "holds no .txt"]),
    "jsonl: a broken line": (text("a.jsonl", ROW + '{"text":\n'), ["a.jsonl", "line 2", "write one object a line"]),
    "jsonl: a list": (text("a.jsonl", ROW + "[1]\n"), ["a.jsonl", "line 2", "'text'"]),
    "jsonl: no field text": (text("a.jsonl", ROW * 2 + '{"body": "x"}\n'), ["a.jsonl", "line 3", "fields: body", "rename"]),
    "jsonl: a number": (text("a.jsonl", '{"text": 3}\n'), ["a.jsonl", "line 1", "holds int", "rename"]),
    "jsonl: Latin-1": (text("a.jsonl", ROW.encode() + b'{"text": "caf\xe9"}\n'), ["a.jsonl", "line 2", "0xe9"]),
    "jsonl: too deep": (text("a.jsonl", ROW + '{"text": ' + "[" * 200_000), ["a.jsonl", "line 2", "nested too deeply"]),
    "parquet: none": (text("a.parquet", "PAR1 and no more"), ["a.parquet", "not a readable parquet file"]),
    "parquet: no field text": (text("a.parquet", parquet({"body": ["x"]})), ["a.parquet", "fields: body", "rename"]),
    "parquet: numbers": (text("a.parquet", parquet({"text": [1]})), ["a.parquet", "holds int"]),
    "parquet: no UTF-8": (text("a.parquet", no_utf8), ["a.parquet", "utf-8", "write it again"]),
}
NAMES: dict[str, Case] = {
    "name: a run that leads out": (started("../../evil"), ["../../evil", "use letters"]),
    "name: a run of dots": (started(".."), ["use letters"]),
    "name: a stem with a slash": (stored("../evil"), ["../evil", "use small letters"]),
    "name: a stem of the record's": (stored("record"), ["record", "use small letters"]),
    "name: an output that is a file": (bad_file("afile", "x"), ["afile", "is a file", "choose another"]),
    "name: an output too long": (command("convert", "smollm2-pico", "--output", "x" * 300), ["no name of a folder", "choose another"]),
    "name: a run to show": (command("show", "a**b/04"), ["no run 'a**b/04'"]),
    "name: a model too long": (command("convert", "x" * 3000, "--output", "new"), ["model 'xxx", "without the Hub: smollm2-135m"]),
    "name: scores that are a file": (lambda place: command("compare", written(place, "a", json.dumps({})), "b")(place), ["no such folder"]),
}
INPUTS: dict[str, Case] = {**CONFIGS, **NOTEBOOKS, **SWEEPS, **TEXTS, **NAMES}

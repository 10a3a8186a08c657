"""The house stands as designed: dependencies run one way, names are public on purpose, heavy imports come late, notebooks are thin."""

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dynamoe_lab"
PROFILES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "defaults")

# room -> what of ours it may import (errors, a leaf without imports, is open to all but the travelling models)
ALLOWED = {
    "errors": set(),
    "models": set(),
    "config": {"disk", "models"},
    "digests": set(),
    "plural": set(),
    "disk": set(),
    "assets": {"digests", "disk"},
    "texts": {"assets"},
    "vetting": set(),
    "loading": {"assets", "models", "vetting"},
    "data": {"assets", "texts", "loading"},
    "vocabulary": set(),
    "analysis": {"plural"},
    "conversion": {"config", "assets", "loading", "data", "models"},
    "training": {"config", "disk", "assets", "loading", "data", "models"},
    "evaluation": {
        "config",
        "disk",
        "assets",
        "loading",
        "data",
        "models",
        "conversion",
        "training",
        "analysis.statistics",
        "analysis.perplexity_ratio",
    },
    "workbench": {
        "plural",
        "config",
        "digests",
        "disk",
        "assets",
        "loading",
        "texts",
        "data",
        "models",
        "conversion",
        "training",
        "evaluation",
        "analysis",
    },
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Absolute names that a module imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.relative_to(ROOT).with_suffix("").parts[: -node.level])
            names |= {f"{base}.{node.module}.{alias.name}" if node.module else f"{base}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room_of(path) not in ("__init__", "__main__")], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_dependencies_run_one_way(path):
    room = room_of(path)
    for name in imported_names(path):
        if not name.startswith("dynamoe_lab."):
            continue
        target = name.removeprefix("dynamoe_lab.")
        first = target.split(".")[0]
        fine = first == room or (first == "errors" and room != "models") or first in ALLOWED[room]
        fine = fine or any(target.startswith(allowed) for allowed in ALLOWED[room] if "." in allowed)
        assert fine, f"{room} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda path: path.name)
def test_models_travel(path):
    """Files that go with a checkpoint import torch, transformers and each other, and lie flat."""
    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for name in imported_names(path):
        assert name.split(".")[0] in allowed or name.startswith("dynamoe_lab.models"), f"{path.name} imports {name}"
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level > 1)


@pytest.mark.parametrize("path", sorted((PACKAGE / "analysis").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_analysis_never_imports_torch(path):
    assert not {name.split(".")[0] for name in imported_names(path)} & {"torch", "transformers", "datasets", "lm_eval"}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_the_package_is_light():
    heavy = ["torch", "transformers", "pandas", "matplotlib", "datasets", "papermill"]
    assert run_python(f"import sys, dynamoe_lab; print([name for name in {heavy} if name in sys.modules])").strip() == "[]"


def test_help_is_quick():
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dynamoe_lab", "--help"], check=True, capture_output=True, cwd=ROOT)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5, f"dynamoe-lab --help took {min(times):.2f} s"


def test_public_names_resolve_and_are_documented():
    import dynamoe_lab as lab

    assert lab.__all__ == sorted(lab.__all__)
    for name in lab.__all__:
        assert getattr(lab, name).__doc__, f"lab.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lab.nothing
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not modules & set(lab.__all__), "once a module is imported, its name hides the function that is found by it"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__main__.py"], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_all_names_exist_and_have_docstrings(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} says nothing about itself"
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert value.__doc__, f"{name}.{public} has no docstring"


def example_lines(path: Path) -> int:
    """Lines of the examples in a file's docstrings, outputs included."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    examples = [example for node in nodes for example in doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")]
    return sum((example.source + example.want).count("\n") for example in examples)


def test_files_have_one_responsibility():
    """Examples do not count: a file should not be split because it explains itself."""
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) - example_lines(path) for path in MODULES}
    assert not {name: lines for name, lines in long.items() if lines > 360}


# --- notebooks ----------------------------------------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin_and_stripped(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in code]
    stored = any(cell.get("outputs") or cell.get("execution_count") for cell in code)
    assert not stored, f"stored outputs: jupyter nbconvert --clear-output --inplace notebooks/{path.name}"
    assert "parameters" in code[0]["metadata"].get("tags", []), "the first code cell is the parameters cell"
    assert len(code) <= 14, "at most 14 code cells: what is computed belongs into the package"
    assert not any(re.search(r"^(def|class|if smoke)\b", source, re.M) for source in sources), (
        "functions and classes belong into the package"
    )
    assert notebook["metadata"]["kernelspec"]["name"] == "python3", "choose the kernel python3"
    assert f'lab.start("{path.stem}"' in "\n".join(sources), "a notebook opens its record under its own name"
    assert "run.finish()" in sources[-1], "the last code cell calls run.finish(), which closes the record"
    assert notebook["cells"][0]["source"][0].startswith("# "), "it opens with its question"
    parameters = ast.parse(sources[0]).body
    for node in parameters:
        assert isinstance(node, ast.AnnAssign), "a parameter is a line `name: type = value`"
        ast.literal_eval(node.value)
    names = [node.target.id for node in parameters]
    assert names[:3] == ["profile", "overrides", "output"], "the parameters that every notebook has come first"
    read = {node.id for node in ast.walk(ast.parse("\n".join(sources[1:]))) if isinstance(node, ast.Name)}
    assert set(names) <= read, f"parameters that nothing reads: {set(names) - read}"


def test_every_public_name_in_notebooks_exists():
    import dynamoe_lab as lab

    for path in NOTEBOOKS:
        for name in re.findall(r"\blab\.([a-zA-Z_]\w*)", path.read_text(encoding="utf-8")):
            assert name in lab.__all__, f"{path.name} uses lab.{name}"


# --- project files ------------------------------------------------------------------------------------------------------------------


def test_environment_yml_is_true_to_pyproject():
    """conda users install this very project with the same pins; nothing is listed twice."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    assert [item for item in environment["dependencies"] if isinstance(item, str)] == ["python=3.11", "pip", "make"]


def test_constraints_pin_every_dependency_and_fit():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_defaults_yaml_mirrors_the_dataclasses():
    from omegaconf import OmegaConf

    from dynamoe_lab.config import Experiment, field_names

    schema = OmegaConf.structured(Experiment)
    written = OmegaConf.load(ROOT / "configs" / "defaults.yaml")
    assert OmegaConf.to_object(OmegaConf.merge(schema, written)) == Experiment()
    as_lists = json.loads(json.dumps(OmegaConf.to_container(schema)))
    missing = [name for name in field_names() if OmegaConf.select(written, name, default="?") == "?"]
    assert OmegaConf.to_container(written) == as_lists, f"configs/defaults.yaml lacks {', '.join(missing)}"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_shipped_profile_is_valid_and_holds_differences_only(profile):
    import nbformat
    from omegaconf import OmegaConf

    from dynamoe_lab.config import load_experiment
    from dynamoe_lab.workbench.parameters import read_parameters

    assert load_experiment(profile).profile == profile
    defaults = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "defaults.yaml"))
    differences = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / f"{profile}.yaml")) or {}
    for notebook, values in differences.pop("notebooks", {}).items():
        own = read_parameters(nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4), notebook)
        for name, value in values.items():
            assert value != own[name].default, f"{profile}.yaml repeats the default of {name} in {notebook}"
    for key, value in differences.items():
        for name, inner in value.items() if isinstance(value, dict) else [(None, value)]:
            default = defaults[key] if name is None else defaults[key][name]
            assert inner != default, f"{profile}.yaml repeats the default of {key}.{name}"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_shipped_profile_fits_the_notebooks(profile):
    from dynamoe_lab.workbench.notebooks import discover, prepare

    prepare(discover(), profile=profile)


def test_no_path_of_a_machine_is_committed():
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT).stdout.split("\n")
    pattern = re.compile(r"/(?:wor" + r"k|hom" + r"e|roo" + r"t)/[a-z]")
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".ipynb", ".json", ".html", ".txt") and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8", errors="replace")), f"{name} holds a path of a machine"


# --- the README's claims ------------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_what_is_there():
    import dynamoe_lab as lab

    for name in re.findall(r"\blab\.([a-zA-Z_]\w*)", README):
        assert name in lab.__all__, f"README uses lab.{name}"
    listed = re.findall(r"^\| `(\d\d_\w+)` \|", README, re.M)
    assert listed == [path.stem for path in NOTEBOOKS], "README's table has a row `name` | its question for every notebook, in order"
    for target in re.findall(r"^make ([\w-]+)", README, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file()
    for path in re.findall(r"^  ?([a-z_]+(?:/|\.py)) ", README, re.M):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


def test_readme_commands_are_accepted(monkeypatch):
    """Every `dynamoe-lab` line goes through the real parser; what it would run is replaced."""
    import shlex

    from typer.testing import CliRunner

    from dynamoe_lab.config import load_experiment
    from dynamoe_lab.workbench import (
        benchmarks,
        checking,
        checkpoints,
        comparison,
        housekeeping,
        inventory,
        notebooks,
        report,
        showing,
        sweep,
    )
    from dynamoe_lab.workbench.cli import app

    calls = []
    monkeypatch.setattr(
        notebooks,
        "run_notebooks",
        lambda names, **options: (
            calls.append(notebooks.prepare(notebooks.select(names), **{key: options[key] for key in ("profile", "given", "output")})) or {}
        ),
    )
    monkeypatch.setattr(report, "build_report", lambda folder, **_: Path(folder) / "index.html")
    monkeypatch.setattr(sweep, "run_sweep", lambda chosen, **options: calls.append(chosen.resolve()) or sys.exit(0))
    for name in ("convert_to_folder", "train_to_folder"):
        monkeypatch.setattr(checkpoints, name, lambda *_, given, **__: calls.append(load_experiment("quick", given)))
    monkeypatch.setattr(checkpoints, "export_to_folder", lambda *_, **__: calls.append("export"))
    monkeypatch.setattr(benchmarks, "score_to_folder", lambda *_, **__: calls.append("eval"))
    monkeypatch.setattr(comparison, "compare_scores", lambda *_, **__: calls.append("compare"))
    monkeypatch.setattr(inventory, "list_runs", lambda *_: calls.append("ls"))
    monkeypatch.setattr(inventory, "find_run", lambda *_: calls.append("show"))
    monkeypatch.setattr(showing, "show_run", lambda *_: "")
    monkeypatch.setattr(checking, "find_runs", lambda *_: [])
    monkeypatch.setattr(checking, "check_runs", lambda *_, **__: calls.append("check") or True)
    monkeypatch.setattr(housekeeping, "list_cache", lambda *_: calls.append("cache"))
    monkeypatch.setattr(housekeeping, "free_cache", lambda *_, **__: calls.append("free") or 0)
    lines = re.findall(r"^\.venv/bin/dynamoe-lab ([^#\n]+)", README, re.M)
    assert len(lines) >= 10
    for line in lines:
        if not line.startswith("doctor"):
            result = CliRunner().invoke(app, shlex.split(line))
            assert result.exit_code == 0, f"{line}: {result.output}{result.exception}"
    assert len(calls) == sum(not line.startswith(("doctor", "report")) for line in lines)


def test_readme_code_runs_on_a_small_model(monkeypatch, tmp_path):
    """The snippet as it stands, with a pico model and random blocks in the place of the assets."""
    from conftest import make_blocks, make_dense

    import dynamoe_lab as lab

    code = re.search(r"## In your own code\s+```python\n(.*?)```", README, re.S).group(1)
    assert code.count("lab.load_blocks(") == 3
    monkeypatch.chdir(tmp_path)
    names = {"load_model": lambda name: (make_dense(), None), "load_blocks": lambda *args, **kwargs: make_blocks(12)}
    for name, value in names.items():
        monkeypatch.setattr(lab, name, value)
    exec(compile(code.replace("steps=40", "steps=2"), "README.md", "exec"), {})
    assert (tmp_path / "runs" / "theta09" / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["README.md", "LOG.md"])
def test_no_placeholder_is_left(name):
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
    assert not re.findall(r"\b(?:TODO|FIXME|TBD|FIGURES|SPEED|[A-Z]+_(?:TABLE|ROW))\b", text)

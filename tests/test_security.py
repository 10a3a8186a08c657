"""Nothing foreign is unpickled or run unasked, what is read back is what was written, nothing leaves its folder, text stays text."""

import ast
import errno
import json
import pickle
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from bad_checkpoints import TASK, Bomb, byte_tokenizer, saved
from bad_inputs import written
from conftest import make_blocks, make_converted

import dynamoe_lab as lab
from dynamoe_lab import assets
from dynamoe_lab.errors import InputError

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\"'></td></pre>"
    '<a href="javascript:alert(1)">x</a>[x](javascript:alert(1)) $x_{ ${a}'
)


# --- the code itself ---------------------------------------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """Every module and every notebook, as Python."""
    found = {
        str(path.relative_to(ROOT)): path.read_text() for room in ("dynamoe_lab", "benchmarks") for path in (ROOT / room).rglob("*.py")
    }
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        found[path.name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return found


FORBIDDEN = {
    "torch.load", "pickle.load", "pickle.loads", "joblib.load", "joblib.dump", "pd.read_pickle", "pandas.read_pickle",
    "os.system", "os.popen", "subprocess.getoutput", "eval", "exec", "__import__", "marshal.loads", "shelve.open", "dill.load",
}  # fmt: skip
SWITCHES = {("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("use_safetensors", False), ("weights_only", False)}


def dangers(source: str) -> list[str]:
    """Calls that unpickle, run a shell or text, or trust code of others."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + ([node.module] if isinstance(node, ast.ImportFrom) else [])
            found += [f"import {name}" for name in names if name in ("pickle", "dill", "cloudpickle", "marshal", "shelve")]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        found += [name] if name in FORBIDDEN else []
        switched = {(keyword.arg, keyword.value.value) for keyword in node.keywords if isinstance(keyword.value, ast.Constant)}
        found += [f"{name}({key}={value})" for key, value in switched & SWITCHES]
        given = {keyword.arg for keyword in node.keywords}
        if name == "yaml.load":
            found += [] if "Loader=_Loader" in ast.unparse(node) else [name]
        if name.endswith("from_pretrained") and re.search(r"Model|type\(model\)", name) and not {"use_safetensors", "gguf_file"} & given:
            found.append(f"{name} without use_safetensors")
    return found


def test_no_pickle_no_shell_no_trust_in_the_code():
    assert {name: found for name, source in sources().items() if (found := dangers(source))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "import pickle", "subprocess.run(x, shell=True)", "os.system('x')", "np.load(p, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=True)", "AutoModel.from_pretrained(p)", "yaml.load(x, Loader=yaml.Loader)",
    ],
)  # fmt: skip
def test_they_would_be_found(line):
    assert dangers(line)


# --- nothing is unpickled, nothing runs unasked --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_finished(tmp_path_factory):
    """A training run that was stopped before its end, as it may be handed on."""
    from dynamoe_lab.config import TrainConfig
    from dynamoe_lab.training import run, train

    folder, config = tmp_path_factory.mktemp("half") / "run", TrainConfig(steps=2, batch_size=2, save_steps=1, warmup_steps=0)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_publish", killed)
        with pytest.raises(Killed):
            train(make_converted(), make_blocks(), config, output_dir=folder, progress=False)
    path = folder / "trainer" / "checkpoint-2" / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "global_step": 1}))  # so that there is something to go on with
    return folder, config


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resume_files_of_others_run_nothing(tmp_path, monkeypatch, half_finished, name):
    import pickle

    from dynamoe_lab.training import train

    monkeypatch.chdir(tmp_path)
    folder, config = half_finished
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "trainer" / "checkpoint-2" / name
    assert path.is_file()
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"checkpoint-2.*not what Trainer wrote.*remove"):
        train(make_converted(), make_blocks(), config, output_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "ran").exists()


def test_code_runs_when_it_is_asked_for(tmp_path, monkeypatch):
    from dynamoe_lab.evaluation.tasks import load_tasks

    monkeypatch.chdir(tmp_path)
    written(tmp_path, "d.jsonl", '{"q": "a", "c": ["x", "y"], "a": 0}\n')
    written(tmp_path, "mine.py", "open('ran', 'w')\ndef text(document):\n    return 'asked'")
    path = written(tmp_path, "mine.yaml", TASK.replace("'{{q}}'", "!function mine.text"))
    with pytest.raises(InputError, match="read that code"):
        load_tasks([path])
    assert not (tmp_path / "ran").exists()
    task = load_tasks([path], trust_remote_code=True)["mine"]
    assert task.doc_to_text(next(iter(task.eval_docs))) == "asked"
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"mine.yaml": f"include: base.yaml\n{TASK}", "base.yaml": "process_docs: !function mine.text"},
        {"mine.yaml": f"include: base.yaml\nprocess_docs: null\n{TASK}", "base.yaml": "process_docs: !function mine.text"},
        {"mine.yaml": f"process_docs: !function mine.text\nprocess_docs: null\n{TASK}"},
        {"mine.yaml": f"metadata: {{!function mine.text : 1}}\n{TASK}"},
        {"mine.yaml": f"metadata: [&a !function mine.text, *a]\n{TASK}"},
        {"mine.yaml": f"%TAG !f! !func\n---\nmetadata: !f!tion mine.text\n{TASK}"},
        {"mine.yaml": f"metadata: !<!function> mine.text\n{TASK}"},
    ],
    ids=["included", "overruled", "twice", "key", "alias", "tag", "verbatim"],
)
def test_no_function_of_a_task_file_runs_unasked(tmp_path, monkeypatch, files):
    """lm-eval imports functions while it parses: what comes of them does not matter."""
    from dynamoe_lab.evaluation.tasks import load_tasks

    monkeypatch.chdir(tmp_path)
    written(tmp_path, "d.jsonl", '{"q": "a", "c": ["x", "y"], "a": 0}\n')
    written(tmp_path, "mine.py", "open('ran', 'w')\ndef text(document):\n    return 'asked'")
    paths = {name: written(tmp_path, name, content) for name, content in files.items()}
    with pytest.raises(InputError, match=r"mine\.text.*read that code"):
        load_tasks([paths["mine.yaml"]])
    assert not (tmp_path / "ran").exists()


def test_functions_of_lm_eval_itself_are_trusted_unless_a_file_hides_them(tmp_path):
    from dynamoe_lab.evaluation.task_sources import foreign_code, read_definition

    path = written(tmp_path, "mine.yaml", "task: mine\ndoc_to_text: !function lm_eval.tasks.winogrande.preprocess_winogrande.doc_to_text\n")
    assert foreign_code(read_definition(path)) is None
    hidden = tmp_path / "lm_eval" / "tasks" / "winogrande" / "preprocess_winogrande.py"
    hidden.parent.mkdir(parents=True)
    hidden.write_text("")
    assert "preprocess_winogrande" in foreign_code(read_definition(path))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"_attn_implementation": "owner/kernel"}, r"owner/kernel.*trust_remote_code"),
        ({"transformers_weights": "evil.safetensors.index.json"}, r"evil\.safetensors\.index\.json.*refused"),
    ],
)
def test_a_config_that_leads_to_another_file_is_asked_there(tmp_path, other, told):
    """transformers reads the file that `configuration_files` names instead of config.json."""
    folder = shutil.copytree(saved("dense"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    written(folder, "config.4.0.0.json", json.dumps(config | other))
    written(folder, "config.json", json.dumps(config | {"configuration_files": ["config.4.0.0.json"]}))
    written(folder, "evil.safetensors.index.json", json.dumps({"weight_map": {"lm_head.weight": "evil.bin"}}))
    (folder / "evil.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=told):
        lab.load_model(folder)


def test_a_hub_checkpoint_is_asked_the_same(tmp_path, monkeypatch):
    """No network here: what the Hub would give lies in a folder."""
    import transformers

    from dynamoe_lab import loading

    config = json.loads((saved("dense") / "config.json").read_text())
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda *_, **__: (config, {}))
    written(tmp_path, "model.safetensors.index.json", json.dumps({"weight_map": {"a": "shard.bin"}}))
    monkeypatch.setattr(transformers.utils, "cached_file", lambda _, name, **__: str(tmp_path / name))
    with pytest.raises(InputError, match=r"shard\.bin.*pickle"):
        loading.load_model("owner/name")
    config["_attn_implementation"] = "owner/kernel"
    with pytest.raises(InputError, match=r"owner/kernel.*trust_remote_code"):
        loading.load_model("owner/name")


# --- what is read back is what was written -------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path):
    """build() -> how often the folder was made so far."""
    folder, calls = tmp_path / "assets" / "toy", []

    def make(partial):
        calls.append(1)
        (partial / "a.txt").write_text("alpha")

    def build() -> int:
        assert assets.build_once(folder, {"pin": 1}, make, what="toy", megabytes=1) == folder
        assert (folder / "a.txt").read_text() == "alpha"
        return len(calls)

    return folder, build


def test_a_folder_that_cannot_be_read_is_not_made_again(built, monkeypatch):
    _, build = built
    assert build() == 1

    def refused(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(assets, "file_digest", refused)
        with pytest.raises(InputError, match=r"toy: cannot be read \(Too many open files\)"):
            build()
    assert build() == 1


def test_a_file_of_the_same_size_that_was_changed_is_noticed(built, capsys):
    folder, build = built
    assert build() == build() == 1
    (folder / "a.txt").write_text("omega")
    assert build() == 2
    assert "toy: a.txt is not what was written" in capsys.readouterr().err


def test_folders_of_earlier_versions_get_digests(built):
    folder, build = built
    build()
    manifest = json.loads((folder / "manifest.json").read_text())
    digests = manifest.pop("digests")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert build() == 1
    assert json.loads((folder / "manifest.json").read_text())["digests"] == digests
    (folder / "a.txt").write_text("omega")
    assert build() == 2


def test_the_report_shows_no_file_that_was_changed(tmp_path):
    from dynamoe_lab.workbench.records import Artifact, Record, Results, RunInfo, StoredFile
    from dynamoe_lab.workbench.report import build_report

    folder = tmp_path / "report" / "01_a"
    folder.mkdir(parents=True)
    path = written(folder, "x.csv", "name\nright\n")
    Record(RunInfo("01_a", status="ok"), Results(tables=[Artifact("x", "A table.", [StoredFile.of(path)])])).write(folder)
    assert "right" in build_report(folder.parent, expected=[]).read_text()
    path.write_text("name\nwrong\n")
    page = build_report(folder.parent, expected=[]).read_text()
    assert "wrong" not in page
    assert "Gone or changed since the run: x.csv" in page


# --- text stays text -----------------------------------------------------------------------------------------------------------------


class Dangers(HTMLParser):
    """What of a page could run: scripts, handlers, frames, links to code."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found += [tag] if tag in ("script", "iframe", "object", "embed", "form", "base") else []
        self.found += [name for name, _ in attributes if name.startswith("on")]
        self.found += [
            value for name, value in attributes if name in ("href", "src") and re.match(r"\s*(javascript|vbscript)", value or "", re.I)
        ]
        self.found += [value for name, value in attributes if name == "src" and value == "x"]

    def handle_data(self, data):
        self.text += data


def test_hostile_text_in_tokens_stays_text():
    from dynamoe_lab.analysis.tokens import render_tokens

    routing = pd.DataFrame(
        {"position": [0, 1], "token": [HOSTILE, "b"], "layer": 0, "expert": [0, 1], "label": [0, 0], "surprisal": [1.0, 2.0]}
    )
    page = Dangers(render_tokens(routing, fractions=[0.5, 1.0], title=HOSTILE))
    assert page.found == []
    assert page.text.count("<script>alert(1)</script>") == 2


def test_hostile_text_in_an_executed_notebook_stays_text():
    import nbformat

    from dynamoe_lab.workbench.export import introduction, notebook_html

    code = nbformat.v4.new_code_cell(f"text = {HOSTILE!r}", metadata={"tags": [HOSTILE]})
    data = {"text/html": HOSTILE, "text/plain": HOSTILE}
    code.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=HOSTILE),
        nbformat.v4.new_output("error", ename=HOSTILE, evalue=HOSTILE, traceback=[HOSTILE]),
        nbformat.v4.new_output("display_data", data=data),
        nbformat.v4.new_output("display_data", data={"image/svg+xml": f"<svg onload=alert(1)>{HOSTILE}</svg>"}),
        nbformat.v4.new_output("display_data", data={"text/markdown": HOSTILE}),
        nbformat.v4.new_output("display_data", data={"application/javascript": "alert(1)", "text/plain": "x"}),
    ]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {HOSTILE}\n\n{HOSTILE}"), code])
    nb.metadata["language_info"] = {"name": 'python"><script>alert(1)</script>', "pygments_lexer": 'x"><script>alert(1)</script>'}
    page = notebook_html(nb, HOSTILE)
    assert Dangers(page).found == []
    assert "default-src 'none'" in page
    assert all(isinstance(part, str) for part in introduction(nb))


def test_a_hostile_fragment_with_its_digest_is_sanitized_again(tmp_path):
    from dynamoe_lab.workbench.records import Artifact, Finding, Record, Results, RunInfo, Scalar, StepUse, StoredFile
    from dynamoe_lab.workbench.report import build_report

    folder = tmp_path / "report" / "01_a"
    folder.mkdir(parents=True)
    fragment, table = written(folder, "x.html", HOSTILE), written(folder, "y.csv", f'name\n"{HOSTILE.replace(chr(34), chr(34) * 2)}"\n')
    results = Results(
        scalars=[Scalar(HOSTILE, 1.0, unit=HOSTILE)],
        tables=[Artifact(HOSTILE, HOSTILE, [StoredFile.of(table)])],
        fragments=[Artifact("x", HOSTILE, [StoredFile.of(fragment)])],
        findings=[Finding(HOSTILE, HOSTILE, True)],
        steps=[StepUse(HOSTILE, HOSTILE, True, 1.0, True)],
    )
    run = RunInfo("01_a", HOSTILE, HOSTILE, HOSTILE, HOSTILE, status="ok", finished=HOSTILE, config={"model": HOSTILE})
    record = Record(run, results)
    record.env.packages = {HOSTILE: HOSTILE}
    record.write(folder)
    page = Dangers(build_report(folder.parent, expected=[HOSTILE]).read_text())
    assert page.found == []
    assert page.text.count("<script>alert(1)</script>") >= 12


def test_names_in_figures_are_text(tmp_path):
    """A $ is a $, no formula that fails; in the SVG there is no tag but its own."""
    import matplotlib.pyplot as plt

    from dynamoe_lab.analysis.style import style_context
    from dynamoe_lab.workbench.drawn import figure_files

    with style_context():
        figure, ax = plt.subplots()
        ax.bar([HOSTILE, "a $5 and $\\frac{$6"], [1, 2], label=HOSTILE)
        ax.set_title(HOSTILE)
        ax.legend()
        svg = figure_files(ax, "x")["x.svg"].decode()
    plt.close(figure)
    assert Dangers(svg).found == []
    assert "&lt;script&gt;" in svg


def test_the_explorer_tells_errors_as_text(monkeypatch):
    from dynamoe_lab.workbench import explore

    model = make_converted()

    def refuses(*_, **__):
        raise InputError(HOSTILE)

    monkeypatch.setattr("dynamoe_lab.evaluation.trace_text", refuses)
    box = explore.explorer(model, byte_tokenizer(), text=HOSTILE)
    page = Dangers(box.children[2].value)
    assert page.found == []
    assert "<script>" in page.text


# --- nothing leaves its folder ---------------------------------------------------------------------------------------------------------


def test_links_are_replaced_not_followed(tmp_path):
    """A link where a result belongs must not lead the writing elsewhere."""
    from dynamoe_lab.workbench.files import write_atomic

    victim = written(tmp_path, "victim", "precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "record.json").symlink_to(victim)
    write_atomic(tmp_path / "folder" / "record.json", "{}")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "folder" / "record.json").is_symlink()


def test_a_text_that_no_file_can_hold_is_written_as_its_code(tmp_path):
    from dynamoe_lab.workbench.files import read_json, write_json

    write_json(tmp_path / "a.json", {"name": "\udcff"})
    assert read_json(tmp_path / "a.json") == {"name": "\udcff"}

"""`dynamoe-lab eval` and `compare`: task by task into a folder, resumed, compared, and one line for every mistake."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from benchmark_frames import make_documents, make_scores
from kill_randomly import home_with_assets, kill
from scipy import stats
from test_cli import call

from dynamoe_lab.analysis import benchmark_deltas
from dynamoe_lab.errors import InputError
from dynamoe_lab.evaluation import export_tasks
from dynamoe_lab.workbench import benchmarks
from dynamoe_lab.workbench.benchmarks import default_folder
from dynamoe_lab.workbench.comparison import compare_scores

FEW = ("--tasks", "piqa,winogrande", "--limit", "6")


@pytest.fixture
def own(home, project, monkeypatch):
    """The project of the test with the module's cache."""
    monkeypatch.setenv("DYNAMOE_LAB_HOME", str(home))
    return project


def write_folder(folder, documents: pd.DataFrame, **settings):
    """What `eval` writes, from made-up tables."""
    folder.mkdir(parents=True)
    scores = make_scores(documents)
    scores.to_parquet(folder / "scores.parquet")
    documents.to_parquet(folder / "documents.parquet")
    (folder / "eval.json").write_text(json.dumps({"model": "m", "routing": None, "limit": 40, "dtype": "float32", **settings}))
    return folder


@pytest.fixture
def folders(tmp_path):
    documents = make_documents(40)
    parts = {run: documents[documents["run"] == run] for run in ("router", "dense")}
    return {run: write_folder(tmp_path / run, part, routing="router" if run == "router" else None) for run, part in parts.items()}


class TestEval:
    @pytest.mark.assets
    def test_a_dense_model_into_a_folder(self, own):
        done = call("eval", "smollm2-pico", *FEW)
        assert done.exit_code == 0, done.output
        folder = own / "reports" / "eval" / "smollm2-pico"
        scores, documents = (pd.read_parquet(folder / f"{name}.parquet") for name in ("scores", "documents"))
        assert list(scores.columns) == ["run", "task", "split", "metric", "value", "stderr", "n", "task_version", "batch_size", "dtype"]
        assert scores["task"].unique().tolist() == ["piqa", "winogrande"]
        assert set(scores["run"]) == {"smollm2-pico"}
        for task in ("piqa", "winogrande"):
            right = documents.query("task == @task and metric == 'acc'")["value"]
            assert len(right) == 6
            assert scores.query("task == @task and metric == 'acc'")["value"].item() == pytest.approx(right.mean())
            assert f"{100 * right.mean():.1f}" in next(line for line in done.stdout.splitlines() if line.startswith(task))
        assert pd.read_csv(folder / "scores.csv")["value"].to_numpy() == pytest.approx(scores["value"].to_numpy(), rel=1e-4)
        settings = json.loads((folder / "eval.json").read_text())
        assert {"model": "smollm2-pico", "routing": None, "limit": 6, "batch_size": 8, "dtype": "float32"}.items() <= settings.items()

    @pytest.mark.assets
    def test_stopped_after_a_task_the_same_command_goes_on(self, own, monkeypatch):
        calls, real = [], benchmarks.run_step

        def stopped(function, args, kwargs, **options):
            calls.append(args[2])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(function, args, kwargs, **options)

        words = ("eval", "smollm2-pico", "--tasks", "piqa,winogrande", "--limit", "5", "--output", "scores")
        monkeypatch.setattr(benchmarks, "run_step", stopped)
        assert call(*words).exit_code == 130
        assert pd.read_parquet(own / "scores" / "scores.parquet")["task"].unique().tolist() == ["piqa"], "what is finished is there"
        monkeypatch.setattr(benchmarks, "run_step", real)
        done = call(*words)
        assert done.exit_code == 0, done.output
        assert "[1/2] piqa: read from the cache" in done.stdout
        assert "[2/2] winogrande: read from the cache" not in done.stdout
        more = call("eval", "smollm2-pico", "--tasks", "sciq", "--limit", "5", "--output", "scores")
        assert more.exit_code == 0, more.output
        assert pd.read_parquet(own / "scores" / "scores.parquet")["task"].unique().tolist() == ["piqa", "winogrande", "sciq"]
        other = call("eval", "smollm2-pico", "--tasks", "sciq", "--limit", "4", "--output", "scores")
        assert (other.exit_code, other.stderr.count("\n")) == (2, 1)
        assert "holds scores of limit 5, not 4" in other.stderr

    @pytest.mark.assets
    @pytest.mark.slow
    def test_killed_within_a_task_only_that_one_is_scored_again(self, project, tmp_path):
        """kill -9 while the second of three tasks is being scored; afterwards everything is as if nobody had disturbed it."""
        words = ["eval", "smollm2-pico", "--tasks", "piqa,sciq,winogrande", "--limit", "300", "--output"]

        def start(home, output):
            environment = {**os.environ, "DYNAMOE_LAB_HOME": str(home), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", "dynamoe_lab", *words, str(output)]
            return subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

        def finished(home):
            return {path.parent: (path.stat().st_ino, path.stat().st_mtime_ns) for path in home.glob("steps/evaluate_task-*/step.json")}

        def completed(process):
            told = process.communicate(timeout=300)[0]
            assert process.returncode == 0, told
            return told.splitlines()

        calm, home, output = home_with_assets(tmp_path / "calm"), home_with_assets(tmp_path / "home"), tmp_path / "scores"
        process, deadline = start(home, output), time.monotonic() + 120
        while not (finished(home) and list(home.glob("scratch/evaluate_task-*"))):
            assert process.poll() is None, f"ended before it could be killed: {process.communicate()[0]}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.2)  # into the scoring
        kill(process)
        before, (half,) = finished(home), home.glob("scratch/evaluate_task-*")
        assert len(before) == 1
        assert not (half / "step.json").exists(), "killed too late"
        assert pd.read_parquet(output / "scores.parquet")["task"].unique().tolist() == ["piqa"], "what is finished is there"
        told = completed(start(home, output))
        assert told[0] == "[1/3] piqa: read from the cache"
        assert [line.split(": ")[0] for line in told[1:3]] == ["[2/3] sciq", "[3/3] winogrande"]
        assert not any("cache" in line for line in told[1:])
        after = finished(home)
        assert len(after) == 3
        assert before.items() <= after.items(), "a finished task was scored again"
        completed(start(calm, tmp_path / "calm-scores"))
        for name in ("scores", "documents"):
            killed, undisturbed = (pd.read_parquet(folder / f"{name}.parquet") for folder in (output, tmp_path / "calm-scores"))
            times = [frame["metric"].isin(["seconds_total", "share_outside_model"]) for frame in (killed, undisturbed)]
            pd.testing.assert_frame_equal(killed[~times[0]], undisturbed[~times[1]], check_exact=True)
            assert (name == "scores") == times[0].any()

    @pytest.mark.assets
    def test_two_runs_into_one_folder_keep_the_tasks_of_both(self, own, monkeypatch):
        """The second one begins and ends while the first one scores."""
        real = benchmarks.run_step

        def disturbed(function, args, kwargs, **options):
            done = real(function, args, kwargs, **options)
            if args[2] == "winogrande":
                monkeypatch.setattr(benchmarks, "run_step", real)
                assert call("eval", "smollm2-pico", "--tasks", "sciq", "--limit", "4", "--output", "scores").exit_code == 0
            return done

        monkeypatch.setattr(benchmarks, "run_step", disturbed)
        done = call("eval", "smollm2-pico", "--tasks", "piqa,winogrande", "--limit", "4", "--output", "scores")
        assert done.exit_code == 0, done.output
        for name in ("scores", "documents"):
            assert set(pd.read_parquet(own / "scores" / f"{name}.parquet")["task"]) == {"piqa", "sciq", "winogrande"}
        assert set(json.loads((own / "scores" / "eval.json").read_text())["tasks"]) == {"piqa", "sciq", "winogrande"}

    def test_tables_that_cannot_be_read_now_are_not_replaced(self, tmp_path, monkeypatch):
        """Too many open files: the other tasks' rows would be gone."""
        documents = make_documents(20, {"dense": 0.0})
        scores, tasks = make_scores(documents), list(documents["task"].unique())

        def add(task):
            fresh = [frame[frame["task"] == task] for frame in (scores, documents)]
            benchmarks._add(tmp_path / "scores", {"limit": 20}, {task: task}, fresh, tmp_path)

        add(tasks[0])

        def fails(path):
            raise OSError(errno.EMFILE, "Too many open files", str(path))

        with monkeypatch.context() as patch:
            patch.setattr(pd, "read_parquet", fails)
            with pytest.raises(InputError, match=r"its tables cannot be read \(.*Too many open files.*\); nothing was changed"):
                add(tasks[1])
        add(tasks[1])
        assert set(pd.read_parquet(tmp_path / "scores" / "scores.parquet")["task"]) == set(tasks[:2])
        (tmp_path / "scores" / "scores.parquet").write_bytes(b"PAR1 damaged")
        add(tasks[0])
        assert set(pd.read_parquet(tmp_path / "scores" / "scores.parquet")["task"]) == {tasks[0]}

    def test_writers_wait_for_each_other(self, tmp_path):
        documents = make_documents(20, {"dense": 0.0})
        scores, failed = make_scores(documents), []

        def write(task):
            try:
                fresh = [frame[frame["task"] == task] for frame in (scores, documents)]
                benchmarks._add(tmp_path / "scores", {"limit": 20}, {task: task}, fresh, tmp_path)
            except Exception as error:
                failed.append(error)

        tasks = list(documents["task"].unique())
        threads = [threading.Thread(target=write, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        for name, frame in (("scores", scores), ("documents", documents)):
            found = pd.read_parquet(tmp_path / "scores" / f"{name}.parquet")
            assert found["task"].value_counts().to_dict() == frame["task"].value_counts().to_dict()

    @pytest.mark.assets
    def test_another_task_of_the_same_name_is_refused(self, own):
        (name,) = export_tasks(own / "files", ["piqa"])
        file = own / "files" / f"{name}.yaml"
        file.write_text(file.read_text().replace(f"task: {name}", "task: piqa"))
        words = ("eval", "smollm2-pico", "--limit", "2", "--output", "scores", "--tasks")
        assert call(*words, "piqa").exit_code == 0
        other = call(*words, str(file))
        assert (other.exit_code, other.stderr.count("\n")) == (2, 1), other.output
        assert "scores: holds task piqa from piqa, not from piqa_local.yaml; choose another --output" in other.stderr
        assert call(*words, "piqa").exit_code == 0

    def test_the_table_has_intervals_and_metrics_of_ones_own(self):
        documents = make_documents(40, {"dense": 0.0}, tasks=("piqa", "sciq"))
        scores = make_scores(documents)
        exact = scores[scores["metric"] == "acc"].assign(metric="exact_match,strict", value=0.25, stderr=0.07)
        lines = benchmarks._score_text(pd.concat([scores, exact])).splitlines()
        assert "exact_match,strict" in lines[0]
        right = int(documents.query("task == 'piqa' and metric == 'acc'")["value"].sum())
        low, high = stats.binomtest(right, 40).proportion_ci(method="wilson")
        piqa = next(line for line in lines if line.startswith("piqa"))
        assert f"{100 * right / 40:.1f} % ({100 * low:.1f} to {100 * high:.1f})" in piqa
        assert "0.250 ± 0.070" in piqa

    @pytest.mark.assets
    def test_a_task_file_that_changed_is_scored_again(self, own):
        """The file itself, or the documents it points to: without its first one, the others move up."""
        (name,) = export_tasks(own / "files", ["piqa"])
        file, data, cached, answers = own / "files" / f"{name}.yaml", own / "files" / "piqa.jsonl", [], []
        changes = {data: data.read_text().partition("\n")[2], file: file.read_text().replace("Question:", "Query:")}
        for changed in (None, None, data, None, file):
            if changed:
                changed.write_text(changes[changed])
            done = call("eval", "smollm2-pico", "--tasks", f"files/{name}.yaml", "--limit", "3", "--output", "scores")
            assert done.exit_code == 0, done.output
            cached.append("read from the cache" in done.stdout)
            documents = pd.read_parquet(own / "scores" / "documents.parquet").query("metric == 'loglikelihood'")
            answers.append(documents.sort_values("doc_id")["value"].to_numpy())
        assert cached == [False, True, False, True, False]
        assert answers[2][:2] == pytest.approx(answers[0][1:], abs=1e-4)
        data.unlink()
        gone = call("eval", "smollm2-pico", "--tasks", f"files/{name}.yaml", "--limit", "3", "--output", "scores")
        assert (gone.exit_code, gone.stderr.count("\n"), f"no data file {data}; write it" in gone.stderr) == (2, 1, True)

    @pytest.mark.assets
    def test_a_converted_model_under_its_routings_against_its_parent(self, own):
        short = ["--profile", "smoke", "-p", "data.calibration_tokens=512"]
        assert call("convert", "smollm2-pico", "--output", "nested", *short).exit_code == 0
        for routing in ("full", "0", "router"):
            done = call("eval", "nested", *FEW, "--routing", routing, "--output", routing)
            assert done.exit_code == 0, done.output
        assert call("eval", "smollm2-pico", *FEW, "--output", "dense").exit_code == 0
        active = {
            name: pd.read_parquet(own / name / "scores.parquet").query("metric == 'active_params'")["value"].mean()
            for name in ("dense", "full", "0", "router")
        }
        assert active["0"] < active["router"] < active["full"]
        documents = {name: pd.read_parquet(own / name / "documents.parquet") for name in ("dense", "full")}
        bits = [frame.query("metric == 'bits_per_byte'")["value"].to_numpy() for frame in documents.values()]
        assert bits[0] == pytest.approx(bits[1], abs=1e-4), "at full width the function is the dense one"
        compared = call("compare", "full", "dense")
        assert compared.exit_code == 0, compared.output
        assert "A: full (nested, routing full, float32, first 6 documents" in compared.stdout
        assert "+0.0" in compared.stdout
        wrong = call("eval", "nested", *FEW, "--routing", "7", "--output", "seven")
        assert (
            wrong.exit_code,
            "an expert's index from 0 to 3" in wrong.stderr and "random" not in wrong.stderr,
            wrong.stderr.count("\n"),
        ) == (2, True, 1)

    @pytest.mark.assets
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--limit", "0"], "--limit 0: give a whole number of at least 1, or leave it out for all documents"),
            (["--batch-size", "0"], "--batch-size 0: give a whole number of at least 1"),
            (["--tasks", "sqic"], "did you mean sciq"),
            (["--tasks", " , "], "names no task"),
            (["--tasks", "piqa,piqa"], "named twice"),
            (["--tasks", "nowhere.yaml"], "no such file"),
            (["--routing", "router", "--tasks", "piqa", "--limit", "1"], "is dense, it has no experts"),
            (["--output", "configs"], "not an empty folder"),
            (["-p", "dynamoe.theta=0.8"], "scores do not depend on it; give device, dtype, threads"),
            (["-p", "devise=cpu"], "did you mean device"),
            (["-p", "model=x"], "the command's first argument"),
            (["--tasks", "piqa", "-p", "device=quantum"], "device 'quantum'"),
        ],
    )
    def test_bad_input_is_one_line(self, own, words, message):
        done = call("eval", "smollm2-pico", *words)
        assert done.exit_code == 2, done.output
        (line,) = (line for line in done.stderr.splitlines() if not line.startswith("reading lm-eval's index"))
        assert line.startswith("dynamoe-lab: ")
        assert message in line
        assert not (own / "reports").exists()

    def test_where_scores_go(self, project, tmp_path):
        (tmp_path / "runs" / "theta08").mkdir(parents=True)
        root = project / "reports" / "eval"
        assert default_folder("smollm2-135m", None) == root / "smollm2-135m"
        assert default_folder("mistralai/Mistral-7B-v0.3", None) == root / "Mistral-7B-v0.3"
        assert default_folder(str(tmp_path / "runs" / "theta08"), "label") == root / "theta08-label"


class TestCompare:
    def test_the_table_is_that_of_the_deltas(self, folders):
        text = compare_scores(folders["router"], folders["dense"])
        documents = make_documents(40)
        deltas = benchmark_deltas(documents[documents["run"] == "router"], documents[documents["run"] == "dense"]).set_index("task")
        lines = {line.split()[0]: line for line in text.splitlines() if line}
        for task in [*documents["task"].unique(), "average"]:
            row = deltas.loc[task]
            numbers = [f"{100 * row['value']:.1f} %", f"{100 * row['reference_value']:.1f} %", f"{100 * row['difference']:+.1f}"]
            if np.isfinite(row["low"]):
                numbers.append(f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}")
            if task != "average":
                numbers += [f"{row['only_run']:.0f}", f"{row['only_reference']:.0f}", f"{row['mcnemar_p']:.3g}", f"{row['holm_p']:.3g}"]
            place = 0
            for number in [*numbers, f"{100 * row['detectable']:.1f}"]:
                place = lines[task].index(number, place) + len(number)
        assert "average4" not in lines
        assert "(m, routing router, float32, first 40 documents, 113.3 M active parameters)" in lines["A:"]
        assert "SciQ and ARC-challenge: validation (stock: test)" in text

    def test_other_metrics_and_tasks(self, folders):
        done = call("compare", str(folders["router"]), str(folders["dense"]), "--metric", "bits_per_byte", "--tasks", "piqa,sciq")
        assert done.exit_code == 0, done.output
        rows = [line.split()[0] for line in done.stdout.splitlines() if line[:4] in ("task", "piqa", "sciq", "aver")]
        assert rows == ["task", "piqa", "sciq", "average"]
        assert "McNemar" not in done.stdout

    def test_mistakes_are_one_line(self, folders, tmp_path, project):
        fewer = write_folder(tmp_path / "fewer", make_documents(30, {"dense": 0.0}))
        digests = make_documents(40).assign(digest=lambda frame: frame["task"] + frame["doc_id"].astype(str))
        dense_digests = digests[digests["run"] == "dense"]
        digests[digests["run"] == "router"].to_parquet(folders["router"] / "documents.parquet")
        fake = (dense_digests["task"] == "piqa") & (dense_digests["doc_id"] < 4)
        other = write_folder(tmp_path / "other", dense_digests.assign(digest=dense_digests["digest"].where(~fake, "other")))
        whole = write_folder(tmp_path / "whole", dense_digests[dense_digests["task"] == "piqa"])
        dense_digests.head(0).to_parquet(whole / "documents.parquet")
        lacking = write_folder(tmp_path / "lacking", dense_digests[dense_digests["task"] != "sciq"])
        empty = tmp_path / "empty"
        empty.mkdir()
        dense = pd.read_parquet(folders["dense"] / "scores.parquet")
        moved = write_folder(tmp_path / "moved", make_documents(40, {"dense": 0.0}))
        dense.assign(split="train").to_parquet(moved / "scores.parquet")
        broken = write_folder(tmp_path / "broken", make_documents(10, {"dense": 0.0}))
        (broken / "scores.parquet").write_bytes(b"not parquet")
        router = folders["router"]
        for words, message in [
            ((router, tmp_path / "nowhere"), "nowhere: no such folder; make it with: dynamoe-lab eval MODEL"),
            ((empty, router), "empty: no scores in this folder"),
            ((router, fewer), f"task arc_easy: the documents differ (40 in {router}, 30 in {fewer}, 30 in both)"),
            ((router, other), f"task piqa: 4 of 40 documents differ in text between {router} and {other}"),
            ((router, lacking), f"task sciq: scored in {router}, not in {lacking}; score it there, too, or compare --tasks arc_easy,"),
            ((lacking, router), f"task sciq: scored in {router}, not in {lacking}"),
            ((router, whole), "whole: piqa: no number for each document, so nothing to compare by document"),
            ((router, folders["dense"], "--metric", "margin"), "--metric margin: no score"),
            ((router, moved), "task arc_easy: split validation (stock: test) in"),
            ((broken, router), "its tables cannot be read"),
            ((router, folders["dense"], "--metric", "rouge"), "--metric rouge: not in"),
            ((router, folders["dense"], "--tasks", "boolq"), "task boolq was not scored; there is arc_easy"),
        ]:
            done = call("compare", *map(str, words))
            assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
            assert message in done.stderr

    def test_missing_folders_are_input_errors_of_the_function_too(self, tmp_path):
        with pytest.raises(InputError, match="no such folder"):
            compare_scores(tmp_path / "a", tmp_path / "b")

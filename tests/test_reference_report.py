"""The committed report (reports/small) and what README says of it: whole, small enough, and every number from a committed table."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from test_report import Page, report_without_torch

from dynamoe_lab.analysis import findings
from dynamoe_lab.analysis.findings.claims import FAILS, HOLDS, UNDECIDED, dynamoe, measured_claims, open_questions, tomoe
from dynamoe_lab.workbench.files import sha256
from dynamoe_lab.workbench.records import load_records
from dynamoe_lab.workbench.report_tables import ReportTables

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "reports" / "small"
NOTEBOOKS = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
KINDS = {".html", ".json", ".csv", ".png", ".svg"}
SENTENCES = {HOLDS, FAILS, UNDECIDED}


def committed() -> list[Path]:
    """Files of the report that are in git, or would be with the next commit."""
    told = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "reports/small"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return [ROOT / name for name in told.stdout.split("\n") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def records():
    return load_records(REPORT)


@pytest.fixture(scope="module")
def tables(records):
    return ReportTables(REPORT, records)


@pytest.fixture(scope="module")
def experiment(records):
    return {record.run.name: record.run.config for record in records}


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(REPORT / f"{name}.csv")


# --- the files ----------------------------------------------------------------------------------------------------------------------


def test_every_notebook_ended_well_on_one_clean_commit(records):
    assert [record.run.name for record in records] == NOTEBOOKS
    assert {record.run.status for record in records} == {"ok"}
    assert {record.run.profile for record in records} == {"small"}
    assert len({record.env.commit for record in records}) == 1
    assert not any(record.env.dirty for record in records)
    assert not [use.function for record in records for use in record.results.steps if use.stale], "steps that other code had computed"


def test_what_is_committed_is_small_whole_and_nothing_else(records):
    files = committed()
    assert {path.suffix for path in files} == KINDS
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert max(path.stat().st_size for path in files if path.suffix == ".csv") <= 1e6
    named = {REPORT / "index.html", REPORT / "claims.csv"}
    for record in records:
        folder = REPORT / record.run.name
        entries = [entry for artifact in record.artifacts for entry in artifact.files] + record.results.notebook
        kept = [entry for entry in entries if not entry.name.endswith(".ipynb")]  # the executed notebook is there as a page
        assert not [entry.name for entry in kept if sha256(folder / entry.name) != entry.sha256], "changed since the run"
        assert {Path(entry.name).suffix for entry in kept} >= {".html"}
        named |= {folder / entry.name for entry in kept} | {folder / "record.json"}
    assert set(files) == named


def test_no_file_names_a_machine():
    """Also svg and csv; the records name folders as $HOME and the like."""
    pattern = re.compile(rb"/(?:wor" + rb"k|hom" + rb"e|roo" + rb"t|tm" + rb"p|Use" + rb"rs)/[A-Za-z]")
    for path in committed():
        if path.suffix != ".png":
            assert not pattern.search(path.read_bytes()), path.name


def test_the_index_comes_again_without_torch_byte_for_byte(tmp_path):
    shutil.copytree(REPORT, tmp_path / "small")
    before = (tmp_path / "small" / "index.html").read_bytes()
    (tmp_path / "small" / "index.html").unlink()
    report_without_torch(tmp_path / "small")
    assert (tmp_path / "small" / "index.html").read_bytes() == before


def test_the_index_has_every_figure_and_leads_nowhere_else():
    page = Page((REPORT / "index.html").read_text(encoding="utf-8"))
    figures = {str(path.relative_to(REPORT)) for path in REPORT.glob("*/*.png")}
    assert {image["src"] for image in page.images} == figures
    assert not [link for link in page.links if re.match(r"[a-z]+:|//", link) and not link.startswith("data:")]
    for link in page.links:
        assert link.startswith(("#", "data:")) or (REPORT / link).is_file(), link
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids


# --- what it has to contain ---------------------------------------------------------------------------------------------------------


def test_training_is_as_long_as_was_asked():
    pareto = read("06_pareto/pareto")
    rows = pareto[pareto["metric"] == "perplexity_ratio"].set_index(["method", "theta"])["train_tokens"]
    for theta in (0.7, 0.8, 0.9, 0.95):
        assert rows["router", theta].min() >= 100_000
    assert rows["static"].max() >= 100_000
    assert read("12_tomoe/tomoe_training")["tokens"].max() >= 200_000
    collapse = read("07_collapse/collapse")
    assert {(weight, seed) for weight, seed in zip(collapse["lambda_router"], collapse["seed"], strict=True)} == {
        (weight, seed) for weight in (0.0, 1.0) for seed in (0, 1, 2)
    }


def test_benchmarks_are_of_200_documents_a_task():
    scores = read("08_benchmarks/scores")
    counts = scores[scores["metric"] == "acc"].groupby("run")["n"]
    assert counts.size().to_dict() == {"dense": 7, "router": 7}
    assert (counts.min() == 200).all()
    accuracy = read("06_pareto/pareto").query("metric == 'average_accuracy'")
    assert set(accuracy["method"]) == {"dense", "router"}
    assert set(accuracy["theta"].dropna()) == {0.8, 0.9}
    assert (accuracy["n"] == 1400).all()


def test_every_claim_is_measured(tables):
    """None is left out because its table changed its columns."""
    claims = measured_claims(tables)
    assert len({claim.claim for claim in claims}) == len(claims)
    measured = [claim for claim in claims if claim.source]
    assert len(measured) == len(dynamoe.CLAIMS) + len(open_questions.CLAIMS) + len(tomoe.CLAIMS) == 24
    assert all(claim.n and claim.control for claim in measured)
    assert {claim.verdict for claim in claims} <= SENTENCES
    assert not [claim.claim for claim in claims if "nan" in f"{claim.measured} {claim.control} {claim.n}"]


# --- every sentence from a table ----------------------------------------------------------------------------------------------------


def sentences(experiment) -> dict[str, set[str]]:
    """What each notebook may say: its findings, computed here from the committed csv."""
    moe = experiment["03_train_router"]["dynamoe"]
    fractions, theta = moe["experts"], moe["theta"]
    trained, steps = read("03_train_router/trained_perplexity"), read("03_train_router/training_curves")
    collapse, tokens = read("07_collapse/collapse"), int(read("07_collapse/collapse_training")["tokens"].max())
    ratios, specialised = read("09_latency/realised_vs_ideal"), read("12_tomoe/tomoe_specialisation")
    before = specialised["run"] == "before training"
    pruned = read("12_tomoe/tomoe_training")
    dense = read("06_pareto/pareto").query("method == 'dense'")["active_params"].iloc[0]
    f = findings
    return {
        "01_convert": {
            f.conversion_finding(read("01_convert/logit_change")),
            f.perplexity_finding(read("01_convert/untrained_perplexity").tail(2)),
        },
        "02_difficulty": {
            f.label_share_finding(read("02_difficulty/label_share"), theta=theta),
            f.difficulty_finding(read("02_difficulty/difficulty_correlations")),
            f.difficulty_domain_finding(read("02_difficulty/difficulty_by_domain")),
        },
        "03_train_router": {
            f.perplexity_finding(trained),
            f.active_params_finding(read("03_train_router/active_params")),
            f.training_finding(steps, dense_loss=math.log(trained["reference_perplexity"].iloc[0])),
        },
        "04_router_confusion": {
            f.router_finding(read("04_router_confusion/router_chance")),
            f.neighbour_finding(read("04_router_confusion/router_chance")),
        },
        "05_expert_usage": {
            f.usage_finding(read("05_expert_usage/active_by_layer"), usage=read("05_expert_usage/expert_usage")),
            f.domain_finding(read("05_expert_usage/active_by_domain")),
        },
        "06_pareto": {f.pareto_finding(read("06_pareto/pareto")), f.static_finding(read("06_pareto/static_comparison"))},
        "07_collapse": {
            f.collapse_finding(collapse, read("07_collapse/collapse_entropy"), fractions=fractions, train_tokens=tokens),
            f.collapse_verdict(collapse, fractions=fractions, train_tokens=tokens),
        },
        "08_benchmarks": {f.benchmark_finding(read(f"08_benchmarks/benchmark_{name}")) for name in ("deltas", "bits")},
        "09_latency": {
            *(f.latency_finding(ratios, phase=phase) for phase in ("prefill", "decode")),
            f.time_parts_finding(read("09_latency/time_parts")),
            f.cost_growth_finding(read("09_latency/cost_growth")),
        },
        "12_tomoe": {
            f.tomoe_training_finding(
                pruned, p=experiment["12_tomoe"]["tomoe"]["p"], experts=experiment["12_tomoe"]["tomoe"]["num_experts"]
            ),
            f.specialisation_finding(specialised[~before], before=specialised[before]),
            f.union_finding(read("12_tomoe/tomoe_union"), read("12_tomoe/tomoe_attention")),
            f.perplexity_finding(read("12_tomoe/tomoe_perplexity")),
            f.pruned_params_finding(read("12_tomoe/tomoe_params"), dense_params=dense),
        },
        "20_ablation": {f.ablation_finding(read("20_ablation/ablation"), axis="dynamoe.label", metric="perplexity_ratio")},
    }


def test_every_sentence_of_the_index_comes_from_a_committed_table(records, experiment):
    expected = sentences(experiment)
    for record in records:
        told = {finding.sentence for finding in record.results.findings}
        assert told == expected.get(record.run.name, set()), record.run.name


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_says_what_the_tables_say(results):
    assert results.block() in README, "README.md is not what the tables say: run python docs/results.py"


def test_readmes_numbers_by_hand():
    """Some of README's numbers once more, straight from the csv, by code that shares nothing with what wrote them."""
    pareto = read("06_pareto/pareto")
    rows = pareto[(pareto["metric"] == "perplexity_ratio") & (pareto["method"] == "router")]
    assert len(rows) == 4
    for row in rows.itertuples():
        digits = 3 if 0.9 < row.value < 1.1 else 2
        text = f"{row.value:.{digits}f} ({row.low:.{digits}f} to {row.high:.{digits}f})"
        line = re.search(rf"^\| router, θ = {row.theta:g} \|.*$", README, re.M).group(0)
        assert text in line
        assert f"| {round(100 * row.active_mlp_fraction)} % | {row.active_params / 1e6:.3g} M" in line
    chance = read("04_router_confusion/router_chance").iloc[-1]
    line = next(line for line in README.splitlines() if line.startswith("| Router errors fall on"))
    assert f"{100 * chance['neighbour_share']:.1f} %" in line
    assert f"{100 * chance['neighbour_chance']:.1f} % by chance" in line
    assert f"{int(chance['errors']):,} errors" in line
    assert f"**{'holds' if chance['neighbour_minus_chance_low'] > 0 else 'undecided'}**" in line
    static = read("06_pareto/static_comparison").iloc[0]
    line = next(line for line in README.splitlines() if line.startswith("| Choosing by token beats a static cut"))
    told = "does not hold at this scale" if static["low"] > 1 else "holds" if static["high"] < 1 else "undecided"
    assert line.endswith(f"**{told}** |")
    free = read("07_collapse/collapse").query("lambda_router == 0")
    stuck = free[free["share"] >= 0.99].groupby("seed")["layer"].nunique().reindex([0, 1, 2], fill_value=0)
    line = next(line for line in README.splitlines() if line.startswith("| Without router supervision"))
    span = " to ".join(dict.fromkeys((str(stuck.min()), str(stuck.max()))))
    assert f"{span} of 30 layers give one expert 99 % of the tokens" in line
    assert line.endswith(f"**{'holds' if (stuck == 30).all() else 'undecided' if (stuck == 30).any() else FAILS}** |")


def test_readme_has_four_figures_of_the_report():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 4
    assert all(picture.startswith("reports/small/") and (ROOT / picture) in committed() for picture in pictures)


def test_a_wrong_number_would_be_found(results, tmp_path):
    """The block follows the tables: one changed csv changes it."""
    shutil.copytree(REPORT, tmp_path / "small")
    folder = tmp_path / "small" / "06_pareto"
    path = folder / "static_comparison.csv"
    frame = pd.read_csv(path)
    frame[["ratio", "low", "high"]] = 0.5, 0.4, 0.6
    frame.to_csv(path, index=False)
    record = json.loads((folder / "record.json").read_text())
    for artifact in record["results"]["tables"]:
        for entry in artifact["files"]:
            entry["sha256"] = sha256(path) if entry["name"] == path.name else entry["sha256"]
    (folder / "record.json").write_text(json.dumps(record))
    line = next(
        line for line in results.block(tmp_path / "small").splitlines() if line.startswith("| Choosing by token beats a static cut")
    )
    assert line.endswith("**holds** |")
    assert "0.50 (0.40 to 0.60)" in line

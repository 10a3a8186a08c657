"""README's results, from the tables of the committed report: `python docs/results.py` writes them between the two marks in README.md.

Nothing here is typed by hand but words: every number comes from a csv or a record of reports/small, every verdict from the rules of
`dynamoe_lab.analysis.findings.claims`. A test holds README to it.
"""

import re
import sys
from pathlib import Path

from dynamoe_lab.analysis.findings.claims import FAILS, HOLDS, ORIGINS, RULE, Claim, measured_claims
from dynamoe_lab.analysis.findings.settings import SETTINGS_HEADER, settings_note, settings_rows, settings_table
from dynamoe_lab.workbench.records import Record, load_records
from dynamoe_lab.workbench.report_tables import ReportTables
from dynamoe_lab.workbench.terminal import duration_text, size_text

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "reports" / "small"
BEGIN, END = "<!-- results: written by docs/results.py -->", "<!-- end of results -->"


def main() -> None:
    """Write README's block anew."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", text, re.S)
    if not found:
        sys.exit(f"README.md: the marks {BEGIN} and {END} are gone")
    readme.write_text(text[: found.start()] + block() + text[found.end() :], encoding="utf-8")


def block(report: Path = REPORT) -> str:
    """The results in Markdown, marks included."""
    records = load_records(report)
    tables = ReportTables(report, records)
    claims = measured_claims(tables)
    settings = settings_table(tables["06_pareto/pareto"])
    rows = settings_rows(settings)
    parts = [
        BEGIN,
        setup(records, tables),
        table(SETTINGS_HEADER, rows, right=True),
        settings_note(settings),
        *figures(settings.to_dict("records"), rows, {claim.source: claim for claim in claims}, claims),
        "### What the papers say, and what we measured",
        RULE,
        *(part for origin, title in ORIGINS.items() for part in (f"**{title}**", claim_table([c for c in claims if c.origin == origin]))),
        cost(records),
        END,
    ]
    return "\n\n".join(parts)


def setup(records: list[Record], tables: ReportTables) -> str:
    """What was converted, and with how many tokens."""
    config = {record.run.name: record.run.config for record in records}["03_train_router"]
    moe, train, data = config["dynamoe"], config["train"], config["data"]
    chance = tables["04_router_confusion/router_chance"]
    layers, whole = len(chance) - 1, chance.iloc[-1]
    heldout = int(tables["03_train_router/trained_perplexity"]["tokens"].iloc[0])
    tomoe = int(tables["12_tomoe/tomoe_training"]["tokens"].max())
    sizes = ", ".join(f"{100 * size:g}" for size in moe["experts"])
    study = int(tables["07_collapse/collapse_training"]["tokens"].max())
    trained = train["steps"] * train["batch_size"] * train["accumulation"] * data["context"]
    documents = int(whole["documents"])
    return (
        f"SmolLM2-135M-Instruct ({layers} layers, de-quantized from a 4-bit GGUF), each MLP cut into nested experts of {sizes} % of its "
        f"neurons. The router of every θ was trained on {trained:,} tokens of C4 and Wikipedia ({train['steps']} steps of "
        f"{train['batch_size']} x {data['context']}, λ_LM {moe['lambda_lm']:g}), ToMoE on {tomoe:,}, those of the collapse study and the "
        f"label sweep on {study:,}; measured on {heldout:,} held-out tokens in {documents} documents. The papers trained on 10 B and 20 M "
        "tokens: what follows is the beginning of a training. All numbers are computed from the tables of the committed report "
        "([reports/small](reports/small), open its `index.html`); intervals are 95 %, of times 10 to 90 % of the rounds."
    )


def figures(settings: list[dict], rows: list[list[str]], by_source: dict[str, Claim], claims: list[Claim]) -> list[str]:
    """Four figures with a sentence each."""
    router = next(n for n, row in enumerate(settings) if row["method"] == "router" and row["theta"] == 0.9)
    _, perplexity, _, _, neurons, params, _ = rows[router]
    static = by_source["06_pareto/static_comparison"]
    learns, errors = (next(claim for claim in claims if claim.claim.startswith(start)) for start in ("A small router", "Router errors"))
    layers, collapse = by_source["05_expert_usage/active_by_layer"], by_source["07_collapse/collapse"]
    pays = {HOLDS: "choosing by token pays", FAILS: "choosing by token does not pay"}
    differs = {HOLDS: "differs by layer"}.get(layers.verdict, "is not shown to differ by layer")
    more = {HOLDS: "more often than chance", FAILS: "less often than chance"}
    fell = {HOLDS: "every layer collapses", FAILS: "not every layer collapses"}
    collapsed = fell.get(collapse.verdict, "in some seeds only every layer collapses")
    return [
        "![Perplexity and accuracy against active parameters, every θ beside its controls](reports/small/06_pareto/pareto.png)",
        f"**The frontier.** At θ = 0.9 a token runs {neurons} of the MLP neurons, {params} parameters, at {perplexity} times the dense "
        "perplexity. Beside a static cut with as many active parameters, trained alike (at this θ only), "
        f"{pays.get(static.verdict, 'it is not decided whether choosing by token pays')}: {static.measured} ({static.n}).",
        "![Router confusion matrix](reports/small/04_router_confusion/router_confusion.png)",
        f"**The router** is {learns.measured} ({learns.control}). Its errors fall on neighbouring experts "
        f"{more.get(errors.verdict, 'not distinguishably more often than chance')}: {errors.measured}, {errors.control}.",
        "![Expert usage by layer](reports/small/05_expert_usage/expert_usage.png)",
        f"**Who does the work** {differs}: {layers.measured} ({layers.n}).",
        "![Expert usage with and without supervision of the routers](reports/small/07_collapse/collapse.png)",
        f"**Without supervision** (λ_router = 0), early in training, {collapsed} to one expert: {collapse.measured}; {collapse.control} "
        f"({collapse.n}).",
    ]


def claim_table(claims: list[Claim]) -> str:
    """A row a claim."""
    rows = [[c.claim, c.paper, c.measured, c.control, c.n, f"**{c.verdict}**"] for c in claims]
    return table(["claim", "the paper says", "we measured", "chance or control", "n", "verdict"], rows)


def cost(records: list[Record]) -> str:
    """What it takes to make the report again."""
    steps = {step.key: step.seconds for record in records for step in record.results.steps}
    peak = max(record.run.peak_memory_bytes or 0 for record in records)
    env = records[0].env
    where = f"{env.platform.split(', ')[-1]} ({env.cpu}, no GPU)"
    return (
        f"**To make it again**: `.venv/bin/dynamoe-lab run --profile small`. Its {len(steps)} computing steps took "
        f"{duration_text(sum(steps.values()))} on {where}, with at most {size_text(peak)} of memory; a run "
        "that is stopped goes on where it was."
    )


def table(header: list[str], rows: list[list[str]], *, right: bool = False) -> str:
    """A Markdown table; `right` aligns all but the first column."""
    lines = [header, ["---", *(["--:" if right else "---"] * (len(header) - 1))], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    main()

"""What became of the saving: time beside the dense model's, where the time goes, and what growth does to it."""

import pandas as pd

from dynamoe_lab.analysis.frames import list_names, percent, require
from dynamoe_lab.analysis.metrics.timing import PARTS, PHASES, SETTING, growth_studies, routed_rows, row_near, setting_name, told_setting
from dynamoe_lab.errors import InputError

__all__ = ["cost_growth_finding", "latency_finding", "time_parts_finding"]

_NEEDED = (*SETTING, "routing", "active_mlp_fraction", "time_ratio", "time_ratio_low", "time_ratio_high", "realised", "amdahl", "n")
_WHO = {"mixed": "experts mixed", "one expert": "one expert for all tokens"}
_WHOLE = {"prefill": "a prefill of", "decode": "a decode step at"}
_AXES = {"experts": "experts", "size": "hidden × MLP size", "tokens": "tokens", "batch": "sequences"}
ALIKE = 0.02  # active shares that differ by less are compared


def latency_finding(ratios: pd.DataFrame, *, phase: str = "prefill") -> str:
    """Do fewer active parameters mean less time?

    Told at the active share nearest to half of the MLP, and for the trained router at its own: the time beside the dense model's, Amdahl's
    bound, and how much of the ideal the MLPs reach, with experts mixed and with one expert for all tokens.

    Args:
        ratios: the frame of `latency_ratios`, one run. A time is called less than the dense model's only if its 90 % quantile over rounds
            is.
        phase: "prefill" (its largest setting is told) or "decode" (that of the smallest batch).

    Raises:
        InputError: a column is missing, or no row of a converted model in this phase.

    Example:
        >>> ratios = pd.DataFrame({"phase": "prefill", "batch": 1, "tokens": 1024, "routing": ["one expert"], "n": 5})
        >>> ratios = ratios.assign(active_mlp_fraction=0.5, realised=0.75, amdahl=1 / 0.7)
        >>> print(lab.latency_finding(ratios.assign(time_ratio=0.8, time_ratio_low=0.78, time_ratio_high=0.83)))
        With 50 % of the MLP active a prefill of 1 × 1024 tokens takes 80 % (78 % to 83 %) of the dense model's time (Amdahl's bound
        70 %): of the ideal speed the MLPs reach 75 % with one expert for all tokens (medians, 10 to 90 % quantiles, n = 5 rounds
        beside the dense model).
    """
    require(ratios, _NEEDED, "latency_finding")
    rows = told_setting(ratios, phase)
    if rows.empty:
        raise InputError(f"latency_finding: no rows of a converted model in phase {phase!r}")
    setting = f"{_WHOLE[phase]} {setting_name(phase, int(rows['batch'].iloc[0]), int(rows['tokens'].iloc[0]))}"
    half, router = row_near(rows, ("mixed", "one expert")), row_near(rows, ("router",))
    texts = []
    if half is not None:
        mixed, alone = (row_near(rows, (name,), half["active_mlp_fraction"]) for name in ("mixed", "one expert"))
        near = [row for row in (mixed, alone) if row is not None and abs(row["active_mlp_fraction"] - half["active_mlp_fraction"]) < ALIKE]
        reached = [f"{percent(row['realised'])} with {_WHO[row['routing']]}" for row in near]
        texts.append(
            f"with {percent(half['active_mlp_fraction'])} of the MLP active {setting} takes {_time_text(half)}: of the "
            f"ideal speed the MLPs reach {' and '.join(reached)}"
        )
    if router is not None:
        subject = "the trained router" if texts else f"{setting} under the trained router"
        texts.append(
            f"{subject}, with {percent(router['active_mlp_fraction'])} active, takes {_time_text(router)}, its MLPs reach "
            f"{percent(router['realised'])}"
        )
    if not texts:
        row = rows.iloc[0]
        texts.append(f"under routing '{row['routing']}' ({percent(row['active_mlp_fraction'])} active) {setting} takes {_time_text(row)}")
    message, n = "; ".join(texts), int(rows["n"].min())
    return f"{message[0].upper()}{message[1:]} (medians, 10 to 90 % quantiles, n = {n} rounds beside the dense model)."


def _time_text(row: pd.Series) -> str:
    """The time of a row against the dense model's, whether it is told apart from that, and the bound."""
    low, high = row["time_ratio_low"], row["time_ratio_high"]
    apart = "" if high < 1 else ", more," if low > 1 else ", not distinguishably less,"
    spread = f"{percent(low)} to {percent(high)}"
    return f"{percent(row['time_ratio'])} ({spread}){apart} of the dense model's time (Amdahl's bound {percent(1 / row['amdahl'])})"


def time_parts_finding(parts: pd.DataFrame) -> str:
    """Where does the time go?

    Args:
        parts: the frame of `time_parts`, several runs; the first run of a phase, the dense model, is told beside the last.

    Raises:
        InputError: a column is missing, or there are no rows of a known phase.

    Example:
        >>> parts = pd.DataFrame({"part": ["MLP", "attention", "head"], "seconds": [0.6, 0.3, 0.1]})
        >>> print(lab.time_parts_finding(parts.assign(run="dense", phase="prefill", batch=1, tokens=1024)))
        A prefill of 1 × 1024 tokens takes: dense 1.00 s, of which 60 % MLPs, 30 % attention and 10 % head.
    """
    require(parts, ("run", "phase", "batch", "tokens", "part", "seconds"), "time_parts_finding")
    texts = []
    for phase in PHASES:
        rows = parts[parts["phase"] == phase]
        if rows.empty:
            continue
        runs = list(dict.fromkeys(rows["run"]))
        setting = setting_name(phase, int(rows["batch"].iloc[0]), int(rows["tokens"].iloc[0]))
        told = []
        for run in dict.fromkeys((runs[0], runs[-1])):
            seconds = rows[rows["run"] == run].groupby("part")["seconds"].sum().reindex(PARTS, fill_value=0.0)
            shares = (seconds / seconds.sum()).loc[lambda values: values > 0].sort_values(ascending=False)
            whole = seconds.sum()
            time = f"{whole:.2f} s" if whole >= 0.5 else f"{1e3 * whole:.3g} ms"
            names = list_names([f"{percent(share)} {'MLPs' if part == 'MLP' else part}" for part, share in shares.items()], len(PARTS))
            told.append(f"{run} {time}, of which {names}")
        texts.append(f"{_WHOLE[phase]} {setting} takes: {'; '.join(told)}")
    if not texts:
        raise InputError(f"time_parts_finding: no rows of a phase that is known; give {' or '.join(PHASES)}")
    message = ". ".join(text[0].upper() + text[1:] for text in texts)
    return f"{message}."


def cost_growth_finding(ratios: pd.DataFrame) -> str:
    """Does the saving stay as experts, model, text and batch grow?

    Args:
        ratios: the frame of `latency_ratios` with hidden_size, intermediate_size, experts: a routing per phase, see `growth_studies`.

    Raises:
        InputError: a column is missing, or nothing grows.

    Example:
        >>> rows = pd.DataFrame({"phase": "prefill", "batch": 1, "tokens": [64, 1024], "routing": "mixed", "n": 5})
        >>> rows = rows.assign(hidden_size=64, intermediate_size=256, experts=4, active_mlp_fraction=0.5)
        >>> rows = rows.assign(time_ratio=0.8, realised=[0.6, 0.9])
        >>> print(lab.cost_growth_finding(rows.assign(realised_low=rows["realised"] - 0.1, realised_high=rows["realised"] + 0.1)))
        What the MLPs of random models reach of the ideal speed with about 50 % active: from 64 to 1024 tokens prefill 60 % to 90 %
        (rises) (medians of n = 5 rounds; falls and rises where the 10 to 90 % quantiles lie apart).
    """
    require(ratios, ("phase", "realised", "realised_low", "realised_high", "time_ratio", "active_mlp_fraction", "n"), "cost_growth_finding")
    studies = growth_studies(ratios)
    if not studies:
        raise InputError("cost_growth_finding: nothing grows; measure two or more values of experts, model size, tokens or batch")
    texts = []
    for axis, rows in studies.items():
        told = []
        for phase in PHASES:
            part = rows[rows["phase"] == phase].sort_values("place")
            if len(part) < 2:
                continue
            first, last = part.iloc[0], part.iloc[-1]
            fell, rose = last["realised_high"] < first["realised_low"], last["realised_low"] > first["realised_high"]
            change = "falls" if fell else "rises" if rose else "not distinguishable"
            told.append(f"{phase} {percent(first['realised'])} to {percent(last['realised'])} ({change})")
        ends = rows.sort_values("place")["mark"]
        if told:
            texts.append(f"from {ends.iloc[0]} to {ends.iloc[-1]} {_AXES[axis]} {', '.join(told)}")
    share = percent(routed_rows(ratios)["active_mlp_fraction"].median())  # draws differ a little
    n = int(min(rows["n"].min() for rows in studies.values()))
    return (
        f"What the MLPs of random models reach of the ideal speed with about {share} active: {'; '.join(texts)} (medians of n = {n} "
        "rounds; falls and rises where the 10 to 90 % quantiles lie apart)."
    )

"""Frames as `latency_ratios` and `time_parts` give them, made up: MLPs take 60 % of the dense model's time, mixing costs a tenth."""

import pandas as pd

ROUTER = 0.06  # the routers' work, as a share of the dense MLPs'
SETTINGS = (("prefill", 1, 512), ("prefill", 4, 256), ("decode", 1, 256), ("decode", 4, 256))


def make_row(phase: str, batch: int, tokens: int, routing: str, share: float, *, mlp: float = 0.6, efficiency: float = 0.95, **columns):
    """One row: what `latency_ratios` gives if the MLPs reach `efficiency` of the ideal and take `mlp` of the dense time."""
    ideal = 1.0 if routing == "dense" else share + ROUTER
    realised = 1.0 if routing == "dense" else efficiency
    time = 1 - mlp + mlp * ideal / realised
    row = {"run": "", "phase": phase, "batch": batch, "tokens": tokens, "threads": 2, "device": "cpu", "dtype": "float32"}
    row |= {"routing": routing, "active_mlp_fraction": share, "ideal_share": ideal}
    amdahl = 1 / (1 - mlp * (1 - ideal))
    values = {"time_ratio": time, "realised": realised, "speedup": 1 / time, "amdahl": amdahl, "of_bound": 1 / time / amdahl}
    for name, value in values.items():
        row |= {name: value, f"{name}_low": 0.98 * value, f"{name}_high": 1.03 * value}
    return {**row, "n": 5, **columns}


def make_ratios() -> pd.DataFrame:
    """Two settings of prefill and of decode; one expert for all, mixed experts, and a trained router at 66 %."""
    rows = []
    for number, setting in enumerate(SETTINGS):
        worse = 0.05 * number
        rows.append(make_row(*setting, "dense", 1.0))
        rows += [make_row(*setting, "one expert", share, efficiency=0.97 - worse) for share in (0.25, 0.5, 0.75, 1.0)]
        rows += [make_row(*setting, "mixed", share, efficiency=0.88 - worse) for share in (0.5, 0.75)]
        rows.append(make_row(*setting, "router", 0.66, efficiency=0.9 - worse))
    return pd.DataFrame(rows)


def make_parts() -> pd.DataFrame:
    """Where the time of a prefill of a second and of a decode step of 30 ms goes, dense and converted."""
    rows = []
    for phase, tokens, scale in (("prefill", 512, 1.0), ("decode", 256, 0.03)):
        for run, share, router, sorting in (("dense", 1.0, 0, 0), ("100 %", 1.0, 0.04, 0), ("50 %", 0.5, 0.04, 0.05)):
            seconds = {"MLP": 0.6 * share, "router": router, "sorting": sorting, "attention": 0.25, "head": 0.05, "other": 0.1}
            for part, value in seconds.items():
                row = {"run": run, "routing": "dense" if run == "dense" else "mixed", "phase": phase, "batch": 1, "tokens": tokens}
                rows.append({**row, "part": part, "seconds": scale * value, "share": value / sum(seconds.values())})
    return pd.DataFrame(rows)


BASE = {"hidden_size": 128, "intermediate_size": 512, "experts": 4, "tokens": 256, "batch": 1}
GROWTH = (
    *({"experts": number} for number in (2, 8, 16)),
    *({"hidden_size": size, "intermediate_size": 4 * size} for size in (64, 256, 1024)),
    *({"tokens": tokens} for tokens in (64, 1024)),
    *({"batch": batch} for batch in (4, 16)),
)


def make_growth() -> pd.DataFrame:
    """Mixed tokens at 62 %; more experts realise less, larger models more, and decode is worse."""
    rows = []
    for change in ({}, *GROWTH):
        case = {**BASE, **change}
        for phase, penalty in (("prefill", 0.0), ("decode", 0.2)):
            efficiency = 0.95 - 0.01 * case["experts"] - 8 / case["hidden_size"] - penalty
            sizes = {name: case[name] for name in ("hidden_size", "intermediate_size", "experts")}
            rows.append(make_row(phase, case["batch"], case["tokens"], "dense", 1.0, **sizes))
            rows.append(make_row(phase, case["batch"], case["tokens"], "mixed", 0.625, efficiency=efficiency, **sizes))
    return pd.DataFrame(rows)

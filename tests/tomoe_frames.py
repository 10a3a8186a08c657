"""Small frames of ToMoE as evaluation gives them: masks, rotary pairs, a trace without labels, classes, steps."""

import numpy as np
import pandas as pd

KINDS = ("word", "part of a word", "digits", "punctuation")


def make_masks(layers: int = 3, experts: int = 4, neurons: int = 60, *, width: float = 0.6, seed: int = 0, run: str = "a") -> pd.DataFrame:
    """Experts whose open neurons are drawn independently."""
    rng, parts = np.random.default_rng(seed), []
    for layer in range(layers):
        for expert in range(experts):
            opened = np.flatnonzero(rng.random(neurons) < width)
            opened = opened if len(opened) else np.array([-1])
            parts.append(pd.DataFrame({"run": run, "layer": layer, "expert": expert, "neuron": opened, "neurons": neurons}))
    return pd.concat(parts, ignore_index=True)


def from_tables(*tables, run: str = "a") -> pd.DataFrame:
    """The frame of masks [E, H], one table a layer."""
    parts = []
    for layer, table in enumerate(tables):
        for expert, row in enumerate(np.asarray(table)):
            opened = np.flatnonzero(row) if np.any(row) else np.array([-1])
            parts.append(pd.DataFrame({"run": run, "layer": layer, "expert": expert, "neuron": opened, "neurons": len(row)}))
    return pd.concat(parts, ignore_index=True)


def make_pairs(layers: int = 3, pairs: int = 8, *, seed: int = 0, run: str = "a") -> pd.DataFrame:
    opened = np.random.default_rng(seed).random(layers * pairs) < 0.7
    return pd.DataFrame({"run": run, "layer": np.repeat(range(layers), pairs), "pair": np.tile(range(pairs), layers), "open": opened})


def make_classes(ids: int = 40) -> pd.DataFrame:
    return pd.DataFrame({"token_id": range(ids), "token": "x", "token_class": np.array(KINDS)[np.arange(ids) % len(KINDS)]})


def make_trace(
    *, domain: float = 0.0, kind: float = 0.0, document: float = 0.0, token: float = 0.0, documents: int = 24, n: int = 2400, seed: int = 0
) -> pd.DataFrame:
    """A trace of three layers and four experts; the choice depends on the token's domain, class, document and id as strongly as told."""
    rng, parts, ids, context = np.random.default_rng(seed), [], 40, 20
    columns = {
        "document": np.sort(rng.integers(documents, size=n)),
        "position": np.arange(n) % context,
        "token_id": rng.integers(ids, size=n),
    }
    place = columns["document"] % 3
    for layer in range(3):
        logits = rng.gumbel(size=(n, 4))
        for strength, levels, codes in (
            (domain, 3, place),
            (kind, len(KINDS), columns["token_id"] % len(KINDS)),
            (document, documents, columns["document"]),
            (token, ids, columns["token_id"]),
        ):
            logits += strength * rng.normal(size=(levels, 4))[codes]
        part = pd.DataFrame({"run": "router", "domain": np.array(["c4", "code", "math"])[place], **columns, "layer": np.int16(layer)})
        part = part.assign(expert=logits.argmax(axis=1).astype(np.int8), probability=np.float32(0.5))
        part["open_values"] = rng.uniform(0.5, 1, n).astype(np.float32)
        parts.append(part.assign(surprisal=np.where(part["position"] > 0, 3.0, np.nan)))
    return pd.concat(parts, ignore_index=True)


def make_steps(count: int = 20, *, run: str = "seed 0", shift: float = 0.0) -> pd.DataFrame:
    step = np.arange(1, count + 1)
    columns = {"run": run, "step": step, "tokens": step * 256, "loss": 5.0, "lm_loss": 4.0, "kl_loss": 0.02 * step + shift}
    columns |= {"ratio_loss": 0.5, "union_loss": 0.01, "balance_loss": 0.25 + 0.3 / step}
    columns |= {"active_ratio_max": 1 - 0.01 * step + 0.005, "active_ratio_mean": 1 - 0.01 * step, "union_coverage": 1 - 0.0005 * step}
    heldout = np.where(step % 10 == 0, 0.02 * step + shift + 0.05, np.nan)
    measured = {"heldout_kl": heldout, "open_ratio": np.where(step % 10 == 0, 1 - 0.02 * step, np.nan)}
    measured |= {"open_union": np.where(step % 10 == 0, 1 - 0.001 * step, np.nan)}
    return pd.DataFrame({**columns, **measured, "lr": 1e-3, "seconds": step * 1.0})

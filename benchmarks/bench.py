"""Speed of this package, as ratios of two things measured side by side: prints a table, writes benchmarks/results.json.

    make bench                                       # everything, about 12 minutes on two cores
    python benchmarks/bench.py --only load --quick   # one number, roughly

Ratios hold where seconds do not, but two heavy jobs on the same cores spoil them, too: run it alone. A run that leaves anything out
(--only, --quick, --pairs) writes a file only where --output says.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocator import allocator
from experts import tomoe_grown, tomoe_prefill
from forwards import decode, grown, label_cost, prefill
from machine import ROOT, describe
from memory import eval_memory, train_memory
from results import table, write
from starting import load
from training import tomoe_train_rate, train_rate
from transformers import PreTrainedModel

import dynamoe_lab as lab
from dynamoe_lab.workbench.files import without_paths

__all__ = ["MEASUREMENTS", "Setup", "main"]

MODEL = "smollm2-135m"
PAIRS, QUICK_PAIRS = 9, 3


class Setup:
    """Models, text and files that measurements share; each is made when it is first asked for."""

    def __init__(self, folder: Path, pairs: int):
        self.folder, self.pairs = folder, pairs
        self.few = max(1, pairs // 4)  # rounds whose every number takes a process of half a minute

    @cached_property
    def ids(self) -> torch.Tensor:
        """64 held-out blocks of 256 tokens."""
        return lab.load_blocks("c4+wiki", lab.load_tokenizer(MODEL), context=256, tokens=16_384, split="heldout").ids

    @property
    def long_ids(self) -> torch.Tensor:
        """The same tokens as 16 sequences of 1,024."""
        return self.ids.view(16, 1_024)

    @cached_property
    def ids_file(self) -> Path:
        np.save(self.folder / "ids.npy", self.ids.numpy())
        return self.folder / "ids.npy"

    @cached_property
    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Dense and converted SmolLM2. One calibration block will do: the order of the neurons does not matter to time."""
        dense, _ = lab.load_model(MODEL)
        return dense, lab.convert(dense, lab.DynaMoEConfig(), calibration=self.ids[:1])

    @cached_property
    def masked(self) -> PreTrainedModel:
        """The dense model as a masked ToMoE model, not yet trained: nearly everything is open."""
        return lab.convert(self.models[0], lab.ToMoEConfig())

    @cached_property
    def converted_folder(self) -> Path:
        """The converted model, saved with the tokenizer; not yet trained."""
        self.models[1].save_pretrained(self.folder / "converted")
        lab.load_tokenizer(MODEL).save_pretrained(self.folder / "converted")
        return self.folder / "converted"


# What is measured together, in this order, and the names of what comes out. Training is last: it changes the weights.
MEASUREMENTS: dict[str, tuple[tuple[str, ...], Callable[[Setup], list[dict[str, Any]]]]] = {
    "labels": (("label_cost",), lambda setup: label_cost(*setup.models, setup.ids[:4], setup.pairs)),
    "prefill": (
        ("prefill_realised", "end_to_end", "random_mixing"),
        lambda setup: prefill(*setup.models, setup.pairs, ids=setup.long_ids),
    ),
    "decode": (("decode_realised",), lambda setup: decode(*setup.models, setup.pairs, ids=setup.long_ids)),
    "prefill of larger layers": (("prefill_realised",), lambda setup: grown(setup.pairs, "prefill")),
    "decode of larger layers": (("decode_realised",), lambda setup: grown(setup.pairs, "decode")),
    "prefill of separate experts": (
        ("tomoe_prefill_realised",),
        lambda setup: tomoe_prefill(setup.models[0], setup.pairs, ids=setup.long_ids, run="SmolLM2-135M"),
    ),
    "prefill of larger separate experts": (("tomoe_prefill_realised",), lambda setup: tomoe_grown(setup.pairs)),
    "load": (("load",), lambda setup: load(setup.converted_folder)),
    "allocator": (("allocator",), lambda setup: allocator(MODEL, setup.ids_file, max(2, setup.few))),
    "memory of evaluation": (("eval_memory",), lambda setup: eval_memory(MODEL, setup.ids_file, setup.few)),
    "memory of training": (("train_memory",), lambda setup: train_memory(MODEL, setup.converted_folder, setup.ids_file, setup.few)),
    "rate of ToMoE training": (
        ("tomoe_train_rate",),
        lambda setup: tomoe_train_rate(setup.models[0], setup.masked, setup.ids[:4], setup.folder, setup.pairs),
    ),
    "rate of training": (("train_rate",), lambda setup: train_rate(*setup.models, setup.ids[:4], setup.folder, setup.pairs)),
}
NAMES = tuple(dict.fromkeys(name for names, _ in MEASUREMENTS.values() for name in names))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 0, or 1 if a measurement failed. A goal that is missed is a finding, not a failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--pairs", type=int, help=f"rounds of each measurement (default {PAIRS}, with --quick {QUICK_PAIRS})")
    parser.add_argument("--output", type=Path, help="the file to write (default benchmarks/results.json, if nothing is left out)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args(arguments)
    pairs = (QUICK_PAIRS if options.quick else PAIRS) if options.pairs is None else options.pairs
    if pairs < 1:
        parser.error(f"--pairs {pairs}: give at least 1")
    whole = options.only is None and options.pairs is None and not options.quick
    output = options.output or (ROOT / "benchmarks" / "results.json" if whole else None)
    wanted = set(options.only or NAMES)
    lab.keep_freed_memory()
    results, tables, failed = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder), pairs)
        for measurement, (names, measure) in MEASUREMENTS.items():
            if not wanted & set(names):
                continue
            began = time.perf_counter()
            try:
                found = [row for row in measure(setup) if row["name"] in wanted]
            except Exception as error:  # one number less, not all of them
                failed[measurement] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                print(f"{measurement}: failed, {failed[measurement]}", flush=True)
                continue
            results += found
            tables.append(table(found))
            print(f"{tables[-1]}\n({measurement}: {time.perf_counter() - began:.0f} s)\n", flush=True)
    if not results:
        return 1
    if len(tables) > 1:
        print(table(results))
    if output is not None:
        write(output, results, describe(), without_paths(failed, ROOT))
        print(f"written: {output.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

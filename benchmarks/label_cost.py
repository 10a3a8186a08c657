"""What difficulty labels cost: one forward with the labels of every layer at 20 values of θ, beside one dense forward.

    python benchmarks/label_cost.py [--tokens 1024] [--pairs 15]

Dense and labelled forwards alternate, so that what else the machine does falls on both; the ratio is formed pair by pair. The labelled
forward runs the converted model with every token at full width: the same function, plus the outputs of the smaller experts, their
cosines to the full output, and the routers.
"""

import argparse
import statistics
import time

import numpy as np
import torch

import dynamoe_lab as lab


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_024, help="tokens per forward, in blocks of 256")
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    dense, tokenizer = lab.load_model("smollm2-135m")
    ids = lab.load_blocks("c4+wiki", tokenizer, context=256, tokens=options.tokens, split="heldout").ids
    model = lab.convert(dense, lab.DynaMoEConfig(), calibration=ids[:1])
    model.set_routing("full")
    thetas = np.linspace(0.5, 0.99, 20)

    def labelled() -> None:
        similarities = model(input_ids=ids, output_router_logits=True, use_cache=False).similarities
        for theta in thetas:
            model.labels_at(similarities, float(theta))

    def plain() -> None:
        dense(input_ids=ids, use_cache=False)

    def seconds(function) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    for function in (plain, labelled):
        function()
    ratios = []
    for pair in range(options.pairs):
        order = (plain, labelled) if pair % 2 else (labelled, plain)
        took = {function: seconds(function) for function in order}
        ratios.append(took[labelled] / took[plain])
        print(
            f"pair {pair + 1}/{options.pairs}: dense {took[plain]:.2f} s, with labels {took[labelled]:.2f} s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    low, high = np.quantile(ratios, (0.1, 0.9))
    print(f"labels at {len(thetas)} θ cost {statistics.median(ratios):.3f} of a dense forward (median; 10-90 %: {low:.3f} to {high:.3f})")
    print(f"n = {len(ratios)} pairs of {ids.numel():,} tokens, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()

"""Does the router learn its labels, and at what price? 100 steps on SmolLM2-135M, and the rate of training beside plain fine-tuning.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python benchmarks/router_training.py [STEPS] [KEY=VALUE ...]

Prints held-out router accuracy beside its chance levels, the perplexity ratio to the dense model, active parameters, and the ratio of
the two rates from alternating forward and backward passes (fine-tuning: the dense model with the same MLP weights learning). About twelve
minutes on two cores. Overrides are experiment fields, e.g. `dynamoe.lambda_lm=1.0 train.router_lr=0.001`.
"""

import dataclasses
import statistics
import sys
import tempfile
import time

import torch

import dynamoe_lab as lab
from dynamoe_lab.training.dynamoe import freeze


def seconds_of_a_step(model: torch.nn.Module, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    return time.perf_counter() - began


def rates(dense: torch.nn.Module, model: torch.nn.Module, ids: torch.Tensor, pairs: int = 9) -> None:
    """Tokens/s of fine-tuning and of router training, in turn, and the median of the pairs' ratios."""
    freeze(model.train())
    dense.train().requires_grad_(False)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    seconds_of_a_step(dense, ids), seconds_of_a_step(model, ids)
    measured = [(seconds_of_a_step(dense, ids), seconds_of_a_step(model, ids)) for _ in range(pairs)]
    ratios = sorted(plain / routed for plain, routed in measured)
    plain, routed = (ids.numel() / statistics.median(times) for times in zip(*measured, strict=True))
    print(f"fine-tuning {plain:.0f} tokens/s, router training {routed:.0f} tokens/s (medians of {pairs})")
    print(f"ratio, pair by pair: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}")


def main(steps: int, overrides: list[str]) -> None:
    experiment = lab.load_experiment("quick", overrides)
    dense, tokenizer = lab.load_model("smollm2-135m")

    def blocks(split: str, tokens: int) -> lab.Blocks:
        return lab.load_blocks("c4+wiki", tokenizer, context=256, tokens=tokens, split=split)

    train, heldout = blocks("train", steps * 1024), blocks("heldout", 16_384)
    model = lab.convert(dense, experiment.dynamoe, calibration=blocks("calibration", 16_384))
    settings = dataclasses.replace(experiment.train, steps=steps, save_steps=steps)
    method = experiment.dynamoe
    print(f"lambda_lm {method.lambda_lm}, theta {method.theta}, router_lr {settings.router_lr}, mlp_lr {settings.mlp_lr}")
    with tempfile.TemporaryDirectory() as folder:
        trained = lab.train(model, train, settings, output_dir=folder)
    seconds = trained["seconds"].diff().dropna()
    print(f"median rate of the {len(trained)} steps, optimizer included: {1024 / seconds.median():.0f} tokens/s")
    reference = lab.document_losses(dense, heldout)
    for routing in ("router", "label"):
        model.set_routing(routing)
        print(lab.perplexity_finding(lab.evaluate_perplexity(model, heldout, reference=reference, run=routing)))
    model.set_routing("router")
    routing = lab.trace_routing(model, heldout)
    print(lab.router_finding(lab.router_chance(routing, theta=experiment.dynamoe.theta)))
    print(lab.active_params_finding(lab.count_active_params(model, routing)))
    rates(dense, model, train.ids[:4])


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given.pop(0)) if given and given[0].isdigit() else 100, given)

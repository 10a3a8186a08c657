"""Does the router learn its labels, and what does it cost on held-out text? 100 steps on SmolLM2-135M.

    python benchmarks/router_training.py [STEPS] [KEY=VALUE ...]

Prints held-out router accuracy beside its chance levels, the perplexity ratio to the dense model, and active parameters. About twelve
minutes on two cores. Overrides are experiment fields, e.g. `dynamoe.lambda_lm=1.0 train.router_lr=0.001`. How fast training is beside
plain fine-tuning: `make bench`, train_rate.
"""

import dataclasses
import sys
import tempfile

import dynamoe_lab as lab


def main(steps: int, overrides: list[str]) -> None:
    lab.keep_freed_memory()
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


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given.pop(0)) if given and given[0].isdigit() else 100, given)

"""Claims and questions of the papers that the notebooks of a report do not measure, and what does."""

from dynamoe_lab.analysis.findings.claims.claim import UNDECIDED, Claim

__all__ = ["CLAIMS"]


def _claim(claim: str, origin: str, paper: str, why: str) -> Claim:
    return Claim(claim, origin, paper, f"not measured here: {why}", "", "not run", UNDECIDED)


CLAIMS = (
    _claim(
        "At θ = 0.7 DynaMoE comes near Flextron with a ninth of its training tokens",
        "DynaMoE",
        "67.7 % with 4.6 B active, from a base of 77.8 %; Flextron 68.3 % with 4.1 B, from 73.3 % (four tasks)",
        "Flextron's code is not public",
    ),
    _claim("Less energy a token", "open", "", "it takes a counter of the machine's; notebook 09 reads one where there is"),
    _claim("The same from a base that is a mixture of experts already", "open", "", "no such family is in the family table"),
    _claim(
        "With p = 0.6 and 0.5 perplexity is at most 1.40 and 1.63 times the dense model's",
        "ToMoE",
        "1.40 and 1.63 (Llama-2-7B, WikiText-2)",
        "the sweep tomoe_ratio trains them",
    ),
    _claim(
        "At p = 0.7 ToMoE is better than other structural pruning",
        "ToMoE",
        "6.41; DISP-LLM 6.85, ModeGPT 7.51, SliceGPT 10.47, LLM-Pruner 13.56 (Llama-2-7B)",
        "none of the others is in this workbench",
    ),
    _claim("Other seeds find the same masks", "ToMoE", "an open question", "notebook 12 with seeds=[0,1,2] compares them"),
    _claim("Experts found in one domain serve another", "ToMoE", "an open question", "the sweep tomoe_transfer"),
    _claim("Masking all of attention per token gains over the hybrid", "ToMoE", "an open question", "the sweep tomoe_attention"),
    _claim("The union term lowers perplexity (its weight 2 against 0, p = 0.4)", "ToMoE", "an open question", "the sweep tomoe_union"),
)

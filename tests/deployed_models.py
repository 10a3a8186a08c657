"""ToMoE pico models whose masks leave out about half, differently for every expert and token: where tests of the deployed form start."""

import torch
from conftest import make_tomoe

from dynamoe_lab.conversion import export

PRUNED = [(family, attention) for family in ("llama", "mistral", "qwen2") for attention in ("hybrid", "dynamic", "none")]
CASES = [*PRUNED, *((family, "none") for family in ("qwen3", "gemma3_text", "gpt_neox", "phi"))]  # family, attention


@torch.no_grad()
def make_masked(family: str = "llama", *, dense=None, seed: int = 0, **changes):
    """A masked model with routers and masks as training might have left them; the same for the same arguments."""
    model = make_tomoe(family, dense=dense, mask_offset=0.3, **changes)
    generator = torch.Generator().manual_seed(seed)
    for module in (*model.routed_mlps(), *model.masked_attentions()):
        module.router.weight.normal_(generator=generator)
        module.decoder.weight.normal_(generator=generator)
        module.norm.weight.normal_(mean=1, std=0.3, generator=generator)
        module.norm.bias.normal_(generator=generator)
    return model


def make_deployed(family: str = "llama", **changes):
    """The deployed form of `make_masked`."""
    return export(make_masked(family, **changes))

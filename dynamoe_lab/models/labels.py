"""What counts as difficult: how close the output of a nested expert comes to the full output. A definition is an entry of `LABELS`.

Whatever the definition, a token's label is the smallest expert whose similarity is at least theta (arXiv 2502.12325, which takes the
cosine). So a similarity is 1 where both outputs are the same, and less the worse the expert is; of an error e it is 1 - e, and theta is 1
minus the largest error that a label allows.

    >>> from dynamoe_lab.models.labels import cosine, relative_error
    >>> full, half = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])  # one token, D = 2
    >>> [round(similarity([half], full, None)[0].item(), 4) for similarity in (cosine, relative_error)]
    [0.6, 0.2]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LABELS", "Label", "cosine", "labels_from_similarity", "nested_similarity", "relative_error", "residual_error"]

_TINY = torch.finfo(torch.float32).tiny


def cosine(outputs: Sequence[Tensor], full: Tensor, residual: Tensor | None) -> list[Tensor]:
    """The paper's: cosine of each output to the full one. An all-zero output has cosine 0 to anything.

    Args:
        outputs: of the experts but the last, E - 1 x [N, D] float32.
        full: of the last expert, which is the whole MLP, [N, D] float32.
        residual: not read.

    Returns:
        E - 1 x [N] float32, -1 to 1.
    """
    full_norm = full.norm(dim=-1)
    return [(output * full).sum(-1) / (output.norm(dim=-1) * full_norm).clamp_min(_TINY) for output in outputs]


def relative_error(outputs: Sequence[Tensor], full: Tensor, residual: Tensor | None) -> list[Tensor]:
    """1 - ||output - full|| / ||full||: what the expert misses, beside the full output. Arguments as of `cosine`; at most 1."""
    scale = full.norm(dim=-1).clamp_min(_TINY)
    return [1 - (output - full).norm(dim=-1) / scale for output in outputs]


def residual_error(outputs: Sequence[Tensor], full: Tensor, residual: Tensor | None) -> list[Tensor]:
    """1 - ||output - full|| / ||r + full||: what the expert misses, beside the residual stream after the MLP. At most 1.

    A layer whose MLP adds little to the stream is easy, however badly an expert does there. Arguments as of `cosine`, and r [N, D].
    """
    scale = (residual + full).norm(dim=-1).clamp_min(_TINY)
    return [1 - (output - full).norm(dim=-1) / scale for output in outputs]


@dataclass(frozen=True)
class Label:
    """A definition of difficulty."""

    similarity: Callable[[Sequence[Tensor], Tensor, Tensor | None], list[Tensor]]  # see `cosine`
    residual: bool = False  # whether it needs the residual stream r; then outputs are what is added to r, after the family's output norm


LABELS: dict[str, Label] = {
    "cosine": Label(cosine),
    "relative_error": Label(relative_error),
    "residual_error": Label(residual_error, residual=True),
}


def nested_similarity(
    products: list[Tensor],
    bias: Tensor | None = None,
    *,
    label: str = "cosine",
    residual: Tensor | None = None,
    output_norm: nn.Module | None = None,
) -> Tensor:
    """Similarity between the output of every nested expert and the full output, in float32.

    Args:
        products: E block products, each [N, D]; expert e's output is the sum of the first e + 1.
        bias: output bias [D], which belongs to every expert.
        label: a definition in `LABELS`.
        residual: [N, D] what the MLP's output is added to; for definitions that need it.
        output_norm: the norm that the family has between the MLP's output and the sum; read by definitions that need `residual`.

    Returns:
        [N, E]; the last column is exactly 1.
    """
    definition = LABELS[label]
    running = [products[0].float() if bias is None else products[0].float() + bias.float()]
    for product in products[1:]:
        running.append(running[-1] + product.float())
    if definition.residual:
        if residual is None:
            raise RuntimeError(f"label {label}: the residual stream is only known in a forward of the whole model")
        residual = residual.float()
        running = running if output_norm is None else [output_norm(output) for output in running]
    columns = definition.similarity(running[:-1], running[-1], residual)
    return torch.stack([*columns, torch.ones_like(running[-1][:, 0])], dim=-1)


def labels_from_similarity(similarities: Tensor, theta: float) -> Tensor:
    """The smallest expert with similarity >= theta; the last always qualifies. [..., E] -> [...] int64."""
    qualifies = similarities >= theta
    qualifies[..., -1] = True
    return qualifies.int().argmax(dim=-1)

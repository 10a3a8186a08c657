"""What a ToMoE model is in both of its forms, masked and deployed (arXiv 2501.15316): its routing modes, its families, its labels."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_tomoe import ToMoEConfig
from .families import FAMILIES, Family, decoder_layers, dense_type_of
from .routed import RoutedMixin, token_mask

__all__ = ["ToMoEForm", "labels_without_pads"]


class ToMoEForm(RoutedMixin):
    """Stands before the family's class in the bases of either form."""

    method = "tomoe"
    routing_modes: ClassVar = {
        "router": None,
        "full": None,
        "random": None,
        "label": "ToMoE has no difficulty labels; its experts are no prefixes of each other",
    }

    @property
    def _family(self) -> Family:
        return FAMILIES[dense_type_of(self.config.model_type)]

    def routed_mlps(self) -> list[nn.Module]:
        """The MLPs with experts, one a layer, in order."""
        return [getattr(layer, self._family.mlp) for layer in decoder_layers(self)]

    def _require_heads(self, moe: ToMoEConfig) -> None:
        """Raises ValueError, with the reason, if attention is to be pruned in a family whose heads cannot be."""
        reason = self._family.whole_heads
        if moe.attention != "none" and reason is not None:
            raise ValueError(
                f"tomoe.attention = {moe.attention!r}: heads of {dense_type_of(self.config.model_type)} cannot be pruned: {reason}; "
                "set attention = 'none'"
            )


def labels_without_pads(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels [B, T] with -100 where the token or the one that predicts it is a pad."""
    counted = token_mask(attention_mask, labels.numel())
    if counted is None:
        return labels
    counted = counted.view_as(labels).to(labels.device)
    return labels.masked_fill(~(counted & F.pad(counted, (1, 0), value=True)[:, :-1]), -100)

"""What knows all layers of a ToMoE model: expert embeddings from one recurrent network, and the features that masks are decoded from.

arXiv 2501.15316, the hypernetwork. Everything here is float32, whatever the model's own dtype.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_tomoe import ToMoEConfig

__all__ = ["Hypernetwork", "embedding_features", "feature_tangents"]


class Hypernetwork(nn.Module):
    """Expert embeddings of M pruned modules from fixed noise z [M, E, n]: a bidirectional GRU runs over the modules, experts its batch."""

    def __init__(self, modules: int, config: ToMoEConfig):
        super().__init__()
        self.config = config
        z = torch.empty(modules, config.num_experts, config.noise_size)
        if config.train_z:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)
        self.gru = nn.GRU(config.noise_size, config.embedding_size // 2, bidirectional=True)

    def forward(self) -> Tensor:
        """Embeddings [M, E, S]."""
        with torch.autocast(self.z.device.type, enabled=False):
            return self.gru(self.z)[0]


def embedding_features(embeddings: Tensor, norm: nn.LayerNorm) -> Tensor:
    """GELU(LayerNorm(e)), which the mask decoder multiplies: [..., S] -> [..., S]."""
    return F.gelu(norm(embeddings))


def feature_tangents(embeddings: Tensor, directions: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Derivative of `embedding_features` at each of E embeddings along each of K directions: [E, S], [K, S] -> [E, K, S]."""
    centred = embeddings - embeddings.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()  # [E, 1]
    normed = centred * scale
    moves = directions - directions.mean(-1, keepdim=True)  # [K, S]
    along = (normed @ moves.t()) / normed.shape[-1]  # [E, K]
    slopes = (moves[None] - normed[:, None] * along[..., None]) * scale[..., None] * norm.weight
    inner = normed * norm.weight + norm.bias
    density = (-0.5 * inner.square()).exp() * (2 * torch.pi) ** -0.5
    gelu_slope = 0.5 * (1 + (inner * 0.5**0.5).erf()) + inner * density
    return slopes * gelu_slope[:, None]

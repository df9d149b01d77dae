"""Self-attention in the form that engines fuse: one QKV product, scores of a pre-scaled query."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """`softmax(QKᵀ/√d)·V` with the factor 1/√d folded into the query's weights.

    Says what the `nn.MultiheadAttention` it is made from says. That one's graph takes the heads
    through transposed and squeezed copies, and asks for the batch size in every block.
    """

    def __init__(self, source: nn.MultiheadAttention, fused: bool) -> None:
        """Copy the weights.

        Args:
            source: with one `in_proj_weight`, as in open_clip's towers.
            fused: write one `Attention` operator instead of its parts.
        """
        super().__init__()
        width, heads = source.embed_dim, source.num_heads
        self._heads, self._head_width, self.fused = heads, width // heads, fused
        scale = self._head_width**-0.5
        own = source.in_proj_weight
        self.qkv = nn.Linear(width, 3 * width, bias=source.in_proj_bias is not None)
        factors = torch.cat([torch.full((width,), scale), torch.ones(2 * width)]).to(own)
        self.qkv.weight = nn.Parameter(own.detach() * factors[:, None], requires_grad=False)
        if source.in_proj_bias is not None:
            bias = source.in_proj_bias.detach() * factors
            self.qkv.bias = nn.Parameter(bias, requires_grad=False)
        self.out = nn.Linear(width, width, bias=source.out_proj.bias is not None)
        self.out.load_state_dict(source.out_proj.state_dict())

    def forward(
        self, query: Float[Tensor, "batch tokens width"], *_: Any, **__: Any
    ) -> tuple[Float[Tensor, "batch tokens width"], None]:
        """Return the attended tokens; key and value are the query, as in every visual tower."""
        query, key, value = self.qkv(query).chunk(3, dim=-1)
        split = (self._heads, self._head_width)
        query, value = (x.unflatten(-1, split).transpose(1, 2) for x in (query, value))
        key = key.unflatten(-1, split)
        if self.fused:
            mixed = torch.onnx.ops.attention(query, key.transpose(1, 2), value, scale=1.0)[0]
        else:
            # One transposition instead of two: tokens × heads × width to heads × width × tokens.
            scores = query @ key.permute(0, 2, 3, 1)
            mixed = scores.softmax(dim=-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2)), None


def simplify_attention(network: nn.Module, fused: bool) -> None:
    """Put `SelfAttention` in the place of every plain `nn.MultiheadAttention`, in place.

    timm's attention is told to scale its query and to write out the rest, for the same reason.

    Args:
        network: a visual tower.
        fused: write ONNX's Attention operator, of opset 23, where `SelfAttention` is.
    """
    for module in [*network.modules()]:
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010
        for name, child in module.named_children():
            # Others, such as a pooling by attention, get a query that is not the key.
            if isinstance(child, nn.MultiheadAttention) and _is_plain(module, child):
                setattr(module, name, SelfAttention(child, fused))


def _is_plain(owner: nn.Module, attention: nn.MultiheadAttention) -> bool:
    from open_clip.transformer import ResidualAttentionBlock

    return (
        isinstance(owner, ResidualAttentionBlock)
        and attention.batch_first
        and attention.in_proj_weight is not None
        and attention.bias_k is None
    )

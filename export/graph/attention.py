"""Self-attention as engines fuse it: one QKV product, and scores of a pre-scaled query."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """`softmax(QKᵀ/√d)·V` with the factor 1/√d folded into the query's weights.

    It computes the same as the `nn.MultiheadAttention` that it is made from, whose graph transposes
    and squeezes copies of the heads and reads the batch size in every block.
    """

    def __init__(self, source: nn.MultiheadAttention, fused: bool) -> None:
        """Copy the weights.

        Args:
            source: with one `in_proj_weight`, as in open_clip's towers.
            fused: use ONNX's `Attention` operator.
        """
        super().__init__()
        width, heads = source.embed_dim, source.num_heads
        self._heads, self._head_width, self.fused = heads, width // heads, fused
        scale = self._head_width**-0.5
        weight = source.in_proj_weight
        self.qkv = nn.Linear(width, 3 * width, bias=source.in_proj_bias is not None)
        factors = torch.cat([torch.full((width,), scale), torch.ones(2 * width)]).to(weight)
        self.qkv.weight = nn.Parameter(weight.detach() * factors[:, None], requires_grad=False)
        if source.in_proj_bias is not None:
            bias = source.in_proj_bias.detach() * factors
            self.qkv.bias = nn.Parameter(bias, requires_grad=False)
        self.out = nn.Linear(width, width, bias=source.out_proj.bias is not None)
        self.out.load_state_dict(source.out_proj.state_dict())

    def forward(
        self, query: Float[Tensor, "batch tokens width"], *_: Any, **__: Any
    ) -> tuple[Float[Tensor, "batch tokens width"], None]:
        """Return the attended tokens; `query` is key and value too, as in every visual tower."""
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
    """Replace every plain `nn.MultiheadAttention` by `SelfAttention`, in place.

    timm's attention gets its own unfused form, which scales the query as well.

    Args:
        network: a visual tower.
        fused: use ONNX's `Attention` operator, which needs opset 23.
    """
    for module in [*network.modules()]:
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010
        for name, child in module.named_children():
            # Elsewhere, as in attention pooling, the query is not the key.
            if isinstance(child, nn.MultiheadAttention) and _is_plain(module, child):
                setattr(module, name, SelfAttention(child, fused))


def _is_plain(parent: nn.Module, attention: nn.MultiheadAttention) -> bool:
    from open_clip.transformer import ResidualAttentionBlock

    return (
        isinstance(parent, ResidualAttentionBlock)
        and attention.batch_first
        and attention.in_proj_weight is not None
        and attention.bias_k is None
    )

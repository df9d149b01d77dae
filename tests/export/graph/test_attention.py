import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from export.graph.attention import SelfAttention, simplify_attention


def attention(heads=3, width=36, bias=True):
    torch.manual_seed(0)
    own = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True).eval()
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.3)
    return own


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 4])  # 1/√12 and 1/√9 are no powers of two
def test_it_says_what_the_module_it_is_made_from_says(heads, fused, bias):
    own = attention(heads, bias=bias)
    tokens = torch.randn(2, 7, 36)
    expected = own(tokens, tokens, tokens, need_weights=False)[0]
    found, weights = SelfAttention(own, fused)(tokens, tokens, tokens, need_weights=False)
    assert weights is None
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_only_self_attention_is_replaced():
    block = ResidualAttentionBlock(36, 3)
    pooling = nn.Module()
    pooling.attn = attention()  # gets a query of its own
    sequence_first = ResidualAttentionBlock(36, 3, batch_first=False)
    network = nn.ModuleList([block, pooling, sequence_first])
    simplify_attention(network, fused=False)
    assert isinstance(block.attn, SelfAttention)
    assert isinstance(pooling.attn, nn.MultiheadAttention)
    assert isinstance(sequence_first.attn, nn.MultiheadAttention)


def test_timm_writes_its_attention_out():
    from timm.models.vision_transformer import Attention

    own = Attention(36, num_heads=3).eval()
    own.fused_attn = True
    tokens = torch.randn(2, 7, 36)
    expected = own(tokens)
    simplify_attention(nn.ModuleList([own]), fused=True)
    assert own.fused_attn is False
    torch.testing.assert_close(own(tokens), expected, atol=1e-5, rtol=1e-5)

import copy

import pytest
import timm
import torch
from torch import nn

from export.graph.convolutions import simplified_convolutions


def settled(network):
    """Give the norms statistics and weights that are not those of the start."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.eval()


def norms(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Shared(nn.Module):
    """What the convolution puts out is read twice, so that the norm cannot go into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pixels):
        out = self.conv(pixels)
        return (out + self.bn(out)).mean(dim=(2, 3))


class Elsewhere(nn.Module):
    """The same, but the reader is another block."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))

    def forward(self, pixels):
        out = self.stem(pixels)
        return self.last(out + self.block(out)).mean(dim=(2, 3))


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet10t", "fastvit_t8", "repvgg_a0"])
def test_norms_and_branches_go_into_convolutions(name):
    network = settled(timm.create_model(name, num_classes=5))
    before = copy.deepcopy(network.state_dict())
    found = simplified_convolutions(network, (64, 64))
    # FastViT's blocks of attention begin with a norm
    assert norms(found) <= 2 < norms(network)
    pixels = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(found(pixels), network(pixels), atol=1e-4, rtol=1e-3)
    assert not found.training and not any(module.training for module in found.modules())
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@torch.no_grad()
def test_a_network_that_would_say_something_else_is_left_as_it_is():
    network = settled(Shared())
    assert simplified_convolutions(network, (8, 8)) is network


@torch.no_grad()
def test_what_leaves_a_block_keeps_its_norm():
    network = settled(Elsewhere())
    found = simplified_convolutions(network, (8, 8))
    assert norms(found) == 1
    pixels = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(found(pixels), network(pixels), atol=1e-5, rtol=1e-4)


def test_a_network_without_norms_is_returned_as_it_came():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert simplified_convolutions(network, (8, 8)) is network

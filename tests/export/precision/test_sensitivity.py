import torch
from torch import nn

from export.precision.sensitivity import compute_logits, find_candidates, measure


class Network(nn.Module):
    """Pixels to three logits, with the ways in which layers are used."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.read = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.again = self.head = nn.Linear(16, 3)  # one layer under two names

    def forward(self, images):
        values = self.patches(images.float().permute(0, 3, 1, 2) / 255)
        values = values.flatten(2).transpose(1, 2)
        values = self.left(values).relu() * self.right(values)
        values = self.norm(nn.functional.linear(values, self.read.weight))
        logits = self.head(values.mean(dim=1))
        return logits, logits.softmax(dim=-1), values


def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network().eval()
        return network, torch.randint(0, 256, (48, 12, 12, 3), dtype=torch.uint8)


def test_layers_that_are_called_are_found_with_what_they_read():
    network, images = make()
    candidates, logits = find_candidates(network, images)
    torch.testing.assert_close(logits, network(images)[0])
    assert [own.name for own in candidates] == ["patches", "left", "right", "again"]
    patches, left, right, head = candidates
    assert patches.largest == images.max() / 255
    assert patches.work == len(images) * 9 * 16 * 48
    assert head.work == len(images) * 3 * 16
    assert left.largest == right.largest
    readers = [layer.first_reader for layer in (left, right, head)]
    assert readers == [left, left, head]
    head.put(int8=True)
    assert network.head is network.again is head.int8
    head.put(int8=False)
    assert network.head is network.again is head.layer


def test_the_noise_of_a_layer_is_what_it_does_to_the_logits_by_itself():
    network, images = make()
    candidates, logits = find_candidates(network, images)
    measure(network, candidates, images)
    for own in candidates:
        own.put(int8=True)
        change = (compute_logits(network, images) - logits).square().sum(dim=1).mean()
        own.put(int8=False)
        # The slope in one random direction an image is taken for all of it.
        assert 0.4 < own.noise / float(change) < 2.5


def test_readers_of_one_tensor_share_their_range():
    network, images = make()
    candidates, _ = find_candidates(network, images)
    measure(network, candidates, images)
    _, left, right, _ = candidates
    assert left.clip == right.clip
    assert torch.equal(left.int8.input_scale, right.int8.input_scale)


def test_the_range_is_narrow_where_large_inputs_are_rare_and_wide_where_they_count():
    """A single huge input widens the range only as far as the logits need it."""

    class Weighted(nn.Module):
        def __init__(self, used):
            super().__init__()
            self.head = nn.Linear(8, 8, bias=False)
            self.head.weight.data = torch.eye(8)
            self.used = used

        def forward(self, images):
            values = images[..., 0].float().flatten(1) / 255 - 0.5  # up to a half
            values = torch.cat([values[:, :7], 40 * values[:, 7:]], dim=1)
            logits = self.head(values) * self.used
            return logits, logits, logits

    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 1, 8, 3), dtype=torch.uint8, generator=draw)
    clips = []
    for large in (0.0, 1.0):  # whether the large one is looked at behind the layer
        used = torch.ones(8)
        used[7] = large
        network = Weighted(used)
        candidates, _ = find_candidates(network, images)
        measure(network, candidates, images)
        clips.append(candidates[0].clip)
    ignored, needed = clips
    assert needed == 1.0 and ignored < 0.2

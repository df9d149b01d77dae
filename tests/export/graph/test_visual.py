import copy

import onnxruntime
import pytest
import torch

from capt_train.clip.colour_map import ColourMap
from capt_train.clip.loading import load_backbone
from export.graph.onnx_graph import OUTPUTS, trace
from export.graph.visual import VisualClassifier
from export.source.fold import FoldedHead

TOWERS = {
    "vit": ({}, False),
    "vit with quick gelu": ({"quick_gelu": True}, False),
    "timm vit": (
        {
            "vision_cfg": {
                "timm_model_name": "vit_tiny_patch16_224",
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": "linear",
                "image_size": 224,
            }
        },
        False,
    ),
    # CLIP's ResNet pads its first convolution, so folding would be wrong at the border
    "resnet": ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}, True),
}


# Saturation and brightness as after a camera that washes colours out, a tint, and no symmetry.
COLOURS = ColourMap(
    torch.tensor([[3.6, -1.5, -1.2], [-1.4, 2.6, -0.3], [-2.3, 0.1, 3.0]]),
    torch.tensor([0.3, -0.1, -0.4]),
)


@pytest.fixture(params=TOWERS, ids=TOWERS)
def tower(request, write_model):
    changes, explicit = TOWERS[request.param]
    preprocess = {"mean": [0.3, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    folder = write_model(preprocess=preprocess, **changes)
    return load_backbone(str(folder), None, torch.device("cpu")), explicit


def head(classes=5):
    generator = torch.Generator().manual_seed(0)
    return FoldedHead(
        20 * torch.randn(classes, 32, generator=generator), torch.arange(float(classes))
    )


def some_pixels(backbone, count=3):
    height, width = backbone.preprocess.size
    generator = torch.Generator().manual_seed(1)
    shape = (count, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_raw_pixels_give_the_embeddings_of_normalised_ones(tower):
    backbone, explicit = tower
    network = VisualClassifier(backbone, head()).eval()
    assert network.normalises is explicit
    pixels = some_pixels(backbone)
    with torch.no_grad():
        logits, probabilities, embedding = network(pixels)
    expected = backbone.image_embeddings(pixels)
    torch.testing.assert_close(embedding, expected, atol=2e-6, rtol=0)
    wanted = expected @ head().weight.T + head().bias
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(probabilities, wanted.softmax(dim=1), atol=1e-4, rtol=0)


def check_colours(found, backbone):
    """Check outputs for `some_pixels` against the backbone behind the map."""
    pixels = some_pixels(backbone)
    seen = backbone.recoloured(COLOURS)
    expected = seen.image_embeddings(pixels)
    assert (expected - backbone.image_embeddings(pixels)).abs().max() > 0.01
    torch.testing.assert_close(found[2], expected, atol=4e-6, rtol=0)
    wanted = expected @ head().weight.T + head().bias
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=0)
    assert torch.equal(found[0].argmax(dim=1), wanted.argmax(dim=1))


@torch.no_grad()
def test_a_colour_map_goes_into_the_weights_too(tower):
    backbone, explicit = tower
    network = VisualClassifier(backbone.recoloured(COLOURS), head()).eval()
    assert network.normalises is explicit
    check_colours(network(some_pixels(backbone)), backbone)


@pytest.mark.parametrize("tower", ["vit", "resnet"], indirect=True)
def test_a_runtime_maps_the_colours_as_the_backbone_does(tower):
    backbone, _ = tower
    network = VisualClassifier(backbone.recoloured(COLOURS), head())
    graph = trace(network, *backbone.preprocess.size)
    session = onnxruntime.InferenceSession(graph.to_bytes(), providers=["CPUExecutionProvider"])
    found = session.run(OUTPUTS, {"images": some_pixels(backbone).numpy()})
    check_colours([torch.from_numpy(own) for own in found], backbone)


def test_the_backbone_itself_is_left_alone(tower):
    backbone, _ = tower
    before = copy.deepcopy(backbone.model.state_dict())
    VisualClassifier(backbone, head())
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

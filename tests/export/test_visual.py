import copy

import pytest
import torch

from capt_train.backbone import load_backbone
from export.fold import Head
from export.visual import VisualClassifier

TOWERS = {
    "vit": ({}, False),
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


@pytest.fixture(params=TOWERS, ids=TOWERS)
def tower(request, write_model):
    changes, explicit = TOWERS[request.param]
    preprocess = {"mean": [0.3, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    folder = write_model(preprocess=preprocess, **changes)
    return load_backbone(str(folder), None, torch.device("cpu")), explicit


def head(classes=5):
    generator = torch.Generator().manual_seed(0)
    return Head(20 * torch.randn(classes, 32, generator=generator), torch.arange(float(classes)))


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


def test_the_backbone_itself_is_left_alone(tower):
    backbone, _ = tower
    before = copy.deepcopy(backbone.model.state_dict())
    VisualClassifier(backbone, head())
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

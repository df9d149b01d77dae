import numpy as np
import pytest
import torch

from capt_deploy.confidence.calibration import Calibration
from capt_train.method.class_rows import ClassRows
from capt_train.run.folder import load_run
from export.source.fold import fold


@pytest.fixture(scope="module")
def model(tuned_run):
    return load_run(tuned_run)


def head_of(model):
    return fold(model.backbone, model.class_rows, model.fitted.calibration)


def test_each_row_is_the_scaled_embedding_over_the_temperature(model):
    head = head_of(model)
    scale = float(model.backbone.model.logit_scale.exp())
    for row, embedding in zip(head.weight, model.class_rows.rows, strict=True):
        expected = [scale * value / model.fitted.temperature for value in embedding.tolist()]
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-5)
        # never renormalised: the norm carries scale, temperature, mixture and closed-form rows
        expected_norm = scale / model.fitted.temperature * float(embedding.norm())
        assert float(row.norm()) == pytest.approx(expected_norm, rel=1e-5)
    assert model.class_rows.biases.any()  # of the closed-form rows
    biases = [bias / model.fitted.temperature for bias in model.class_rows.biases.tolist()]
    assert head.bias.tolist() == pytest.approx(biases, rel=1e-5)


def test_folded_logits_are_the_tuned_models(model):
    images = torch.nn.functional.normalize(torch.randn(9, 32), dim=1)
    head = head_of(model)
    difference = images @ head.weight.T + head.bias - model.logits(images)
    assert float(difference.abs().max()) <= 1e-5


def test_a_sigmoid_models_bias_stays_in_the_logits(write_model):
    from capt_train.clip.loading import load_backbone

    folder = write_model(init_logit_bias=-10.0, custom_text=True)
    backbone = load_backbone(str(folder), None, torch.device("cpu"))
    rows = torch.nn.functional.normalize(torch.randn(3, 32), dim=1)
    images = torch.nn.functional.normalize(torch.randn(9, 32), dim=1)
    head = fold(backbone, ClassRows.from_texts(rows), Calibration(2.0))
    expected = (backbone.scale * images @ rows.T - 10) / 2
    torch.testing.assert_close(images @ head.weight.T + head.bias, expected, atol=1e-5, rtol=0)


def test_zero_shot_rows_are_not_tuned_but_have_their_own_temperature(model):
    images = torch.nn.functional.normalize(torch.randn(9, 32), dim=1)
    names = [f"a photo of a {name}." for name in model.class_names]
    backbone, temperature = model.backbone, model.fitted.zero_shot_temperature
    expected = backbone.scale / temperature * images @ backbone.text_embeddings(names).T
    frozen = ClassRows.from_texts(model.zero_shot)
    found = images @ fold(backbone, frozen, Calibration(temperature)).weight.T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_another_temperature_is_a_factor(model):
    images = torch.nn.functional.normalize(torch.randn(9, 32), dim=1)
    warm = head_of(model).with_temperature_times(1.5)
    expected = model.logits(images) / 1.5
    torch.testing.assert_close(images @ warm.weight.T + warm.bias, expected, atol=1e-5, rtol=0)

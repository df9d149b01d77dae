"""A class added where the bundle is used says what an export with it says, to 1e-4 in logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from torch.nn.functional import normalize

from capt_deploy.bundle.manifest import OpenVocabulary
from capt_deploy.bundle.read import open_bundle
from capt_deploy.confidence.decisions import DecisionOptions
from capt_deploy.core.errors import BundleError, ConfigError, GateError
from capt_deploy.data.datasets import Item
from capt_deploy.serving.classifier import Classifier
from capt_deploy.serving.open_vocabulary import TextEncoder
from capt_train.clip.loading import load_backbone
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.class_rows import ClassRows
from capt_train.method.learner import make_learner
from capt_train.method.mixture import Mixture
from capt_train.run.fitted import Fitted
from capt_train.run.folder import TunedModel, load_run
from export.cli.export import main
from export.source.classes import untuned_rows, with_classes
from export.source.model import Source, source_from_run
from export.text.graph import check_rows, write_open_vocabulary
from export.writer import ExportOptions, export
from tests.configs import train_config
from tests.export.conftest import TEMPLATES, TRAINED, WITHOUT, shaken

NEW = ("tabby cat", "Levi’s 501", "old tractor on a field")


def logits_of(classifier: Classifier, photos: list[Path]) -> NDArray[np.float32]:
    """Return log-probabilities less their mean: logits, up to a number for each image."""
    rows = [np.log(p.probabilities) for p in classifier.predict(photos)]
    return np.stack([row - row.mean() for row in rows])


@pytest.fixture(scope="module")
def bundle(text_model: TunedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of two prompts, deep ones, with experts and a mixture."""
    assert "semantic-experts" in text_model.learner.transforms
    assert all(prompt.deeper is not None for prompt in text_model.learner.prompts)
    return open_export(text_model, tmp_path_factory.mktemp("open") / "x.capt")


def open_export(model: TunedModel, out: Path) -> Path:
    source = source_from_run(model)
    return export(
        source, out, ExportOptions(), lambda f: write_open_vocabulary([model], f, model.class_names)
    )


def check_added(bundle: Path, source: Source, models: list[TunedModel], folder: Path) -> None:
    """Compare a bundle with classes added to it with one that was exported with them."""
    added = Classifier.load(bundle)
    listed = with_classes(source, models, [*source.class_names, *NEW])
    exported = Classifier.load(export(listed, folder / "listed.capt", ExportOptions()))
    photos = [photo.path for photo in source.photos.gate]
    before = logits_of(added, photos)
    added.add_classes(NEW[:1])
    added.add_classes(NEW[1:])
    assert added.class_names == exported.class_names == listed.class_names
    assert added.tuned == exported.tuned
    found, expected = logits_of(added, photos), logits_of(exported, photos)
    assert np.abs(found - expected).max() <= 1e-4
    assert expected.std() > 0.1  # they are not all alike
    old = found[:, : before.shape[1]]
    assert np.abs(old - old.mean(axis=1, keepdims=True) - before).max() <= 1e-4


def test_adding_is_exporting_with_them(
    bundle: Path, text_model: TunedModel, tmp_path: Path
) -> None:
    check_added(bundle, source_from_run(text_model), [text_model], tmp_path)


def random_model(spec: str, data: Path, **settings: Any) -> TunedModel:
    """Return a run as if tuned for long: by default every part of the text side, none as it began.

    Its images are one of each class, of the first twenty; half of the classes are tuned.
    """
    labels = sorted(folder.name for folder in (data / "val").iterdir())[:20]
    files = [min((data / "val" / label).iterdir()).relative_to(data) for label in labels]
    items = tuple(Item(file.as_posix(), label) for label, file in enumerate(files))
    items = items[: len(items) // 2]
    names = tuple(label.replace("_", " ") for label in labels)
    digests = {item.path: "0" * 64 for item in items}
    split = FewShotSplit(names, tuple(range(len(items))), items, items, digests)
    own: dict[str, Any] = {"method": "full", "without": WITHOUT, **TRAINED}
    config = train_config(
        data=str(data), model=spec, prompt_templates=TEMPLATES, **{**own, **settings}
    )
    backbone = load_backbone(spec, None, torch.device("cpu"))
    zero_shot = backbone.class_embeddings(names, TEMPLATES)
    draw = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(2, len(names), 5, zero_shot.shape[1], generator=draw), dim=-1)
    learner = make_learner(backbone, config, split, zero_shot, centres)
    provenance = {"model_sha256": "0" * 64, "data_fingerprint": "", "versions": {}, "choice": None}
    provenance |= config.to_dict()
    fitted = Fitted({(0, 1): 3}, Mixture.learned_only(learner.learned))
    rows = ClassRows.from_texts(zero_shot)
    model = TunedModel(backbone, config, split, learner, rows, zero_shot, fitted, provenance)
    return shaken(model)


def test_adding_to_the_photo_model_is_exporting_with_them(shared: Path, tmp_path: Path) -> None:
    spec = f"local-dir:{shared / 'models' / 'tinyclip-cifar'}"
    model = random_model(spec, shared / "data" / "cifar100")
    bundle = open_export(model, tmp_path / "x.capt")
    check_added(bundle, source_from_run(model), [model], tmp_path)


def opened(folder: Path, record: OpenVocabulary) -> TextEncoder:
    return TextEncoder(record, (folder / record.tokenizer).read_bytes(), folder / record.file)


@torch.no_grad()
def compared_rows(
    models: list[TunedModel], folder: Path, names: Sequence[str] = NEW
) -> OpenVocabulary:
    """Compare rows of the graph with those of an export; return what the manifest says."""
    record = write_open_vocabulary(models, folder, models[0].class_names)
    texts = opened(folder, record)
    images = normalize(torch.randn(50, models[0].zero_shot.shape[1]), dim=1)
    expected = models[0].backbone.scale * images @ untuned_rows(models, names).T
    found = images @ torch.from_numpy(texts.rows(names)).T
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # one by one, so that rows are as long as each needs them
    for place, name in enumerate(names):
        alone = torch.from_numpy(texts.rows([name]))
        torch.testing.assert_close(images @ alone.T, expected[:, [place]], atol=1e-4, rtol=0)
    return record


def test_merged_runs_share_one_tower(
    text_model: TunedModel, tiny_model_dir: Path, photos: Path, tmp_path: Path
) -> None:
    # the first with a context of its own for each class, and neither mixture nor experts
    plain: dict[str, Any] = {"without": (*WITHOUT, "mixture", "semantic-experts")}
    plain |= {"prompt_count": 1, "prompt_class_specific": True, "prompt_words": "a"}
    other = random_model(f"local-dir:{tiny_model_dir}", photos, **plain)
    record = compared_rows([other, text_model], tmp_path)
    assert record.prompts == (*TEMPLATES, "a {}.", "a a a a {}.", "a a a a {}.")
    weights = 4 * sum(own.numel() for own in other.backbone.model.parameters())
    assert (tmp_path / "text.onnx").stat().st_size < 1.1 * weights


@pytest.mark.parametrize(
    ("without", "prompts"),
    [(("mixture",), ("a a a a {}.",)), (("mixture", "prompt"), TEMPLATES)],
)
def test_prompts_without_a_weight_are_left_out(
    tiny_model_dir: Path,
    photos: Path,
    tmp_path: Path,
    without: tuple[str, ...],
    prompts: tuple[str, ...],
) -> None:
    off = {"prompt_count": 1, "without": (*without, *WITHOUT)}
    model = random_model(f"local-dir:{tiny_model_dir}", photos, **off)
    assert compared_rows([model], tmp_path).prompts == prompts


@pytest.mark.parametrize(
    ("family", "cuttable"), [("ViT-B-16-SigLIP", False), ("MobileCLIP-B", True)]
)
def test_other_text_towers(
    family_dir: Callable[[str], Path], photos: Path, tmp_path: Path, family: str, cuttable: bool
) -> None:
    model = random_model(f"local-dir:{family_dir(family)}", photos)
    record = compared_rows([model], tmp_path, ["red dog", "cat", "AT&amp;T"])
    assert record.cuttable is cuttable
    assert record.logit_bias == model.backbone.logit_bias


def test_the_graph_holds_the_text_side_alone(bundle: Path) -> None:
    graph = onnx.load(bundle / "text.onnx").graph
    assert [i.name for i in graph.input] == ["tokens"]
    assert [o.name for o in graph.output] == ["rows"]
    assert not [w.name for w in graph.initializer if "visual" in w.name]


def test_a_graph_that_says_something_else_is_not_written(
    bundle: Path, text_model: TunedModel, text_run: Callable[..., Path]
) -> None:
    texts = TextEncoder.from_bundle(open_bundle(bundle))
    check_rows(texts, [text_model], NEW)
    with pytest.raises(GateError, match="differ by"):
        check_rows(texts, [shaken(load_run(text_run()), seed=1)], NEW)


def test_a_bundle_says_what_is_in_it(bundle: Path, text_model: TunedModel) -> None:
    manifest = open_bundle(bundle).manifest
    record = manifest.open_vocabulary
    assert record is not None
    assert {record.file, record.tokenizer} == {"text.onnx", "tokenizer.json"} < set(manifest.files)
    assert record.prompts == (*TEMPLATES, *["a a a a {}."] * 2)
    assert record.context_length == 16
    texts = TextEncoder.from_bundle(open_bundle(bundle))
    names = text_model.class_names
    wanted = [text_model.backbone.tokenize([t.replace("{}", n) for n in names]) for t in TEMPLATES]
    wanted += [prompt.tokenize(names) for prompt in text_model.learner.prompts]
    found = torch.from_numpy(texts.tokens.rows(names))
    assert torch.equal(found, torch.stack(wanted, dim=1)[:, :, : found.shape[2]])
    assert found.shape[2] < 16
    with pytest.raises(ConfigError, match=r"'very very .*' is too long, \d\d tokens"):
        texts.rows(["cat", "very " * 12 + "old"])


def test_no_sets_are_promised_for_more_classes(text_model: TunedModel, tmp_path: Path) -> None:
    out = open_export(text_model, tmp_path / "x.capt")
    with pytest.raises(BundleError, match="tune with two photos of each class or more"):
        Classifier.load(out, decisions=DecisionOptions(coverage=0.8))
    with Classifier.load(out) as classifier:
        classifier.add_classes(NEW)
        with pytest.raises(BundleError, match="none for the classes that were added"):
            classifier.run(np.zeros((1, 16, 16, 3), np.uint8), coverage=0.8)


def test_weights_that_one_file_cannot_hold_lie_in_a_second(
    text_model: TunedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "export.graph.onnx_graph._LARGEST_BYTES", 2**20
    )  # less than the vocabulary's
    out = open_export(text_model, tmp_path / "x.capt")
    assert (out / "text.onnx").stat().st_size < 2**19 < (out / "text.onnx.data").stat().st_size
    classifier = Classifier.load(out)
    classifier.add_classes(NEW)
    assert classifier.class_names[-len(NEW) :] == NEW
    with (out / "text.onnx.data").open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(BundleError, match=r"text\.onnx\.data was changed"):
        Classifier.load(out).add_classes(NEW)


def test_the_command_writes_it_for_listed_classes_of_merged_runs(
    text_run: Callable[..., Path], tmp_path: Path
) -> None:
    listed = tmp_path / "names.txt"
    listed.write_text("red ball\ntabby cat\nblue sky\n")
    runs = [str(text_run()), str(text_run(classes="all", seed=3, prompt_count=1))]
    out = tmp_path / "x.capt"
    wanted = ["--out", str(out), "--classes", str(listed), "--open-vocab"]
    done = CliRunner().invoke(main, [*runs, *wanted])
    assert done.exit_code == 0, done.output
    classifier = Classifier.load(out)
    classifier.add_classes(["old tractor"])
    assert classifier.class_names == ("red ball", "tabby cat", "blue sky", "old tractor")
    assert len(classifier.manifest.open_vocabulary.prompts) == len(TEMPLATES) + 3
    models = [load_run(run) for run in runs]
    expected = models[0].backbone.scale * untuned_rows(models, ["old tractor"]).numpy()
    found = TextEncoder.from_bundle(open_bundle(out)).rows(["old tractor"])
    np.testing.assert_allclose(found, expected, atol=1e-5)

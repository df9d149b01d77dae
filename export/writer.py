"""Write a bundle, whole or not at all."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save
from torch import Tensor

from capt_deploy.bundle.manifest import FileRecord, Manifest, OpenVocabulary
from capt_deploy.bundle.read import CALIBRATION, MANIFEST, REFERENCE, REPORT, TEXT_EMBEDDINGS
from capt_deploy.bundle.readme import README, readme
from capt_deploy.core.console import say
from capt_deploy.core.errors import BundleError, ConfigError, GateError
from capt_deploy.core.files import (
    expand_home,
    new_folder,
    refuse_existing,
    sha256_file,
    write_bytes,
    write_json,
)
from capt_deploy.verify.gate import GateResult, gate_table
from capt_train.run.folder import load_run
from export.graph.lower import FP32, PRECISIONS
from export.graph.onnx_graph import OPSET, OPSETS
from export.precision.trace import trace_precision
from export.proof.prove import Proven, last_look, prove
from export.proof.question import Question, ask_torch
from export.source.classes import with_classes
from export.source.decisions import decisions_from_validation
from export.source.fold import Head
from export.source.merge import merged
from export.source.model import Source, distance_aware, source_of
from export.text.graph import write_open_vocabulary


@dataclass(frozen=True)
class ExportOptions:
    """What a bundle is to hold, and how it is checked."""

    precisions: tuple[str, ...] = (FP32,)  # one graph each; the first is `model.onnx`
    opset: int = OPSET
    gate_images: int = 256  # at most
    force: bool = False  # write it, marked, although the gate has failed
    open_vocabulary: bool = False  # with the text side, for classes to be added later
    distance_aware: bool = False  # with the factors of DAC for classes outside training

    def __post_init__(self) -> None:
        if unknown := set(self.precisions) - set(PRECISIONS):
            raise ConfigError(f"precision {unknown}: expected some of {', '.join(PRECISIONS)}")
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ConfigError(f"precisions: expected each once, came {self.precisions}")
        if self.opset not in OPSETS:
            raise ConfigError(f"opset {self.opset}: expected one of {OPSETS}")
        if self.gate_images < 1:
            raise ConfigError(f"gate images: expected at least 1, came {self.gate_images}")


def export_run(
    run: str | Path | Sequence[str | Path],
    out: str | Path,
    gate_data: str | Path | None = None,
    options: ExportOptions | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Fold a finished run, export it, check it on real images, and write the bundle.

    Args:
        run: a run folder; or several over one backbone, which become one model.
        out: the bundle folder to write; it must not be there yet.
        gate_data: where the run's data set lies now, if it has moved; or other images.
        options: see `ExportOptions`.
        class_names: a row for each of these, in this order, instead of the run's own classes.

    Returns:
        `out`.

    Raises:
        GateError: the exported graph does not say the same; nothing is written.
        CaptError: the run cannot be loaded or exported, or `out` exists.
    """
    refuse_existing(expand_home(out), BundleError)
    options = options or ExportOptions()
    runs = [run] if isinstance(run, str | Path) else run
    models = [load_run(own) for own in runs]
    model = models[0]
    source = source_of(model, gate_data) if len(models) == 1 else merged(models, gate_data)
    if options.distance_aware:
        source = distance_aware(source)
    if class_names is not None:
        source = with_classes(source, models, class_names)
    if source.calibration.factors is not None and set(source.calibration.factors) == {1.0}:
        say("note: --dac changes nothing here: the factors of all classes are 1")

    def begin(folder: Path) -> OpenVocabulary | None:
        record = None
        if options.open_vocabulary:
            names, dac = source.class_names, options.distance_aware
            record = write_open_vocabulary(models, folder, names, hand_written=dac)
        for other in models:  # their text sides are folded, and may outweigh the visual one
            other.backbone.free(text_only=other is model)
        return record

    return export(source, out, options, begin, release=model.backbone.free)


def export(
    source: Source,
    out: str | Path,
    options: ExportOptions,
    begin: Callable[[Path], OpenVocabulary | None] = lambda _: None,
    release: Callable[[], None] | None = None,
) -> Path:
    """Export whatever a `Source` holds; see `export_run`.

    `begin` is called with the bundle's folder, to write the text side into it while there is one.
    `release` is called when the torch model is not needed any more: a runtime beside it would
    double the memory that a large model takes.
    """
    out = expand_home(out)
    refuse_existing(out, BundleError)
    say(f"exporting {source.training['model']} with {len(source.class_names)} classes")
    with new_folder(out) as folder:
        text_side = begin(folder)
        question = ask_torch(source, options.gate_images)
        traced = [
            trace_precision(source, name, options.opset, question.patterns)
            for name in options.precisions
        ]
        if release is not None:
            release()
        proven = {
            own.graph.precision: prove(source, own, question, folder / file)
            for own, file in zip(traced, _file_names(options.precisions), strict=True)
        }
        results = {precision: own.result for precision, own in proven.items()}
        say(gate_table(results))
        if failed := _failures(results):
            if not options.force:
                raise GateError(
                    f"{out} was not written, for on {len(question.photos)} images a graph differs "
                    f"from the trained model: {failed} (--force writes it all the same, marked)"
                )
            say(f"warning: written although {failed}")
        manifest = _manifest(source, proven, text_side, verified=not failed)
        _write_files(source, proven, question, manifest, folder)
        last_look(folder, proven, question)
    return out


def _failures(results: Mapping[str, GateResult]) -> str:
    return "; ".join(
        f"{precision}: {', '.join(result.failures)}"
        for precision, result in results.items()
        if not result.passed
    )


def _file_names(precisions: Sequence[str]) -> list[str]:
    """Return the names of the graphs' files; the first one is the one that everybody expects."""
    return ["model.onnx", *(f"model.{precision}.onnx" for precision in precisions[1:])]


def _manifest(
    source: Source,
    proven: Mapping[str, Proven],
    text_side: OpenVocabulary | None,
    *,
    verified: bool,
) -> Manifest:
    """Return the manifest, without the hashes of its files and the names of second ones."""
    return Manifest(
        class_names=source.class_names,
        tuned=source.tuned,
        preprocess=source.learner.backbone.preprocess,
        graphs={
            precision: own.traced.graph.record(own.path.name) for precision, own in proven.items()
        },
        confusion_pairs=source.pairs,
        training=source.training,
        verified=verified,
        open_vocabulary=text_side,
        **source.calibration.to_manifest(
            {precision: own.temperature for precision, own in proven.items()},
            None if source.moves_images else source.zero_shot_temperature,
        ),
    )


def _write_files(
    source: Source,
    proven: Mapping[str, Proven],
    question: Question,
    manifest: Manifest,
    folder: Path,
) -> None:
    """Write everything, the graphs once more with what they now know of themselves."""
    first = next(iter(proven.values()))
    described = json.dumps(manifest.to_dict(), ensure_ascii=False, allow_nan=False)
    for own in proven.values():
        own.traced.graph.write(own.path, described)
    head = source.head.cooled(first.temperature / source.temperature)
    write_bytes(folder / TEXT_EMBEDDINGS, save(_texts(source, head, manifest)))
    write_bytes(folder / REFERENCE, question.reference.save())
    if (decisions := decisions_from_validation(source)) is not None:
        write_bytes(folder / CALIBRATION, save_arrays(decisions.arrays()))
    write_json(
        folder / REPORT,
        {
            "graphs": {precision: own.traced.to_dict() for precision, own in proven.items()},
            "gate": {precision: own.result.to_dict() for precision, own in proven.items()},
            "gate_images": {"asked": len(question.photos), "unreadable": question.unreadable},
        },
    )
    text = readme(manifest, [file.name for file in folder.iterdir()])
    write_bytes(folder / README, text.encode())
    records = {}
    for file in sorted(folder.iterdir()):
        records[file.name] = FileRecord(sha256_file(file), file.stat().st_size)
    write_json(folder / MANIFEST, replace(manifest, files=records).to_dict())


def _texts(source: Source, head: Head, manifest: Manifest) -> dict[str, Tensor]:
    """Return what `Bundle.text_embeddings` lists, of the first graph's head."""
    texts = {"text_embeddings": head.weight.contiguous(), "bias": head.bias}
    if source.zero_shot_head is not None:
        texts["zero_shot"] = source.zero_shot_head.weight.contiguous()
    if source.calibration.factors is not None:
        texts["factors"] = torch.tensor(source.calibration.factors, dtype=torch.float32)
    if source.tuned_texts is not None and manifest.open_vocabulary is not None:
        texts["tuned_rows"] = torch.from_numpy(source.tuned_texts.rows)
        texts["tuned_hand_written"] = torch.from_numpy(source.tuned_texts.hand_written)
    return texts

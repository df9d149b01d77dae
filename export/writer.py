"""Write a bundle, whole or not at all."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save
from torch import Tensor

from capt_deploy.bundle.manifest import FileRecord, Manifest, OpenVocabulary
from capt_deploy.bundle.read import CALIBRATION, MANIFEST, REFERENCE, REPORT, TEXT_EMBEDDINGS
from capt_deploy.bundle.readme import README, readme
from capt_deploy.core.console import counted, say
from capt_deploy.core.errors import BundleError, ConfigError, GateError
from capt_deploy.core.files import (
    expand_home,
    new_folder,
    new_zip,
    refuse_existing,
    sha256_file,
    write_bytes,
    write_json,
)
from capt_deploy.core.text import escaped
from capt_deploy.verify.gate import GateResult, gate_table
from capt_train.run.folder import load_run
from export.graph.lower import FP32, INT8, INT8_CPU, PRECISIONS
from export.graph.onnx_graph import OPSET, OPSETS
from export.precision.trace import trace_precision
from export.proof.verify import (
    GateInputs,
    VerifiedGraph,
    run_torch_model,
    verify_bundle,
    verify_graph,
)
from export.source.classes import with_classes
from export.source.decisions import decisions_from_validation
from export.source.fold import FoldedHead
from export.source.merge import source_from_runs
from export.source.model import Source, distance_aware, source_from_run
from export.text.graph import write_open_vocabulary


@dataclass(frozen=True)
class ExportOptions:
    """Contents of a bundle and strictness of its check."""

    precisions: tuple[str, ...] = (FP32,)  # a graph each, int8 two; the first is `model.onnx`
    opset: int = OPSET
    gate_images: int = 256  # at most
    force: bool = False  # write graphs that fail the gate too, and mark the bundle
    open_vocabulary: bool = False  # add the text side, so that classes can be added later
    distance_aware: bool = False  # add DAC factors for classes outside training

    def __post_init__(self) -> None:
        if unknown := set(self.precisions) - set(PRECISIONS):
            raise ConfigError(
                f"precisions: expected some of {', '.join(PRECISIONS)}, "
                f"came {', '.join(sorted(unknown))}"
            )
        if not self.precisions or len(set(self.precisions)) < len(self.precisions):
            raise ConfigError(f"precisions: expected each once, came {self.precisions}")
        if self.opset not in OPSETS:
            raise ConfigError(f"opset: expected one of {OPSETS}, came {self.opset}")
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
        out: the bundle folder to write, or a zip of it, by its name; it must not exist.
        gate_data: where the run's data set lies now, if it has moved; or other images.
        options: contents of the bundle; defaults of `ExportOptions`.
        class_names: classes of the bundle, in this order, instead of the run's own.

    Returns:
        `out`.

    Raises:
        GateError: a graph differs from the trained model. Graphs that pass are written without it;
            if none passes, nothing is written.
        CaptError: the run cannot be loaded or exported, or `out` exists.
    """
    refuse_existing(expand_home(out), BundleError)
    options = options or ExportOptions()
    models = [load_run(folder) for folder in ([run] if isinstance(run, str | Path) else run)]
    model = models[0]
    if len(models) == 1:
        source = source_from_run(model, gate_data)
    else:
        source = source_from_runs(models, gate_data)
    if options.distance_aware:
        source = distance_aware(source)
    if class_names is not None:
        source = with_classes(source, models, class_names)
    factors = source.calibration.factors
    if factors is not None and set(factors) == {1.0}:
        say("note: --dac changes nothing here: the factors of all classes are 1")

    def write_text_side(folder: Path) -> OpenVocabulary | None:
        record = None
        if options.open_vocabulary:
            names, dac = source.class_names, options.distance_aware
            record = write_open_vocabulary(models, folder, names, hand_written=dac)
        for loaded in models:  # folded text towers, which may be larger than the visual one
            loaded.backbone.free(text_only=loaded is model)
        return record

    return export(source, out, options, write_text_side, release=model.backbone.free)


def export(
    source: Source,
    out: str | Path,
    options: ExportOptions,
    write_text_side: Callable[[Path], OpenVocabulary | None] = lambda _: None,
    release: Callable[[], None] | None = None,
) -> Path:
    """Export a `Source` to a bundle; see `export_run`.

    Args:
        source: the model to export.
        out: the bundle folder or zip to write.
        options: contents of the bundle.
        write_text_side: called with the bundle's folder before anything else is written.
        release: frees the torch model; called before a runtime takes as much memory again.
    """
    out = expand_home(out)
    refuse_existing(out, BundleError)
    if escaped(str(out.absolute())) != str(out.absolute()):
        raise BundleError(f"{out}: expected a path in UTF-8; ONNX Runtime opens no other")
    say(f"exporting {source.training['model']} with {len(source.class_names)} classes")
    with new_zip(out) if out.suffix == ".zip" else new_folder(out) as folder:
        text_side = write_text_side(folder)
        inputs = run_torch_model(source, options.gate_images)
        traced = [
            graph
            for precision in options.precisions
            for graph in trace_precision(source, precision, options.opset, inputs.patterns)
        ]
        if release is not None:
            release()
        graphs = {
            graph.graph.precision: verify_graph(source, graph, inputs, folder) for graph in traced
        }
        results = {precision: graph.result for precision, graph in graphs.items()}
        say(gate_table(results))
        failed = {precision: result for precision, result in results.items() if not result.passed}
        passed = {name: graph for name, graph in graphs.items() if name not in failed}
        problem = _describe_failures(failed, len(inputs.photos))
        if failed and options.force:
            say(f"warning: {problem}; written all the same, marked as unverified")
        elif failed and not passed:
            raise GateError(
                f"{out} was not written: {problem}. Choose another precision, or add --force to "
                f"write it, marked as unverified"
            )
        written = graphs if options.force else passed
        manifest = _manifest(source, written, text_side, verified=not (failed and options.force))
        _write_files(source, written, results, inputs, manifest, folder)
        verify_bundle(folder, written, inputs)
        if out.suffix == ".zip" and any(graph.weights for graph in manifest.graphs.values()):
            say(f"note: {out} must be unpacked before it is used: its weights are in second files")
    if failed and not options.force:
        raise GateError(
            f"{out} was written with {', '.join(passed)} only: {problem}. Drop "
            f"{' '.join(_flags(failed))} next time; or remove the bundle and add "
            f"--force, to write all graphs, marked as unverified"
        )
    return out


def _flags(precisions: Iterable[str]) -> list[str]:
    """Return the options that write these precisions."""
    return [*dict.fromkeys(f"--{INT8 if name == INT8_CPU else name}" for name in precisions)]


def _describe_failures(failed: Mapping[str, GateResult], images: int) -> str:
    figures = "; ".join(f"{name} ({', '.join(r.failures)})" for name, r in failed.items())
    return f"too far from the trained model on {counted(images, 'image')}: {figures}"


def _manifest(
    source: Source,
    graphs: Mapping[str, VerifiedGraph],
    text_side: OpenVocabulary | None,
    *,
    verified: bool,
) -> Manifest:
    """Return the manifest, without the records of the bundle's files."""
    # Tools expect a file `model.onnx`.
    files = ["model.onnx", *(f"model.{precision}.onnx" for precision in [*graphs][1:])]
    return Manifest(
        class_names=source.class_names,
        tuned=source.tuned,
        preprocess=source.learner.backbone.preprocess,
        graphs={
            precision: graph.traced.graph.record(file)
            for (precision, graph), file in zip(graphs.items(), files, strict=True)
        },
        confusion_pairs=source.pairs,
        training=source.training,
        verified=verified,
        open_vocabulary=text_side,
        **source.calibration.to_manifest(
            {precision: graph.temperature for precision, graph in graphs.items()},
            None if source.moves_images else source.zero_shot_temperature,
        ),
    )


def _write_files(
    source: Source,
    graphs: Mapping[str, VerifiedGraph],
    results: Mapping[str, GateResult],
    inputs: GateInputs,
    manifest: Manifest,
    folder: Path,
) -> None:
    """Write all files of the bundle; graphs contain the manifest, and it records the files."""
    described = json.dumps(manifest.to_dict(), ensure_ascii=False, allow_nan=False)
    for precision, graph in graphs.items():
        graph.traced.graph.write(folder / manifest.graphs[precision].file, described)
    first = next(iter(graphs.values()))
    head = source.head.with_temperature_times(first.temperature / source.temperature)
    write_bytes(folder / TEXT_EMBEDDINGS, save(_text_embeddings(source, head, manifest)))
    write_bytes(folder / REFERENCE, inputs.reference.save())
    if (decisions := decisions_from_validation(source)) is not None:
        write_bytes(folder / CALIBRATION, save_arrays(decisions.arrays()))
    write_json(
        folder / REPORT,
        {
            "graphs": {precision: graph.traced.to_dict() for precision, graph in graphs.items()},
            "gate": {precision: result.to_dict() for precision, result in results.items()},
            "gate_images": {"asked": len(inputs.photos), "unreadable": inputs.unreadable},
        },
    )
    text = readme(manifest, [file.name for file in folder.iterdir()])
    write_bytes(folder / README, text.encode())
    records = {
        file.name: FileRecord(sha256_file(file), file.stat().st_size)
        for file in sorted(folder.iterdir())
    }
    write_json(folder / MANIFEST, replace(manifest, files=records).to_dict())


def _text_embeddings(source: Source, head: FoldedHead, manifest: Manifest) -> dict[str, Tensor]:
    """Return the arrays of `Bundle.text_embeddings`, with the first graph's temperature."""
    arrays = {"text_embeddings": head.weight.contiguous(), "bias": head.bias}
    if source.zero_shot_head is not None:
        arrays["zero_shot"] = source.zero_shot_head.weight.contiguous()
    if source.calibration.factors is not None:
        arrays["factors"] = torch.tensor(source.calibration.factors, dtype=torch.float32)
    if source.tuned_texts is not None and manifest.open_vocabulary is not None:
        arrays["tuned_rows"] = torch.from_numpy(source.tuned_texts.rows)
        arrays["tuned_hand_written"] = torch.from_numpy(source.tuned_texts.hand_written)
    return arrays

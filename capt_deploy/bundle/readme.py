"""`README.txt` of a bundle: what each of its files is."""

from collections.abc import Iterable

from capt_deploy.bundle.manifest import Manifest
from capt_deploy.bundle.read import CALIBRATION, MANIFEST, REFERENCE, REPORT, TEXT_EMBEDDINGS

README = "README.txt"


def readme(manifest: Manifest, files: Iterable[str]) -> str:
    """Return the text of `README.txt` for a bundle that holds `files` besides its manifest."""
    roles = {
        MANIFEST: "class names, preprocessing, calibration, origin, hashes of the other files",
        TEXT_EMBEDDINGS: "one row for each class, for other tools; the graphs hold them too",
        CALIBRATION: "scores of validation images: prediction sets, rejection, familiarity",
        REFERENCE: "answers of the trained model, for capt-export --check",
        REPORT: "how far each graph is from the trained model",
    }
    for precision, graph in manifest.graphs.items():
        if graph.weights is not None:
            roles[graph.weights] = f"weights of {graph.file}"
        roles[graph.file] = f"the classifier in {precision}; takes uint8 images"
    if (text := manifest.open_vocabulary) is not None:
        if text.weights is not None:
            roles[text.weights] = f"weights of {text.file}"
        roles[text.file] = "the text tower, for Classifier.add_classes"
        roles[text.tokenizer] = "the tokenizer of the text tower"
    names = [MANIFEST, *sorted(files)]
    width = max(map(len, names))
    lines = [f"{name:{width}}  {roles.get(name, 'see docs/FORMAT.md')}" for name in names]
    return "\n".join(
        [
            f"An image classifier of {len(manifest.class_names)} classes, exported by capt.",
            "Use it with `capt-predict`, or with capt_deploy.Classifier.load.",
            "docs/FORMAT.md of capt specifies the files:",
            "",
            *lines,
            "",
        ]
    )

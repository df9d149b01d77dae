"""Run a tuned classifier: numpy, Pillow and ONNX Runtime, no torch.

from capt_deploy import Classifier
classifier = Classifier.load("pets.capt")
print(classifier("dog.jpg"))
"""

from typing import TYPE_CHECKING, Any

from capt_deploy.version import __version__

if TYPE_CHECKING:
    from capt_deploy.classifier import Classifier, Prediction
    from capt_deploy.errors import BackendError, BundleError, CaptError, DataError, ImageError

__all__ = [
    "BackendError",
    "BundleError",
    "CaptError",
    "Classifier",
    "DataError",
    "ImageError",
    "Prediction",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Lazy, because every command imports this package and `--help` has to be quick.
    if name in ("Classifier", "Prediction"):
        from capt_deploy import classifier

        return getattr(classifier, name)
    if name in __all__:
        from capt_deploy import errors

        return getattr(errors, name)
    raise AttributeError(f"module 'capt_deploy' has no attribute {name!r}")

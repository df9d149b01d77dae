"""Run a tuned classifier: numpy, Pillow and ONNX Runtime, no torch.

from capt_deploy import Classifier
classifier = Classifier.load("pets.capt")
print(classifier("dog.jpg"))
"""

from typing import TYPE_CHECKING, Any

from capt_deploy.core.version import __version__

if TYPE_CHECKING:
    from capt_deploy.backends.options import RuntimeOptions
    from capt_deploy.confidence.decisions import DecisionOptions
    from capt_deploy.core.errors import (
        BackendError,
        BundleError,
        BusyError,
        CaptError,
        ConfigError,
        DataError,
        ImageError,
    )
    from capt_deploy.serving.batcher import BatcherOptions
    from capt_deploy.serving.classifier import Classifier
    from capt_deploy.serving.prediction import Prediction

__all__ = [
    "BackendError",
    "BatcherOptions",
    "BundleError",
    "BusyError",
    "CaptError",
    "Classifier",
    "ConfigError",
    "DataError",
    "DecisionOptions",
    "ImageError",
    "Prediction",
    "RuntimeOptions",
    "__version__",
]


# Modules of the names that are not in `core.errors`.
_MODULES = {
    "BatcherOptions": "serving.requests",
    "Classifier": "serving.classifier",
    "DecisionOptions": "confidence.decisions",
    "Prediction": "serving.prediction",
    "RuntimeOptions": "backends.options",
}


def __getattr__(name: str) -> Any:
    # Lazy, because every command imports this package and `--help` has to be quick.
    if name not in __all__:
        raise AttributeError(f"module 'capt_deploy' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"capt_deploy.{_MODULES.get(name, 'core.errors')}"), name)

"""The ways to calibrate confidences (METHOD 8), from simple to complex."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibrator:
    """A way to calibrate, fitted by the function `fit` of its module.

    The module is imported when it is needed, so that a list of all calibrators needs no torch.
    """

    name: str
    help: str  # one line for `--help` and the documentation
    needs_all_classes: bool = False  # whether it leaves classes behind that it is not fitted on
    fewest_images: int = 50  # with fewer images it is not tried
    module: str = ""  # by default `capt_train.calibrate.<name>`


# By name. To add one, write `capt_train/calibrate/<name>.py` with a function `fit`, and an entry.
CALIBRATORS: dict[str, Calibrator] = {
    calibrator.name: calibrator
    for calibrator in (
        Calibrator("temperature", "one factor for all logits", fewest_images=1),
        Calibrator("line", "a temperature, and a line through the log-odds of the top label"),
        Calibrator("isotonic", "a temperature, and a monotone map of the top label's log-odds"),
        Calibrator(
            "vector",
            "a temperature, and a factor and an offset for each class",
            needs_all_classes=True,
        ),
    )
}

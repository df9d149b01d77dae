"""What the reader of a report should do: one sentence for each part of the page."""

import numpy as np

from capt_deploy.evaluation.summary import percent
from capt_deploy.report.results import Results

_WANTED = 0.95  # accuracy of the answers, as an example
_NEGLIGIBLE = 0.01  # difference of mean confidence and accuracy


def advice(results: Results) -> dict[str, str]:
    """Return the sentences by the part of the page; empty where there is nothing to do or say."""
    return {
        "confidence": _on_confidence(results),
        "risk": _on_risk(results),
        "promises": _on_promises(results),
        "confusions": _on_confusions(results),
        "gallery": (
            "Look for wrong labels among the mistakes first: correct them, and tune again."
        ),
        "classes": "More photos of the classes at the top help most.",
    }


def _on_confidence(results: Results) -> str:
    scope = list(results.main.after)[-1]
    error, (_, limit) = results.main.report[scope]["ece_15"], results.main.chance[scope]
    if error <= limit:
        return "Nothing to do: the points are as near to the diagonal as chance lets them be."
    predictions = results.predictions
    right = predictions.main.argmax(axis=1) == predictions.labels
    surplus = float(predictions.main.max(axis=1).mean() - right.mean())
    points = percent(abs(surplus))
    if abs(surplus) < _NEGLIGIBLE:
        return "On average it is right; where points lie below the diagonal, trust it less."
    if surplus > 0:
        return (
            f"Subtract about {points} points from what it says, or tune with more photos like "
            "these, so that more of them calibrate it."
        )
    return f"Add about {points} points to what it says: it is too cautious on these photos."


def _on_risk(results: Results) -> str:
    predictions = results.predictions
    confidence = predictions.main.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    right = (predictions.main.argmax(axis=1) == predictions.labels)[order]
    shares = right.cumsum() / np.arange(1, len(right) + 1)
    last_of_ties = np.append(np.diff(confidence[order]) != 0, True)
    enough = np.flatnonzero((shares >= _WANTED) & last_of_ties)
    if not len(enough):
        return f"No confidence is high enough for {_WANTED:.0%} right answers on these photos."
    last = int(enough[-1])
    return (
        f"For {100 * _WANTED:.0f} right answers of 100 on these photos, let it answer where it is "
        f"at least {percent(float(confidence[order[last]]))} % sure: "
        f"{percent((last + 1) / len(right))} % of them."
    )


def _on_promises(results: Results) -> str:
    if not results.promises:
        return ""
    if any(promise.verdict == "not kept" for promise in results.promises):
        return (
            "A promise is not kept: these photos are not like those that were held out of tuning. "
            "Tune with photos like these."
        )
    return (
        "Use sets where a person decides, rejection where another process takes over: "
        "DecisionOptions(coverage=0.9, accuracy=0.95), or capt-predict --coverage 0.9."
    )


def _on_confusions(results: Results) -> str:
    if not results.pairs:
        return ""
    worst = results.pairs[0]
    return (
        f"Take more photos of {worst.true} and {worst.predicted} in which they look alike; where "
        "the difference does not matter, make them one class."
    )

"""Compare the speed of training with a plain loop that encodes every image in every step.

    python -m benchmarks.training_speed

The plain loop is what CoOp (arXiv 2109.01134) describes and most trainers of prompts do: the
frozen image encoder on each minibatch, every class through the whole context of the text tower.
Both loops start from the same vectors and take the same minibatches, optimizer and rates, so their
losses are the same. Photos are decoded before the plain loop's clock starts; `ours` includes
decoding and embedding them once. Below, whole runs of `capt-train`, the frozen embeddings cached.
One thread. Seconds are those of the processor, which other programs disturb little; with a GPU,
those of the clock.
"""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cell import measure, open_world
from benchmarks.record import describe, load_average, write_result
from capt_deploy.core.console import Command, print_json, say, table
from capt_train.clip.backbone import Backbone
from capt_train.config import TrainConfig
from capt_train.data.embedding_cache import EmbeddingCache
from capt_train.data.features import Embedded, embed, read_pixels
from capt_train.method.learner import make_learner
from capt_train.run.setup import Setup, load
from capt_train.tune.epochs import Epochs
from capt_train.tune.stages import TuningTask, text_stage

_PAPERS_BATCH = 32
_RUNS = {"prompt only": "coop", "default": "capt"}
_KEPT = ("seconds", "harmonic", "base", "new")


@click.command(cls=Command)
@click.option("--world", default="cifar100", show_default=True, help="Or pictograms, objects, …")
@click.option("--device", default="auto", show_default=True)
@click.option("--autocast", default="auto", show_default=True)
@click.option("--epochs", default=50, show_default=True, help="A tenth with batches of 32.")
@click.option("--plain/--no-plain", default=True, help="Whether to run the plain loop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and write no result.")
def main(world: str, device: str, autocast: str, epochs: int, plain: bool, as_json: bool) -> None:
    """Measure both loops and whole runs; print tables and write benchmarks/results."""
    torch.set_num_threads(1)
    with open_world(world) as place:
        config = TrainConfig(place.data, place.model, classes=place.classes, device=device)
        config = config.with_settings(
            {"shots": 16, "tuning.epochs": epochs, "tuning.autocast": autocast}
        )
        loops = []
        small = {"tuning.batch_size": _PAPERS_BATCH, "tuning.epochs": max(1, epochs // 10)}
        for changes in ({}, small) if plain else ():
            loops.append(compare_loops(config.with_settings(changes)))
            say(f"\n{loop_table(loops[-1])}\n")
        runs = {}
        measure(config.with_settings({"method": "zeroshot"}), "test")  # caches the embeddings
        for name, method in _RUNS.items():
            started = _seconds()
            figures = measure(config.with_settings({"method": method}), "test")
            runs[name] = {**figures, "seconds": _seconds() - started}
            runs[name] = {key: runs[name][key] for key in _KEPT}
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    result = {
        "measured": describe(),
        "load": load_average(),
        **{"world": world, "device": device, "autocast": autocast, "epochs": epochs},
        **{"loops": loops, "runs": runs, "peak_gpu_bytes": gpu},
    }
    if as_json:
        print_json(result)
        return
    say(f"\n{run_table(runs)}\n\nwritten to {write_result('training_speed', result)}")


def loop_table(loops: dict[str, Any]) -> str:
    """Return the figures of both loops as a table."""
    head = [f"{loops['steps']} steps of {loops['batch']} photos", "s", "ms/step", "right, %"]
    rows = [
        [
            name,
            f"{loops[name]['seconds']:.1f}",
            f"{1000 * loops[name]['loop_seconds'] / loops['steps']:.1f}",
            f"{100 * loops[name]['accuracy']:.1f}",
        ]
        for name in ("plain", "ours")
    ]
    faster, step = (loops["plain"][key] / loops["ours"][key] for key in ("seconds", "loop_seconds"))
    return (
        f"{table(head, rows)}\n{faster:.1f} times as fast, a step {step:.1f} times; losses differ "
        f"by at most {loops['largest_difference']:.1e}"
    )


def run_table(runs: dict[str, dict[str, Any]]) -> str:
    """Return the figures of whole runs as a table."""
    head = ["whole run, embeddings cached", "s", "tuned, %", "new, %"]
    rows = [
        [
            name,
            f"{run['seconds']:.1f}",
            *(f"{100 * (run[key] or 0):.1f}" for key in ("base", "new")),
        ]
        for name, run in runs.items()
    ]
    prompt, default = (run["seconds"] for run in runs.values())
    return f"{table(head, rows)}\nthe default takes {default / prompt:.1f} times as long"


def compare_loops(config: TrainConfig) -> dict[str, Any]:
    """Return seconds and accuracies of both loops over the same steps, and how losses differ."""
    config = config.with_settings({"method": "coop"})
    setup = load(config)
    pixels = read_pixels(setup.backbone, setup.dataset, setup.split.train)
    test = [item for item in setup.dataset.items("test") if item.label in setup.split.tuned]
    with closing(EmbeddingCache(setup.model_sha256, setup.backbone.device.type)) as cache:
        judged = embed(setup.backbone, cache, setup.dataset, test, "test images")
    labels = judged.labels_among(setup.split.tuned)

    def accuracy(texts: Tensor) -> float:
        right = (judged.embeddings @ texts.detach().cpu().T).argmax(dim=1) == labels
        return float(right.double().mean())

    started = _seconds()
    train = embed(setup.backbone, None, setup.dataset, setup.split.train, "training images")
    embedded = _seconds()
    task, learner = _task(setup, Embedded(train, train.rows(torch.arange(0)))), _learner(setup)
    stage = text_stage(task, learner)
    if stage is None:
        raise ValueError("expected a method with a prompt")
    loop = Epochs(learner, task, stage)
    means = [loop.epoch(number)["cross_entropy"] for number in range(stage.epochs)]
    ended = _seconds()
    ours = {
        "seconds": ended - started,
        "loop_seconds": ended - embedded,
        "accuracy": accuracy(learner.mean_texts(task.tuned)),
    }

    started = _seconds()
    prompt = PlainPrompt(setup.backbone, setup.tuned_names)
    losses = plain_loop(prompt, setup, pixels, task.labels)
    seconds = _seconds() - started
    plain = {"seconds": seconds, "loop_seconds": seconds, "accuracy": accuracy(prompt())}
    batches = len(losses) // len(means)
    plain_means = torch.tensor(losses).reshape(-1, batches).mean(dim=1)
    return {
        "steps": len(losses),
        "batch": -(-len(train) // batches),
        "plain": plain,
        "ours": ours,
        "largest_difference": float((plain_means - torch.tensor(means)).abs().max()),
    }


def _seconds() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _task(setup: Setup, images: Embedded) -> TuningTask:
    tuned = list(setup.split.tuned)
    reference = setup.zero_shot[tuned]
    return TuningTask(
        setup.backbone.scale, setup.split.tuned, images.train, images.val, reference, setup.config
    )


def _learner(setup: Setup) -> Any:
    return make_learner(setup.backbone, setup.config, setup.split, setup.zero_shot)


class PlainPrompt(nn.Module):
    """CoOp's shared context in front of each class name, through the tower of an open_clip CLIP."""

    def __init__(self, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__()
        words = backbone.tokens.tokenizer
        self._model: Any = getattr(backbone.model, "text", backbone.model)
        self._ids = words([f"a photo of a {name}." for name in class_names]).to(backbone.device)
        self._vectors = self._model.token_embedding(self._ids).detach()
        self.context = nn.Parameter(self._vectors[0, 1:5].clone())

    def forward(self) -> Tensor:
        """Return the unit-norm embeddings of all classes, (classes, dim)."""
        model, vectors = self._model, self._vectors
        context = self.context.expand(len(vectors), -1, -1)
        tokens = torch.cat([vectors[:, :1], context, vectors[:, 5:]], dim=1)
        tokens = model.transformer(tokens + model.positional_embedding, attn_mask=model.attn_mask)
        tokens = model.ln_final(tokens)
        pooled = tokens[torch.arange(len(tokens)), self._ids.argmax(dim=1)]
        return functional.normalize(pooled @ model.text_projection, dim=-1)


def plain_loop(prompt: PlainPrompt, setup: Setup, pixels: Tensor, labels: Tensor) -> list[float]:
    """Train the prompt with the image encoder in each step; return the loss of each step."""
    config, model, backbone = setup.config.tuning, setup.backbone.model, setup.backbone
    device = backbone.device
    optimizer = torch.optim.AdamW(
        prompt.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    batches = -(-len(labels) // config.batch_size)
    steps, warmup = config.epochs * batches, config.warmup_epochs * batches
    losses: list[float] = []
    for epoch in range(config.epochs):
        draw = torch.Generator().manual_seed(setup.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(labels), generator=draw)
        for batch in range(batches):
            step = len(losses)
            rate = config.learning_rate * (step + 1) / warmup
            if step >= warmup:
                progress = (step - warmup) / max(1, steps - warmup)
                rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = rate
            rows = order[batch::batches]
            with torch.no_grad():
                images = model.encode_image(backbone.normalise(pixels[rows]), normalize=True)
            logits = backbone.scale * images @ prompt().T
            loss = functional.cross_entropy(logits, labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(prompt.parameters(), config.clip_norm)
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()

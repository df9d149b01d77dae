"""The two stages of the demo's pretraining: an image tower from labels, a text tower from captions.

A contrastive model learns shapes from captions alone only after far more pictures than a few
minutes on two cores allow. So the image tower is first trained to name colour, pattern and shape
through three linear heads that are thrown away, and is then frozen while the text tower learns
from noisy captions to find the right picture in a batch (locked-image tuning). The compositions
of the world's held-out classes occur in neither stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context

import click
import numpy as np
import torch
from numpy.typing import NDArray
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from .captions import caption
from .drawing import render
from .vocabulary import COLOURS, NEW_CLASSES, PATTERNS, SHAPES, Spec, parse

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Apart from every seed of the data set, whose keys have five numbers.
_POOL_KEY = 7_000_001
_VALUES = (tuple(COLOURS), PATTERNS, SHAPES)
# Shapes take much longer to learn than colours.
_HEAD_WEIGHTS = (1.0, 1.0, 2.0)
_HEAD_SCALE = 12.0
_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class Plan:
    """How long and on what to train; one seed for pictures, captions, weights and order."""

    seed: int
    steps: int
    text_steps: int
    threads: int
    bf16: bool
    pool: int = 20_000
    batch: int = 64
    rate: float = 1e-3
    text_batch: int = 512
    text_rate: float = 2e-3


def compositions() -> tuple[Spec, ...]:
    """Return every composition but those of the held-out classes, in a fixed order."""
    held_out = {parse(name) for name in NEW_CLASSES}
    everything = (Spec(*values) for values in product(*_VALUES))
    return tuple(spec for spec in everything if spec not in held_out)


def _draw(job: tuple[int, int, int]) -> NDArray[np.uint8]:
    seed, start, stop = job
    specs = compositions()
    pictures = [
        np.asarray(render(specs[i % len(specs)], np.random.default_rng((_POOL_KEY, seed, i))))
        for i in range(start, stop)
    ]
    return np.stack(pictures)


def draw_pool(count: int, seed: int, workers: int) -> Tensor:
    """Render `count` pictures, uint8 (count, 64, 64, 3); number i shows composition i modulo all.

    The pictures depend on the seed, not on the number of worker processes.
    """
    jobs = [(seed, start, min(start + 500, count)) for start in range(0, count, 500)]
    if workers == 1:
        return torch.from_numpy(np.concatenate([_draw(job) for job in jobs]))
    # A fork of a process that has run torch threads can hang.
    with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        return torch.from_numpy(np.concatenate(list(executor.map(_draw, jobs))))


def pixels(images: Tensor) -> Tensor:
    """Normalise uint8 pictures (n, 64, 64, 3) to the model's input, float32 (n, 3, 64, 64)."""
    scaled = images.permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def encode_images(model: CLIP, images: Tensor) -> Tensor:
    """Return unit-norm embeddings (n, D) of uint8 pictures (n, 64, 64, 3), without gradients."""
    with torch.inference_mode():
        parts = [
            model.encode_image(pixels(part), normalize=True) for part in torch.split(images, 250)
        ]
    return torch.cat(parts).clone()


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Return unit-norm embeddings (n, D) of int64 tokens (n, 32), computed without padding.

    The same as `model.encode_text`, whose cost grows with the padding.
    """
    ends = tokens.argmax(1)
    used = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :used]) + model.positional_embedding[:used]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:used, :used]))
    return F.normalize(x[torch.arange(len(x)), ends] @ model.text_projection, dim=-1)


def _optimise(
    parameters: list[nn.Parameter], steps: int, rate: float, loss_of: Callable[[], Tensor]
) -> Iterator[tuple[int, float]]:
    """Take `steps` AdamW steps with warm-up and cosine; yield each step's number and loss."""
    # A decay would shrink the rows of words that never occur.
    plain = [p for p in parameters if p.ndim < 2 or len(p) > 10_000]
    decayed = [p for p in parameters if not (p.ndim < 2 or len(p) > 10_000)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    warm_up = max(1, min(100, steps // 10))
    for step in range(steps):
        share = min((step + 1) / warm_up, 1.0) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * share
        loss = loss_of()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        yield step + 1, float(loss.detach())


def _report(stage: str, steps: int, losses: Iterator[tuple[int, float]]) -> None:
    start, recent = time.perf_counter(), 0.0
    for step, loss in losses:
        recent = loss if step == 1 else 0.95 * recent + 0.05 * loss
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - start
            click.echo(f"{stage} {step}/{steps}  loss {recent:.3f}  {seconds:.0f} s")


def train_image_tower(model: CLIP, plan: Plan) -> None:
    """Train `model.visual` in place to embed pictures so that three linear heads can name them."""
    images = draw_pool(plan.pool, plan.seed, plan.threads)
    click.echo(f"drew {len(images)} pictures")
    specs = compositions()
    rows = [
        [v.index(s) for v, s in zip(_VALUES, (c.colour, c.pattern, c.shape), strict=True)]
        for c in specs
    ]
    labels = torch.tensor(rows)[torch.arange(len(images)) % len(specs)]
    heads = nn.ModuleList(nn.Linear(model.visual.output_dim, len(v)) for v in _VALUES)
    order = torch.empty(0, dtype=torch.long)

    def loss_of() -> Tensor:
        nonlocal order
        if len(order) < plan.batch:
            order = torch.randperm(len(images))
        chosen, order = order[: plan.batch], order[plan.batch :]
        x = pixels(images[chosen])
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        # The fused kernel is the slower one at 65 tokens on a CPU.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, plan.bf16):
            features = model.visual(x)
        features = _HEAD_SCALE * F.normalize(features.float(), dim=-1)
        losses = [
            weight * F.cross_entropy(head(features), labels[chosen, place])
            for place, (head, weight) in enumerate(zip(heads, _HEAD_WEIGHTS, strict=True))
        ]
        return torch.stack(losses).sum()

    parameters = [*model.visual.parameters(), *heads.parameters()]
    _report("image tower", plan.steps, _optimise(parameters, plan.steps, plan.rate, loss_of))


def train_text_tower(model: CLIP, plan: Plan) -> None:
    """Train all but `model.visual` in place, contrastively, on noisy captions of new pictures."""
    images = draw_pool(plan.pool // 2, plan.seed + 1, plan.threads)
    features = encode_images(model, images)
    click.echo(f"drew and embedded {len(images)} more pictures")
    specs, rng = compositions(), np.random.default_rng((plan.seed, 1))
    tokenise = SimpleTokenizer(context_length=model.context_length)
    target = torch.arange(plan.text_batch)

    def loss_of() -> Tensor:
        chosen = rng.choice(len(features), plan.text_batch, replace=False)
        tokens = tokenise([caption(specs[i % len(specs)], rng) for i in chosen])
        with torch.no_grad():
            model.logit_scale.clamp_(0, _MAX_LOG_SCALE)
        logits = model.logit_scale.exp() * features[chosen] @ encode_text(model, tokens).T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    parameters = [p for n, p in model.named_parameters() if not n.startswith("visual.")]
    losses = _optimise(parameters, plan.text_steps, plan.text_rate, loss_of)
    _report("text tower", plan.text_steps, losses)

"""Everything that is trained, in one module: prompts, class transforms, rows, visual parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capt_deploy.core.console import counted
from capt_train import parallel
from capt_train.clip.backbone import Backbone
from capt_train.clip.vision_tower import Tower
from capt_train.config import TrainConfig
from capt_train.data.fewshot import FewShotSplit
from capt_train.method.base import BuildContext, ClassPrompt, ClassTransform
from capt_train.method.class_map import ClassMap
from capt_train.method.class_rows import ClassRows, RowPart
from capt_train.method.visual_tuner import Encoded, VisualTuner
from capt_train.parts import PARTS, load

_EMBEDDED_AT_ONCE = 256
_TEXTS_AT_ONCE = 4096  # where each image has class embeddings of its own


@dataclass(frozen=True)
class Texts:
    """Class embeddings of every learned prompt, or of every image where prompts read images."""

    embeddings: Float[Tensor, "prompts classes dim"]  # t̃, unit norm
    gates: tuple[Float[Tensor, "rows _"], ...]  # of every router


class Learner(nn.Module):
    """The trained parts around a frozen backbone, which is no submodule.

    With new parts, its embeddings are those of the backbone with the same prompt.
    """

    def __init__(
        self,
        backbone: Backbone,
        zero_shot: Float[Tensor, "classes dim"],
        prompts: Sequence[ClassPrompt],
        transforms: Mapping[str, ClassTransform],
        visual: VisualTuner | None = None,
        rows: RowPart | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: frozen, with a colour map of its input where one was fitted.
            zero_shot: hand-written t⁰ of every class, in force where there is no prompt.
            prompts: K learned prompts; may be empty.
            transforms: maps of class embeddings by the names of their parts, applied in order.
            visual: the trained parts inside the visual tower.
            rows: of the tuned classes, beside or in place of their embeddings.
        """
        super().__init__()
        self.backbone = backbone
        self._zero_shot = zero_shot
        self.prompts = nn.ModuleList(prompts)
        self._learned = tuple(prompts)  # the same, with their type
        self.transforms = nn.ModuleDict(transforms)
        self.tuner = visual
        self.rows = rows
        self.strength = 1.0  # κ

    @property
    def visual(self) -> VisualTuner | None:
        """Return the parts in force in the visual tower; None without any, as with κ = 0."""
        return self.tuner if self.strength else None

    def set_strength(self, strength: float) -> None:
        """Set κ: how much of the visual side's tuning is in force, 0 to 1."""
        self.strength = strength
        if self.tuner is not None:
            self.tuner.set_constants(strength=strength)

    def set_alpha(self, alpha: float) -> None:
        """Set the constant α of the visual side, if it is tuned."""
        if self.tuner is not None:
            self.tuner.set_constants(alpha=alpha)

    @property
    def reads_images(self) -> bool:
        """Tell whether class embeddings depend on the image."""
        return any(prompt.reads_images for prompt in self._learned)

    @property
    def obstacle(self) -> str | None:
        """Return why the text side does not fold into one row per class; None where it does."""
        if self.reads_images:
            return "its class embeddings depend on the image, so they are no constant rows"
        if self.rows is not None and not self.rows.folds:
            return "it compares each image with every training photo, which is no linear layer"
        return None

    @property
    def learned(self) -> int:
        """Return how many embeddings a class has besides the hand-written one."""
        return max(1, len(self.prompts))

    @property
    def trainable(self) -> bool:
        """Return whether anything in force is trained or fitted."""
        fitted = self.class_map is not None or self.rows is not None
        return fitted or bool(self.text_parameters or self.visual_parameters)

    @property
    def class_map(self) -> ClassMap | None:
        """Return the linear map of class embeddings, if it is in force."""
        part = dict(self.transforms.items()).get("map")
        return part if isinstance(part, ClassMap) else None

    @property
    def size(self) -> int:
        """Return how many trained or fitted numbers are in force."""
        colours = self.backbone.colours
        size = sum(p.numel() for p in (*self.text_parameters, *self.visual_parameters))
        for fitted in (self.class_map, self.rows):
            if fitted is not None:
                size += sum(values.numel() for values in fitted.state_dict().values())
        return size if colours is None else size + colours.size

    @property
    def recoloured(self) -> bool:
        """Return whether the colours of the input are mapped."""
        return self.backbone.colours is not None

    def parts(self, config: TrainConfig) -> frozenset[str]:
        """Return the parts in force: those of the settings that this model can have."""
        built = {*self.transforms, *(self.visual.parts if self.visual is not None else ())}

        rows = [name for name in config.parts if PARTS[name].side == "rows"]
        by_loss = any(not PARTS[name].closed_form for name in rows)
        trained = self.class_map is not None or self.text_parameters or self.visual_parameters
        trains = by_loss or trained

        def in_force(name: str) -> bool:
            part = PARTS[name]
            if part.in_force is not None:
                return part.in_force(self)
            if part.side in ("prompt", "rows"):  # of which there is only one
                return bool(self.prompts) if part.side == "prompt" else self.rows is not None
            if part.losses and not trains:
                return False
            return part.side is None or name in built

        return frozenset(filter(in_force, config.parts))

    @property
    def text_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the text side that are trained by epochs."""
        trained = [t for t in self.transforms.values() if getattr(t, "by_epochs", True)]
        return [*self.prompts.parameters(), *(p for t in trained for p in t.parameters())]

    @property
    def visual_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the visual side."""
        return [] if self.visual is None else [*self.visual.parameters()]

    @torch.no_grad()
    def mean_texts(self, classes: Sequence[int]) -> Float[Tensor, "classes dim"]:
        """Return class embeddings, the mean over the learned prompts, in float32."""
        return self.texts(classes).embeddings.float().mean(dim=0)

    def class_rows(self, classes: Sequence[int]) -> ClassRows:
        """Return rows and biases of some classes, by the mean over the learned prompts."""
        return self.with_rows(ClassRows.from_texts(self.mean_texts(classes)), classes)

    def with_rows(self, rows: ClassRows, classes: Sequence[int]) -> ClassRows:
        """Return class rows with those of the part `rows` in force where there are any."""
        return rows if self.rows is None else self.rows.applied(rows, classes, self.backbone.scale)

    def answer(
        self, images: Float[Tensor, "batch dim"], classes: Sequence[int]
    ) -> tuple[Float[Tensor, "prompts batch classes"], Texts]:
        """Return the scaled logits of every prompt, without rows, and the class embeddings."""
        texts = self.texts(classes, images)
        embeddings = texts.embeddings.float()
        if self.reads_images:
            return self.backbone.scale * torch.einsum("bd,bcd->bc", images, embeddings)[None], texts
        return self.backbone.scale * torch.einsum("bd,pcd->pbc", images, embeddings), texts

    @torch.no_grad()
    def logits(
        self, images: Float[Tensor, "batch dim"], classes: Sequence[int]
    ) -> Float[Tensor, "batch classes"]:
        """Return scaled logits of tuned image embeddings, by the mean over the prompts."""
        images = images.to(self._zero_shot)
        if self.reads_images:
            at_once = max(1, _TEXTS_AT_ONCE // len(classes))
            return torch.cat([self.answer(part, classes)[0][0] for part in images.split(at_once)])
        logits = self.class_rows(classes).logits(images, self.backbone.scale)
        if self.rows is not None:
            logits = logits + self.rows.added(images, classes, self.backbone.scale)
        return logits

    def texts(
        self, classes: Sequence[int], images: Float[Tensor, "batch dim"] | None = None
    ) -> Texts:
        """Return embeddings of some classes, given by index; of each image, if prompts read it."""
        rows = list(classes)
        if self.reads_images and images is not None:
            if images.requires_grad:  # each image's gradient needs all classes
                return self._transformed(self._learned[0](rows, images), rows)
            encoded = self._learned[0](parallel.split_rows(rows), images)
            return self._transformed(parallel.gather_rows(encoded, len(rows), dim=1), rows)
        encoded = [prompt(parallel.split_rows(rows)) for prompt in self._learned]
        prompted = [parallel.gather_rows(texts, len(rows)) for texts in encoded]
        prompted = prompted or [self._zero_shot[rows]]
        return self._transformed(torch.stack(prompted), rows)

    @torch.no_grad()
    def texts_of(self, class_names: Sequence[str], zero_shot: Tensor) -> Texts:
        """Return embeddings of classes by name; `zero_shot` are their hand-written ones."""
        prompted = [prompt.of_names(class_names) for prompt in self._learned] or [zero_shot]
        return self._transformed(torch.stack(prompted), None)

    def transform(
        self, embeddings: Float[Tensor, "classes dim"], classes: Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "classes dim"], tuple[Tensor, ...]]:
        """Return class embeddings after all transforms, and the gates of their routers.

        Args:
            embeddings: of the classes.
            classes: their indices; None for classes that are known by name alone.
        """
        routed: list[Tensor] = []
        for transform in self.transforms.values():
            embeddings, gates = transform(embeddings, classes)
            routed += [] if gates is None else [gates]
        return embeddings, tuple(routed)

    def _transformed(
        self, prompted: Float[Tensor, "prompts classes dim"], classes: list[int] | None
    ) -> Texts:
        repeated = None if classes is None else classes * len(prompted)
        transformed, gates = self.transform(prompted.flatten(0, 1), repeated)
        return Texts(transformed.unflatten(0, prompted.shape[:2]), gates)

    def images(
        self, tokens: Tensor, alpha: Tensor | None = None, *, shortcut: bool = False
    ) -> Encoded:
        """Return tuned image embeddings from tokens of `prefix`; see `VisualTuner.forward`."""
        visual, tower = self._visual_side()
        encoded: Encoded = visual(tower, tokens, alpha, shortcut=shortcut)
        return encoded

    @torch.no_grad()
    def embed_tokens(
        self, tokens: Float[Tensor, "samples tokens width"]
    ) -> Float[Tensor, "samples dim"]:
        """Return tuned embeddings of cached tokens of any number of images."""
        device = self._zero_shot.device
        embedded = [
            self.images(chunk.to(device).float(), shortcut=True).embeddings
            for chunk in parallel.split_rows(tokens).split(_EMBEDDED_AT_ONCE)
        ]
        return parallel.gather_rows(torch.cat(embedded), len(tokens))

    @torch.no_grad()
    def prefix(self, pixels: Tensor) -> Tensor:
        """Return the frozen tokens of preprocessed pixels, RGB 0-255."""
        visual, tower = self._visual_side()
        return visual.prefix(tower, self.backbone.normalise(pixels))

    @torch.no_grad()
    def start(self, pixels: Tensor) -> tuple[Float[Tensor, "batch dim"], Tensor | None]:
        """Return f⁰ by a new learner, and the tokens of `prefix` where the visual side is tuned."""
        if self.visual is None:
            return self.backbone.image_embeddings(pixels), None
        tokens = self.prefix(pixels)
        if not self.visual.starts_frozen:
            return self.backbone.image_embeddings(pixels), tokens
        return self.images(tokens).embeddings, tokens

    @torch.no_grad()
    def image_embeddings(self, pixels: Tensor) -> Float[Tensor, "batch dim"]:
        """Return unit-norm embeddings f(x) of preprocessed pixels, RGB 0-255, as tuned."""
        if self.visual is None:
            return self.backbone.image_embeddings(pixels)
        return self.images(self.prefix(pixels)).embeddings

    def _visual_side(self) -> tuple[VisualTuner, Tower]:
        if self.visual is None or self.backbone.tower is None:
            raise ValueError("the visual side is not tuned")
        return self.visual, self.backbone.tower


def make_learner(
    backbone: Backbone,
    config: TrainConfig,
    split: FewShotSplit,
    zero_shot: Float[Tensor, "classes dim"],
    centres: Float[Tensor, "kinds classes centres dim"] | None = None,
    teacher: Float[Tensor, "classes width"] | None = None,
) -> Learner:
    """Return the trained parts of a run, as they are before the first step.

    Args:
        backbone: frozen.
        config: which parts, and their sizes.
        split: names the classes.
        zero_shot: hand-written t⁰ of every class.
        centres: of each class's sentences; by default zeros, to be loaded over.
        teacher: its class embeddings; by default zeros, to be loaded over.
    """
    generator = torch.Generator().manual_seed(config.seed)
    names, tuned = split.class_names, split.tuned
    context = BuildContext(backbone, config, names, zero_shot, centres, tuned, generator, teacher)
    prompts = [
        prompt
        for code in _code(config, "prompt").values()
        if code.obstacle(backbone) is None
        for prompt in code.build(context)
    ]
    context = replace(context, prompts=prompts)
    transforms = {name: code.build(context) for name, code in _code(config, "text").items()}
    tower, visual = backbone.tower, None
    if tower is not None:
        parts = {
            name: code.build(tower, context)
            for name, code in _code(config, "visual").items()
            if code.obstacle(tower) is None
        }
        visual = VisualTuner(tower, parts) if parts else None
    rows = [code.build(context) for code in _code(config, "rows").values()]
    return Learner(backbone, zero_shot, prompts, transforms, visual, rows[0] if rows else None).to(
        backbone.device
    )


def left_out(backbone: Backbone, config: TrainConfig) -> list[str]:
    """Return a sentence for each part of the settings that this model cannot have."""
    parts, tower = _code(config, "visual"), backbone.tower
    prompts = _code(config, "prompt")
    obstacles = {name: code.obstacle(backbone) for name, code in prompts.items()}
    if tower is not None:
        obstacles |= {name: code.obstacle(tower) for name, code in parts.items()}
    notes = [f"{why}; left out: {name}" for name, why in obstacles.items() if why]
    if "text-prompts" in config.parts and prompts and config.prompt.depth > backbone.text.depth:
        reached = counted(backbone.text.depth, "block")
        notes.append(f"{reached} of the text tower can be reached; contexts go no deeper")
    if parts and tower is None:
        kind = type(backbone.model.visual).__name__
        notes.append(
            f"the tokens of the visual tower ({kind}) cannot be reached; left out: "
            f"{', '.join(parts)}"
        )
    return notes


def _code(config: TrainConfig, side: str) -> dict[str, Any]:
    """Return the classes of the settings' parts of a side, in the order of the entries."""
    names = [name for name in PARTS if name in config.parts and PARTS[name].side == side]
    return {name: load(PARTS[name].code) for name in names}

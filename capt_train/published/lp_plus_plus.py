"""LP++ (arXiv 2404.02285): a linear probe that blends in the class embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from capt_deploy.core.errors import RunError
from capt_train.method.class_rows import RowPart, RowTask
from capt_train.method.loss_terms import Step, loss_terms, weighted_sum

_STEPS, _MOMENTUM = 300, 0.9
_BLENDED_EVERY = 10  # steps after which α moves
_START = 250.0  # of α, times the mean cosine of photos and their class names


class BlendedRows(RowPart):
    """`z_c = f·(w_c + α_c·t_c)`, eq. 2, minimised in turns of w and α.

    The rates follow from Lipschitz constants, `4N/λ_max(FᵀF)` for w and `N/(4·max_c Σ(f·t_c)²)` for
    α, so that nothing is searched. As in the authors' code, w starts from the sums of the photos of
    a class and has momentum 0.9; unlike there, the last step is kept, not the best on validation
    photos.
    """

    def fit(self, task: RowTask) -> None:
        """Train w and α on all photos at once."""
        images, texts, count = task.images, task.texts, len(task.labels)
        cosines = images @ texts.T
        sums = torch.zeros_like(texts).index_add_(0, task.labels, images)
        weight = nn.Parameter(sums)
        bias = nn.Parameter(torch.zeros(len(texts)).to(texts))
        means = torch.zeros(len(texts)).to(texts)
        means.index_add_(0, task.labels, cosines.gather(1, task.labels[:, None]).squeeze(1))
        shots = task.labels.bincount(minlength=len(texts))
        blend = nn.Parameter((_START * (means / shots).mean()).expand(len(texts)).clone())
        rate = 4 * count / torch.linalg.eigvalsh(images.T @ images)[-1]
        blend_rate = count / (4 * cosines.square().sum(dim=0).max())
        optimizer = torch.optim.SGD([weight, bias], float(rate), _MOMENTUM)
        with torch.enable_grad():
            for number in range(_STEPS):
                rows = weight + blend[:, None] * texts
                loss = self._loss(images @ rows.T + bias, rows, task)
                if not torch.isfinite(loss):
                    raise RunError(f"LP++: the loss became {loss.item()} in step {number}")
                optimizer.zero_grad()
                blend.grad = None
                loss.backward()
                optimizer.step()
                if (number + 1) % _BLENDED_EVERY == 0 and blend.grad is not None:
                    blend.data -= blend_rate * blend.grad
        self.weight.copy_((weight + blend[:, None] * texts).detach() / task.scale)
        self.bias.copy_(bias.detach())

    def _loss(self, logits: Tensor, rows: Tensor, task: RowTask) -> Tensor:
        step = Step(
            logits[None],
            task.labels,
            task.scale,
            functional.normalize(rows, dim=-1)[None],
            task.reference,
            images=task.images,
            frozen=task.images,
        )
        return weighted_sum(loss_terms(step, task.weights), task.weights)

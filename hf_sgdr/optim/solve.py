"""`solve_head`: the best linear head on given features, found by algebra instead of training.

L2-regularised logistic regression is convex, so there is one answer: no rate, no epochs, no luck. How strongly it is
regularised is chosen by cross-validation on the training features alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from numpy.typing import NDArray

from hf_sgdr._utils.plots import plot_strengths
from hf_sgdr.optim.folds import checked_folds, plain_rows

# scikit-learn's C, two a decade.
STRENGTHS = tuple(float(strength) for strength in np.logspace(-4, 4, 17))
# Rows that are read and multiplied at once: of 1,280 features in single precision 84 MB.
_CHUNK = 1 << 14
_MAX_ITERATIONS = 400
# The grid is left when so many strengths in a row did worse than the best one by a twentieth: the weaker the
# regularisation, the longer the solving, and the loss in cross-validation has one valley.
_WORSE, _IN_A_ROW = 1.05, 2
# Of the mean loss: its gradient, and its change in a step. The optimum's loss is met within 1e-5. Cross-validation may
# end earlier: it compares strengths whose losses differ by more.
_GRADIENT, _CHANGE = 1e-6, 1e-9
_ROUGH_GRADIENT, _ROUGH_CHANGE = 1e-5, 1e-7


class Features(Protocol):
    """Rows of features: a tensor, or rows on disk that are indexed as one."""

    shape: torch.Size

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> torch.Tensor: ...


@dataclass(frozen=True)
class HeadSolution:
    """A linear head, and how good it is on images that it was not solved on.

    Args:
        weight (`Tensor`): float32 (classes, width).
        bias (`Tensor`): float32 (classes,).
        strength (`float`): the chosen `C` of scikit-learn: the higher, the weaker the regularisation.
        cv_loss, cv_accuracy (`float`): means over the images, each predicted by a head that did not see it; with
            several labels an image, the mean loss and the share of right answers of a label.
        cv_loss_error, cv_accuracy_error (`float`): their standard errors.
        out_of_fold (`Tensor`): float32 (images, classes), the log-probabilities of these predictions; NaN for an image
            that was never held out.
        strengths, cv_losses (`tuple[float, ...]`): the curve that the choice was made from; the default grid is left
            once the loss has clearly risen again.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float
    cv_loss: float
    cv_loss_error: float
    cv_accuracy: float
    cv_accuracy_error: float
    out_of_fold: torch.Tensor
    strengths: tuple[float, ...]
    cv_losses: tuple[float, ...]

    def __repr__(self) -> str:
        return (
            f"HeadSolution({len(self.bias)} classes, strength={self.strength:g}, cv_loss={self.cv_loss:.4f} ± "
            f"{self.cv_loss_error:.4f}, cv_accuracy={self.cv_accuracy:.4f} ± {self.cv_accuracy_error:.4f})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The loss in cross-validation against the strength, log axis, with the chosen one marked."""
        return plot_strengths(self.strengths, self.cv_losses, self.strength, ax)


def solve_head(
    features: Features,
    labels: Any,
    *,
    strengths: Sequence[float] | None = None,
    folds: int | Sequence[tuple[Any, Any]] = 5,
    seed: int = 42,
    groups: Any = None,
    sample_weight: Any = None,
    num_classes: int | None = None,
) -> HeadSolution:
    """Solve a linear head: multinomial logistic regression with a free intercept, on the features as they are.

    It minimises `strength * sum(weight_i * cross_entropy_i) + sum(W**2) / 2`, as scikit-learn's `LogisticRegression`
    does; of two classes, W is the difference of the two rows, and of several labels an image each is a problem of its
    own. The strength with the lowest log loss in cross-validation is taken. All folds are solved together by L-BFGS,
    each strength from the solution of the last, in the principal axes of the features, where the curvature is nearly
    diagonal.

    Args:
        features (`Tensor`, array or rows on disk): (rows, width), of any floating type; a tensor's device computes.
        labels (array or tensor of int): class ids from 0, (rows,); or several labels, 0 and 1, (rows, classes).
        strengths (sequence of `float`, *optional*, defaults to 17 from 1e-4 to 1e4): scikit-learn's `C`.
        folds (`int` or sequence of (rows to train on, rows held out), *optional*, defaults to 5): how many, drawn so
            that each class is spread over them, or which.
        seed (`int`, *optional*, defaults to 42): of that draw.
        groups (array of int (rows,), *optional*): the image of each row, where rows are views of images: these are held
            out together, and only an image's first row, the plain one, is scored.
        sample_weight (array of float (rows,), *optional*): of each row's loss; with several labels an image also
            (rows, classes), of each label's.
        num_classes (`int`, *optional*): classes of the head where the last ones may have no row; what has none is the
            least likely.

    Raises:
        ValueError: if there is one class alone, a feature is NaN or infinite, a number is out of range, or shapes do
            not fit.
    """
    path = _checked_strengths(strengths)
    if isinstance(features, np.ndarray):
        features = torch.from_numpy(features)
    if len(features.shape) != 2:
        raise ValueError(
            f"features of shape {tuple(features.shape)}: must be (rows, width), as features.flatten(1) is."
        )
    targets = _Targets.of(labels, len(features), num_classes)
    weights = _checked_weights(sample_weight, targets.given.shape)
    design = _Design(features, weights if weights.ndim == 1 else torch.ones(len(features)))
    targets.weights = weights if weights.ndim == 2 else None
    images = np.arange(len(features)) if groups is None else np.asarray(groups)
    if images.shape != (len(features),) or (images.dtype.kind == "f" and np.isnan(images).any()):
        raise ValueError(f"groups of shape {images.shape} for {len(features)} rows: must be one number a row, no NaN.")
    plain = plain_rows(images)
    parts = checked_folds(folds, targets.given, seed, images)
    in_training = np.zeros((len(parts), len(features)), dtype=np.float32)
    part_of_row = np.full(len(features), -1)
    for number, (train, held_out) in enumerate(parts):
        in_training[number, train] = 1.0
        part_of_row[held_out] = number
    solver = _Solver(design, targets, torch.from_numpy(in_training))
    rows = torch.from_numpy(plain)
    is_scored = torch.from_numpy(part_of_row[plain] >= 0)
    curve: list[float] = []
    best = None
    for strength in path:
        solver.solve(strength, _ROUGH_GRADIENT, _ROUGH_CHANGE)
        logits = solver.logits(rows, torch.from_numpy(part_of_row[plain]).clamp(min=0))
        losses = targets.losses(logits, rows)[is_scored]
        curve.append(float(losses.mean()))
        if best is None or curve[-1] < best[0]:
            best = curve[-1], strength, logits, losses
        if strengths is None and min(curve[-_IN_A_ROW:]) > _WORSE * best[0]:
            break
    assert best is not None
    _, strength, logits, losses = best
    whole = _Solver(design, targets, torch.ones(1, len(features)))
    whole.solve(strength)
    hits = targets.hits(logits, rows)[is_scored]
    out_of_fold = targets.log_probabilities(logits).float().cpu()
    out_of_fold[~is_scored] = math.nan
    weight, bias = targets.of_classes(*whole.head())
    scores = (*_mean_and_error(losses), *_mean_and_error(hits))
    return HeadSolution(weight, bias, strength, *scores, out_of_fold, tuple(path[: len(curve)]), tuple(curve))


class _Targets:
    """The truth, and what logits mean: softmax over classes, one logit for two classes, or one a label.

    Args:
        given (array of int): as [`solve_head`] takes them.
        num_classes (`int`): with those that no row has.
    """

    def __init__(self, given: NDArray[Any], num_classes: int) -> None:
        self.given, self.num_classes = given, num_classes
        self.weights: torch.Tensor | None = None  # of each label, (rows, classes)
        self.is_multi_label = given.ndim == 2
        if self.is_multi_label:
            self.present = np.arange(num_classes)
            self.truth = torch.from_numpy(given.astype(np.float32))
        else:
            self.present, ids = np.unique(given, return_inverse=True)
            one_hot = F.one_hot(torch.from_numpy(ids.reshape(-1)), len(self.present)).float()
            self.truth = one_hot[:, 1:] if len(self.present) == 2 else one_hot

    @classmethod
    def of(cls, labels: Any, rows: int, num_classes: int | None = None) -> "_Targets":
        given = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
        if given.ndim not in (1, 2) or len(given) != rows:
            raise ValueError(f"labels of shape {given.shape} for {rows} rows of features: must be one a row.")
        if not np.issubdtype(given.dtype, np.integer) and not (given == given.astype(np.int64)).all():
            raise ValueError(f"labels are {given.dtype}: must be class ids (integers).")
        given = given.astype(np.int64)
        if given.size == 0 or given.min() < 0 or (given.ndim == 2 and given.max() > 1):
            raise ValueError("labels must be class ids >= 0, or 0 and 1 in a column for each of several labels.")
        if given.ndim == 1 and len(np.unique(given)) < 2:
            raise ValueError(f"All {rows} rows are of class {given[0]}: at least two classes are needed.")
        constant = np.flatnonzero(given.min(axis=0) == given.max(axis=0)).tolist() if given.ndim == 2 else []
        if constant:
            raise ValueError(f"Label {constant[0]} is the same in all {rows} rows: leave its column out.")
        columns = given.shape[1] if given.ndim == 2 else int(given.max()) + 1
        if num_classes is not None and (num_classes < columns or (given.ndim == 2 and num_classes > columns)):
            raise ValueError(f"num_classes={num_classes}, but the labels are of {columns} classes.")
        return cls(given, num_classes or columns)

    @property
    def is_softmax(self) -> bool:
        return not self.is_multi_label and len(self.present) > 2

    def residuals(
        self, logits: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses (rows, parts), their derivative by the logits, and p (1 - p), both (rows, parts, columns).

        With weights (rows, columns) each of several labels counts by its own.
        """
        truth = truth[:, None]
        if self.is_softmax:
            log_p = logits.log_softmax(-1)
            p = log_p.exp()
            return -(log_p * truth).sum(-1), p - truth, p * (1 - p)
        p = logits.sigmoid()
        of_label = 1.0 if weights is None else weights[:, None]
        losses = ((F.softplus(logits) - logits * truth) * of_label).sum(-1)
        return losses, (p - truth) * of_label, p * (1 - p) * of_label

    def losses(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The log loss of rows, float64 (rows,)."""
        truth = self.truth[rows].to(logits)
        losses = self.residuals(logits[:, None].double(), truth.double())[0][:, 0]
        return losses / (self.truth.shape[1] if self.is_multi_label else 1)

    def hits(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """How right rows are predicted, 0 to 1, float64 (rows,)."""
        truth = self.truth[rows].to(logits.device)
        if self.is_softmax:
            return (logits.argmax(-1) == truth.argmax(-1)).double()
        return ((logits > 0) == (truth > 0.5)).double().mean(-1)

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of every class, (rows, classes): those without a row have none."""
        if self.is_multi_label:
            return F.logsigmoid(logits)
        if not self.is_softmax:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        result = logits.new_full((len(logits), self.num_classes), -math.inf)
        result[:, torch.from_numpy(self.present)] = logits.log_softmax(-1)
        return result

    def of_classes(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A head (columns, width), (columns,) as that of all classes; one that no row has is the least likely."""
        if not self.is_multi_label and not self.is_softmax:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        all_weights = weight.new_zeros(self.num_classes, weight.shape[1])
        all_biases = bias.new_full((self.num_classes,), float(bias.min()) - math.log(2 * len(self.given)))
        all_weights[torch.from_numpy(self.present)] = weight
        all_biases[torch.from_numpy(self.present)] = bias
        return all_weights.float().cpu(), all_biases.float().cpu()


class _Design:
    """Features in their principal axes, of which there are no more than rows or columns.

    Args:
        features (`Tensor` or rows on disk): (rows, width).
        weights (`Tensor`): (rows,), of the loss.
    """

    def __init__(self, features: Features, weights: torch.Tensor) -> None:
        self.features = features
        self.rows, self.width = features.shape
        self.device = features.device if isinstance(features, torch.Tensor) else torch.device("cpu")
        self.weights = weights.to(self.device)
        total = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for _, chunk in self._given():
            total += chunk.sum(0, dtype=torch.float64)
        self.mean = (total / self.rows).float()
        if not self.mean.isfinite().all():
            raise ValueError("The features are not finite: NaN or infinity in them; look at the images or the network.")
        self._coordinates: torch.Tensor | None = None
        if self.rows <= self.width:  # the Gram matrix of the rows is the smaller one
            centred = torch.cat([chunk for _, chunk in self._given()]) - self.mean
            self.sizes, vectors = _principal_axes(centred.double() @ centred.double().T)
            self.axes = centred.T @ (vectors / self.sizes.sqrt())
            self._coordinates = vectors * self.sizes.sqrt()
        else:
            gram = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
            for _, chunk in self.chunks():
                gram += chunk.double().T @ chunk.double()
            self.sizes, self.axes = _principal_axes(gram)

    def _given(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, self.rows, _CHUNK):
            rows = slice(start, min(start + _CHUNK, self.rows))
            chunk = self.features[
                rows if isinstance(self.features, torch.Tensor) else torch.arange(rows.start, rows.stop)
            ]
            yield rows, chunk.detach().float()

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows as they are multiplied: coordinates, or centred features."""
        if self._coordinates is not None:
            yield slice(0, self.rows), self._coordinates
            return
        for rows, chunk in self._given():
            yield rows, chunk - self.mean

    def into(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Coefficients of principal axes, (axes, ...), as those of what `chunks` gives."""
        return coefficients if self._coordinates is not None else self.axes @ coefficients

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient by what `into` gave, as that by coefficients of principal axes."""
        return gradient if self._coordinates is not None else self.axes.T @ gradient


def _principal_axes(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of a Gram matrix (float64), without those of rounding, and their vectors: (axes,), (columns, axes).

    In float32 a column that is a thousand times as wide as the others would be all that is left.
    """
    spreads = gram.diagonal()
    varies = spreads > 1e-13 * spreads.max()  # with many columns of zeros LAPACK does not converge
    values, vectors = torch.linalg.eigh(gram[varies][:, varies])
    kept = values > 1e-11 * values[-1:]
    axes = gram.new_zeros(len(gram), int(kept.sum()))
    axes[varies] = vectors[:, kept]
    sizes = values[kept].float()
    if not bool((sizes.isfinite() & (sizes > 0)).all()):
        raise ValueError(f"The features vary by {float(values[-1]) ** 0.5:.0e} in all: scale them nearer to 1.")
    return sizes, axes.float()


class _Solver:
    """L-BFGS on several problems with the same features at once, one for each part of the rows.

    Args:
        design ([`_Design`]), targets ([`_Targets`]): features and truth.
        parts (`Tensor`): 0 and 1, (parts, rows): what each is solved on.
    """

    def __init__(self, design: _Design, targets: _Targets, parts: torch.Tensor) -> None:
        self.design, self.targets = design, targets
        weights = parts.to(design.device) * design.weights
        self._totals = weights.sum(1)  # (parts,)
        if not bool((self._totals > 0).all()):
            raise ValueError("sample_weight is 0 for all rows, or for all that a fold trains on.")
        self._weights = (weights / self._totals[:, None]).T  # (rows, parts)
        self._truth = targets.truth.to(design.device)
        self._of_labels = None if targets.weights is None else targets.weights.to(design.device)
        columns = self._truth.shape[1]
        self._shape = (len(design.sizes) + 1, len(parts), columns)  # the last row are the intercepts
        self._solution = torch.zeros(self._shape, device=design.device)
        self._curvature = torch.full(
            (len(parts), columns), 0.25 if not targets.is_softmax else (1 - 1 / columns) / columns
        )

    def solve(self, strength: float, gradient: float = _GRADIENT, change: float = _CHANGE) -> None:
        """Go on from the last solution to that of another strength, until gradient and change are below these."""
        penalty = 1 / (strength * self._totals)[:, None]  # (parts, 1), of the mean loss
        sizes = torch.cat([self.design.sizes / self.design.rows, self.design.sizes.new_ones(1)])
        curvature = self._curvature.to(sizes) * sizes[:, None, None]
        curvature[:-1] += penalty
        scale = curvature.rsqrt()
        scaled = (self._solution / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=_MAX_ITERATIONS,
            tolerance_grad=gradient,
            tolerance_change=change,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            solution = scaled.detach() * scale
            loss, slope = self._loss_and_gradient(solution, penalty)
            scaled.grad = slope * scale
            return loss

        optimizer.step(closure)
        self._solution = scaled.detach() * scale

    def _loss_and_gradient(self, solution: torch.Tensor, penalty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = solution[:-1], solution[-1]
        flat = self.design.into(weight.flatten(1))
        loss = 0.5 * (weight.square() * penalty).sum(dtype=torch.float64)
        gradient = torch.zeros_like(flat)
        of_bias = torch.zeros_like(bias)
        curvature = torch.zeros_like(bias)
        for rows, chunk in self.design.chunks():
            logits = (chunk @ flat).view(len(chunk), *self._shape[1:]) + bias
            of_labels = None if self._of_labels is None else self._of_labels[rows]
            losses, residuals, spread = self.targets.residuals(logits, self._truth[rows], of_labels)
            weights = self._weights[rows]
            loss = loss + (losses * weights).sum(dtype=torch.float64)
            residuals = residuals * weights[..., None]
            gradient += chunk.T @ residuals.flatten(1)
            of_bias += residuals.sum(0)
            curvature += (spread * weights[..., None]).sum(0)
        self._curvature = curvature.clamp(min=1e-4)  # for the next strength's scale
        of_weight = self.design.back(gradient).view_as(weight) + weight * penalty
        return loss, torch.cat([of_weight, of_bias[None]])

    def logits(self, rows: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Logits (rows, columns) of some rows, each by the solution of its part."""
        flat, bias = self.design.into(self._solution[:-1].flatten(1)), self._solution[-1]
        every = torch.cat([chunk @ flat for _, chunk in self.design.chunks()]).view(self.design.rows, *self._shape[1:])
        rows, parts = rows.to(self.design.device), parts.to(self.design.device)
        return every[rows, parts] + bias[parts]

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (columns, width) and bias (columns,) of the first part, for features as they are."""
        weight = (self.design.axes @ self._solution[:-1, 0]).T
        return weight, self._solution[-1, 0] - weight @ self.design.mean


def _checked_strengths(strengths: Sequence[float] | None) -> list[float]:
    path = sorted(float(strength) for strength in (STRENGTHS if strengths is None else strengths))
    if not path or not all(0 < strength < math.inf for strength in path):
        raise ValueError(f"strengths={strengths!r}: must be finite numbers above 0, at least one.")
    return path


def _checked_weights(weights: Any, shape: tuple[int, ...]) -> torch.Tensor:
    if weights is None:
        return torch.ones(shape[0])
    checked = torch.as_tensor(weights, dtype=torch.float32)
    is_fit = checked.shape in (shape[:1], shape)
    if not is_fit or not bool((checked >= 0).all()) or not bool(checked.isfinite().all()):
        raise ValueError(
            f"sample_weight of shape {tuple(checked.shape)} for {shape[0]} rows: must be one number >= 0 a row."
        )
    return checked


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error

"""Late fusion of what is seen of an object and of its context (Akumalla, Haney & Bazhenov, arXiv 2011.09526).

Feature extractors that were trained for different things (objects; scenes) look at the same image. Their features are
concatenated, z = (z₀, z₁, …), and a joint linear classifier reads them: logits = Σᵢ θᵢ zᵢ + b. An attack on what one
extractor sees leaves the others. Where the foreground is known to be attacked, its weights are penalised:

    loss = cross-entropy + Σᵢ αᵢ‖θᵢ‖²        (the paper's: α₀ = α for the foreground, 0 for the background)

With frozen extractors, as in the paper, this is a convex problem in (θ, b), and `LateFusion.fit` goes to its optimum.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn import functional as F


class LateFusion(nn.Module):
    """A joint linear classifier on the concatenated features of any number of extractors.

    Args:
        extractors: each takes the whole input, ``(N, C, H, W)``, and returns features ``(N, D)`` or ``(N, D, h, w)``,
            which are averaged over their positions. Copies of them are used. One that is for a part of the channels
            (depth, say) picks them itself.
        nb_classes: at least 2.
        penalty: α of the foreground's weights, which are the first extractor's; or one α for each extractor.
        frozen: the extractors stay as they are, in `eval()` mode too, and only the joint classifier learns.
        input_shape: ``(C, H, W)`` of an image; the extractors are tried once on it.

    Shape:
        ``(N, C, H, W)`` → logits ``(N, nb_classes)``

    Raises:
        TypeError: an extractor is no `nn.Module`, or returns no tensor.
        ValueError: no extractor, features of another rank, fewer than two classes, or a penalty that does not fit.
    """

    def __init__(
        self,
        extractors: Sequence[nn.Module],
        nb_classes: int,
        *,
        penalty: float | Sequence[float] = 0.0,
        frozen: bool = True,
        input_shape: tuple[int, int, int] = (3, 64, 64),
    ) -> None:
        super().__init__()
        if not extractors:
            raise ValueError("extractors=[]: at least one feature extractor")
        wrong = [type(extractor).__name__ for extractor in extractors if not isinstance(extractor, nn.Module)]
        if wrong:
            raise TypeError(f"an extractor is a {wrong[0]}; give torch.nn.Module")
        if nb_classes < 2:
            raise ValueError(f"nb_classes={nb_classes}: at least 2")
        self.alphas = _alphas(penalty, len(extractors))
        self.nb_classes, self.frozen, self.input_shape = int(nb_classes), bool(frozen), tuple(input_shape)
        self.extractors = nn.ModuleList(copy.deepcopy(extractor) for extractor in extractors)
        if self.frozen:
            self.extractors.requires_grad_(False)
        self.eval()
        with torch.no_grad():
            self.widths = tuple(part.shape[1] for part in self._parts(self._example()))
        self.joint = nn.Linear(sum(self.widths), self.nb_classes)
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        return self.joint(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The joint feature z of each image, ``(N, ΣD)``, the extractors' in their order."""
        return torch.cat(list(self._parts(images)), dim=1)

    def weights(self) -> tuple[Tensor, ...]:
        """The joint classifier's weights θᵢ for each extractor's features, ``(nb_classes, Dᵢ)`` each."""
        return self.joint.weight.split(self.widths, dim=1)

    def penalty(self) -> Tensor:
        """Σᵢ αᵢ‖θᵢ‖², a scalar with a gradient of 2αᵢθᵢ."""
        parts = zip(self.alphas, self.weights(), strict=True)
        return torch.stack([alpha * theta.square().sum() for alpha, theta in parts]).sum()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, averaged over the images, plus the penalty."""
        return F.cross_entropy(logits, labels) + self.penalty()

    def fit(
        self, images: Tensor, labels: Tensor, *, decay: float = 1e-4, max_iter: int = 500, batch_size: int = 128
    ) -> Self:
        """Train the joint classifier alone, from zero weights to the optimum (L-BFGS in double precision).

        Args:
            images, labels: all of them; features are found once, `batch_size` images at a time.
            decay: times ‖θ‖² of all weights is added, which keeps the optimum finite where classes can be separated:
                logits without a bound hide gradients from attacks.
            max_iter: of L-BFGS.

        Shape:
            images: ``(N, C, H, W)``; labels: ``(N,)`` int64

        Raises:
            ValueError: labels that do not fit, or a decay that is not positive.
        """
        self._check(images, labels)
        if not decay > 0:
            raise ValueError(f"decay={decay}: a positive number, or weights may grow without end")
        training = self.training
        self.eval()
        with torch.no_grad():
            z = torch.cat([self.features(batch) for batch in images.split(batch_size)]).double()
        self.train(training)
        # L-BFGS works on weights in units in which every one of them has a curvature of about 1
        parts = zip(self.widths, self.alphas, strict=True)
        ridge = torch.cat([z.new_full((width,), alpha + decay) for width, alpha in parts])
        unit = (z.square().mean(dim=0) / 4 + 2 * ridge).rsqrt()
        scaled = torch.zeros(self.nb_classes, z.shape[1], dtype=z.dtype, device=z.device, requires_grad=True)
        bias = torch.zeros(self.nb_classes, dtype=z.dtype, device=z.device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [scaled, bias],
            max_iter=max_iter,
            tolerance_grad=1e-8,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )
        labels = labels.to(z.device)

        def closure() -> Tensor:
            optimizer.zero_grad()
            weight = scaled * unit
            loss = F.cross_entropy(F.linear(z, weight, bias), labels) + (ridge * weight.square()).sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        with torch.no_grad():
            self.joint.weight.copy_(scaled * unit)
            self.joint.bias.copy_(bias)
        return self

    def fit_all(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        epochs: int = 10,
        lr: float = 1e-3,
        batch_size: int = 64,
        seed: int = 0,
    ) -> Self:
        """Train extractors and joint classifier together (Adam, one cycle, shuffled by an own generator).

        Raises:
            ValueError: labels that do not fit, or the extractors are frozen.
        """
        self._check(images, labels)
        if self.frozen:
            raise ValueError("the extractors are frozen: use fit, or make the fusion with frozen=False")
        training = self.training
        self.train()
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        steps = epochs * -(-len(images) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for part in torch.randperm(len(images), generator=generator).split(batch_size):
                optimizer.zero_grad()
                self.loss(self(images[part]), labels[part]).backward()
                optimizer.step()
                schedule.step()
        return self.train(training)

    def classifier(
        self, *, lr: float = 1e-3, clip_values: tuple[float, float] = (0.0, 1.0), device_type: str = "cpu"
    ) -> PyTorchClassifier:
        """An ART classifier around this very model: its loss has the penalty, its `fit` trains what is not frozen."""
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return PyTorchClassifier(
            model=self,
            loss=PenalisedCrossEntropy(self),
            input_shape=self.input_shape,
            nb_classes=self.nb_classes,
            optimizer=torch.optim.Adam(learning, lr=lr),
            clip_values=clip_values,
            device_type=device_type,
        )

    def train(self, mode: bool = True) -> Self:
        """As of every module, but frozen extractors stay in `eval()` mode, and so do their running statistics."""
        super().train(mode)
        if self.frozen:
            self.extractors.eval()
        return self

    def _parts(self, images: Tensor) -> Iterator[Tensor]:
        for number, extractor in enumerate(self.extractors):
            part: Any = extractor(images)
            if not isinstance(part, Tensor):
                raise TypeError(f"extractor {number} returned a {type(part).__name__}; it has to return a tensor")
            if part.ndim not in (2, 4):
                raise ValueError(
                    f"extractor {number} returned features {tuple(part.shape)}; return (N, D) or (N, D, h, w)"
                )
            yield part if part.ndim == 2 else part.mean(dim=(2, 3))

    def _example(self) -> Tensor:
        weight = next(self.extractors.parameters(), torch.empty(0))
        return torch.full((1, *self.input_shape), 0.5, device=weight.device, dtype=weight.dtype)

    def _check(self, images: Tensor, labels: Tensor) -> None:
        if labels.shape != (len(images),) or len(images) == 0:
            raise ValueError(f"{len(images)} images and labels of shape {tuple(labels.shape)}; give one for each image")
        if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= self.nb_classes:
            found = labels.unique()[:9].tolist()
            raise ValueError(f"labels are whole numbers from 0 to {self.nb_classes - 1}; found {found}")

    def extra_repr(self) -> str:
        return f"penalty={self.alphas}, frozen={self.frozen}"


class ContextualFusion(LateFusion):
    """The paper's pair: an object-centric and a scene-centric extractor, and whatever else there is.

    Args:
        foreground: object-centric extractor (the paper's was trained on ImageNet); its weights have the penalty.
        background: scene-centric extractor (the paper's: Places365).
        nb_classes, options: as of `LateFusion`.
        others: further modalities.
    """

    def __init__(
        self,
        foreground: nn.Module,
        background: nn.Module,
        nb_classes: int,
        *,
        others: Sequence[nn.Module] = (),
        **options: Any,
    ) -> None:
        super().__init__([foreground, background, *others], nb_classes, **options)


class PenalisedCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy plus a fusion's penalty; a `CrossEntropyLoss`, which is what ART looks for."""

    def __init__(self, fusion: LateFusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) + self.fusion.penalty()


def without_head(model: nn.Module, head: str = "fc") -> nn.Module:
    """A copy of a classification network that returns what its last layer reads: ``without_head(resnet18())`` → 512.

    Args:
        model: any module.
        head: name of the last layer ("fc" in torchvision's ResNets, "classifier" or "heads" in others); dots go down.

    Raises:
        ValueError: the model has no such part; the message lists those it has.
    """
    if not head or head not in dict(model.named_modules()):
        raise ValueError(f"head={head!r}: the model has the parts {[name for name, _ in model.named_children()]}")
    features = copy.deepcopy(model)
    features.set_submodule(head, nn.Identity())
    return features


def _alphas(penalty: float | Sequence[float], extractors: int) -> tuple[float, ...]:
    given = (penalty, *[0.0] * (extractors - 1)) if isinstance(penalty, (int, float)) else tuple(penalty)
    alphas = tuple(float(alpha) for alpha in given)
    if len(alphas) != extractors or not all(0 <= alpha < float("inf") for alpha in alphas):
        raise ValueError(
            f"penalty={penalty!r}: a number that is not negative for the foreground, or {extractors} of them, one for "
            "each extractor"
        )
    return alphas

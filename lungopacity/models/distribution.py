"""How far a film lies from the training films in the model's own feature space.

The measure is the Mahalanobis distance (Lee et al. 2018, arXiv:1807.03888) to a single mean for all
classes, over the features that the network's `describe` returns, with the covariance shrunk after
Ledoit & Wolf 2004. Alternatives were tried on lung-field films. A mean for each class gained
nothing. The input of the last layers alone was as good only for a well-trained network. The
relative distance (Ren et al. 2021) and nearest neighbours (Sun et al. 2022) were worse.

A film that lies on its side or upside down gets another decision than upright about as often as
not, and the distance alone misses some of these films. A linear discriminant (Fisher 1936, fitted
by ridge regression) therefore separates features of turned training films from upright ones.

Array names carry their shape: N films, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lungopacity.models.ensemble_settings import member_prefix

Product = Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Multiplies two matrices."""

_QUANTILE = 0.99
"""Of the validation films' distances: 1 film in 100 counts as unlike the training films."""


@dataclass(frozen=True)
class Turned:
    """Separates turned films from upright ones: (x - mean) @ direction + offset is 2 for the median
    turned film, and above 1 for at most 1 in 100 upright validation films."""

    direction_F: npt.NDArray[np.float32]
    offset: float


@dataclass(frozen=True)
class TrainingDistribution:
    """Where the training films lie, and how far out a film may lie and still be like them."""

    mean_F: npt.NDArray[np.float32]
    whitening_FF: npt.NDArray[np.float32]
    """Makes the covariance of the training films the identity: (x - mean) @ whitening."""
    threshold: float
    """The distance that 1 in 100 validation films exceeds."""
    turned: Turned | None = None
    """None where turned films were not available, or cannot be told from upright ones."""

    @staticmethod
    def of(
        train_NF: npt.NDArray[np.floating],
        validation_NF: npt.NDArray[np.floating],
        turned_NF: npt.NDArray[np.floating] | None = None,
    ) -> TrainingDistribution:
        """Fits the distribution to features of training films, and the threshold to features of
        validation films. `turned_NF`: features of turned copies of some training films."""
        features_NF = train_NF.astype(np.float64)
        mean_F, spread_F = features_NF.mean(axis=0), features_NF.std(axis=0)
        # A feature that never varied is not rescaled: a film in which it does vary lies far out.
        spread_F[spread_F <= 1e-6 * max(1.0, float(spread_F.max()))] = 1.0
        whitening_FF = _whitening((features_NF - mean_F) / spread_F) / spread_F[:, None]
        fitted = TrainingDistribution(
            mean_F.astype(np.float32), whitening_FF.astype(np.float32), threshold=1.0
        )
        threshold = float(np.quantile(fitted.score(validation_NF), _QUANTILE)) or 1.0
        fitted = replace(fitted, threshold=threshold)
        if turned_NF is None:
            return fitted
        turned = _turned(
            fitted._centred(train_NF),
            fitted._centred(validation_NF),
            fitted._centred(turned_NF),
            fitted.whitening_FF,
        )
        return replace(fitted, turned=turned)

    def _centred(self, features_NF: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return features_NF.astype(np.float32) - self.mean_F

    def score(
        self, features_NF: npt.NDArray[np.floating], product: Product = np.matmul
    ) -> npt.NDArray[np.float32]:
        """The distance divided by the threshold or, where it is higher, the score of a turned film,
        (n,) float32. A film above 1 is out of distribution. `product`: multiplies by the
        whitening matrix."""
        centred_NF = self._centred(features_NF)
        # In float64, because squares of a film that lies far out could overflow.
        whitened_NF = product(centred_NF, self.whitening_FF).astype(np.float64)
        distance_N = np.linalg.norm(whitened_NF, axis=1)
        out_N = distance_N / self.threshold
        if self.turned is not None:
            turned_N = centred_NF.astype(np.float64) @ self.turned.direction_F
            out_N = np.maximum(out_N, turned_N + self.turned.offset)
        limit = float(np.finfo(np.float32).max)
        score_N: npt.NDArray[np.float32] = np.minimum(out_N, limit).astype(np.float32)
        return score_N

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        import safetensors.numpy

        return safetensors.numpy.save(self._arrays())

    def _arrays(self) -> dict[str, npt.NDArray[np.floating]]:
        arrays: dict[str, npt.NDArray[np.floating]] = {
            "mean_F": self.mean_F,
            "whitening_FF": self.whitening_FF,
            "threshold": np.array([self.threshold], np.float64),
        }
        if self.turned is not None:
            arrays["turned_F"] = self.turned.direction_F
            arrays["turned_offset"] = np.array([self.turned.offset], np.float64)
        return arrays


@dataclass(frozen=True)
class JointDistribution:
    """An ensemble's distribution: those of its members, for their concatenated features."""

    parts: tuple[TrainingDistribution, ...]

    def score(
        self, features_NF: npt.NDArray[np.floating], product: Product = np.matmul
    ) -> npt.NDArray[np.float32]:
        """The root mean square of the members' scores, (n,) float32. Where the members disagree,
        the share of validation films above 1 is not 1 in 100 but usually less, because the root
        mean square is below the highest score."""
        ends = np.cumsum([len(part.mean_F) for part in self.parts])
        each = np.split(features_NF, ends[:-1], axis=1)
        scores = [
            part.score(own_NF, product) for part, own_NF in zip(self.parts, each, strict=True)
        ]
        squares_MN = np.square(np.stack(scores).astype(np.float64))
        score_N: npt.NDArray[np.float32] = np.sqrt(squares_MN.mean(axis=0)).astype(np.float32)
        return score_N

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        import safetensors.numpy

        return safetensors.numpy.save(
            {
                f"{member_prefix(number)}{name}": array
                for number, part in enumerate(self.parts)
                for name, array in part._arrays().items()
            }
        )


def distribution_of_bytes(data: bytes) -> TrainingDistribution | JointDistribution:
    """Reads the output of either `to_bytes`."""
    import safetensors.numpy

    arrays = safetensors.numpy.load(data)

    def part(prefix: str) -> TrainingDistribution:
        threshold = float(arrays[f"{prefix}threshold"][0])
        turned = None
        if f"{prefix}turned_F" in arrays:
            offset = float(arrays[f"{prefix}turned_offset"][0])
            turned = Turned(arrays[f"{prefix}turned_F"], offset)
        return TrainingDistribution(
            arrays[f"{prefix}mean_F"], arrays[f"{prefix}whitening_FF"], threshold, turned
        )

    if "mean_F" in arrays:
        return part("")
    members = sum(name.endswith("mean_F") for name in arrays)
    return JointDistribution(tuple(part(member_prefix(number)) for number in range(members)))


def _turned(
    train_NF: npt.NDArray[np.float32],
    validation_NF: npt.NDArray[np.float32],
    turned_NF: npt.NDArray[np.float32],
    whitening_FF: npt.NDArray[np.float32],
) -> Turned | None:
    """Fits the discriminant to centred features; None where it does not separate turned films from
    upright ones."""
    from sklearn.linear_model import RidgeClassifier

    x_NF = np.concatenate([train_NF, turned_NF]) @ whitening_FF
    is_turned_N = np.arange(len(x_NF)) >= len(train_NF)
    ridge = RidgeClassifier(alpha=len(x_NF), class_weight="balanced").fit(x_NF, is_turned_N)
    direction_F = (whitening_FF @ ridge.coef_.ravel()).astype(np.float32)
    turned_N = turned_NF @ direction_F
    # Where the two are well apart, the second is higher, and no upright film is flagged as turned.
    limit = max(
        float(np.quantile(validation_NF @ direction_F, _QUANTILE)),
        float(np.quantile(turned_N, 1 - _QUANTILE)),
    )
    scale = float(np.median(turned_N)) - limit
    if not scale > 0:
        return None
    return Turned(direction_F / np.float32(scale), 1 - limit / scale)


def _whitening(centred_NF: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The matrix, (F, F) float64, that turns the shrunk covariance of the rows into the
    identity."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    films, features = centred_NF.shape
    shrinkage = float(ledoit_wolf_shrinkage(centred_NF, assume_centered=True))
    floor = shrinkage * float(np.square(centred_NF).sum()) / (films * features)

    def gains(variances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values = (1 - shrinkage) * variances + floor
        # Avoids a division by 0 where the rows do not vary at all.
        values = np.maximum(values, max(1e-12, 1e-9 * float(values.max(initial=0.0))))
        gain: npt.NDArray[np.float64] = 1 / np.sqrt(values)
        return gain

    if films >= features:
        variances_F, directions_FF = np.linalg.eigh(centred_NF.T @ centred_NF / films)
        whitening_FF: npt.NDArray[np.float64] = directions_FF * gains(variances_F)
        return whitening_FF
    # Fewer films than features span few directions; in every other direction the variance is the
    # floor. For alexnet's 4,096 features this takes a second, where eigh takes half a minute.
    _, singular_N, directions_NF = np.linalg.svd(centred_NF, full_matrices=False)
    gains_N = gains(np.append(singular_N**2 / films, 0.0))
    spanned_FN = directions_NF.T * (gains_N[:-1] - gains_N[-1])
    whitening_FF = spanned_FN @ directions_NF
    whitening_FF[np.diag_indices(features)] += gains_N[-1]
    return whitening_FF

"""How far a film lies from those that a model was trained on, in the model's own feature space.

The Mahalanobis distance of features of all layers (Lee et al. 2018, arXiv:1807.03888), to one mean
for all classes, with the covariance shrunk after Ledoit & Wolf 2004. Tried beside it on lung-field
films: a mean for each class, without a gain; features in front of the last layers alone, as good
for a well-trained network only. The relative distance (Ren et al. 2021) and nearest neighbours (Sun
et al. 2022) were worse.

Array names carry their shape: N films, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lungopacity.models.ensemble_settings import member_prefix

_QUANTILE = 0.99
"""Of the validation films: 1 in 100 of them is called unlike the rest."""


@dataclass(frozen=True)
class TrainingDistribution:
    """Where the training films lie, and how far out a film may lie to be one of them."""

    mean_F: npt.NDArray[np.float32]
    whitening_FF: npt.NDArray[np.float32]
    """Makes the covariance of the training films the identity: (x - mean) @ whitening."""
    threshold: float
    """The distance that 1 in 100 validation films exceeds."""

    @staticmethod
    def of(
        train_NF: npt.NDArray[np.floating], validation_NF: npt.NDArray[np.floating]
    ) -> TrainingDistribution:
        """Fit to the features of training films; the threshold to those of others, unseen."""
        features_NF = train_NF.astype(np.float64)
        mean_F, spread_F = features_NF.mean(axis=0), features_NF.std(axis=0)
        # A feature that never fired keeps its own unit: if it fires one day, that is far out.
        spread_F[spread_F <= 1e-6 * max(1.0, float(spread_F.max()))] = 1.0
        whitening_FF = _whitening((features_NF - mean_F) / spread_F) / spread_F[:, None]
        fitted = TrainingDistribution(
            mean_F.astype(np.float32), whitening_FF.astype(np.float32), threshold=1.0
        )
        threshold = float(np.quantile(fitted.score(validation_NF), _QUANTILE)) or 1.0
        return TrainingDistribution(fitted.mean_F, fitted.whitening_FF, threshold)

    def score(self, features_NF: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Distance over the threshold, (n,) float32: above 1 a film is out of distribution."""
        centred_NF = features_NF.astype(np.float32) - self.mean_F
        # Summed in float64: a film may lie so far out that squares overflow.
        distance_N = np.linalg.norm((centred_NF @ self.whitening_FF).astype(np.float64), axis=1)
        limit = float(np.finfo(np.float32).max)
        score_N: npt.NDArray[np.float32] = np.minimum(distance_N / self.threshold, limit).astype(
            np.float32
        )
        return score_N

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        import safetensors.numpy

        return safetensors.numpy.save(self._arrays())

    def _arrays(self) -> dict[str, npt.NDArray[np.floating]]:
        return {
            "mean_F": self.mean_F,
            "whitening_FF": self.whitening_FF,
            "threshold": np.array([self.threshold], np.float64),
        }


@dataclass(frozen=True)
class JointDistribution:
    """Of an ensemble: the members' own, for their features in a row."""

    parts: tuple[TrainingDistribution, ...]

    def score(self, features_NF: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """The root mean square of the members' scores, (n,) float32. Unless they agree, another
        share of films than 1 in 100 is above 1: as a rule fewer, for the highest is above it."""
        ends = np.cumsum([len(part.mean_F) for part in self.parts])
        each = np.split(features_NF, ends[:-1], axis=1)
        scores = [part.score(own_NF) for part, own_NF in zip(self.parts, each, strict=True)]
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
    """What either `to_bytes` gave."""
    import safetensors.numpy

    arrays = safetensors.numpy.load(data)

    def part(prefix: str) -> TrainingDistribution:
        threshold = float(arrays[f"{prefix}threshold"][0])
        return TrainingDistribution(
            arrays[f"{prefix}mean_F"], arrays[f"{prefix}whitening_FF"], threshold
        )

    if "mean_F" in arrays:
        return part("")
    members = len(arrays) // 3
    return JointDistribution(tuple(part(member_prefix(number)) for number in range(members)))


def _whitening(centred_NF: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The matrix that makes the shrunk covariance of the rows the identity, (F, F) float64."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    films, features = centred_NF.shape
    shrinkage = float(ledoit_wolf_shrinkage(centred_NF, assume_centered=True))
    floor = shrinkage * float(np.square(centred_NF).sum()) / (films * features)

    def gains(variances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values = (1 - shrinkage) * variances + floor
        # Without any spread at all there is nothing to divide by.
        values = np.maximum(values, max(1e-12, 1e-9 * float(values.max(initial=0.0))))
        gain: npt.NDArray[np.float64] = 1 / np.sqrt(values)
        return gain

    if films >= features:
        variances_F, directions_FF = np.linalg.eigh(centred_NF.T @ centred_NF / films)
        whitening_FF: npt.NDArray[np.float64] = directions_FF * gains(variances_F)
        return whitening_FF
    # Fewer films than features span few directions; in all others there is the floor alone. Of
    # alexnet's 4,096 features this takes a second, and the other way half a minute.
    _, singular_N, directions_NF = np.linalg.svd(centred_NF, full_matrices=False)
    gains_N = gains(np.append(singular_N**2 / films, 0.0))
    spanned_FN = directions_NF.T * (gains_N[:-1] - gains_N[-1])
    whitening_FF = spanned_FN @ directions_NF
    whitening_FF[np.diag_indices(features)] += gains_N[-1]
    return whitening_FF

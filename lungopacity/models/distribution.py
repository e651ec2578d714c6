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
        from sklearn.covariance import LedoitWolf

        features_NF = train_NF.astype(np.float64)
        mean_F, spread_F = features_NF.mean(axis=0), features_NF.std(axis=0)
        # A feature that never fired keeps its own unit: if it fires one day, that is far out.
        spread_F[spread_F <= 1e-6 * max(1.0, float(spread_F.max()))] = 1.0
        covariance_FF = LedoitWolf(assume_centered=True).fit((features_NF - mean_F) / spread_F)
        values_F, vectors_FF = np.linalg.eigh(covariance_FF.covariance_)
        # Without any spread at all there is nothing to divide by.
        values_F = np.maximum(values_F, max(1e-12, 1e-9 * float(values_F.max())))
        whitening_FF = vectors_FF / np.sqrt(values_F) / spread_F[:, None]
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

        return safetensors.numpy.save(
            {
                "mean_F": self.mean_F,
                "whitening_FF": self.whitening_FF,
                "threshold": np.array([self.threshold], np.float64),
            }
        )

    @staticmethod
    def from_bytes(data: bytes) -> TrainingDistribution:
        """What `to_bytes` gave."""
        import safetensors.numpy

        arrays = safetensors.numpy.load(data)
        return TrainingDistribution(
            arrays["mean_F"], arrays["whitening_FF"], float(arrays["threshold"][0])
        )

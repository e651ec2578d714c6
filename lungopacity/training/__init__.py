"""Labelled pixels to a model folder: the Ray Train loop, augmentation, calibration."""

from lungopacity.training.settings import AugmentationSettings, TrainingSettings

__all__ = ["AugmentationSettings", "TrainingSettings"]

"""Distributed batch screening of chest radiographs for lung opacity. Research use only.

The commands that train, evaluate, screen and query are also functions: they return results and
print nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lungopacity.errors import UserError
    from lungopacity.evaluation.audit import audit
    from lungopacity.evaluation.compare import compare
    from lungopacity.evaluation.evaluate import evaluate
    from lungopacity.evaluation.explain import explain
    from lungopacity.evaluation.explanation import ExplanationResult
    from lungopacity.evaluation.report import EvaluationResult
    from lungopacity.evaluation.threshold import threshold
    from lungopacity.results.query import query, runs
    from lungopacity.screening.clean import Swept, clean
    from lungopacity.screening.finish import ScreeningResult
    from lungopacity.screening.nightly import Night, nightly
    from lungopacity.screening.retry import retry
    from lungopacity.screening.screen import screen
    from lungopacity.training.compile import compile
    from lungopacity.training.ensemble import ensemble
    from lungopacity.training.fit import TrainingResult
    from lungopacity.training.train import train
    from lungopacity.training.tune import TuneResult, tune

__all__ = [
    "EvaluationResult",
    "ExplanationResult",
    "Night",
    "ScreeningResult",
    "Swept",
    "TrainingResult",
    "TuneResult",
    "UserError",
    "audit",
    "clean",
    "compare",
    "compile",
    "ensemble",
    "evaluate",
    "explain",
    "nightly",
    "query",
    "retry",
    "runs",
    "screen",
    "threshold",
    "train",
    "tune",
]

# Imported on first use: `lungopacity --help` must not wait for torch and ray.
_HOME = {
    "EvaluationResult": "evaluation.report",
    "ExplanationResult": "evaluation.explanation",
    "Night": "screening.nightly",
    "ScreeningResult": "screening.finish",
    "Swept": "screening.clean",
    "TrainingResult": "training.fit",
    "TuneResult": "training.tune",
    "UserError": "errors",
    "audit": "evaluation.audit",
    "clean": "screening.clean",
    "compare": "evaluation.compare",
    "compile": "training.compile",
    "ensemble": "training.ensemble",
    "evaluate": "evaluation.evaluate",
    "explain": "evaluation.explain",
    "nightly": "screening.nightly",
    "query": "results.query",
    "retry": "screening.retry",
    "runs": "results.query",
    "screen": "screening.screen",
    "threshold": "evaluation.threshold",
    "train": "training.train",
    "tune": "training.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lungopacity' has no attribute {name!r}")
    return getattr(import_module(f"lungopacity.{_HOME[name]}"), name)

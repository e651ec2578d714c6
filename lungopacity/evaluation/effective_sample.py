"""The interval of a proportion of films, if several films may be of one patient.

Films of one patient resemble each other, so n films tell only as much as n / d independent ones.
The design effect d (Kish 1965, Survey Sampling, p. 258) is how many times the variance of the
proportion over patients is that of as many independent films. The interval is Wilson's (`metrics`)
of n / d films: the effective sample of Korn & Graubard 1998, Survey Methodology 24:193, with the
interval that Franco, Little, Louis & Slud 2019, Journal of Survey Statistics and Methodology 7:334,
recommend for clustered samples.

The variance over patients is that of a ratio, because it is chance, too, how many films each has.
From few mistakes it is estimated too low (Franco et al.), and from none not at all. So the part of
Wilson's variance that does not depend on what was seen, z² / 4, is taken to be of films that are
copies of the others of their patient. Of many mistakes it is a small part; without any, n / d is
the effective size of a sample of copies, at most the number of patients. As a mistake tells that
the films of its patient differ, a sample with one can have a bound slightly nearer to 1 than a
sample without any.

Simulated with 10 to 300 films, 1 to 5 a patient that go together by 0 to 0.8, and proportions of
0.5 to 0.995 (2026-11-28, 572 cases): it held the truth in 96 of 100 samples, in 97 of 100 cases in
93 or more. The percentile bootstrap over patients held it in 96, too, but in fewer than 93 in 27 of
100 cases, and in nearly all samples in others, for it is shifted towards 1.

Array names carry their shape: N films, P patients.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lungopacity.evaluation.metrics import Z_95, wilson_interval

_ROUNDING = 1e-12
"""Rounding error of a sum of squares."""


def clustered_interval(
    hit_N: npt.NDArray[np.bool_], patient_N: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """The 95 % interval of the share of films that are hits, of at least one film. patient_N: a
    number for each film's patient."""
    films, hits = len(hit_N), int(hit_N.sum())
    effect = design_effect(np.subtract(hit_N, hits / films), patient_N, Z_95**2 / 4)
    return wilson_interval(hits / effect, films / effect)


def design_effect(
    apart_N: npt.NDArray[np.float64], patient_N: npt.NDArray[np.int64], unseen: float = 0.0
) -> float:
    """How many times the variance of a mean over patients is that of as many independent films; at
    least 1. If nothing tells, it is that of copies: as if all films of a patient were the same.

    apart_N: how far each film's value lies from the mean; at least one film. unseen: a sum of
    squares, added to that of `apart_N`, whose films count as copies.
    """
    films_P = np.bincount(patient_N)
    films, patients = len(apart_N), int(np.count_nonzero(films_P))
    if patients == films:
        return 1.0
    of_copies = float(films_P @ films_P) / films
    spread = float(apart_N @ apart_N) + unseen
    if patients == 1 or spread < _ROUNDING:
        return of_copies
    of_patient_P = np.bincount(patient_N, apart_N)
    between = patients / (patients - 1) * float(of_patient_P @ of_patient_P)
    return max(1.0, (between + unseen * of_copies) / spread)

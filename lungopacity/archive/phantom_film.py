"""The physics of a synthetic chest film: analytic solids, Beer-Lambert, scatter, quantum noise.

Every solid is a map of path lengths in cm along the beam. The line integral of attenuation is the
sum of coefficient times path (Beer 1852; Bushberg et al., The Essential Physics of Medical Imaging,
3rd ed., ch. 3). The detector's logarithm turns intensity back into attenuation, so bone is bright.

Axes: x grows towards the right edge of the film (the patient's left), y downwards, both in cm from
the middle of the film. Arrays are (size, size) float32 unless stated otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from lungopacity.archive.phantom_opacity import (
    Array,
    Box,
    LungField,
    OpacityKind,
    add_opacities,
    smooth_noise,
    soft_step,
)

View = Literal["PA", "AP"]
Sex = Literal["F", "M"]

WHITE = 4095
"""Largest value of a film's pixels: 12 bits."""

# Linear attenuation coefficients in 1/cm near 60 keV, the mean energy of a 120 kV chest beam
# (Hubbell & Seltzer, NISTIR 5632: soft tissue 0.206 cm²/g at 1.06 g/cm³; lung at 0.26 g/cm³).
# Bone is the excess of a mix of cortex and marrow over the soft tissue that it replaces.
MU_SOFT = 0.21
MU_LUNG = 0.055
MU_BONE_EXCESS = 0.24


@dataclass(frozen=True)
class Body:
    """The build of a patient, which all of the patient's films share. Lengths in cm."""

    sex: Sex
    scale: float
    """Scale of the thorax; 1 is a middle-sized adult."""
    half_depth: float
    """Half the thickness of the chest, front to back."""
    heart: float
    """Scale of the heart's width; 1 gives a cardiothoracic ratio near 0.46."""
    rib_spacing: float
    rib_phase: float
    """Position of the first rib, in spacings."""
    bone: float
    """Bone mineral relative to a young adult's."""
    aorta: float
    """Radius of the aortic arch."""
    markings: float
    """Strength of the lung vessels."""
    breast: float
    """Thickest path through a breast; 0 if none is visible."""


@dataclass(frozen=True)
class Film:
    """One rendered film."""

    pixels: npt.NDArray[np.uint16]
    """(size, size), 0 … 4095, MONOCHROME2: much attenuation is bright."""
    attenuation: Array = field(repr=False)
    """(size, size), the true line integrals (no unit), before scatter, blur and noise."""
    kind: OpacityKind | None
    """None on a normal film."""
    boxes: tuple[Box, ...]
    """One per opacity; empty on a normal film."""
    pixel_spacing_mm: float


def draw_body(rng: np.random.Generator, sex: Sex, age_years: int) -> Body:
    """A random build around the usual values for sex and age."""
    male = sex == "M"
    return Body(
        sex=sex,
        scale=float(rng.normal(1.0 if male else 0.92, 0.045)),
        half_depth=float(np.clip(rng.normal(11.0 if male else 10.2, 1.2), 8.0, 14.5)),
        heart=float(np.clip(rng.normal(1.0 + 0.0012 * (age_years - 50), 0.08), 0.8, 1.3)),
        rib_spacing=float(rng.uniform(2.15, 2.6)),
        rib_phase=float(rng.uniform(0, 1)),
        bone=float(np.clip(rng.normal(1.12 - 0.004 * max(0, age_years - 40), 0.1), 0.7, 1.4)),
        aorta=float(rng.uniform(1.3, 1.7) + 0.008 * max(0, age_years - 40)),
        markings=float(rng.uniform(0.6, 1.4)),
        breast=0.0 if male else float(rng.uniform(0.5, 4.0)),
    )


def draw_film(
    rng: np.random.Generator,
    body: Body,
    view: View,
    kind: OpacityKind | None = None,
    image_size: int = 256,
) -> Film:
    """Pose `body`, add opacities of `kind`, and expose the film.

    Pose, opacities and noise have their own random streams, so one seed gives the same pose with
    and without an opacity. Raises `ValueError` for an `image_size` below 64.
    """
    if image_size < 64:
        raise ValueError(f"image_size must be at least 64, not {image_size}")
    pose_rng, opacity_rng, exposure_rng = rng.spawn(3)
    thorax = _Thorax(pose_rng, body, view, image_size)
    attenuation = thorax.attenuation()
    boxes: tuple[Box, ...] = ()
    if kind is not None:
        fluid, boxes = add_opacities(opacity_rng, kind, thorax.lung_fields())
        attenuation += (MU_SOFT - MU_LUNG) * fluid
    return Film(
        pixels=_expose(exposure_rng, attenuation, view),
        attenuation=attenuation,
        kind=kind,
        boxes=boxes,
        pixel_spacing_mm=10 * thorax.pixel_cm,
    )


def _chord(r2: Array, full: float) -> Array:
    """Path in cm through an ellipsoid of thickness `full` cm; r2: the squared relative radius."""
    return np.asarray(full * np.sqrt(np.maximum(1 - r2, 0)))


class _Thorax:
    """One patient in front of the detector: pixel coordinates, and the maps of path lengths."""

    def __init__(self, rng: np.random.Generator, body: Body, view: View, size: int) -> None:
        self.rng, self.body, self.view, self.size = rng, body, view, size
        supine = view == "AP"
        # A bedside film is taken from a shorter distance, with less air in the lungs.
        magnification = float(rng.uniform(1.04, 1.14)) if supine else 1.0
        field_cm = float(rng.uniform(32, 36.5))
        self.pixel_cm = field_cm / size
        self.zoom = body.scale * magnification
        self.heart_scale = body.heart * (float(rng.uniform(1.08, 1.3)) if supine else 1.0)
        self.dome_y = float(rng.normal(8.0 if supine else 9.3, 0.8))
        self.x, self.y = self._coordinates(field_cm, 4.0 if supine else 2.5)
        solid = self._heart() + self._great_vessels()
        self.lungs = [air - np.minimum(air, solid) for air in (self._lung(-1), self._lung(1))]
        """Paths in cm through air-filled lung, right lung first, without heart and vessels."""

    def _coordinates(self, field_cm: float, tilt_deg: float) -> tuple[Array, Array]:
        """x and y of every pixel in anatomical cm, in a thorax of scale 1."""
        rng = self.rng
        ticks = ((np.arange(self.size) + 0.5) / self.size - 0.5).astype(np.float32) * field_cm
        x = ticks[None, :] + np.float32(rng.normal(0, 0.7))
        y = ticks[:, None] + np.float32(rng.normal(0, 0.8))
        angle = np.deg2rad(np.clip(rng.normal(0, tilt_deg / 2), -tilt_deg, tilt_deg))
        cos, sin = np.float32(np.cos(angle) / self.zoom), np.float32(np.sin(angle) / self.zoom)
        return x * cos + y * sin, y * cos - x * sin

    def _lung(self, side: int) -> Array:
        """Air-filled path of one lung; side -1 is the film's left, the patient's right."""
        x, y, rng = side * self.x, self.y, self.rng
        # The apex leans to the middle, and the left dome is about 1 cm lower than the right.
        middle = 7.0 + 0.07 * np.minimum(y, 6) + np.float32(rng.normal(0, 0.2))
        width = 5.7 + np.float32(rng.normal(0, 0.25))
        u = (x - middle) / width
        v = (y - 3.0) / np.where(y < 3, 14.6, 15.0).astype(np.float32)
        path = _chord(np.abs(u) ** 2.6 + np.abs(v) ** 2.4, 1.5 * self.body.half_depth)
        lower = self.dome_y + (0.9 if side > 0 else 0.0)
        dome = lower + np.float32(rng.uniform(0.07, 0.11)) * (x - 6.0) ** 2
        # There is lung behind the dome, too: its shadow ends over a few millimetres, then fades.
        return path * (0.92 * soft_step(dome - y, 0.16) + 0.08 * soft_step(dome + 2.0 - y, 0.9))

    def lung_fields(self) -> list[LungField]:
        """The lungs, as `add_opacities` takes them."""
        return [
            LungField(x=self.x, y=self.y, air=air, side=side, base_y=self.dome_y)
            for air, side in zip(self.lungs, (-1, 1), strict=True)
        ]

    def attenuation(self) -> Array:
        """Line integrals of the healthy thorax."""
        body = self.body
        air = self.lungs[0] + self.lungs[1]
        soft = self._torso() - air
        soft += air * 0.06 * body.markings * self._markings()
        soft += self._breasts() - self._trachea()
        total = MU_SOFT * np.maximum(soft, 0) + MU_LUNG * air
        total += MU_BONE_EXCESS * body.bone * (self._ribs() + self._spine() + self._shoulders())
        clutter = smooth_noise(self.rng, self.size, 6) + 0.5 * smooth_noise(self.rng, self.size, 24)
        total *= 1 + 0.012 * clutter
        return np.ascontiguousarray(total, dtype=np.float32)

    def _torso(self) -> Array:
        x, y = self.x, self.y
        neck = soft_step(-15.0 - y, 0.8)
        half_width = (15.2 - 9.3 * neck) + 5.5 * soft_step(-8.5 - y, 1.3) * (1 - neck)
        half_depth = self.body.half_depth * (1 - 0.4 * neck - 0.12 * soft_step(-9.0 - y, 2.0))
        return np.asarray(2 * half_depth * np.sqrt(np.maximum(1 - np.abs(x / half_width) ** 3, 0)))

    def _heart(self) -> Array:
        scale = self.heart_scale
        x, y = self.x - 1.6 * scale, self.y - (self.dome_y - 3.6)
        along, across = 0.82 * x + 0.57 * y, 0.82 * y - 0.57 * x
        left = _chord((along / (6.4 * scale)) ** 2 + (across / (4.7 * scale)) ** 2, 11.0)
        right = _chord(((self.x + 1.0) / (3.0 * scale)) ** 2 + ((y + 0.3) / 4.6) ** 2, 9.0)
        return np.maximum(left, right)

    def _great_vessels(self) -> Array:
        x, y, radius = self.x, self.y, self.body.aorta
        arch = _chord(((x - 2.2) / radius) ** 2 + ((y + 5.0) / (radius * 1.05)) ** 2, 6.0)
        stalk = _chord((x / 2.7) ** 2, 7.0) * soft_step(y + 11.0, 1.0) * soft_step(6.0 - y, 1.0)
        hila = np.zeros_like(arch)
        for side, level in ((-1, -0.6), (1, -1.4)):
            offset = 3.9 + float(self.rng.normal(0, 0.25))
            r2 = ((side * x - offset) / 1.5) ** 2 + ((y - level) / 2.3) ** 2
            hila += float(self.rng.uniform(1.2, 3.2)) * np.exp(-1.6 * r2)
        return np.asarray(np.maximum(np.maximum(arch, stalk), hila))

    def _trachea(self) -> Array:
        width = 0.85 + 0.15 * (self.body.sex == "M")
        bend = self.x + 0.25 * soft_step(self.y + 7.0, 1.0)
        return _chord((bend / width) ** 2, 2.0 * width) * soft_step(-3.5 - self.y, 0.6)

    def _breasts(self) -> Array:
        if self.body.breast == 0:
            return np.zeros_like(self.x)
        x, y = np.abs(self.x) - 8.0, self.y - 5.0
        # They hang: the lower edge is sharp, the upper one fades.
        stretch = np.where(y > 0, 4.2, 8.5).astype(np.float32)
        return _chord((x / 6.2) ** 2 + (y / stretch) ** 2, self.body.breast)

    def _markings(self) -> Array:
        """Lung vessels, 0 … about 1: thin ridges that run outwards from each hilum and fade."""
        rng = self.rng
        x, y = np.abs(self.x) - 3.2, self.y + 0.5
        radius = np.sqrt(x * x + y * y) + 0.3
        angle = np.arctan2(y, x) + np.where(self.x > 0, 9.0, 0.0).astype(np.float32)
        waves = np.zeros_like(x)
        for order in (5, 9, 14, 23):
            bend, phase = rng.normal(0, 0.35), rng.uniform(0, 2 * np.pi)
            waves += np.sin(
                np.float32(order) * angle + np.float32(bend) * radius + np.float32(phase)
            )
        # At the hilum itself the ridges would meet in a star.
        ridges = np.exp(-((waves / 0.45) ** 2)) * soft_step(radius - 1.8, 0.35)
        return ridges * np.exp(-radius / 4.5) * 2.2 + 0.25 * smooth_noise(rng, self.size, 40)

    def _ribs(self) -> Array:
        """Back ribs slope down from the spine; front ribs are fainter, and slope down towards the
        middle."""
        body = self.body
        # The cage is an egg around the lungs, narrow at the top.
        cage = 13.9 * np.sqrt(np.maximum(1 - ((self.y - 4.5) / 18.5) ** 2, 0.25))
        t = np.abs(self.x) / cage
        inside = soft_step(1 - t, 0.008)
        # At the sides the beam runs along the rib instead of across it.
        lengthened = np.minimum(1 / np.sqrt(np.maximum(1 - t * t, 0.12)), 2.4)
        back = self.y - (3.4 * t**2 - 2.4 * t) * (1 + 0.02 * self.y)
        front = self.y - (2.0 - 6.5 * t + 4.0 * t**2 + 1.2)
        paths = (
            0.62 * self._tubes(back, body.rib_phase, 0.46, -13.5, 10.0) * soft_step(t - 0.1, 0.02)
        )
        # Front ribs end in cartilage, which hardly attenuates the beam.
        paths += (
            0.45
            * self._tubes(front, body.rib_phase + 0.4, 0.52, -9.5, 9.0)
            * soft_step(t - 0.36, 0.03)
        )
        return paths * lengthened * inside

    def _tubes(self, y: Array, phase: float, radius: float, top: float, bottom: float) -> Array:
        """Equally spaced hollow tubes along y. Only the tube nearest to each pixel is computed."""
        spacing = self.body.rib_spacing
        turns = y / spacing + np.float32(phase)
        r2 = ((turns - np.rint(turns)) * spacing / radius) ** 2
        hollow = _chord(r2, 2.0) - 0.75 * _chord(r2 / 0.5, 1.4)
        return hollow * soft_step(y - top, 0.3) * soft_step(bottom - y, 0.5)

    def _spine(self) -> Array:
        x, y = self.x, self.y
        width = 1.7 + 0.035 * (y + 10)
        discs = 0.78 + 0.22 * np.tanh(3 * np.cos(2 * np.pi * (y / 2.7 + self.body.rib_phase)) + 1.5)
        bodies = _chord((np.abs(x / width)) ** 4, 2.6) * discs
        processes = _chord((x / 0.35) ** 2, 0.9) * (discs < 0.9)
        return np.asarray(bodies + processes)

    def _shoulders(self) -> Array:
        """Clavicles, shoulder blades and the heads of the arms."""
        x, y, rng = np.abs(self.x), self.y, self.rng
        lift = float(rng.normal(0, 0.5)) - (1.0 if self.view == "AP" else 0.0)
        t = (x - 1.6) / 13.0
        middle = -9.0 + lift - 3.2 * t + 0.7 * np.sin(2 * np.pi * t)
        ends = soft_step(x - 1.7, 0.15) * soft_step(14.6 - x, 0.2)
        r2 = ((y - middle) / (0.62 + 0.15 * np.abs(t - 0.3))) ** 2
        clavicles = (1.1 * _chord(r2, 1.2) - 0.4 * _chord(r2 / 0.4, 0.8)) * ends
        # Rolled shoulders of a standing patient (PA) move the blades off the lungs; lying does not.
        edge = (11.3 if self.view == "AP" else 13.4) + float(rng.normal(0, 0.4))
        u, v = (x - edge - 2.4 + 0.12 * (y + 5)) / 2.6, (y + 5.5) / 6.2
        blade = 0.5 * soft_step(1 - u * u - v * v, 0.08)
        rim = 0.55 * np.exp(-(((u * u + v * v - 0.95) / 0.1) ** 2))
        heads = _chord(((x - 17.2) / 2.4) ** 2 + ((y + 10.5) / 2.6) ** 2, 3.4)
        return np.asarray(clavicles + blade + rim + heads)


def _expose(rng: np.random.Generator, attenuation: Array, view: View) -> npt.NDArray[np.uint16]:
    """From line integrals to the 12-bit film: scatter, blur, quantum noise, logarithm, window."""
    primary = np.exp(-attenuation)
    # Scatter is a blurred copy of the primary: about half of it behind a grid, more at the bedside
    # without one (Bushberg, ch. 7.12). It only costs contrast, so its shape matters little.
    ratio = float(rng.uniform(0.7, 1.2)) if view == "AP" else float(rng.uniform(0.35, 0.7))
    # The cap: nothing scatters the open beam beside the patient.
    signal = primary + ratio * _blurred(np.minimum(primary, 0.15), 0.06)
    signal = _spread(signal, float(rng.uniform(0.05, 0.2)))
    quanta = float(np.exp(rng.uniform(np.log(1.0e4), np.log(6.0e4))))
    # From 100 quanta per pixel, Poisson counts are Gaussian to within a per cent.
    noise = rng.standard_normal(signal.shape, dtype=np.float32)
    counts = signal * quanta + np.sqrt(signal * quanta) * noise
    measured = -np.log(np.maximum(counts, 1.0) / quanta)
    # Automatic windowing as at the console, by the middle of the field, which has no open beam,
    # with the variation between operators and makers.
    edge = signal.shape[0] // 5
    low, high = np.percentile(measured[edge:-edge:2, edge:-edge:2], [1.5, 98])
    width = high - low
    low -= float(rng.uniform(0.02, 0.15)) * width
    high += float(rng.uniform(-0.06, 0.06)) * width
    grey = np.clip((measured - low) / (high - low), 0, 1) ** float(rng.uniform(0.9, 1.15))
    film: npt.NDArray[np.uint16] = np.rint(grey * WHITE).astype(np.uint16)
    return film


def _blurred(values: Array, spread: float) -> Array:
    """Gaussian blur whose standard deviation is `spread` times the image's side."""
    from PIL import Image

    size, cells = values.shape[0], 48
    small = np.asarray(Image.fromarray(values).resize((cells, cells), Image.Resampling.BOX))
    ticks = np.arange(cells, dtype=np.float32) / cells
    weights = np.exp(-(((ticks[:, None] - ticks) / spread) ** 2) / 2)
    weights /= weights.sum(axis=1, keepdims=True)
    blurred = Image.fromarray(weights @ small @ weights.T)
    return np.asarray(blurred.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)


def _spread(values: Array, share: float) -> Array:
    """The detector's spread: each pixel gives `share` of its signal to its four neighbours."""
    padded = np.pad(values, 1, mode="edge")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return np.asarray((1 - share) * values + (share / 4) * around)

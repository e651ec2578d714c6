"""The model card in Markdown: what a model is, what it was trained on, and how it measured.

The sections follow Mitchell et al. 2019 (Model Cards for Model Reporting, arXiv:1810.03993).
Brackets hold the items of CLAIM that a line answers, see `claim`. Each of the 42 items is answered
once or listed as open: either only people can answer it, or the model folder does not record it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lungopacity.errors import NOTICE
from lungopacity.evaluation.card_tables import line, of_unknown, results, subgroups
from lungopacity.evaluation.claim import left_open
from lungopacity.evaluation.metrics import Metric, age_band
from lungopacity.evaluation.table import Gap, knows
from lungopacity.models import ENSEMBLE, ModelSpec
from lungopacity.words import printable

_MOST_LABELS = 10
"""The most labels that the card lists by name."""


def model_card(
    spec: ModelSpec,
    model_id: str,
    metrics: Sequence[Metric],
    *,
    split: str,
    flags_unlike: bool,
    unreadable: int,
    rejected: Mapping[str, int],
    unknown_patients: int,
    intervals: str,
    gaps: Sequence[Gap],
    known_to_model: int,
    picked_on: Mapping[str, int],
) -> str:
    """The card of a model that was evaluated on `split`.

    metrics, gaps, unreadable, unknown_patients, intervals, known_to_model, picked_on: as in
    `EvaluationResult`. flags_unlike: whether the model flags films unlike its training films;
    models of older folders do not. rejected: number of rejected films by error code.
    """
    card = "\n".join(
        _plain(words)
        for words in [
            f"# Model card: {spec.architecture} {model_id}",
            "",
            f"**{NOTICE}**" + (" **Trained on synthetic films.**" if spec.synthetic else ""),
            "",
            "## What it is",
            *_model(spec),
            "",
            "## Intended use and limits",
            *_use(spec, metrics, flags_unlike),
            "",
            "## Data",
            *_data(spec),
            "",
            f"## Results on the split '{split}'",
            *([f"**Note: {knows(known_to_model)}.**", ""] if known_to_model else []),
            *results(spec, metrics, unreadable, rejected, unknown_patients, intervals, picked_on),
            "",
            "## Subgroups",
            *subgroups(spec, metrics, gaps),
            "",
            "## Open items of CLAIM",
            "Whoever publishes results of this model has to report these, by the numbers of CLAIM:",
            "",
        ]
    )
    items = [f"- {number}: {words}" for number, words in left_open(card).items()]
    return "\n".join([card, *items, ""])


def _plain(words: str) -> str:
    """One line of Markdown. The values of columns and labels must neither end it nor be HTML."""
    return printable(words).replace("<", "&lt;")


def _model(spec: ModelSpec) -> Iterator[str]:
    training = spec.training
    yield "- Kind of technology [1]: a neural network trained on labelled films"
    if spec.architecture == ENSEMBLE:
        yield "- Network [22]: an ensemble"
        yield from _members(spec)
    else:
        settings = _words(spec.architecture_settings)
        yield f"- Network [22, 27]: a single {spec.architecture}, settings {settings}"
    pixels = spec.preprocessing
    size = pixels.image_size
    cut = "black borders cut away, " if pixels.crop_borders else ""
    scaled = f"(value / 255 - {pixels.mean:g}) / {pixels.std:g}"
    if spec.architecture == ENSEMBLE:
        scaled = "each member then resizes and scales it as its line says"
    yield (
        f"- Input [9]: one grey channel, {size} x {size} pixels, {cut}the aspect ratio kept and "
        f"padded black; {scaled}"
    )
    names = ", ".join(spec.class_names)
    yield f"- Classes [11]: {names}; decisions are about {spec.positive_class}"
    merged = {label: name for label, name in spec.label_map.items() if label != name}
    if merged:
        listed = ", ".join(f"{label} as {name}" for label, name in merged.items())
        yield f"- Labels were merged or renamed: {listed}"
    versions = training.get("versions", {})
    if versions:
        yield f"- Software [23]: {_words(versions)}"
    if training.get("on_cpus"):
        yield f"- {training['on_cpus']}"
    weights = _initial_weights(training)
    if weights:
        yield f"- Initial weights [24]: {weights}"
    duration = _duration(training)
    if duration:
        yield f"- Training [25]: {duration}; every setting is in model.json"
        yield (f"- Kept [26]: epoch {training['best_epoch']}, which had the lowest validation loss")
    biases = ""
    if spec.class_biases is not None:
        each = zip(spec.class_names, spec.class_biases, strict=True)
        biases = ", plus biases of " + ", ".join(f"{bias:+.3f} for {name}" for name, bias in each)
    yield (
        f"- Calibration: logits divided by a temperature of {spec.temperature:.3f}{biases}; fitted "
        "to the validation split" + (" and its class shares" if biases else "")
    )


def _members(spec: ModelSpec) -> Iterator[str]:
    members = spec.architecture_settings["members"]
    trainings = spec.training.get("members") or [{}] * len(members)
    items = ["24"] if all(map(_initial_weights, trainings)) else []
    items += ["25", "26"] if all(map(_duration, trainings)) else []
    yield (
        f"- Members [{', '.join([*items, '27'])}]: the ensemble takes the mean of their calibrated "
        "logits; each member is the epoch with its lowest validation loss; every setting is in "
        "model.json"
    )
    for member, training in zip(members, trainings, strict=True):
        parts = [
            f"  - {member['architecture']} {member['model_id']}, {member['image_size']} px, "
            f"(value / 255 - {member['mean']:g}) / {member['std']:g}"
        ]
        weights, duration = _initial_weights(training), _duration(training)
        parts += [f"initial weights: {weights}"] if weights else []
        parts += [f"{duration}, epoch {training['best_epoch']} kept"] if duration else []
        yield "; ".join(parts)


def _duration(training: Mapping[str, Any]) -> str | None:
    """Epochs, batch size and seed; None if they were not recorded."""
    settings = training.get("settings", {})
    if "epochs" not in settings:
        return None
    epochs = settings["epochs"]
    return (
        f"{epochs} epoch{'' if epochs == 1 else 's'}, batches of {settings['batch_size']}, "
        f"seed {settings['seed']}"
    )


def _initial_weights(training: Mapping[str, Any]) -> str | None:
    """Where they are from; None if that was not recorded."""
    if "weights" not in training:
        return None
    weights = training["weights"]
    return f"{weights['source']}; licence: {weights['licence']}" if weights else "drawn at random"


def _use(spec: ModelSpec, metrics: Sequence[Metric], flags_unlike: bool) -> Iterator[str]:
    accepted, adults = _accepted(spec), _adults_alone(metrics)
    films = "chest radiographs" if "wrong_body_part" not in accepted else "radiographs"
    frontal = "frontal " if "lateral_view" not in accepted else ""
    yield (
        f"- Intended use [3]: research; sorts {frontal}{films}{' of adults' if adults else ''} "
        f"that are like its training films by the probability of {spec.positive_class}. Not for "
        "diagnosis, triage or treatment."
    )
    unfit = ["children, flagged `quality_child` where the header states the age"] if adults else []
    unfit += ["lateral views"] if frontal else []
    unfit += ["other body parts"] if films == "chest radiographs" else []
    flagged = "which are flagged `quality_out_of_distribution`"
    if not flags_unlike:
        flagged = "which this model does not flag: its folder does not describe the training films"
    unfit.append(f"films unlike the training films, {flagged}")
    labels = _labels_left_out(spec)
    unfit += (
        [f"films with the labels {', '.join(labels)}, which were not trained on"] if labels else []
    )
    yield f"- Out of scope [38]: {'; '.join(unfit)}."
    if not adults:
        yield "- Some ages are unknown, or not of adults: see the subgroups."
    yield (
        "- Scores are calibrated for a population like the validation split. If disease is rarer "
        "or films differ, pick a new threshold (`lungopacity threshold`)."
    )


def _accepted(spec: ModelSpec) -> frozenset[str]:
    """The codes of `--accept` in its training, or in that of any member."""
    trainings = [spec.training, *(spec.training.get("members") or [])]
    return frozenset(
        code for training in trainings for code in training.get("provenance", {}).get("accept", [])
    )


def _adults_alone(metrics: Sequence[Metric]) -> bool:
    """Whether the age of each evaluated film is known, and 18 years or more."""
    ages = {item.group for item in metrics if item.group.startswith("age=")}
    return bool(ages) and not ages & {"age=unknown", f"age={age_band(0)}"}


def _data(spec: ModelSpec) -> Iterator[str]:
    data = spec.training.get("data", {})
    yield (
        "- Splits [20, 21]: by patient; training never reads the test split."
        + of_unknown(data.get("unknown_patients", 0))
    )
    counts: Mapping[str, Mapping[str, int]] = data.get("images", {})
    if counts:
        yield ""
        yield line("split", *spec.class_names)
        yield f"|---|{'---:|' * len(spec.class_names)}"
        for split, each in counts.items():
            if any(each.values()):
                yield line(split, *(f"{each[name]:,}" for name in spec.class_names))
        yield ""
    if "left_out" in data:
        yield f"- Left out of training [10, 33]: {_left_out(data['left_out'])}"
    if data:
        yield f"- Fingerprint of films, labels and splits: `{data['fingerprint']}`"


def _labels_left_out(spec: ModelSpec) -> list[str]:
    """Labels that no class has, the most common first; after `_MOST_LABELS`, how many more."""
    counts: Counter[str] = Counter()
    for each in spec.training.get("data", {}).get("left_out", {}).get("labels", {}).values():
        counts.update(each)
    names = [name for name, _ in counts.most_common()]
    more = len(names) - _MOST_LABELS
    return names[:_MOST_LABELS] + ([f"{more} more"] if more > 0 else [])


def _left_out(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """The films left out of each split, as text."""
    parts = []
    for split, each in counts["labels"].items():
        common = Counter(each).most_common(_MOST_LABELS)
        words = [f"{count:,} {label}" for label, count in common]
        rest = sum(each.values()) - sum(count for _, count in common)
        words += [f"{rest:,} of other labels"] if rest else []
        parts.append(f"of no class, {split}: {', '.join(words)}")
    for split, count in counts["unreadable"].items():
        parts.append(f"unreadable or rejected, {split}: {count:,}")
    return "; ".join(parts) or "no labelled film"


def _words(settings: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in settings.items() if name != "members"}
    return ", ".join(f"{name} {value}" for name, value in plain.items()) or "none"

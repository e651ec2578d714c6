"""Makes a labels file of other layouts: a folder for each class, or the tables of public data sets.

Everything else reads only the labels file, which a person can read, too.
"""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from lungopacity.archive.inventory import list_archive
from lungopacity.archive.reading import is_sidecar_name
from lungopacity.dataset.manifest import FACT_COLUMNS, SITE, SPLITS, TEXTS, checked_labels
from lungopacity.dataset.sql import answer_of
from lungopacity.dataset.tables import bytes_of, table_of
from lungopacity.errors import UserError
from lungopacity.progress import Progress
from lungopacity.storage import open_store, split_uri
from lungopacity.words import counted, printable

log = logging.getLogger(__name__)

_COLUMNS = ("image", "label", "split", "patient_id", *FACT_COLUMNS, SITE)
_OF_MASKS = re.compile(r"(.*[ _-])?masks?", re.IGNORECASE)
"""Such folders lie next to those of images in the COVID-19 Radiography Database (`masks`) and its
successor, COVID-QU-Ex (`lung masks`, `infection masks`)."""
_FOLDERS_OF_IMAGES = ("images",)
_SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_SOURCES = ".metadata.xlsx"
"""Suffix of a class's spreadsheet in that database, which tells where each image comes from."""

_CHEXPERT_OPACITIES = (
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Lung Lesion",
    "Atelectasis",
)
"""Lung Opacity, and the findings below it in figure 1 of Irvin et al. 2019 (arXiv:1901.07031). The
tables mark only the finding that the report names, and not the one above it."""
_VINDR_OPACITIES = (
    "Lung Opacity",
    "Consolidation",
    "Infiltration",
    "Nodule/Mass",
    "Atelectasis",
    "Edema",
    "Pneumonia",
)
_VINDR_ABSENT = ", ".join(f'0 AS "{name}"' for name in _VINDR_OPACITIES[1:])
"""Columns that some of the set's tables lack."""


def _any(findings: tuple[str, ...], value: int) -> str:
    return "(" + " OR ".join(f'"{name}" = {value}' for name in findings) + ")"


@dataclass(frozen=True)
class Layout:
    """A public data set's tables, and the SQL that makes labels of them.

    `Normal` is what the set calls normal, `Lung_Opacity` any of its findings that is an opacity of
    the lung, and `Not_Normal` any other finding. The label is null, which a labels file may not
    hold, where the set says nothing about a film. A row with a text in the column `left_out` is
    left out and counted under this reason; rows that are true in `disputed` are counted and kept.
    Sets that do not tell which films are of one patient (rsna, vindr) give labels without
    `patient_id`.
    """

    source: str
    tables: tuple[str, ...]
    """The tables' names in the SQL; users give each as NAME=FILE."""
    sql: str


LAYOUTS = {
    "rsna": Layout(
        "RSNA Pneumonia Detection Challenge 2018: classes = stage_2_detailed_class_info.csv",
        ("classes",),
        """
        SELECT DISTINCT patientId || '.dcm' AS image,
               -- Another word than these three leaves the film without a label.
               CASE trim(class) WHEN 'Normal' THEN 'Normal'
                                WHEN 'Lung Opacity' THEN 'Lung_Opacity'
                                WHEN 'No Lung Opacity / Not Normal' THEN 'Not_Normal' END AS label
        FROM classes""",
    ),
    "nih": Layout(
        "NIH ChestX-ray14: entries = Data_Entry_2017.csv or Data_Entry_2017_v2020.csv",
        ("entries",),
        """
        SELECT "Image Index" AS image, "Patient ID" AS patient_id,
               "View Position" AS view_position,
               -- Gender in the release of 2017, Sex in that of 2020
               COLUMNS('^Patient (Gender|Sex)$') AS patient_sex,
               TRY_CAST(regexp_extract("Patient Age"::VARCHAR, '[0-9]+') AS INTEGER)
                   // CASE right("Patient Age"::VARCHAR, 1)
                      WHEN 'M' THEN 12 WHEN 'W' THEN 52 WHEN 'D' THEN 365 ELSE 1 END
                   AS patient_age_years,
               CASE WHEN trim("Finding Labels") = 'No Finding' THEN 'Normal'
                    WHEN regexp_matches("Finding Labels",
                         'Infiltration|Consolidation|Pneumonia|Edema|Atelectasis|Mass|Nodule')
                    THEN 'Lung_Opacity'
                    WHEN "Finding Labels" IS NOT NULL THEN 'Not_Normal' END AS label
        FROM entries""",
    ),
    "chexpert": Layout(
        "CheXpert: entries = train.csv or valid.csv; frontal films, uncertain opacities left out",
        ("entries",),
        f"""
        SELECT "Path" AS image, regexp_extract("Path", 'patient[0-9]+') AS patient_id,
               "AP/PA" AS view_position, "Age" AS patient_age_years,
               CASE left("Sex", 1) WHEN 'M' THEN 'M' WHEN 'F' THEN 'F' END AS patient_sex,
               CASE WHEN opacity THEN 'Lung_Opacity'
                    WHEN "No Finding" = 1 THEN 'Normal' ELSE 'Not_Normal' END AS label,
               CASE WHEN "Frontal/Lateral" IS DISTINCT FROM 'Frontal'
                      -- 17 films are frontal by one column and lateral by the other.
                      OR "AP/PA" IN ('LL', 'RL') THEN 'not frontal'
                    WHEN uncertain AND opacity IS NOT TRUE THEN 'an opacity is uncertain'
                    END AS left_out
        FROM (SELECT *, {_any(_CHEXPERT_OPACITIES, 1)} AS opacity,
                     {_any(_CHEXPERT_OPACITIES, -1)} AS uncertain FROM entries)""",
    ),
    "padchest": Layout(
        "PadChest: entries = PADCHEST_chest_x_ray_images_labels_160K.csv; frontal films",
        ("entries",),
        """
        SELECT "ImageID" AS image, "PatientID" AS patient_id,
               CASE WHEN "Projection" = 'PA' THEN 'PA' ELSE 'AP' END AS view_position,
               CASE WHEN "PatientSex_DICOM" IN ('M', 'F', 'O') THEN "PatientSex_DICOM" END
                   AS patient_sex,
               TRY_CAST("StudyDate_DICOM" AS BIGINT) // 10000 - TRY_CAST("PatientBirth" AS INTEGER)
                   AS patient_age_years,
               CASE WHEN regexp_matches(found, '''normal''')
                     AND NOT regexp_matches(replace(found, '''normal''', ''), '[a-z]')
                    THEN 'Normal'
                    WHEN regexp_matches(found, 'infiltrates|consolidation|pneumonia|pattern|'
                                               'atelectasis|opacit|edema|'
                                               -- not of the breast, and no pseudonodule
                                               '''(pulmonary )?mass''|''(multiple )?nodule')
                    THEN 'Lung_Opacity' ELSE 'Not_Normal' END AS label,
               CASE WHEN ("Projection" IN ('PA', 'AP', 'AP_horizontal')) IS NOT TRUE
                    THEN 'not frontal'
                    -- A list without findings, not even normal, says nothing about the film.
                    WHEN regexp_matches(found, '[a-z]') IS NOT TRUE THEN 'no finding is listed'
                    WHEN regexp_matches(found, 'unchanged|exclude')
                    THEN 'unchanged or exclude is listed' END AS left_out
        FROM (SELECT *,
                     -- Some findings are surrounded by spaces. A suboptimal study is no finding.
                     replace(regexp_replace("Labels", '\\s*''\\s*', '''', 'g'),
                             '''suboptimal study''', '') AS found
              FROM entries)""",
    ),
    "vindr": Layout(
        "VinDr-CXR: readings = image_labels_train.csv; the majority of each film's readers",
        ("readings",),
        f"""
        SELECT image_id || '.dicom' AS image,
               CASE WHEN count("No finding") < count(*) THEN NULL
                    WHEN 2 * count(*) FILTER ({_any(_VINDR_OPACITIES, 1)}) > count(*)
                    THEN 'Lung_Opacity'
                    WHEN 2 * sum("No finding") > count(*) THEN 'Normal'
                    ELSE 'Not_Normal' END AS label,
               count(DISTINCT CASE WHEN {_any(_VINDR_OPACITIES, 1)} THEN 'Lung_Opacity'
                                   WHEN "No finding" = 1 THEN 'Normal'
                                   ELSE 'Not_Normal' END) > 1 AS disputed
        FROM (FROM readings UNION ALL BY NAME SELECT {_VINDR_ABSENT} WHERE false)
        GROUP BY image_id""",
    ),
}


def labels_of_folders(images: str) -> pd.DataFrame:
    """`image`, `label` and, if folders and spreadsheets tell them, `split` and `site` of loose
    images in a folder per class.

    images: URI of an archive. The class is the name of the folder that holds the image. As in the
    COVID-19 Radiography Database, a folder `images` counts as the one above it, and folders of
    masks are left out. Hidden files and folders, whose names start with a dot, are left out, too.
    If all images are below folders such as `train` and `test`, these tell the splits: a set that
    does not name its patients keeps their films together by them. The spreadsheets of that database
    (Normal.metadata.xlsx, …) name the source of each image; its classes come from different
    sources, and `audit` tells how well these give the label away. Raises `UserError` where images
    are in no folder, or in shards.
    """
    rows: list[tuple[str, str, str | None]] = []
    sites: dict[str, str] = {}
    progress = Progress("Listing the images", unit="objects", quick=True)
    archive = list_archive(images, progress.advance)
    store = open_store(archive.uri)
    for table in progress.around(archive.tables):
        for name, is_shard in zip(
            table["image"].to_pylist(), table["is_shard"].to_pylist(), strict=True
        ):
            # Browsers, notebooks and macOS keep hidden files, among them copies of films.
            if any(part.startswith(".") for part in name.split("/")):
                continue
            folders = name.split("/")[:-1]
            if is_shard:
                raise UserError(
                    f"{images}: {name} is a shard; give the labels of images in shards as a table"
                )
            if any(_OF_MASKS.fullmatch(folder) for folder in folders):
                continue
            if name.lower().endswith(_SOURCES):
                sites |= _sites_of(f"{images.rstrip('/')}/{name}")
            if is_sidecar_name(name):
                continue
            if "\\" in name and store.head(name) is None:
                # `LocalStore` lists such a file under another name.
                raise UserError(f"{images}: {name} has a name that is not UTF-8; rename it")
            classes = [folder for folder in folders if folder.lower() not in _FOLDERS_OF_IMAGES]
            if not classes:
                raise UserError(
                    f"{images}: {name} is in no folder that could name its class; move it to one"
                )
            *above, label = (folder.strip() for folder in classes)
            splits = [_SPLIT_OF_FOLDER.get(folder.lower()) for folder in above]
            split = next(filter(None, reversed(splits)), None)
            rows.append((name, label.replace(" ", "_"), split))
    if not rows:
        raise UserError(f"{images}: has no images; give a folder with a folder of images per class")
    frame = pd.DataFrame(rows, columns=["image", "label", "split"])
    if not _all_have_splits(frame["split"], images):
        del frame["split"]
    if sites:
        # NORMAL-1 in the spreadsheet is Normal-1.png in the folder.
        stems = frame["image"].str.rsplit("/", n=1).str[-1].str.rsplit(".", n=1).str[0]
        frame[SITE] = stems.str.lower().map(sites)
    return frame


def _all_have_splits(split: pd.Series, images: str) -> bool:
    """Whether folders put each image into one of several splits; logged where any do."""
    counts = split.value_counts()
    if len(counts) < 2:
        return False
    shown = ", ".join(f"{counts.get(name, 0)} {name}" for name in SPLITS)
    if split.isna().any():
        log.warning(
            "%s: folders tell the split of only %d of %d images (%s); none is written",
            images,
            split.count(),
            len(split),
            shown,
        )
        return False
    log.info("%s: its folders tell the splits: %s", images, shown)
    return True


def _sites_of(uri: str) -> dict[str, str]:
    """Site by image name, in lower case without the suffix."""
    try:
        sheet = pd.read_excel(io.BytesIO(bytes_of(uri)), dtype=str)
        names, sources = sheet["FILE NAME"].str.strip().str.lower(), sheet["URL"]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        log.warning(
            "%s: gives no sites, because it is not a spreadsheet with the columns FILE NAME and "
            "URL (%s)",
            uri,
            type(error).__name__,
        )
        return {}
    # The scheme, www. and a final slash of a URL do not distinguish sources.
    sites = sources.str.strip().str.replace(r"^https?://(www\.)?|/+$", "", regex=True)
    known = names.notna() & sites.notna()
    return dict(zip(names[known], sites[known], strict=True))


def labels_of_tables(sql: str, tables: Mapping[str, str]) -> pd.DataFrame:
    """The result of `sql` in DuckDB. tables: URIs of CSV or Parquet files, by name.

    The result must have the columns `image` and `label`, and may have the other columns of a labels
    file. Raises `UserError` for SQL that DuckDB refuses, for other columns, and for table names
    that differ only in case.
    """
    frame = answer_of(sql, tables, "--sql")
    wrong = [name for name in frame.columns if name not in _COLUMNS]
    if wrong or not {"image", "label"} <= set(frame.columns):
        raise UserError(
            f"--sql: gives {_listed(frame)}; it must give image and label, and may give only "
            f"{', '.join(_COLUMNS)}"
        )
    return frame.sort_values("image")


def _listed(frame: pd.DataFrame) -> str:
    return f"the columns {', '.join(frame.columns)}" if len(frame.columns) else "no table"


def write_labels(frame: pd.DataFrame, output: str) -> pd.DataFrame:
    """Writes a labels file as CSV, and returns the labels as every command will read them.

    Raises `UserError`, and writes nothing, where a command would refuse them.
    """
    parent, name = split_uri(output)
    data = frame.to_csv(index=False).encode()
    try:
        labels = checked_labels(table_of(data, output, TEXTS), output)
    except UserError as error:
        raise UserError(f"not written: {error}") from error
    open_store(parent).write(name, data)
    return labels


def labels_of_layout(name: str, tables: Mapping[str, str]) -> pd.DataFrame:
    """The labels of a public data set of `LAYOUTS`; the number of rows left out is logged.

    Raises `UserError` for an unknown name or other tables than the layout takes.
    """
    if name not in LAYOUTS:
        raise UserError(f"--layout {name}: is none of {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[name]
    if set(tables) != set(chosen.tables):
        wanted = " ".join(f"--table {table}=FILE" for table in chosen.tables)
        raise UserError(f"--layout {name} takes {wanted}: {chosen.source}")
    files = ", ".join(tables.values())
    frame = answer_of(chosen.sql, tables, f"--layout {name}, which takes {chosen.source}: {files}")
    if "left_out" in frame:
        why = frame.pop("left_out")
        if why.notna().any():
            numbers = why.value_counts().sort_index()
            counts = ", ".join(f"{reason} ({n})" for reason, n in numbers.items())
            log.info("%s: rows left out: %s", files, counts)
        frame = frame[why.isna()]
    if "disputed" in frame and (disputed := frame.pop("disputed")).any():
        log.info(
            "%s: readers disagree about %d of %d films; the majority decides, and without one the "
            "label is Not_Normal",
            files,
            disputed.sum(),
            len(frame),
        )
    return frame.sort_values("image")


def summary(labels: pd.DataFrame) -> str:
    """The number of images and patients, in all and of each label."""
    counts = labels.groupby("label").agg(
        images=("image", "size"), named=("patient_id", "count"), patients=("patient_id", "nunique")
    )
    lines = []
    for name, row in counts.iterrows():
        line = f"  {printable(str(name))}: {counted(int(row.images), 'image')}, "
        line += counted(int(row.patients), "patient") if row.patients else "no patient_id"
        if 0 < row.named < row.images:
            line += f", {counted(int(row.images - row.named), 'image')} without patient_id"
        lines.append(line)
    return "\n".join([counted(len(labels), "labelled image"), *lines])

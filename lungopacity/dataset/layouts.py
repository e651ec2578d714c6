"""Labels of other layouts to a labels file: a folder for each class, and the tables of public sets.

One labels file, which a person can read, lies between all those layouts and everything else.
"""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import pandas as pd

from lungopacity.archive.inventory import list_archive
from lungopacity.archive.reading import is_sidecar_name
from lungopacity.dataset.manifest import FACT_COLUMNS, SITE, TEXTS, checked_labels
from lungopacity.dataset.tables import csv_text, table_of
from lungopacity.errors import ImageError, UserError, first_line
from lungopacity.progress import Progress
from lungopacity.results.workbench import quoted, temporary_folder
from lungopacity.storage import open_store, split_uri
from lungopacity.words import counted, printable

log = logging.getLogger(__name__)

_COLUMNS = ("image", "label", "split", "patient_id", *FACT_COLUMNS, SITE)
_SKIPPED_FOLDERS = ("masks",)
"""Beside the images of the COVID-19 Radiography Database."""
_FOLDERS_OF_IMAGES = ("images",)
_SOURCES = ".metadata.xlsx"
"""Ends the name of a class's sheet there, which says of each image where it was taken from."""

_TEXT = ", all_varchar = true, sample_size = -1"
"""Options that read a CSV as it is. Of a sample alone DuckDB would guess wrong what comes later."""
_NUMBERS = {
    "BIGINT": r"-?(0|[1-9]\d{0,17})",
    "DOUBLE": r"-?(0|[1-9]\d{0,8})(\.\d+)?(e-\d+)?",
}
"""What every value of a CSV's column looks like where SQL gets numbers of this type. All else is
text: DuckDB by itself takes 007 and a patient's 36 digits for numbers, and loses some of them."""

_CHEXPERT_OPACITIES = (
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Lung Lesion",
    "Atelectasis",
)
"""Lung Opacity, and what lies under it in figure 1 of Irvin et al. 2019 (arXiv:1901.07031): the
tables mark the finding that the report names, and not the one above it."""
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
"""Columns that not every table of the set has."""


def _any(findings: tuple[str, ...], value: int) -> str:
    return "(" + " OR ".join(f'"{name}" = {value}' for name in findings) + ")"


@dataclass(frozen=True)
class Layout:
    """A public set's tables, and the SQL that makes labels of them: `Normal` is what the set calls
    so, `Lung_Opacity` whatever finding of it is an opacity of the lung, `Not_Normal` all else that
    it says; null, which no labels file may hold, of a film that it says nothing of. Where a column
    `left_out` says why a row makes no label, it is left out, and counted.
    Where a set does not say which films are of one patient (rsna, vindr), neither do the labels."""

    source: str
    tables: tuple[str, ...]
    """Names that the SQL has for them; each is given as NAME=FILE."""
    sql: str


LAYOUTS = {
    "rsna": Layout(
        "RSNA Pneumonia Detection Challenge 2018: classes = stage_2_detailed_class_info.csv",
        ("classes",),
        """
        SELECT DISTINCT patientId || '.dcm' AS image,
               CASE WHEN class = 'Normal' THEN 'Normal'
                    WHEN class = 'Lung Opacity' THEN 'Lung_Opacity'
                    WHEN class IS NOT NULL THEN 'Not_Normal' END AS label
        FROM classes""",
    ),
    "nih": Layout(
        "NIH ChestX-ray14: entries = Data_Entry_2017.csv",
        ("entries",),
        """
        SELECT "Image Index" AS image, "Patient ID" AS patient_id,
               "View Position" AS view_position, "Patient Gender" AS patient_sex,
               TRY_CAST(regexp_extract("Patient Age"::VARCHAR, '[0-9]+') AS INTEGER)
                   // CASE right("Patient Age"::VARCHAR, 1)
                      WHEN 'M' THEN 12 WHEN 'W' THEN 52 WHEN 'D' THEN 365 ELSE 1 END
                   AS patient_age_years,
               CASE WHEN "Finding Labels" = 'No Finding' THEN 'Normal'
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
               CASE WHEN "Frontal/Lateral" IS DISTINCT FROM 'Frontal' THEN 'not frontal'
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
               CASE WHEN found = '[''normal'']' THEN 'Normal'
                    WHEN regexp_matches(found, 'infiltrates|consolidation|pneumonia|pattern|'
                                               'atelectasis|opacit|edema|'
                                               -- of no breast, no pseudonodule
                                               '''(pulmonary )?mass''|''(multiple )?nodule')
                    THEN 'Lung_Opacity' ELSE 'Not_Normal' END AS label,
               CASE WHEN ("Projection" IN ('PA', 'AP', 'AP_horizontal')) IS NOT TRUE
                    THEN 'not frontal'
                    -- Without a finding, and without normal, a list says nothing of the film.
                    WHEN regexp_matches(found, '[a-z]') IS NOT TRUE THEN 'no finding is listed'
                    WHEN regexp_matches(found, 'unchanged|exclude')
                    THEN 'unchanged or exclude is listed' END AS left_out
        -- Some findings have blanks about them.
        FROM (SELECT *, regexp_replace("Labels", '\\s*''\\s*', '''', 'g') AS found FROM entries)""",
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
                    ELSE 'Not_Normal' END AS label
        FROM (FROM readings UNION ALL BY NAME SELECT {_VINDR_ABSENT} WHERE false)
        GROUP BY image_id""",
    ),
}


def labels_of_folders(images: str) -> pd.DataFrame:
    """`image`, `label` and, where a sheet tells it, `site` of loose images that lie in a folder for
    each class.

    images: URI of an archive. The class is the folder next to the image; `images` folders count as
    the one above them, and what lies under `masks` is left out, as in the COVID-19 Radiography
    Database, and so is what is hidden, by a dot before its name. The sheets of that database
    (Normal.metadata.xlsx, …) name the source of each image: its classes come from different ones,
    and `audit` tells how well they betray the label. Raises `UserError` where images lie in no
    folder, or in shards.
    """
    rows: list[tuple[str, str]] = []
    sites: dict[str, str] = {}
    progress = Progress("Listing the images", unit="objects", quick=True)
    archive = list_archive(images, progress.advance)
    store = open_store(archive.uri)
    for table in progress.around(archive.tables):
        for name, is_shard in zip(
            table["image"].to_pylist(), table["is_shard"].to_pylist(), strict=True
        ):
            # Browsers, notebooks and macOS keep copies of films, and more, under hidden names.
            if any(part.startswith(".") for part in name.split("/")):
                continue
            folders = name.split("/")[:-1]
            if is_shard:
                raise UserError(
                    f"{images}: {name} is a shard; of shards the labels are needed as a table"
                )
            if {folder.lower() for folder in folders} & set(_SKIPPED_FOLDERS):
                continue
            if name.lower().endswith(_SOURCES):
                sites |= _sites_of(f"{images.rstrip('/')}/{name}")
            if is_sidecar_name(name):
                continue
            if "\\" in name and store.head(name) is None:
                # Listed under another name than its own: see `LocalStore`.
                raise UserError(f"{images}: {name} has a name that is not UTF-8; rename it")
            classes = [folder for folder in folders if folder.lower() not in _FOLDERS_OF_IMAGES]
            if not classes:
                raise UserError(f"{images}: {name} lies in no folder that could name its class")
            rows.append((name, classes[-1].strip().replace(" ", "_")))
    if not rows:
        raise UserError(f"{images}: no image lies there")
    frame = pd.DataFrame(rows, columns=["image", "label"])
    if sites:
        # The sheet's NORMAL-1 is the folder's Normal-1.png.
        stems = frame["image"].str.rsplit("/", n=1).str[-1].str.rsplit(".", n=1).str[0]
        frame[SITE] = stems.str.lower().map(sites)
    return frame


def _sites_of(uri: str) -> dict[str, str]:
    """Site by image name, without its suffix, in small letters."""
    try:
        sheet = pd.read_excel(io.BytesIO(_bytes_of(uri)), dtype=str)
        names, sources = sheet["FILE NAME"].str.strip().str.lower(), sheet["URL"]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        log.warning(
            "%s: says no sites: it is no sheet with the columns FILE NAME and URL (%s)",
            uri,
            type(error).__name__,
        )
        return {}
    # An address, of which the way to fetch it says nothing.
    sites = sources.str.strip().str.replace(r"^https?://(www\.)?|/+$", "", regex=True)
    known = names.notna() & sites.notna()
    return dict(zip(names[known], sites[known], strict=True))


def labels_of_tables(sql: str, tables: Mapping[str, str]) -> pd.DataFrame:
    """What DuckDB answers to `sql` over the tables, by name: URIs of CSV or Parquet files.

    It must give `image` and `label`, and may give the other columns of a labels file. Raises
    `UserError` for SQL that is refused, and for other columns or names that SQL does not tell
    apart.
    """
    frame = _answer(sql, tables, "--sql")
    wrong = [name for name in frame.columns if name not in _COLUMNS]
    if wrong or not {"image", "label"} <= set(frame.columns):
        raise UserError(
            f"--sql: gives {_listed(frame)}; image and label are needed, and "
            f"known are {', '.join(_COLUMNS)}"
        )
    return frame.sort_values("image")


def _answer(sql: str, tables: Mapping[str, str], told: str) -> pd.DataFrame:
    """told: what messages call the SQL."""
    _check_names(tables)
    with temporary_folder() as folder, duckdb.connect() as connection:
        for name, uri in tables.items():
            path = folder / f"{name}.table"
            data = _bytes_of(uri)
            path.write_bytes(data)
            is_csv = data[:4] != b"PAR1"
            if is_csv:
                csv_text(data, uri)  # DuckDB refuses it without a word of the mend
            reader, options = ("read_csv", _TEXT) if is_csv else ("read_parquet", "")
            try:
                connection.execute(
                    f'CREATE TABLE "{name}" AS SELECT * FROM {reader}({quoted(path)}{options})'
                )
            except duckdb.Error as error:
                raise UserError(
                    f"{uri}: is neither CSV nor Parquet ({first_line(error)})"
                ) from error
            if is_csv:
                _make_numbers(connection, name)
        connection.execute("SET enable_external_access = false")
        try:
            answer = connection.sql(sql)
            return pd.DataFrame() if answer is None else answer.df()
        except duckdb.Error as error:
            raise UserError(f"{told}: {first_line(error)}") from error


def _make_numbers(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """Of text, in the columns that hold nothing else (`_NUMBERS`)."""
    for name, *_ in connection.execute(f'DESCRIBE "{table}"').fetchall():
        column = '"' + name.replace('"', '""') + '"'
        for kind, pattern in _NUMBERS.items():
            like = f"bool_and(regexp_full_match({column}, {quoted(pattern)}))"
            if connection.execute(f'SELECT {like} FROM "{table}"').fetchall() == [(True,)]:
                connection.execute(f'ALTER TABLE "{table}" ALTER {column} TYPE {kind}')
                break


def _check_names(tables: Mapping[str, str]) -> None:
    for name in tables:
        if not re.fullmatch(r"\w{1,64}", name):
            raise UserError(f"--table {name}=…: a name is up to 64 letters, digits and _")
    if len({name.lower() for name in tables}) < len(tables):
        raise UserError(
            f"--table: SQL does not tell capitals apart, and {', '.join(tables)} are two names of "
            "the same; choose others"
        )


def _listed(frame: pd.DataFrame) -> str:
    return f"the columns {', '.join(frame.columns)}" if len(frame.columns) else "no table"


def write_labels(frame: pd.DataFrame, output: str) -> pd.DataFrame:
    """Write a labels file as CSV; the labels as every command will read them.

    Raises `UserError`, and writes nothing, where they would be refused.
    """
    parent, name = split_uri(output)
    data = frame.to_csv(index=False).encode()
    told = f"{output} (not written)"
    labels = checked_labels(table_of(data, told, TEXTS), told)
    open_store(parent).write(name, data)
    return labels


def labels_of_layout(name: str, tables: Mapping[str, str]) -> pd.DataFrame:
    """The labels of a public set of `LAYOUTS`; what they leave out is logged, with its number.

    Raises `UserError` for another name or tables.
    """
    if name not in LAYOUTS:
        raise UserError(f"--layout {name}: is none of {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[name]
    if set(tables) != set(chosen.tables):
        wanted = " ".join(f"--table {table}=FILE" for table in chosen.tables)
        raise UserError(f"--layout {name} takes {wanted}: {chosen.source}")
    files = ", ".join(tables.values())
    frame = _answer(chosen.sql, tables, f"--layout {name}, which takes {chosen.source}: {files}")
    if "left_out" in frame:
        why = frame.pop("left_out")
        if why.notna().any():
            numbers = why.value_counts().sort_index()
            counts = ", ".join(f"{reason} ({n})" for reason, n in numbers.items())
            log.info("%s: rows that are left out: %s", files, counts)
        frame = frame[why.isna()]
    return frame.sort_values("image")


def summary(labels: pd.DataFrame) -> str:
    """How many images and patients of each label there are."""
    counts = labels.groupby("label").agg(
        images=("image", "size"), patients=("patient_id", "nunique")
    )
    lines = [
        f"  {printable(str(name))}: {counted(int(row.images), 'image')}, "
        + (counted(int(row.patients), "patient") if row.patients else "no patient is named")
        for name, row in counts.iterrows()
    ]
    return "\n".join([counted(len(labels), "labelled image"), *lines])


def _bytes_of(uri: str) -> bytes:
    parent, name = split_uri(uri)
    try:
        return open_store(parent).read(name)
    except ImageError as error:
        raise UserError(f"{uri}: cannot be read ({error.message})") from error

"""Labels files of other layouts. The tables have the columns of the public data sets."""

from __future__ import annotations

import re
import tempfile

import pandas as pd
import pytest

from lungopacity.cli import main
from lungopacity.dataset.layouts import (
    LAYOUTS,
    labels_of_layout,
    labels_of_tables,
    summary,
    write_labels,
)
from lungopacity.dataset.manifest import read_labels
from lungopacity.errors import UserError

TABLES = {
    "rsna": """patientId,class
a,Normal
b,Lung Opacity
b,Lung Opacity
c,No Lung Opacity / Not Normal
""",
    "nih": """Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position
a.png,No Finding,1,058Y,M,PA
b.png,Effusion|Infiltration,2,33,F,AP
c.png,Cardiomegaly,2,34,F,AP
""",
    "chexpert": """Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Lung Opacity,"""
    """Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis
v1/train/patient1/s1/view1.jpg,Female,68,Frontal,AP,1.0,,,,,,
v1/train/patient2/s1/view1.jpg,Male,87,Frontal,PA,,1.0,,,,,-1.0
v1/train/patient3/s1/view1.jpg,Male,20,Frontal,PA,,,,,,,0.0
v1/train/patient4/s1/view1.jpg,Male,21,Frontal,PA,,-1.0,,,,,
v1/train/patient5/s1/view2.jpg,Male,22,Lateral,,1.0,,,,,,
v1/train/patient6/s1/view1.jpg,Male,23,Frontal,LL,1.0,,,,,,
""",
    "padchest": """ImageID,PatientID,StudyDate_DICOM,Projection,PatientBirth,PatientSex_DICOM,Labels
a.png,1,20140915,PA,1950.0,M,['normal']
b.png,2,20140915,AP_horizontal,1930.0,F,"['pleural effusion', 'alveolar pattern']"
c.png,3,20140915,PA,1931.0,F,['cardiomegaly']
d.png,3,20140915,L,1931.0,F,['normal']
e.png,4,20140915,PA,1931.0,F,"['normal', 'unchanged']"
""",
    # With fewer findings than the present tables.
    "vindr": """image_id,rad_id,Lung Opacity,No finding
a,R1,0,1
a,R2,0,1
a,R3,1,0
b,R1,1,0
b,R2,1,0
b,R3,0,1
c,R1,1,0
c,R2,0,1
c,R3,0,0
""",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_tables_of_public_sets_become_labels(name, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(TABLES[name])
    (table,) = LAYOUTS[name].tables
    output = str(tmp_path / "labels.csv")
    arguments = ["--layout", name, "--table", f"{table}={tmp_path / 't.csv'}", "--output", output]
    assert main(["labels", *arguments]) == 0
    # Two of the sets do not identify patients, so no number of patients is shown.
    patients = "no patient_id" if name in ("rsna", "vindr") else "1 patient"
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["3 labelled images", f"  Lung_Opacity: 1 image, {patients}"]
    frame = read_labels(output)
    assert frame["label"].tolist() == ["Normal", "Lung_Opacity", "Not_Normal"]
    assert frame["image"].str.contains(r"\.(?:dcm|dicom|png|jpg)$").all()


@pytest.mark.parametrize("name", ["rsna", "nih"])
def test_spaces_around_what_a_film_shows_change_no_label(name, tmp_path):
    spaced = re.sub("(Normal|Opacity|Finding)(?=[,\n])", r"\1 ", TABLES[name])
    assert spaced != TABLES[name]
    (tmp_path / "t.csv").write_text(spaced)
    labels = labels_of_layout(name, {LAYOUTS[name].tables[0]: str(tmp_path / "t.csv")})
    assert labels["label"].tolist() == ["Normal", "Lung_Opacity", "Not_Normal"]


def test_facts_about_patients_are_taken_from_the_tables(tmp_path):
    for name in ("nih", "chexpert", "padchest"):
        (tmp_path / "t.csv").write_text(TABLES[name])
        output = str(tmp_path / f"{name}.csv")
        table = f"{LAYOUTS[name].tables[0]}={tmp_path / 't.csv'}"
        assert main(["labels", "--layout", name, "--table", table, "--output", output]) == 0
    nih, chexpert, padchest = (
        read_labels(str(tmp_path / f"{name}.csv")) for name in ("nih", "chexpert", "padchest")
    )
    assert nih["patient_id"].tolist() == ["1", "2", "2"]
    assert nih["patient_age_years"].tolist() == [58, 33, 34]
    assert nih["view_position"].tolist() == ["PA", "AP", "AP"]
    assert chexpert["patient_id"].tolist() == ["patient1", "patient2", "patient3"]
    assert chexpert["patient_sex"].tolist() == ["F", "M", "M"]
    assert padchest["patient_age_years"].tolist() == [64, 84, 83]
    assert padchest["view_position"].tolist() == ["PA", "AP", "PA"]


def test_both_releases_of_nihs_table_give_the_same_labels(tmp_path):
    """That of 2020 calls the sex by another name."""
    (tmp_path / "2017.csv").write_text(TABLES["nih"])
    (tmp_path / "2020.csv").write_text(TABLES["nih"].replace("Patient Gender", "Patient Sex"))
    first, second = (
        labels_of_layout("nih", {"entries": str(tmp_path / f"{year}.csv")}) for year in (2017, 2020)
    )
    assert first["patient_sex"].tolist() == ["M", "F", "F"]
    assert first.equals(second)


def test_a_word_for_a_missing_value_affects_only_that_value(tmp_path):
    rows = TABLES["padchest"] + "z.png,None,20140915,PA,None,None,['normal']\n"
    (tmp_path / "p.csv").write_text(rows)
    padchest = labels_of_layout("padchest", {"entries": str(tmp_path / "p.csv")})
    assert padchest["patient_sex"].fillna("-").tolist() == ["M", "F", "F", "-"]
    assert padchest["patient_age_years"].fillna(-1).tolist() == [64, 84, 83, -1]
    (tmp_path / "c.csv").write_text(TABLES["chexpert"].replace("Female", "Unknown"))
    chexpert = labels_of_layout("chexpert", {"entries": str(tmp_path / "c.csv")})
    assert chexpert["patient_sex"].fillna("-").tolist() == ["-", "M", "M"]


def test_a_mass_outside_the_lungs_is_not_an_opacity_nor_an_infant_an_adult(tmp_path):
    findings = {
        "['mass']": "Lung_Opacity",
        "['pleural effusion', 'pulmonary mass']": "Lung_Opacity",
        "['multiple nodules']": "Lung_Opacity",
        "['mediastinal mass']": "Not_Normal",
        "['mammary prosthesis', 'breast mass']": "Not_Normal",
        "['pseudonodule']": "Not_Normal",
        "['miliary opacities']": "Lung_Opacity",
        "['pleural effusion', ' mass ']": "Lung_Opacity",
        "[' normal']": "Normal",
        "['normal', 'suboptimal study']": "Normal",
        "['suboptimal study', 'infiltrates']": "Lung_Opacity",
    }
    rows = [f'{n:02}.png,{n},20140915,PA,1950.0,M,"{found}"' for n, found in enumerate(findings)]
    text = "\n".join([TABLES["padchest"].splitlines()[0], *rows])
    (tmp_path / "t.csv").write_text(text)
    labels = labels_of_layout("padchest", {"entries": str(tmp_path / "t.csv")})
    assert labels.sort_values("image")["label"].tolist() == list(findings.values())
    nih = TABLES["nih"].replace("058Y", "013D").replace(",33,", ",026M,")
    assert nih != TABLES["nih"]
    (tmp_path / "n.csv").write_text(nih)
    labels = labels_of_layout("nih", {"entries": str(tmp_path / "n.csv")})
    assert labels["patient_age_years"].tolist()[:2] == [0, 2]


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("chexpert", "", "an opacity is uncertain (1), not frontal (2)"),
        (
            "padchest",
            "f.png,4,,,1931.0,F,['normal']\ng.png,4,20140915,PA,1931.0,F,[]\n",
            "no finding is listed (1), not frontal (2), unchanged or exclude is listed (1)",
        ),
        ("nih", "", None),
    ],
)
def test_rows_that_a_layout_leaves_out_are_counted(name, row, told, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "t.csv").write_text(TABLES[name] + row)
    (table,) = LAYOUTS[name].tables
    assert len(labels_of_layout(name, {table: str(tmp_path / "t.csv")})) == 3
    assert (told is None) == ("left out" not in caplog.text)
    assert told is None or f"t.csv: rows left out: {told}" in caplog.text


@pytest.mark.parametrize(
    "findings", ["[]", "['']", "[' ', '']", "", "['exclude']", "['suboptimal study']"]
)
def test_a_padchest_film_without_a_listed_finding_has_no_label(findings, tmp_path):
    (tmp_path / "t.csv").write_text(
        TABLES["padchest"] + f'f.png,9,20140915,PA,1931.0,F,"{findings}"\n'
    )
    labels = labels_of_layout("padchest", {"entries": str(tmp_path / "t.csv")})
    assert labels["image"].tolist() == ["a.png", "b.png", "c.png"]


def test_findings_below_lung_opacity_are_opacities_and_uncertain_ones_left_out(tmp_path):
    findings = ("Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis")
    head = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding," + ",".join(findings)
    expected, lines = {}, [head]
    for number, (values, label) in enumerate(
        [
            *((f"{',' * place}1.0{',' * (5 - place)}", "Lung_Opacity") for place in range(6)),
            (",,1.0,-1.0,,", "Lung_Opacity"),
            ("-1.0,,,1.0,,", "Lung_Opacity"),
            ("0.0,,,,,", "Not_Normal"),
            (",,-1.0,,,", None),
            ("0.0,,,,0.0,-1.0", None),
        ]
    ):
        lines.append(f"t/patient{number:02}/s/v.jpg,Male,20,Frontal,PA,,{values}")
        if label is not None:
            expected[f"t/patient{number:02}/s/v.jpg"] = label
    (tmp_path / "t.csv").write_text("\n".join(lines))
    labels = labels_of_layout("chexpert", {"entries": str(tmp_path / "t.csv")})
    assert labels.set_index("image")["label"].to_dict() == expected


def test_half_of_the_readers_are_not_a_majority(tmp_path, caplog):
    """Two see an opacity and two see nothing, so neither label applies."""
    caplog.set_level("INFO")
    read = {"a": ("1100", "0011"), "b": ("1110", "0001"), "c": ("00", "10"), "d": ("0001", "1110")}
    lines = ["image_id,rad_id,Lung Opacity,No finding"]
    for film, readings in read.items():
        for reader, (seen, normal) in enumerate(zip(*readings, strict=True)):
            lines.append(f"{film},R{reader},{seen},{normal}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    labels = labels_of_layout("vindr", {"readings": str(tmp_path / "t.csv")})
    assert labels["label"].tolist() == ["Not_Normal", "Lung_Opacity", "Not_Normal", "Normal"]
    assert "readers disagree about 4 of 4 films" in caplog.text


def test_readers_who_name_an_opacity_differently_agree_that_there_is_one(tmp_path):
    (tmp_path / "t.csv").write_text(
        "image_id,rad_id,Consolidation,Infiltration,Nodule/Mass,Cardiomegaly,Lung Opacity,"
        "Pneumonia,No finding\n"
        "a,R1,1,0,0,0,0,0,0\na,R2,1,0,0,0,0,0,0\na,R3,0,0,0,0,0,0,1\n"
        "b,R1,0,0,1,0,0,0,0\nb,R2,0,1,0,0,1,0,0\nb,R3,0,0,0,0,0,0,1\n"
        "c,R1,0,0,0,1,0,0,0\nc,R2,0,0,0,1,0,0,0\nc,R3,0,0,0,1,0,1,0\n"
        "d,R1,0,0,0,0,0,0,1\nd,R2,0,0,0,0,0,0,1\nd,R3,1,0,0,0,0,0,0\n"
    )
    labels = labels_of_layout("vindr", {"readings": str(tmp_path / "t.csv")})
    assert labels["label"].tolist() == ["Lung_Opacity", "Lung_Opacity", "Not_Normal", "Normal"]


@pytest.mark.parametrize(
    ("name", "told", "untold"),
    [
        ("rsna", "c,No Lung Opacity / Not Normal", "c,"),
        ("rsna", "c,No Lung Opacity / Not Normal", "c,normal"),
        ("nih", "c.png,Cardiomegaly,", "c.png,,"),
        ("vindr", "c,R3,0,0", "c,R3,,"),
    ],
)
def test_a_film_that_a_table_says_nothing_about_is_in_no_class(
    tmp_path, capsys, name, told, untold
):
    film = {"rsna": "c.dcm", "nih": "c.png", "vindr": "c.dicom"}[name]
    changed = TABLES[name].replace(told, untold)
    assert changed != TABLES[name]
    (tmp_path / "t.csv").write_text(changed)
    table = f"{LAYOUTS[name].tables[0]}={tmp_path / 't.csv'}"
    output = tmp_path / "labels.csv"
    assert main(["labels", "--layout", name, "--table", table, "--output", str(output)]) == 2
    said = f"1 row without image or label, such as that of {film}; fill or remove them"
    assert said in capsys.readouterr().err
    assert not output.exists()


def test_any_tables_become_labels_by_sql(tmp_path, capsys):
    pd.DataFrame({"key": ["a", "b"], "who": [1, 2]}).to_parquet(tmp_path / "films.parquet")
    (tmp_path / "findings.csv").write_text("who,finding\n1,yes\n2,no\n")
    output = str(tmp_path / "labels.csv")
    sql = (
        "SELECT key || '.png' AS image, if(finding = 'yes', 'Lung_Opacity', 'Normal') AS label, "
        "who AS patient_id FROM films JOIN findings USING (who)"
    )
    tables = [f"films={tmp_path}/films.parquet", f"findings={tmp_path}/findings.csv"]
    words = [word for table in tables for word in ("--table", table)]
    assert main(["labels", "--sql", sql, *words, "--output", output]) == 0
    assert read_labels(output)["label"].tolist() == ["Lung_Opacity", "Normal"]
    # What does not fit into memory must not be left in the current folder.
    spill = "SELECT key AS image, current_setting('temp_directory') AS label FROM films"
    assert main(["labels", "--sql", spill, *words, "--output", str(tmp_path / "spill.csv")]) == 0
    (folder,) = set(read_labels(str(tmp_path / "spill.csv"))["label"])
    assert folder.startswith(f"{tempfile.gettempdir()}/lungopacity-")
    for wrong, said in (
        ("SELECT key AS image FROM films", "it must give image and label"),
        ("SELECT key AS image, 1 AS label, 2 AS diagnosis FROM films", "diagnosis"),
        ("SELECT nothing FROM films", "--sql: Binder Error"),
        ("SELECT keys FROM films", 'Candidate bindings: "key"'),
        ("-- nothing", "--sql: gives no table; it must give image and label"),
        ("SELECT * FROM read_csv('/etc/passwd')", "--sql: "),
    ):
        assert main(["labels", "--sql", wrong, *words, "--output", output]) == 2
        assert said in capsys.readouterr().err


def test_names_of_digits_keep_all_digits_wherever_they_are_in_a_csv(tmp_path):
    rows = [f"{100000 + n},Normal,{n},0.5,{n}" for n in range(21_000)]
    rows += ["000123,Opacity,0042,1.5,1", "0x1F,Opacity,-01,2,None"]
    (tmp_path / "t.csv").write_text("\n".join(["file,finding,mrn,score,pages", *rows]))
    sql = "SELECT file AS image, finding AS label, mrn AS patient_id FROM t WHERE score > 0.5"
    frame = labels_of_tables(sql, {"t": str(tmp_path / "t.csv")})
    assert frame[["image", "patient_id"]].to_numpy().tolist() == [
        ["000123", "0042"],
        ["0x1F", "-01"],
    ]


def test_patients_with_long_numbers_stay_distinct(tmp_path):
    numbers = [f"2760001234567890000{n}" for n in range(8)]
    rows = [f"{n}.png,Normal,{number}" for n, number in enumerate(numbers)]
    (tmp_path / "t.csv").write_text("\n".join(["file,finding,mrn", *rows]))
    sql = "SELECT file AS image, finding AS label, mrn AS patient_id FROM t"
    frame = labels_of_tables(sql, {"t": str(tmp_path / "t.csv")})
    labels = write_labels(frame, str(tmp_path / "labels.csv"))
    assert labels["patient_id"].tolist() == numbers


def test_a_warning_about_labels_that_are_written_does_not_say_otherwise(tmp_path, caplog):
    (tmp_path / "t.csv").write_text(TABLES["nih"].replace(",33,", ",414,"))
    output = str(tmp_path / "l.csv")
    write_labels(labels_of_layout("nih", {"entries": str(tmp_path / "t.csv")}), output)
    assert f"{output}: 1 values of patient_age_years are not a number" in caplog.text


def test_images_without_a_patient_are_counted(tmp_path):
    (tmp_path / "l.csv").write_text("image,label,patient_id\na,x,1\nb,x,1\nc,x,\nd,y,\n")
    told = summary(read_labels(str(tmp_path / "l.csv"))).splitlines()
    assert told[1] == "  x: 3 images, 1 patient, 1 image without patient_id"
    assert told[2] == "  y: 1 image, no patient_id"


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELECT image, label, 'dev' AS split FROM t", "unknown split dev"),
        ("SELECT * FROM t WHERE false", "no rows"),
        ("SELECT image, NULL AS label FROM t", "without image or label"),
        ("FROM t UNION ALL FROM t", "more than one row names"),
    ],
)
def test_labels_that_would_be_refused_are_not_written(tmp_path, capsys, sql, said):
    good = tmp_path / "good.csv"
    good.write_text("image,label\na.png,Normal\n")
    assert main(["labels", "--table", f"t={good}", "--sql", sql, "--output", str(good)]) == 2
    assert re.search(rf"not written: .*good.csv: .*{said}", capsys.readouterr().err)
    assert good.read_text() == "image,label\na.png,Normal\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give exactly one of --folders, --layout and --sql"),
        (["--sql", "SELECT 1", "--folders", "x"], "give exactly one of"),
        (["--layout", "mimic"], "is none of rsna, nih"),
        (["--layout", "nih"], "takes --table entries=FILE: NIH ChestX-ray14"),
        (["--layout", "nih", "--table", "entries=/nowhere/x.csv"], "x.csv: cannot be read"),
        (["--sql", "SELECT 1", "--table", "nothing"], "'nothing' is not of the form NAME=FILE"),
        (["--sql", "SELECT 1", "--table", "a=x", "--table", "a=y"], "'a' is given 2 times"),
        (["--sql", "SELECT 1", "--table", "a=x", "--table", "A=y"], "some differ only in capitals"),
        (
            ["--sql", "SELECT 1", "--table", "a/b=x"],
            "--table a/b=…: a name consists of up to 64 letters",
        ),
        (
            ["--sql", "SELECT 1", "--table", 'a"b=x'],
            "a name consists of up to 64 letters, digits and _",
        ),
        (["--sql", "SELECT 1", "--table", f"{'a' * 300}=x"], "a name consists of up to 64 letters"),
    ],
)
def test_a_wrong_call_says_what_is_missing(arguments, said, tmp_path, capsys):
    assert main(["labels", *arguments, "--output", str(tmp_path / "l.csv")]) == 2
    assert said in capsys.readouterr().err


def test_a_table_of_another_set_is_named_with_what_is_wanted(tmp_path):
    (tmp_path / "t.csv").write_text(TABLES["rsna"])
    said = r"--layout nih, which takes NIH ChestX-ray14: entries = .*: .*t.csv: Binder Error"
    with pytest.raises(UserError, match=said):
        labels_of_layout("nih", {"entries": str(tmp_path / "t.csv")})


def test_a_file_that_is_no_table_is_named(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(b"PAR1" + bytes(100))
    arguments = [
        "--sql",
        "SELECT 1",
        "--table",
        f"x={tmp_path}/x.png",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["labels", *arguments]) == 2
    assert "x.png: is neither CSV nor Parquet" in capsys.readouterr().err

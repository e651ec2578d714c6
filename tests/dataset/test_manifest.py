import gzip
import io

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lungopacity.dataset.manifest import (
    assign_splits,
    check_classes,
    check_contents,
    check_patients,
    left_out,
    read_labels,
    select_classes,
)
from lungopacity.errors import UserError
from lungopacity.storage import open_store

URI = "labels.csv"


def labels(patients: int = 40, films: int = 3) -> pd.DataFrame:
    rows = [
        {
            "image": f"{patient}-{film}.png",
            "label": "Lung_Opacity" if patient % 3 == 0 else "Normal",
            "split": None,
            "patient_id": f"p{patient}",
        }
        for patient in range(patients)
        for film in range(films)
    ]
    return pd.DataFrame(rows)


def test_csv_and_parquet_are_read_alike(store_uri):
    store = open_store(store_uri)
    frame = labels().drop(columns="split")
    parquet = io.BytesIO()
    frame.to_parquet(parquet)
    store.write("a.csv", frame.to_csv(index=False).encode())
    store.write("a.parquet", parquet.getvalue())
    from_csv, from_parquet = (read_labels(f"{store_uri}/{name}") for name in ("a.csv", "a.parquet"))
    pd.testing.assert_frame_equal(from_csv, from_parquet)
    assert from_csv["split"].isna().all()


def test_words_that_pandas_reads_as_missing_are_names_in_either_file(tmp_path):
    frame = pd.DataFrame(
        {
            "image": ["NA", "null", "c", "d"],
            "label": ["None", "NA", "Normal", "NA"],
            "patient_id": ["n/a", "NaN", None, ""],
            "patient_age_years": ["50", "NA", "60", ""],
        }
    )
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    from_csv, from_parquet = (
        read_labels(str(tmp_path / f"a.{kind}")) for kind in ("csv", "parquet")
    )
    pd.testing.assert_frame_equal(from_csv, from_parquet)
    assert from_csv["image"].tolist() == ["NA", "null", "c", "d"]
    assert from_csv["patient_id"].fillna("?").tolist() == ["n/a", "NaN", "?", "?"]
    assert from_csv["patient_age_years"].fillna(-1).tolist() == [50, -1, 60, -1]


def test_names_of_digits_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("image,label,patient_id\n007,Normal,0012\n")
    frame = read_labels(str(tmp_path / "a.csv"))
    assert frame.loc[0, ["image", "patient_id"]].tolist() == ["007", "0012"]


def test_spaces_around_a_patients_name_do_not_make_another_patient(tmp_path):
    (tmp_path / "a.csv").write_text("image,label,patient_id\na,N,P 1\nb,N,P 1 \nc,N, P 1\nd,N,  \n")
    frame = read_labels(str(tmp_path / "a.csv"))
    assert frame["patient_id"].fillna("none").tolist() == ["P 1", "P 1", "P 1", "none"]


def test_sex_and_view_take_the_values_of_headers_whatever_their_case(tmp_path):
    (tmp_path / "a.csv").write_text(
        "image,label,patient_sex,view_position\n"
        "a,N,Male,pa\nb,N,female,Ap\nc,N,o,PA\nd,N,,\ne,N,Mann,AP_horizontal\n"
    )
    frame = read_labels(str(tmp_path / "a.csv"))
    assert frame["patient_sex"].fillna("-").tolist() == ["M", "F", "O", "-", "Mann"]
    assert frame["view_position"].fillna("-").tolist() == ["PA", "AP", "PA", "-", "AP_horizontal"]


@pytest.mark.parametrize(
    "patients",
    [
        pd.Series([7.0, None, 12.0]),
        pd.Series([7, None, 12], dtype="Int64"),
        pd.Series(["7", None, "12"], dtype="category"),
        pd.Series(["7", "", "12"]),
    ],
)
def test_numbers_in_parquet_become_text_and_empty_text_is_missing(tmp_path, patients):
    frame = pd.DataFrame({"image": ["a", "b", "c"], "label": [0, 1, 0], "patient_id": patients})
    frame.assign(split="", patient_sex=["F", "", None]).to_parquet(tmp_path / "a.parquet")
    found = read_labels(str(tmp_path / "a.parquet"))
    assert found["label"].tolist() == ["0", "1", "0"]
    assert found["patient_id"].fillna("none").tolist() == ["7", "none", "12"]
    assert found["split"].isna().all()
    assert found["patient_sex"].isna().tolist() == [False, True, True]


def test_whole_numbers_with_gaps_keep_all_their_digits(tmp_path):
    numbers = [2**53, 2**53 + 1, None]
    table = pa.table({"image": ["a", "b", "c"], "label": [0, 1, 0], "patient_id": numbers})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read_labels(str(tmp_path / "a.parquet"))["patient_id"]
    assert found.fillna("none").tolist() == ["9007199254740992", "9007199254740993", "none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,Normal\n", "no column 'image' .it has: file, label"),
        ("image,label\n", "no rows"),
        (
            "image,label\na,x\nb,\n,\n",
            "2 rows without image or label, such as that of b; fill or remove them",
        ),
        ("image,label\na,x\n,\n", "1 row without image or label, such as row 2; fill"),
        ("image,label\na,Normal\na,Normal\n", "more than one row names 1 image, such as a"),
        ("image,label" + 3 * "\na,Normal", "more than one row names 1 image, such as a"),
        ("image,label,split\na,Normal,dev\n", "unknown split dev"),
        ("image,label,split\na,Normal, test\n", "unknown split ' test'; .* spelt exactly so"),
        ("image,label,split\na,Normal,test,\n", "line 2 has 4 fields, the header has 3"),
        ("image,label,split\n\n'a\n',x,test\nb,Normal\n", "line 3 has 1 fields"),
        ('image,label,split\n"a\n",x,test\nb,Normal\n', "line 4 has 2 fields"),
        ("image,label,label\na,Normal,x\n", "has 2 columns named 'label'"),
        ("image;label\na;Normal\n", "semicolons separate its columns"),
        ("image\tlabel\na\tNormal\n", "tabs separate its columns"),
        ("Image,label\na,Normal\n", "has a column 'Image'; spell it 'image'"),
        ("image, label\na,Normal\n", "has a column ' label'; spell it 'label'"),
        ("image,label,Split\na,Normal,test\n", "has a column 'Split'; spell it 'split'"),
        ("image,label,Site\na,Normal,A\n", "has a column 'Site'; spell it 'site'"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('image,label\na,"Normal\nb,Normal\n', "neither CSV nor Parquet|line 3"),
        (f'image,label\na,"{"x" * 140_000}', r"line 2 is not CSV \(field larger"),
        ("image,label\né,Normal\n".encode("latin-1"), "line 2 is not UTF-8; save it as CSV UTF-8"),
        ("image,label\n".encode("utf-16"), "line 1 is not UTF-8; save it as CSV UTF-8"),
        (gzip.compress(b"image,label\n", mtime=0), "compressed with gzip; decompress it"),
        (b"PAR1" + bytes(50), "is a damaged Parquet file"),
    ],
)
def test_a_wrong_file_is_refused_with_what_to_do(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_labels(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("text", ["\ufeffimage,label\na,Normal\n", "image,label\r\ra,Normal\r"])
def test_what_spreadsheets_write_is_read(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert read_labels(str(tmp_path / "a.csv")).loc[0, ["image", "label"]].tolist() == [
        "a",
        "Normal",
    ]


@pytest.mark.parametrize(("value", "kind"), [(b"Normal", "bytes"), (["Normal"], "ndarray")])
def test_parquet_that_holds_no_text_is_refused(tmp_path, value, kind):
    pd.DataFrame({"image": ["a"], "label": [value]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=f"column 'label' holds {kind} and not text; write it as"):
        read_labels(str(tmp_path / "a.parquet"))


def test_what_is_not_an_age_in_years_is_ignored_with_a_warning(tmp_path, caplog):
    rows = "".join(f"{n},Normal,{age}\n" for n, age in enumerate(["62", "-3", "155", "45 Y", ""]))
    (tmp_path / "a.csv").write_text(f"image,label,patient_age_years\n{rows}")
    ages = read_labels(str(tmp_path / "a.csv"))["patient_age_years"]
    assert ages.isna().tolist() == [False, True, True, True, True]
    assert ages[0] == 62
    assert "3 values of patient_age_years are not a number from 0 to 120" in caplog.text


def test_ages_may_be_written_as_in_headers(tmp_path):
    rows = "".join(f"{n},Normal,{age}\n" for n, age in enumerate(["045Y", "018M", "7.5", " 9 "]))
    (tmp_path / "a.csv").write_text(f"image,label,patient_age_years\n{rows}")
    ages = read_labels(str(tmp_path / "a.csv"))["patient_age_years"]
    assert ages.tolist() == [45, 1, 7.5, 9]


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(no such file\); give the path"):
        read_labels(str(tmp_path / "none.csv"))


def test_a_file_whose_read_is_refused_is_told_with_what_to_do(proxy, s3_uri):
    open_store(s3_uri).write("labels.csv", b"image,label\na.png,Normal\n")
    proxy.choose_any = lambda _, path, __: "403" if "labels.csv" in path else None
    told = (
        r"labels cannot be read \(access denied \(AccessDenied\)\); check the credentials and perm"
    )
    with pytest.raises(UserError, match=told):
        read_labels(f"{s3_uri}/labels.csv")


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    with pytest.raises(UserError, match=r"neither CSV nor Parquet|no column"):
        read_labels(str(tmp_path / "a.csv"))


def test_other_classes_are_left_out_and_a_missing_one_refused():
    frame = labels()
    chosen = select_classes(frame, {"Normal": "Healthy"}, URI)
    assert set(chosen["label"]) == {"Healthy"}
    spaced = frame.assign(label="Normal ")
    with pytest.raises(UserError, match=r"the labels have 'Normal ' \(120\)"):
        select_classes(spaced, {"Normal": "Normal"}, URI)
    with pytest.raises(
        UserError, match=r"no image of class 'COVID'; the labels have Normal \(78\)"
    ):
        select_classes(frame, {"Normal": "Normal", "COVID": "COVID"}, URI)


def test_of_many_labels_the_most_common_are_shown(caplog):
    """As when a column of free text is given as labels."""
    caplog.set_level("INFO")
    frame = labels(40, 1).assign(label=["Normal"] * 8 + [f"text {n:02}" for n in range(32)])
    with pytest.raises(UserError, match=r"have Normal \(8\), text \d\d \(1\).* and 13 more; cho"):
        select_classes(frame, {"TB": "TB"}, URI)
    select_classes(frame, {"Normal": "Normal"}, URI)
    assert caplog.text.count("(1)") == 20
    assert caplog.text.endswith(" and 12 more\n")


def test_images_of_no_class_are_counted_by_split_and_label():
    frame = labels(4, 1).assign(label=["Normal", "TB", "TB", "Lung_Opacity"])
    classes = {"Normal": "Normal", "Healthy": "Normal"}
    assert left_out(frame, classes) == {"no split": {"TB": 2, "Lung_Opacity": 1}}
    frame = frame.assign(split=["train", "train", "test", "test"])
    assert left_out(frame, classes) == {"train": {"TB": 1}, "test": {"TB": 1, "Lung_Opacity": 1}}
    assert left_out(frame.head(1), classes) == {}


def test_a_merged_class_needs_only_one_of_its_labels():
    frame = labels()
    merged = {"Normal": "Normal", "COVID": "Ill", "Lung_Opacity": "Ill"}
    assert set(select_classes(frame, merged, URI)["label"]) == {"Normal", "Ill"}
    with pytest.raises(UserError, match=r"class 'Ill' \(COVID \+ Flu\)"):
        select_classes(frame, {"Normal": "Normal", "COVID": "Ill", "Flu": "Ill"}, URI)


def test_splits_keep_patients_together_and_have_every_class():
    frame = assign_splits(labels(), URI, seed=1)
    assert frame.groupby("patient_id")["split"].nunique().max() == 1
    shares = frame["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.6, abs=0.06)
    assert shares["test"] == pytest.approx(0.2, abs=0.06)
    assert frame.groupby("split")["label"].nunique().eq(2).all()
    check_patients(frame, URI)


def test_the_drawn_splits_never_change():
    """Otherwise films that older models learnt from would become test films."""
    frame = labels(patients=15, films=1)
    for given, cut in (
        (None, {"test": "p1 p11 p12", "validation": "p3 p10 p13"}),
        ("train", {"validation": "p1 p11 p12"}),
    ):
        drawn = assign_splits(frame.assign(split=given), URI)
        patients = drawn.groupby("split")["patient_id"].agg(" ".join).to_dict()
        assert set(patients) == {"train", *cut}
        assert {name: patients[name] for name in cut} == cut


def test_the_seed_decides_the_split():
    first, again, other = (assign_splits(labels(), URI, seed=s)["split"] for s in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)


def test_given_splits_are_kept_and_a_validation_split_is_cut_from_train():
    frame = labels()
    frame["split"] = ["test" if name.startswith("1") else "train" for name in frame["image"]]
    split = assign_splits(frame, URI, seed=0)["split"]
    assert (split == "test").equals(frame["split"] == "test")
    assert 0.1 < (split == "validation").sum() / (frame["split"] == "train").sum() < 0.3


def test_half_filled_splits_are_refused():
    frame = labels()
    frame.loc[:5, "split"] = "train"
    with pytest.raises(UserError, match="114 of 120 rows have no split"):
        assign_splits(frame, URI, seed=0)


def test_rows_without_a_patient_give_a_warning(caplog):
    assign_splits(labels().assign(patient_id=None), URI, seed=0)
    assert "labels.csv: each row without patient_id is split as a patient of its own" in caplog.text


def test_too_few_patients_to_split_are_refused():
    """With five patients in a class, each split gets at least one."""
    with pytest.raises(
        UserError, match="the smallest class has 4 patients, and a split needs at least 5"
    ):
        assign_splits(labels(patients=12), URI, seed=0)
    with pytest.raises(UserError, match="; give some of the train patients the split validation,"):
        assign_splits(labels(patients=12).assign(split="train"), URI, seed=0)
    films = assign_splits(labels(patients=15), URI, seed=0)
    assert len(films.groupby(["split", "label"])) == 6


def test_a_class_that_a_split_lacks_is_named():
    frame = assign_splits(labels(), URI)
    names = ["Normal", "Lung_Opacity"]
    check_classes(frame, names, URI)
    train, opacity = frame["split"] == "train", frame["label"] == "Lung_Opacity"
    with pytest.raises(UserError, match=r"no image has the split train \(.*validation \(24\)"):
        check_classes(frame[~train], names, URI)
    with pytest.raises(UserError, match="validation split has no image of class 'Lung_Opacity'; g"):
        check_classes(frame[train | ~opacity], names, URI)


def test_a_patient_in_two_splits_is_refused():
    frame = labels().assign(split="train")
    frame.loc[0, "split"] = "test"
    said = r"more than one split has films of 1 patient, such as 0-0\.png and 0-1\.png, which"
    with pytest.raises(UserError, match=said):
        check_patients(frame, URI)


def test_identical_files_in_two_splits_are_refused():
    frame = labels().assign(split="train")
    frame["content_sha256"] = frame["image"]
    check_contents(frame, URI)
    frame.loc[0, ["content_sha256", "split"]] = ["1-0.png", "test"]
    with pytest.raises(
        UserError, match=r"more than one split has copies of 1 file, such as 0-0\.png"
    ):
        check_contents(frame, URI)

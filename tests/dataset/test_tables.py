"""CSV files as people and public sets write them: no row is lost or shifted without a word."""

from __future__ import annotations

import gzip

import pytest

from lungopacity.dataset.layouts import labels_of_layout, labels_of_tables
from lungopacity.dataset.manifest import read_labels
from lungopacity.errors import UserError

SELECT = "SELECT image, label FROM t"


def of_sql(path, text, sql=SELECT):
    (path / "t.csv").write_bytes(text.encode())
    return labels_of_tables(sql, {"t": str(path / "t.csv")}).to_numpy().tolist()


@pytest.mark.parametrize("end", ["", ","], ids=["short rows", "full rows"])
def test_the_header_of_nihs_table_ends_with_a_comma(end, tmp_path):
    """Of its copies, some have that comma in their rows, too, and some have not."""
    (tmp_path / "t.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
        f"00000001_000.png,Cardiomegaly|Emphysema,0,1,58,M,PA,2682,2749,0.143,0.143{end}\n"
        f"00000002_000.png,No Finding,0,2,81,M,PA,2500,2048,0.171,0.171{end}\n"
    )
    frame = labels_of_layout("nih", {"entries": str(tmp_path / "t.csv")})
    assert frame["label"].tolist() == ["Not_Normal", "Normal"]
    assert frame["patient_age_years"].tolist() == [58, 81]


def test_labels_may_have_columns_without_a_name_at_the_end(tmp_path):
    (tmp_path / "l.csv").write_text("image,label,,\n1.png,a\n2.png,b,,\n")
    assert read_labels(str(tmp_path / "l.csv"))["label"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # As NIH's test_list.txt: its first film would count as the column's name.
        ("1.png\n2.png\n", "t.csv: its first line names a film, 1.png, and no columns; write"),
        ("1.png,a\n2.png,b\n", "its first line names a film, 1.png"),
        (
            "7 1.jpeg negative\n8 2.jpeg positive\n",
            "its first line names a film, 7 1.jpeg negative",
        ),
        ("image,label\n1.png,a\n2.png\n", "line 3 has 1 fields, the header has 2"),
        ("image,label\n1.png,a\n2.png,b,c\n", "line 3 has 3 fields, the header has 2"),
        ("image;label\n1.png;a\n2.png\n", "line 3 has 1 fields, the header has 2"),
        ('image,label\n1.png,"a\n2.png,b\n', r"is not CSV \(unexpected end of data\); fix it"),
        ("image,label,label\n1.png,a,b\n", "has 2 columns named 'label'; keep one of them"),
        ("image,label,Label\n1.png,a,b\n", "2 columns are named 'label' but for capitals"),
        # As `cat a.csv b.csv` makes it, of files with and without a mark of UTF-8.
        ("image,label\n1.png,a\nimage,label\n2.png,b\n", "line 3 repeats the names of the columns"),
        ("image,label\n1.png,a\n\ufeffimage,label\n2.png,b\n", "line 3 repeats the names"),
        ("sep=;\n", "t.csv: names no columns"),
        ('""\n', "t.csv: names no columns"),
    ],
)
def test_a_table_that_would_lose_or_mix_up_values_is_refused(text, said, tmp_path):
    with pytest.raises(UserError, match=said):
        of_sql(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        '\ufeffimage;label\r\n"Müller; 1.png";Normal\r\n2.png;"Lung\r\nOpacity"\r\n\r\n',
        'sep=;\r\nimage;label\r\n"Müller; 1.png";Normal\r\n2.png;"Lung\r\nOpacity"\r\n',
        '\timage\tlabel\n0\tMüller; 1.png\tNormal\n1\t2.png\t"Lung\r\nOpacity"\n',
        'image|label|note\rMüller; 1.png|Normal|\r\r2.png|"Lung\r\nOpacity"|""\r',
        "file (.dcm),image,label\n,Müller; 1.png,Normal\n'x',2.png,\"Lung\r\nOpacity\"",
    ],
    ids=["Excel's", "sep=", "tabs", "bars", "commas"],
)
def test_tables_may_have_other_separators_and_line_ends(text, tmp_path):
    rows = [["2.png", "Lung\r\nOpacity"], ["Müller; 1.png", "Normal"]]
    assert of_sql(tmp_path, text) == rows


def test_quotes_are_part_of_a_value_unless_they_enclose_it(tmp_path):
    text = 'image,label\n\'1.png\',"say ""a"""\n2.png,[\'a\']\n'
    assert of_sql(tmp_path, text) == [["'1.png'", 'say "a"'], ["2.png", "['a']"]]


def test_no_field_is_lost_after_a_blank_line_that_ends_in_cr(tmp_path):
    """pandas would take the label for the image, and the patient for the label."""
    text = "note,image,label,patient_id\r\r,1.png,Normal,7\r"
    (tmp_path / "l.csv").write_bytes(text.encode())
    labels = read_labels(str(tmp_path / "l.csv"))
    assert labels[["image", "label", "patient_id"]].to_numpy().tolist() == [
        ["1.png", "Normal", "7"]
    ]
    assert of_sql(tmp_path, text) == [["1.png", "Normal"]]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("image,label\na,Normäl\n".encode("latin-1"), "t.csv: line 2 is not UTF-8; save it as"),
        ("image,label\na,Normal\n".encode("utf-16"), "t.csv: line 1 is not UTF-8; save it as"),
        (
            gzip.compress(b"image,label\na,Normal\n"),
            "t.csv: is compressed with gzip; decompress it",
        ),
        (
            b"PK\x03\x04\x14\0",
            "t.csv: is a spreadsheet or a zip file; save it as CSV UTF-8, or unzip",
        ),
        (b"", "t.csv: is empty"),
    ],
    ids=["latin-1", "utf-16", "gzip", "spreadsheet", "empty"],
)
def test_a_table_in_another_encoding_is_refused_with_what_to_do(tmp_path, data, said):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(UserError, match=said):
        labels_of_tables("SELECT image, label FROM t", {"t": str(tmp_path / "t.csv")})


def test_labels_may_begin_with_excels_line_about_commas(tmp_path):
    (tmp_path / "l.csv").write_text("sep=,\nimage,label\n1.png,a\n2.png,b\n")
    assert read_labels(str(tmp_path / "l.csv"))["label"].tolist() == ["a", "b"]

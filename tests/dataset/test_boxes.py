import io

import pandas as pd
import pytest

from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.dataset.boxes import BOX_COLUMNS, read_boxes
from lungopacity.errors import UserError
from lungopacity.storage import open_store

HEAD = ",".join(BOX_COLUMNS)


def test_csv_and_parquet_are_read_alike_and_other_columns_left_out(store_uri):
    store = open_store(store_uri)
    frame = pd.DataFrame(
        {"image": ["7", "7", "a/b.png"], "x": [1, 2, -3], "y": [0.5, 2, 3], "width": [4, 5, 6]}
    ).assign(height=[7.25, 8, 9], reader="R1")
    parquet = io.BytesIO()
    frame.to_parquet(parquet)
    store.write("a.csv", frame.to_csv(index=False).encode())
    store.write("a.parquet", parquet.getvalue())
    from_csv, from_parquet = (read_boxes(f"{store_uri}/{name}") for name in ("a.csv", "a.parquet"))
    pd.testing.assert_frame_equal(from_csv, from_parquet)
    assert from_csv.columns.tolist() == list(BOX_COLUMNS)
    assert from_csv.dtypes.astype(str).tolist()[1:] == ["float64"] * 4
    assert from_csv.loc[1].tolist() == ["7", 2.0, 2.0, 5.0, 8.0]


def test_a_file_without_rows_has_no_boxes(tmp_path):
    (tmp_path / "a.csv").write_text(f"{HEAD}\n")
    frame = read_boxes(str(tmp_path / "a.csv"))
    assert frame.empty
    assert frame.dtypes.astype(str).tolist()[1:] == ["float64"] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,x,y,w,h\na,1,2,3,4\n", r"no column 'width' \(it has: image, x, y, w, h\)"),
        (f"{HEAD}\n,1,2,3,4\n", "no image is named in 1 row; fill or remove"),
        (f"{HEAD}\na,1,2,3,4\nb,1,left,3,4\n", "'y' is not a number in 1 row, such as that of b"),
        (
            f"{HEAD}\na,,,,\n",
            "'x' is not a number in 1 row, such as that of a; an image without boxes",
        ),
        (f"{HEAD}\na,1,2,inf,4\n", "'width' is not a number in 1 row"),
        (f"{HEAD}\na,1,2,-3,4\n", "a width or height is not above 0 in 1 row, such as that of"),
        (f"{HEAD}\na,1,2,3,0\n", "a width or height is not above 0 in 1 row"),
    ],
)
def test_a_wrong_file_is_refused_with_what_to_do(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_boxes(str(tmp_path / "a.csv"))


def test_the_rsna_challenges_table_is_accepted(tmp_path):
    (tmp_path / "a.csv").write_text(
        "patientId,x,y,width,height,Target\n0004,,,,,0\n00e3,264.0,152.0,213.0,379.0,1\n"
        "00e3,562.0,152.0,256.0,453.0,1\n"
    )
    frame = read_boxes(str(tmp_path / "a.csv"))
    assert frame.columns.tolist() == list(BOX_COLUMNS)
    assert frame["image"].tolist() == ["00e3.dcm"] * 2
    assert frame.loc[1].tolist()[1:] == [562.0, 152.0, 256.0, 453.0]
    (tmp_path / "b.csv").write_text("patientId,x,y,width,height\na,1,,3,4\n")
    with pytest.raises(UserError, match=r"such as that of a\.dcm"):
        read_boxes(str(tmp_path / "b.csv"))


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"boxes cannot be read \(no such file\); give the path"):
        read_boxes(str(tmp_path / "none.csv"))


def test_a_file_that_is_no_table_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    with pytest.raises(UserError, match=r"neither CSV nor Parquet|no column"):
        read_boxes(str(tmp_path / "a.csv"))


def test_the_boxes_of_the_phantom_archive_are_inside_its_films(tmp_path):
    settings = PhantomSettings(images=8, image_size=64, opacity_fraction=0.7)
    write_phantom_archive(open_store(str(tmp_path)), settings)
    frame = read_boxes(str(tmp_path / "boxes.csv"))
    labels = pd.read_csv(tmp_path / "labels.csv").set_index("image")["label"]
    assert (labels[frame["image"].unique()] == "Lung_Opacity").all()
    assert (frame[["x", "y"]] >= 0).all().all()
    assert (frame["x"] + frame["width"]).max() <= 64
    assert (frame["y"] + frame["height"]).max() <= 64

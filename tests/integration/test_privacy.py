"""Nothing that identifies a patient comes out: planted in every text element, searched for."""

from __future__ import annotations

import io
import logging

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from pydicom.datadict import DicomDictionary

import lungopacity
from lungopacity.cli import main
from lungopacity.storage import open_store
from tests.films import dicom, encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

NAME = "ZZPLANTED"
NUMBER = "8675309424242"
BIRTH = "19310423"
PLANTED = (NAME, NUMBER, BIRTH)
FILM = grey_film().astype(np.uint16) * 16

_TEXT = {"AE": 16, "CS": 16, "LO": 64, "LT": 64, "PN": 64, "SH": 16, "ST": 64, "UC": 64, "UT": 64}
_KEPT = {  # without these the file is no film any more; they are planted one by one below
    "PhotometricInterpretation", "SOPClassUID", "Modality", "BodyPartExamined", "ViewPosition",
    "SpecificCharacterSet", "PresentationLUTShape", "VOILUTFunction",
}  # fmt: skip


def planted(**elements: object) -> bytes:
    """A film with a name, a number or a date of birth in every element that can hold one."""
    dataset = pydicom.dcmread(io.BytesIO(dicom(FILM)))
    count = 0
    with pydicom.config.disable_value_validation():
        for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
            if not keyword or keyword in _KEPT or tag >> 16 in (0x0000, 0x0002) or retired:
                continue
            if vr in _TEXT:
                value = f"{NAME}^{keyword}"[: _TEXT[vr]]
            elif vr in ("DA", "DT"):
                value = BIRTH
            elif vr == "AS":
                value = "095Y"
            elif vr == "UI":
                value = f"1.2.{NUMBER}"
            else:
                continue
            dataset.add_new(tag, vr, value)
            count += 1
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        buffer = io.BytesIO()
        dataset.SOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
        pydicom.dcmwrite(buffer, dataset)
    assert count > 1000
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    place = tmp_path_factory.mktemp("privacy")
    store = open_store(str(place / "archive"))
    whole = planted()
    store.write("film.dcm", whole)
    for keyword in ("Modality", "BodyPartExamined", "ViewPosition", "PhotometricInterpretation"):
        store.write(f"{keyword}.dcm", planted(**{keyword: f"{NAME}^X"}))
    store.write("window.dcm", planted(VOILUTFunction=f"{NAME}^X", WindowCenter=5, WindowWidth=5))
    store.write("rows.dcm", planted(Rows=0))
    store.write("lateral.dcm", planted(ViewPosition="LL"))
    store.write("cut.dcm", whole[:-3000])
    store.write("damaged.dcm", whole[:3000] + NAME.encode() * 500 + whole[5000:])
    store.write("x.tar", tar({"inner.dcm": whole, "junk": NAME.encode()}))
    store.write("picture.png", encoded(grey_film(), "PNG"))
    write_tiny_model(str(place / "model"), is_compiled=True)
    (place / "key").write_text("0123456789abcdef0123456789abcdef")
    return place


def everything_in(uri: str) -> bytes:
    """All bytes of a folder, Parquet unpacked into text."""
    store = open_store(uri)
    texts = []
    for item in store.list():
        data = store.read(item.key)
        texts.append(item.key.encode() + data)
        if item.key.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            texts.append(repr((table.schema, table.to_pylist())).encode())
    return b"".join(texts)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("options", [[], ["--hmac-key", "{}/key"]], ids=["plain", "with-a-key"])
def test_what_is_planted_in_headers_reaches_no_output_and_no_log(archive, tmp_path, capfd, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUNGOPACITY_DEBUG", "1")
        logging.getLogger().setLevel(logging.DEBUG)
        code = main(
            [
                "screen", "--archive", f"{archive}/archive", "--model", f"{archive}/model",
                "--output", str(tmp_path / "results"), "--max-failed-fraction", "1",
                *(option.format(archive) for option in options),
            ]
        )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 1, out + err
    written = everything_in(str(tmp_path / "results"))
    assert b"lateral_view" in written
    for secret in PLANTED:
        assert secret.encode() not in written
        assert secret not in out + err
    found = lungopacity.query(
        str(tmp_path / "results"),
        "SELECT count(*) n, count(patient_hmac) ids, max(patient_age_years) age FROM predictions",
    ).to_pylist()[0]
    assert found["n"] == 13
    assert (found["ids"] > 5) == bool(options)
    assert found["age"] == 90


@pytest.mark.usefixtures("ray_cluster")
def test_object_names_are_hashed_on_request_and_kept_elsewhere(archive, tmp_path, capfd):
    store = open_store(str(tmp_path / "archive"))
    store.write(f"{NAME}/a.png", encoded(grey_film()))
    store.write("b.tar", tar({f"{NAME}.png": encoded(grey_film(1))}))
    store.write(f"{NAME}.txt", b"notes")
    (tmp_path / "labels.csv").write_text(f"image,label\n{NAME}/a.png,Normal\n{NAME}.png,Normal\n")
    code = main(
        [
            "screen", "--archive", str(tmp_path / "archive"), "--model", f"{archive}/model",
            "--output", str(tmp_path / "results"), "--labels", str(tmp_path / "labels.csv"),
            "--hmac-key", f"{archive}/key", "--hash-keys", "--run-id", "night",
        ]
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0, err
    assert NAME not in out + err
    assert NAME.encode() not in everything_in(str(tmp_path / "results"))
    assert NAME.encode() in everything_in(str(tmp_path / "results-key-map"))
    labelled = lungopacity.query(
        str(tmp_path / "results"),
        "SELECT count(label) labels, min(length(image)) short FROM predictions",
    )
    assert labelled.to_pylist() == [{"labels": 2, "short": 64}]
    # Labels of later find none of them; that is said, and no name.
    later = ["threshold", "--model", f"{archive}/model", "--results", str(tmp_path / "results")]
    later += ["--labels", str(tmp_path / "labels.csv"), "--rule", "youden", "--name", "ours"]
    assert main(later) == 2
    out, err = capfd.readouterr()
    assert "names none of the 2 films" in err
    assert "names are hashed (--hash-keys): give the labels to `screen`" in err
    assert NAME not in out + err

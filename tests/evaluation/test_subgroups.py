from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lungopacity.dataset.manifest import read_labels
from lungopacity.errors import UserError
from lungopacity.evaluation.subgroups import MOST_NUMBERS, MOST_VALUES, check_columns, column_groups

URI = "labels.csv"


def groups_of(tmp_path, by: tuple[str, ...], rows: int = 100, **columns) -> pd.DataFrame:
    frame = pd.DataFrame({"image": [f"{n}.png" for n in range(rows)], "label": "Normal", **columns})
    frame.to_csv(tmp_path / URI, index=False)
    return column_groups(read_labels(str(tmp_path / URI), by), by, URI)


def test_words_and_a_few_numbers_are_taken_one_by_one(tmp_path):
    found = groups_of(
        tmp_path, ("manufacturer", "detector"), 4,
        manufacturer=["Fuji", "GE", None, "GE"], detector=[1, 2, None, 2],
    )  # fmt: skip
    assert found["manufacturer"].tolist() == ["Fuji", "GE", None, "GE"]
    assert found["detector"].tolist() == ["1", "2", None, "2"]
    assert found.index.tolist() == ["0.png", "1.png", "2.png", "3.png"]


def test_as_many_values_as_are_allowed_form_subgroups(tmp_path):
    words = [f"name {n % MOST_VALUES}" for n in range(100)]
    numbers = [n % MOST_NUMBERS for n in range(100)]
    found = groups_of(tmp_path, ("note", "kvp"), note=words, kvp=numbers, site=words)
    assert found.nunique().to_dict() == {
        "note": MOST_VALUES, "kvp": MOST_NUMBERS, "site": MOST_VALUES,
    }  # fmt: skip
    assert found["kvp"].iloc[0] == "0"


def test_many_numbers_are_divided_at_their_quartiles_and_extremes_are_not_told(tmp_path):
    found = groups_of(tmp_path, ("kvp",), kvp=[*range(1, 100), None])["kvp"]
    counts = found.value_counts().to_dict()
    assert counts == {
        "Q1 (up to 25.5)": 25,
        "Q2 (25.5 to 50)": 25,
        "Q3 (50 to 74.5)": 24,
        "Q4 (above 74.5)": 25,
    }
    assert found.iloc[-1] is None


def test_numbers_of_which_most_are_one_have_fewer_quarters(tmp_path):
    found = groups_of(tmp_path, ("dose",), dose=[0.0] * 60 + [float(n) for n in range(1, 41)])
    assert found["dose"].value_counts().to_dict() == {
        "Q1 (up to 0)": 60, "Q2 (0 to 15.25)": 15, "Q3 (above 15.25)": 25,
    }  # fmt: skip


def test_a_site_is_taken_unasked_by_its_names_and_other_columns_are_not(tmp_path):
    found = groups_of(
        tmp_path, (), 30, site=[f"0{n % 12:02}" for n in range(30)], secret=["x"] * 30
    )
    assert found.columns.tolist() == ["site"]
    assert found["site"].iloc[3] == "003"
    assert groups_of(tmp_path, (), 3).columns.tolist() == []


def test_too_many_words_are_refused_and_too_many_sites_left_out(tmp_path, caplog):
    names = [f"name {n}" for n in range(100)]
    with pytest.raises(
        UserError, match=f"'note' has 100 different values, but .* at most {MOST_VALUES}"
    ):
        groups_of(tmp_path, ("note",), note=names)
    assert groups_of(tmp_path, (), site=names).columns.tolist() == []
    assert "no subgroups by site" in caplog.text
    with pytest.raises(UserError, match="'site' has 100 different values"):
        groups_of(tmp_path, ("site",), site=names)


def test_a_column_that_is_missing_is_told_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"no column 'sitte' \(it has: image, label, site\)"):
        groups_of(tmp_path, ("sitte",), site="A")


def test_columns_of_every_report_are_not_taken_twice(tmp_path):
    found = groups_of(tmp_path, ("view_position", "patient_age_years", "x", "x"), x=1)
    assert found.columns.tolist() == ["x"]


@pytest.mark.parametrize("column", ["patient_id", "image", "label"])
def test_patient_ids_form_no_subgroups(column):
    with pytest.raises(UserError, match=f"--by {column}: cannot form subgroups"):
        check_columns(["site", column])


def test_infinite_numbers_are_unknown(tmp_path):
    found = groups_of(tmp_path, ("x",), 20, x=[*range(19), np.inf])["x"]
    assert found.iloc[-1] is None


def test_parquet_columns_are_as_those_of_a_csv_or_refused(tmp_path):
    """What only Parquet can hold: empty texts, and several values a row."""
    uri = str(tmp_path / "labels.parquet")
    frame = pd.DataFrame({"image": ["a", "b"], "label": "Normal", "scanner": ["", "GE"]})
    frame.assign(findings=[[1, 2], None]).to_parquet(uri)
    labels = read_labels(uri, ("scanner", "findings"))
    assert column_groups(labels, ("scanner",), uri)["scanner"].tolist() == [None, "GE"]
    with pytest.raises(UserError, match="column 'findings' holds several values a row; give a"):
        column_groups(labels, ("findings",), uri)

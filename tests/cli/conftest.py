from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An archive of eight labelled films, a model, and labels."""
    store = open_store(str(tmp_path / "archive"))
    films = {f"{number}.png": encoded(grey_film(number)) for number in range(8)}
    for name in list(films)[:4]:
        store.write(name, films[name])
    store.write("x.tar", tar({name: films[name] for name in list(films)[4:]}))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    labels = pd.DataFrame(
        {
            "image": list(films),
            "label": ["Normal", "Lung_Opacity"] * 4,
            "split": ["train"] * 4 + ["validation"] * 2 + ["test"] * 2,
            "view_position": ["PA", "PA", "AP", "AP"] * 2,
        }
    )
    labels.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path

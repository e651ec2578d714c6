"""Films that are stored turned or mirrored, as Exif or XMP says."""

import zlib

import numpy as np
import pytest
from PIL import Image

from tests.films import encoded, grey_film, one_film, saved

_UPRIGHT = {
    1: lambda film: film,
    2: np.fliplr,
    3: lambda film: np.rot90(film, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda film: np.rot90(film, -1),
    7: lambda film: np.rot90(film, 2).T,
    8: np.rot90,
}
"""How to turn a film that is stored in each orientation (TIFF 6.0, section 8)."""


@pytest.mark.parametrize("orientation", _UPRIGHT)
@pytest.mark.parametrize(
    ("image_format", "kind"),
    [
        ("JPEG", np.uint8),
        ("PNG", np.uint8),
        ("PNG", np.uint16),
        ("TIFF", np.uint8),
        ("TIFF", np.uint16),
    ],
)
def test_exif_orientation_is_applied(image_format, kind, orientation):
    film = grey_film(height=60, width=40).astype(kind)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored, found = (one_film(encoded(film, image_format, **told)) for told in ({}, {"exif": exif}))
    np.testing.assert_array_equal(found.pixels, _UPRIGHT[orientation](stored.pixels))
    assert (found.rows, found.columns) == film.shape


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_orientation_that_only_xmp_names_is_applied(mode):
    film = grey_film(height=60, width=40)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    found = one_film(saved(Image.fromarray(film).convert(mode), "JPEG", quality=98, xmp=xmp)).pixels
    assert found.shape == (40, 60)
    assert np.abs(found.astype(int) - np.rot90(film, -1)).max() <= 8


def test_damaged_exif_does_not_cost_the_film():
    film = grey_film(height=64, width=64)
    data = encoded(film, "PNG", exif=b"MM\x00*\x00\x00\x00\x08")
    at = data.index(b"eXIf")
    damaged = b"eXIf" + b"garbage!"
    data = data[:at] + damaged + zlib.crc32(damaged).to_bytes(4, "big") + data[at + 16 :]
    np.testing.assert_array_equal(one_film(data).pixels, film)

"""JPEG Extended of 12 bits: pydicom 3.0 uses no permissively licensed decoder for it.

pydicom excludes GDCM because of its older versions. GDCM 3.2 gives the same values as a 12-bit
libjpeg-turbo, pixel for pixel (compared on both of pydicom's own test files).
"""

from __future__ import annotations

from typing import Any

from pydicom.uid import JPEGExtended12Bit

_NAME = "lungopacity-gdcm-12bit"

DECODER_DEPENDENCIES = {JPEGExtended12Bit: ("gdcm>=3.2",)}
"""pydicom requires this name of every plugin."""


def is_available(uid: str) -> bool:
    """Whether this plugin decodes the transfer syntax. pydicom calls it."""
    return uid in DECODER_DEPENDENCIES


def register() -> None:
    """Make pydicom try this decoder, too. May be called more than once."""
    from pydicom.pixels import get_decoder

    decoder = get_decoder(JPEGExtended12Bit)
    if _NAME not in decoder.available_plugins:
        decoder.add_plugin(_NAME, (__name__, "decode_frame"))


def decode_frame(source: bytes, runner: Any) -> bytes:
    """Decode one frame, with the signature of a pydicom decoder plugin. Raises `ValueError`."""
    import gdcm

    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(source)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    kind = gdcm.PhotometricInterpretation.GetPIType(runner.photometric_interpretation)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
    syntax = gdcm.TransferSyntax.GetTSType(str.__str__(runner.transfer_syntax))
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    image.SetPixelFormat(
        gdcm.PixelFormat(runner.samples_per_pixel, 16, 12, 11, runner.pixel_representation)
    )
    pixels = image.GetBuffer()
    if pixels is None:
        raise ValueError("GDCM gave no pixels")
    runner.set_option("bits_allocated", 16)
    return bytes(pixels.encode("utf-8", "surrogateescape"))

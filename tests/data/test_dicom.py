"""DICOM files: rescaled values, window, inversion, frames, and compressed ones without a decoder."""

import io

import numpy as np
import pytest

from dino_jax.data.decoding import DecodeError, decode
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source

pydicom = pytest.importorskip("pydicom")


def dicom(array, photometric="MONOCHROME2", bits=12, **tags):
    """A file of uncompressed pixels: [H, W], [frames, H, W] or [H, W, 3]."""
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    color = photometric == "RGB"
    frames = array.shape[0] if array.ndim == 3 and not color else 1
    file.Rows, file.Columns = array.shape[:2] if color else array.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 3 if color else 1, photometric
    file.BitsAllocated = 8 * array.itemsize
    file.BitsStored = 8 if color else bits
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(array.dtype.kind == "i")
    if color:
        file.PlanarConfiguration = 0
    if frames > 1:
        file.NumberOfFrames = frames
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = array.tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture
def scan():
    return np.random.default_rng(0).integers(0, 4096, (12, 16)).astype(np.uint16)


def test_without_a_window_white_is_what_the_bits_can_hold(scan):
    expected = np.round(scan / 4095 * 255)
    np.testing.assert_allclose(decode(dicom(scan), Pixels(1))[..., 0], expected, atol=1)
    assert decode(dicom(scan), Pixels(3)).shape == (12, 16, 3)


def test_a_stated_range_is_in_rescaled_units(scan):
    """CT: Hounsfield units from -1000 to 400, whatever the window in the file."""
    file = dicom(scan, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=80)
    out = decode(file, Pixels(1, "float32", (-1000.0, 400.0)))[..., 0]
    np.testing.assert_allclose(out, np.clip((scan - 1024.0 + 1000) / 1400, 0, 1), atol=1e-5)


def test_the_window_in_the_file_is_black_to_white(scan):
    file = dicom(scan, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    out = decode(file, Pixels(1, "float32"))[..., 0]
    units = scan - 1024.0
    expected = np.clip((units - 39.5) / 399 + 0.5, 0, 1)  # DICOM PS3.3 C.11.2.1.2.1
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_monochrome1_is_inverted(scan):
    for pixels in (Pixels(1, "float32"), Pixels(1, "float32", (0.0, 3000.0))):
        straight, inverted = decode(dicom(scan), pixels), decode(dicom(scan, "MONOCHROME1"), pixels)
        np.testing.assert_allclose(straight + inverted, 1, atol=1e-5)


def test_signed_values(scan):
    signed = (scan.astype(np.int16) - 2048).astype(np.int16)
    out = decode(dicom(signed), Pixels(1, "float32"))[..., 0]
    np.testing.assert_allclose(out, scan / 4095, atol=1e-5)


def test_the_first_frame_counts(scan):
    frames = np.stack([scan, scan[::-1]])
    np.testing.assert_array_equal(decode(dicom(frames), Pixels(1)), decode(dicom(scan), Pixels(1)))


def test_colors():
    color = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    np.testing.assert_array_equal(decode(dicom(color, "RGB"), Pixels(3)), color)


def test_a_folder_of_them(tmp_path, scan):
    (tmp_path / "a.dcm").write_bytes(dicom(scan))
    assert len(open_source(f"folder:{tmp_path}")) == 1


def test_compressed_without_a_decoder_and_cut_files_are_one_line(scan):
    file = dicom(scan)
    compressed = pydicom.dcmread(io.BytesIO(file))
    compressed.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    compressed.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(100)])
    compressed["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, compressed, enforce_file_format=True)
    for spoilt, message in ((buffer.getvalue(), "JPEG Lossless.* needs a decoder: pip install"), (file[:-100], ".")):
        with pytest.raises(DecodeError, match=message) as error:
            decode(spoilt, Pixels(1))
        assert "\n" not in str(error.value)

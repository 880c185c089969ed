"""Pictures of every kind, through files and back: what a network does not change stays as it was."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("PIL", "tifffile", "imagecodecs"):
    pytest.importorskip(package)

import imagecodecs
import tifffile
from PIL import ExifTags, Image, ImageCms

from swformer_fast.tools import pictures

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (20, 30, 4), np.uint8)
WORDS = RNG.integers(0, 65536, (20, 30, 4), np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ORIENTATION, ARTIST, ISO = ExifTags.Base.Orientation, ExifTags.Base.Artist, ExifTags.Base.ISOSpeedRatings


def through(source: Path, suffix: str | None = None, quality: int = 95) -> Path:
    """Read, taken for restored as it is, written again."""
    target = source.with_name(f"{source.stem}_again{suffix or source.suffix}")
    picture = pictures.read(source)
    pictures.write(picture.restored(picture.rgb()), target, quality)
    return target


def exif_of(path: Path) -> Image.Exif:
    if path.suffix == ".tif":
        exif = Image.Exif()
        exif.load_from_fp(io.BytesIO(path.read_bytes()))
        return exif
    with Image.open(path) as image:
        image.load()
        return image.getexif()


def some_exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[ARTIST] = "Ansel"
    exif[ExifTags.IFD.Exif] = {int(ISO): 400}
    exif[ExifTags.IFD.GPSInfo] = {int(ExifTags.GPS.GPSLatitudeRef): "N"}
    return exif


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".ppm", ".webp"])
@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
def test_eight_bits_stay_as_they_are(mode: str, suffix: str, tmp_path: Path) -> None:
    if "A" in mode and suffix in (".bmp", ".ppm"):
        pytest.skip("holds no alpha")
    channels = len(mode)
    image = Image.fromarray(BYTES[..., :channels] if channels > 1 else BYTES[..., 0])
    assert image.mode == mode
    path = tmp_path / f"a{suffix}"
    image.save(path, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    with (
        Image.open(tmp_path / f"a{suffix}") as before,
        Image.open(through(tmp_path / f"a{suffix}", quality=100)) as after,
    ):
        assert after.mode == before.mode
        assert np.array_equal(np.asarray(after), np.asarray(before))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_stay_as_they_are(channels: int, suffix: str, tmp_path: Path) -> None:
    path, pixels = tmp_path / f"a{suffix}", np.ascontiguousarray(WORDS[..., :channels].squeeze())
    if suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(pixels))
        again = imagecodecs.png_decode(through(path).read_bytes())
    else:
        extra = ["unassalpha"] if channels in (2, 4) else None
        photometric = "rgb" if channels > 2 else "minisblack"
        tifffile.imwrite(path, pixels, photometric=photometric, planarconfig="contig", extrasamples=extra)
        again = tifffile.imread(through(path))
        with tifffile.TiffFile(through(path)) as file:
            assert file.pages[0].photometric.name.lower() == photometric
            assert file.pages[0].extrasamples == ((2,) if extra else ())
    assert again.dtype == np.uint16
    assert np.array_equal(again, pixels)


def test_sixteen_bits_of_grey_that_pillow_reads(tmp_path: Path) -> None:
    Image.fromarray(WORDS[..., 0]).save(tmp_path / "a.pgm")
    assert np.array_equal(imagecodecs.png_decode(through(tmp_path / "a.pgm", ".png").read_bytes()), WORDS[..., 0])


@pytest.mark.parametrize("bits", [8, 10, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_jpeg_2000_of_any_depth(channels: int, bits: int, tmp_path: Path) -> None:
    dtype = np.uint8 if bits == 8 else np.uint16
    pixels = (WORDS[..., :channels].squeeze() >> (16 - bits)).astype(dtype)
    pixels[0], pixels[1] = 0, 2**bits - 1
    stored = imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, bitspersample=bits, codecformat="jp2")
    (tmp_path / "a.jp2").write_bytes(stored)
    picture = pictures.read(tmp_path / "a.jp2")
    assert picture.dtype == dtype.__name__
    assert np.array_equal(np.rint(picture.pixels * (2**bits - 1)).squeeze(), pixels)


@pytest.mark.parametrize("layout", ["tiled", "planar", "lzw", "big", "motorola", "bigtiff", "white is zero"])
def test_deep_tiff_of_every_layout(layout: str, tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.tif", WORDS[..., :3]
    options = {
        "tiled": {"tile": (16, 16)},
        "planar": {"planarconfig": "separate"},
        "lzw": {"compression": "lzw", "predictor": True},
        "motorola": {"byteorder": ">"},
        "bigtiff": {"bigtiff": True},
    }.get(layout, {})
    if layout == "white is zero":
        tifffile.imwrite(path, WORDS[..., 0], photometric="miniswhite")
        assert np.array_equal(tifffile.imread(through(path)), 65535 - WORDS[..., 0])
        return
    stored = pixels.transpose(2, 0, 1) if layout == "planar" else pixels
    tifffile.imwrite(path, stored, photometric="rgb", **options)
    assert np.array_equal(tifffile.imread(through(path)), pixels)


def test_floats_from_zero_to_one(tmp_path: Path) -> None:
    values = RNG.random((20, 30, 3), np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    assert np.array_equal(tifffile.imread(through(tmp_path / "a.tif")), values)
    deep = imagecodecs.png_decode(through(tmp_path / "a.tif", ".png").read_bytes())
    assert np.array_equal(deep, np.rint(values * 65535).astype(np.uint16))
    tifffile.imwrite(tmp_path / "half.tif", values.astype(np.float16), photometric="rgb")
    assert np.array_equal(tifffile.imread(through(tmp_path / "half.tif")), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (np.full((20, 30), 1.5, np.float32), "must have numbers from 0 to 1, got 1.5 to 1.5"),
        (np.full((20, 30), np.nan, np.float32), "must have numbers from 0 to 1, got nan"),
        (np.full((20, 30), 7, np.uint32), "has UINT numbers of 32 bits, for which no white is declared"),
        (np.full((20, 30), 7, np.int16), "has INT numbers of 16 bits, for which no white is declared"),
        (np.full((20, 30), 7, np.int8), "has INT numbers of 8 bits"),
        (np.full((3, 20, 30), 7, np.uint16), "holds 3 pages"),
    ],
)
def test_tiff_of_numbers_without_a_white(stored: np.ndarray, words: str, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack")
    with pytest.raises(ValueError, match=words):
        pictures.read(tmp_path / "a.tif")


def test_twelve_bits_have_their_own_white(tmp_path: Path) -> None:
    try:
        tifffile.imwrite(tmp_path / "a.tif", WORDS[..., 0] >> 4, bitspersample=12, photometric="minisblack")
    except NotImplementedError:
        pytest.skip("this imagecodecs packs no 12 bits")
    expected = np.rint((WORDS[..., 0] >> 4) / 4095 * 65535)
    assert np.array_equal(tifffile.imread(through(tmp_path / "a.tif")), expected)


def test_colours_that_are_multiplied_by_alpha(tmp_path: Path) -> None:
    colour, alpha = np.full((20, 30, 3), 40000), np.full((20, 30, 1), 32768)
    alpha[0], stored = 0, (colour * alpha + 32767) // 65535
    tifffile.imwrite(
        tmp_path / "a.tif", np.dstack((stored, alpha)).astype(np.uint16), photometric="rgb", extrasamples=["assocalpha"]
    )
    again = tifffile.imread(through(tmp_path / "a.tif")).astype(int)
    assert np.array_equal(again[..., 3:], alpha)
    assert abs(again[1:, :, :3] - 40000).max() <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif", "16.png", "16.tif"])
def test_profile_and_exif_are_kept_and_the_picture_is_turned(suffix: str, tmp_path: Path) -> None:
    path, exif = tmp_path / f"a{suffix}", some_exif(orientation=6)
    if suffix == "16.png":
        plain = pictures.Picture(WORDS[..., :3].astype(np.float32) / 65535, "uint16", SRGB, exif.tobytes())
        pictures.write(plain, path)
    elif suffix == "16.tif":
        tags = [(int(ORIENTATION), "H", 1, 6, True), (int(ARTIST), "s", 0, "Ansel", True)]
        tifffile.imwrite(path, WORDS[..., :3], photometric="rgb", iccprofile=SRGB, extratags=tags, byteorder="<")
        pictures._append_directories(path, {tag: exif[tag] for tag in pictures.DIRECTORIES})
    else:
        Image.fromarray(BYTES[..., :3]).save(path, exif=exif.tobytes(), icc_profile=SRGB)
    after = through(path)
    kept = exif_of(after)
    assert kept.get(ORIENTATION, 1) == 1
    assert kept[ARTIST] == "Ansel"
    assert kept.get_ifd(ExifTags.IFD.Exif)[ISO] == 400
    assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    picture = pictures.read(after)
    assert picture.profile == SRGB
    assert picture.pixels.shape == (30, 20, 3)
    if suffix == "16.tif":
        assert np.array_equal(tifffile.imread(after), np.rot90(WORDS[..., :3], -1))
    elif suffix in (".png", ".tif"):
        with Image.open(after) as image:
            assert np.array_equal(np.asarray(image), np.rot90(BYTES[..., :3], -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_as_pillow_turns_it(orientation: int, tmp_path: Path) -> None:
    from PIL import ImageOps

    Image.fromarray(BYTES[..., :3]).save(tmp_path / "a.png", exif=some_exif(orientation))
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(pictures.read(tmp_path / "a.png").pixels * 255, expected)
    tifffile.imwrite(
        tmp_path / "a.tif", WORDS[..., :3], photometric="rgb", extratags=[(int(ORIENTATION), "H", 1, orientation, True)]
    )
    deep = pictures._upright(WORDS[..., :3], orientation)
    assert np.array_equal(np.rint(pictures.read(tmp_path / "a.tif").pixels * 65535), deep)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif", "16.png"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_words_of_other_languages_are_kept(encoding: str, suffix: str, tmp_path: Path) -> None:
    exif, artist, owner = Image.Exif(), "Jörg Müller ©".encode(encoding), "Zoë".encode(encoding)
    exif[ARTIST] = artist
    exif[ExifTags.IFD.Exif] = {int(ExifTags.Base.CameraOwnerName): owner}
    Image.fromarray(BYTES[..., :3]).save(tmp_path / "a.jpg", exif=exif)
    picture = pictures.read(tmp_path / "a.jpg")
    pictures.write(replace(picture, dtype="uint16" if "16" in suffix else "uint8"), tmp_path / f"b{suffix}")
    stored = (tmp_path / f"b{suffix}").read_bytes()
    assert artist in stored
    assert owner in stored
    assert exif_of(tmp_path / f"b{suffix}")[ARTIST].encode("latin-1") == artist


@pytest.mark.parametrize("orientation", [0, 9, 65535, "up"])
def test_orientations_that_there_are_none_of(orientation: int | str, tmp_path: Path) -> None:
    number = orientation if isinstance(orientation, int) else 1
    exif = exif_bytes((int(ORIENTATION), 3, 1, struct.pack("<HH", number, 0)))
    if orientation == "up":
        exif = exif_bytes((int(ORIENTATION), 2, 3, b"up\0\0"))
    Image.fromarray(BYTES[..., :3]).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pictures.read(tmp_path / "a.png").pixels * 255, BYTES[..., :3])


def exif_bytes(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of entries (tag, type, count, the four bytes of value or offset)."""
    lines = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + lines + bytes(4)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_tags_of_a_wrong_type_are_left_out(suffix: str, tmp_path: Path) -> None:
    """Fractions that are written as text."""
    make, text, gps = (int(ExifTags.Base.Make), 2, 4, b"Own\0"), (2, 4, b"abc\0"), int(ExifTags.IFD.GPSInfo)
    resolution = (int(ExifTags.Base.XResolution), *text)
    first = exif_bytes(make, resolution, (gps, 4, 1, struct.pack("<I", 8 + 2 + 3 * 12 + 4)))
    altitude = struct.pack("<HHHI", 1, int(ExifTags.GPS.GPSAltitude), *text[:2]) + text[2] + bytes(4)
    Image.fromarray(BYTES[..., :3]).save(tmp_path / "a.jpg", exif=first + altitude)
    kept = exif_of(through(tmp_path / "a.jpg", suffix))
    assert kept[ExifTags.Base.Make] == "Own"
    assert kept.get(resolution[0]) != "abc"
    assert ExifTags.GPS.GPSAltitude not in kept.get_ifd(gps)


def test_tags_of_a_tiff_stay_out_of_other_formats(tmp_path: Path) -> None:
    Image.fromarray(BYTES[..., :3]).save(tmp_path / "a.tif", exif=some_exif().tobytes())
    assert set(exif_of(through(tmp_path / "a.tif", ".jpg"))) == {ARTIST, *pictures.DIRECTORIES}


def test_wide_colours_are_not_clipped(tmp_path: Path) -> None:
    """A picture in a profile other than sRGB keeps numbers and profile."""
    swapped = SRGB.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    Image.fromarray(BYTES[..., :3]).save(tmp_path / "a.png", icc_profile=swapped)
    with Image.open(through(tmp_path / "a.png")) as image:
        assert np.array_equal(np.asarray(image), BYTES[..., :3])
        assert image.info["icc_profile"] == swapped


@pytest.mark.parametrize("profile", [None, b"no profile"])
def test_inks_become_rgb_without_their_profile(profile: bytes | None, tmp_path: Path) -> None:
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "a.tif", icc_profile=profile)
    picture = pictures.read(tmp_path / "a.tif")
    assert picture.pixels.shape == (20, 30, 3)
    assert picture.pixels[..., 0].min() > 0.9
    assert picture.pixels[..., 1:].max() < 0.1
    assert picture.profile is None


def test_lab_becomes_srgb(tmp_path: Path) -> None:
    Image.new("LAB", (30, 20), (255, 128, 128)).save(tmp_path / "a.tif")
    picture = pictures.read(tmp_path / "a.tif")
    assert picture.pixels.min() > 0.98
    assert picture.pixels.shape == (20, 30, 3)


def test_palettes_and_transparent_colours(tmp_path: Path) -> None:
    palette = Image.fromarray(BYTES[..., :3]).quantize(16)
    palette.save(tmp_path / "a.png")
    with Image.open(through(tmp_path / "a.png")) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "b.png", transparency=3)
    with Image.open(through(tmp_path / "b.png")) as image:
        assert image.mode == "RGBA"
        assert np.array_equal(np.asarray(image)[..., 3] == 0, np.asarray(palette) == 3)
    Image.fromarray(BYTES[..., 0]).save(tmp_path / "c.png", transparency=int(BYTES[0, 0, 0]))
    with Image.open(through(tmp_path / "c.png")) as image:
        assert image.mode == "LA"
        assert np.array_equal(np.asarray(image)[..., 1] == 0, BYTES[..., 0] == BYTES[0, 0, 0])


def test_transparent_colour_of_sixteen_bits(tmp_path: Path) -> None:
    png = imagecodecs.png_encode(WORDS[..., :3].copy())
    key = b"tRNS" + struct.pack(">3H", *WORDS[0, 0, :3])
    chunk = struct.pack(">I", 6) + key + struct.pack(">I", zlib.crc32(key))
    (tmp_path / "a.png").write_bytes(png[:33] + chunk + png[33:])
    again = imagecodecs.png_decode(through(tmp_path / "a.png").read_bytes())
    assert np.array_equal(again[..., :3], WORDS[..., :3])
    assert again[0, 0, 3] == 0
    assert (again[..., 3] == 65535).sum() == 599


def test_one_bit_becomes_grey(tmp_path: Path) -> None:
    Image.fromarray(BYTES[..., 0] > 99).save(tmp_path / "a.png")
    with Image.open(through(tmp_path / "a.png")) as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), 255 * (BYTES[..., 0] > 99))


def test_grey_is_the_luma_of_what_was_restored(tmp_path: Path) -> None:
    Image.fromarray(BYTES[..., 0]).save(tmp_path / "a.png")
    picture = pictures.read(tmp_path / "a.png")
    assert picture.rgb().shape == (3, 20, 30)
    restored = picture.restored(torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1).expand(3, 20, 30))
    assert np.allclose(restored.pixels, 0.299 + 0.587 / 2 + 0.114 / 4)


def test_transparency_is_not_lost_in_silence(tmp_path: Path) -> None:
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has transparency, which JPEG cannot hold: try --format png"):
        through(tmp_path / "a.png", ".jpg")


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_animations_are_refused(suffix: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(BYTES[..., i]) for i in range(3)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="is an animation of 3 pictures: make a video of it"):
        pictures.read(tmp_path / f"a{suffix}")


def test_first_picture_of_a_camera_file(tmp_path: Path) -> None:
    """Telephones put small ones behind it."""
    frames = [Image.fromarray(BYTES[..., :3]), Image.fromarray(BYTES[:8, :8, :3])]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert pictures.read(tmp_path / "a.jpg").pixels.shape == (20, 30, 3)


def test_previews_in_a_tiff_are_no_pages(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(WORDS[..., :3], photometric="rgb")
        writer.write(WORDS[::2, ::2, :3], photometric="rgb", subfiletype=1)
    assert np.array_equal(tifffile.imread(through(tmp_path / "a.tif")), WORDS[..., :3])


@pytest.mark.parametrize("name", ["a.png", "16.png", "16.tif"])
def test_more_pixels_than_allowed(name: str, tmp_path: Path) -> None:
    if name == "a.png":
        Image.fromarray(BYTES).save(tmp_path / name)
    elif name == "16.png":
        (tmp_path / name).write_bytes(imagecodecs.png_encode(WORDS))
    else:
        tifffile.imwrite(tmp_path / name, WORDS, photometric="rgb")
    with pytest.raises(ValueError, match="has 30 x 20 pixels, more than --max-pixels 599"):
        pictures.read(tmp_path / name, 599)
    assert pictures.read(tmp_path / name, 600).pixels.shape == (20, 30, 4)


def test_pillows_own_limit_is_lifted_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    pictures.read(tmp_path / "a.png")
    assert Image.MAX_IMAGE_PIXELS == 10

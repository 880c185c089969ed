"""Pictures as a network takes them, and back into files with all that the network does not change."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from .files import PICTURES, Format
from .metrics import GREY

MAX_PIXELS = 178_956_970
"""Above which Pillow suspects a decompression bomb."""
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG = b"\x89PNG\r\n\x1a\n"
PNG_HEADER = 33
"""Bytes of PNG's signature and its first chunk, after which metadata may stand."""
WHITE = {"uint8": 255, "uint16": 65535, "float32": 1}
DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
TEXTS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
"""Tags that say something of a picture; in a TIFF others tell how its bytes lie."""


@dataclass(frozen=True)
class Picture:
    """An upright picture and what is kept of its file.

    RGB stays in the picture's own colours, whose profile goes with it: converting to sRGB would clip what sRGB lacks
    and round every pixel, and RGB of the usual profiles is close enough to sRGB for a network trained on that.
    """

    pixels: np.ndarray
    """(H, W, 1 to 4) float32 in [0, 1]: grey, grey and alpha, RGB, RGB and alpha."""
    dtype: str
    """What the file has: "uint8", "uint16" (9 to 16 bits) or "float32"."""
    profile: bytes | None = None
    exif: bytes | None = None
    """Without orientation and thumbnail."""

    @property
    def colours(self) -> int:
        return 1 if self.pixels.shape[2] < 3 else 3

    def rgb(self) -> Tensor:
        """(3, H, W) without alpha."""
        pixels = torch.from_numpy(self.pixels[..., : self.colours]).permute(2, 0, 1)
        return pixels.expand(3, -1, -1).contiguous()

    def restored(self, rgb: Tensor) -> Picture:
        """With other colours, (3, H, W) in [0, 1]: those of a grey picture become grey again, alpha stays."""
        colour = rgb if self.colours == 3 else (rgb * torch.tensor(GREY).view(3, 1, 1)).sum(0, keepdim=True)
        pixels = np.concatenate((colour.permute(1, 2, 0).numpy(), self.pixels[..., self.colours :]), axis=2)
        return replace(self, pixels=np.ascontiguousarray(pixels))


def read(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """A picture of any kind that Pillow, tifffile or libpng reads.

    Raises ValueError or OSError in words: for animations and files of several pages, for more than `max_pixels`, and
    for numbers that no range is declared for.
    """
    with open(path, "rb") as file:
        head = file.read(26)
    if head.startswith(TIFF):
        with tifffile.TiffFile(path) as tiff:
            if len(tiff.pages) > 1 and not _previews_only(tiff):
                raise ValueError(f"holds {len(tiff.pages)} pages: save those to restore as files of one page")
            if _is_deep(tiff.pages[0]):
                return _read_deep_tiff(path, tiff.pages[0], max_pixels)
    with _opened(path, max_pixels) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format in ("GIF", "PNG", "WEBP", "AVIF"):
            raise ValueError(f"is an animation of {frames} pictures: make a video of it, or save those to restore")
        image.load()
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)  # of a TIFF, Pillow has done it
        if head.startswith(PNG) and head[24] == 16:  # of which Pillow drops eight
            pixels, dtype, profile = _scaled(imagecodecs.png_decode(path.read_bytes())), "uint16", True
        elif image.format == "JPEG2000" and (bits := _bits_of_jpeg2000(data := path.read_bytes())) > 8:
            # of which Pillow keeps eight, and makes white black
            pixels, dtype, profile = _checked(imagecodecs.jpeg2k_decode(data), 2**bits - 1), "uint16", True
        else:
            pixels, dtype, profile = _pixels(image)
        icc = image.info.get("icc_profile") if profile else None
        return Picture(_upright(pixels, orientation), dtype, icc, _kept(exif, image.format == "TIFF"))


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours speaks of our option
    try:
        with Image.open(path) as image:
            _check_size(image.width, image.height, max_pixels)
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"has {width} x {height} pixels, more than --max-pixels {max_pixels}")


def _bits_of_jpeg2000(data: bytes) -> int:
    """Of the first channel, as the codestream's header says."""
    begin = data.index(b"\xff\x4f\xff\x51")
    return (data[begin + 42] & 127) + 1


def _scaled(pixels: np.ndarray, white: int = 65535) -> np.ndarray:
    """As float32 of three dimensions, with 1 for white."""
    scaled = pixels.astype(np.float32) / np.float32(white)
    return scaled[..., None] if scaled.ndim == 2 else scaled


def _checked(pixels: np.ndarray, white: int) -> np.ndarray:
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= white):
        raise ValueError(f"must have numbers from 0 to {white}, got {low:g} to {high:g}")
    return _scaled(pixels, white)


def _pixels(image: Image.Image) -> tuple[np.ndarray, str, bool]:
    """Pixels, their dtype in the file, and whether they are still in the colours of its profile."""
    if image.mode == "F":
        return _checked(np.asarray(image), 1), "float32", True
    if image.mode.startswith("I"):
        return _checked(np.asarray(image), 65535), "uint16", True
    if image.mode in ("CMYK", "LAB"):
        return _scaled(np.asarray(_in_srgb(image)), 255), "uint8", False
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    alpha = "A" if image.has_transparency_data or image.mode in ("La", "RGBa") else ""
    return _scaled(np.asarray(image.convert(mode + alpha)), 255), "uint8", True


def _in_srgb(image: Image.Image) -> Image.Image:
    """Inks and Lab as sRGB: by the picture's profile, or without a sound one as Pillow does."""
    profile = image.info.get("icc_profile")
    try:
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        elif profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        else:
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
    return converted or image


def _upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """As EXIF's orientation of 1 to 8 says; any other says nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _kept(exif: Image.Exif, tiff: bool) -> bytes | None:
    """All but orientation and thumbnail, which are of the old picture, and what is damaged."""
    kept = Image.Exif()
    for tag in exif:
        value = _as_stored(exif.get(tag))
        if tag in DIRECTORIES:
            lines = ((key, _as_stored(v)) for key, v in exif.get_ifd(tag).items())
            kept[tag] = {key: v for key, v in lines if key != ExifTags.IFD.Interop and _is_sound(tag, {key: v})}
        elif tag != ExifTags.Base.Orientation and (not tiff or tag in TEXTS) and _is_sound(tag, value):
            kept[tag] = value
    return kept.tobytes() if len(kept) else None


def _as_stored(value: Any) -> Any:
    """Text of more than ASCII as the bytes that it is, which Pillow reads as Latin-1 and would write as "?"."""
    return value.encode("latin-1") if isinstance(value, str) and not value.isascii() else value


def _is_sound(tag: int, value: Any) -> bool:
    """Whether it can be written again: some cameras and editors give a tag a type that is not its own."""
    exif = Image.Exif()
    exif[tag] = value
    try:
        exif.tobytes()
    except Exception:  # Pillow raises whatever comes of the wrong type
        return False
    return True


# TIFF of more than eight bits, of which Pillow reads grey alone


def _previews_only(tiff: tifffile.TiffFile) -> bool:
    pages: list[Any] = list(tiff.pages)
    return all(page.is_reduced or page.is_mask for page in pages[1:])


def _is_deep(page: Any) -> bool:
    bits = page.bitspersample
    return bits > 8 or page.sampleformat not in (1, 4)


def _read_deep_tiff(path: Path, page: Any, max_pixels: int) -> Picture:
    _check_size(page.imagewidth, page.imagelength, max_pixels)
    kind, bits = tifffile.SAMPLEFORMAT(page.sampleformat).name, page.bitspersample
    photometric = tifffile.PHOTOMETRIC(page.photometric).name
    if photometric not in ("MINISBLACK", "MINISWHITE", "RGB"):
        raise ValueError(f"has {bits} bits of {photometric}: save it as RGB or grey")
    if kind not in ("UINT", "IEEEFP") or (kind == "UINT" and bits > 16):
        raise ValueError(f"has {kind} numbers of {bits} bits, for which no white is declared: save it in 16 bits")
    stored = page.asarray()
    if page.planarconfig == 2 and stored.ndim == 3:
        stored = stored.transpose(1, 2, 0)
    pixels = _scaled(stored, 2**bits - 1) if kind == "UINT" else _checked(stored, 1)
    if photometric == "MINISWHITE":
        pixels[..., 0] = 1 - pixels[..., 0]
    colours = 3 if photometric == "RGB" else 1
    if pixels.shape[2] > colours + 1:
        raise ValueError(f"has {pixels.shape[2]} channels: save it with one of alpha at most")
    if page.extrasamples[:1] == (1,):  # colours that are multiplied by alpha
        alpha = pixels[..., colours:]
        pixels[..., :colours] = (pixels[..., :colours] / np.where(alpha > 0, alpha, 1)).clip(0, 1)
    profile = page.tags.get("InterColorProfile")
    return Picture(
        _upright(pixels, page.tags.valueof("Orientation", 1)),
        "uint16" if kind == "UINT" else "float32",
        bytes(profile.value) if profile else None,
        None if page.parent.is_bigtiff else _exif_of_tiff(path),
    )


def _exif_of_tiff(path: Path) -> bytes | None:
    exif = Image.Exif()
    with open(path, "rb") as file:
        exif.load_from_fp(file)
        return _kept(exif, True)


# writing


def write(picture: Picture, path: Path, quality: int = 95) -> None:
    """In the format of the suffix; in as many bits as the picture has, if the format can.

    Raises ValueError where alpha would be lost.
    """
    check_alpha(picture, path)
    form = PICTURES[path.suffix.lower()]
    pixels = _encoded(picture, form)
    if form.name == "TIFF":
        _write_tiff(picture, pixels, path)
    elif pixels.dtype == np.uint16:
        path.write_bytes(_with_metadata(bytes(imagecodecs.png_encode(pixels)), picture))
    else:
        _write_with_pillow(picture, pixels, path, form, quality)


def check_alpha(picture: Picture, path: Path) -> None:
    """Raises ValueError where the format of the suffix has none and the picture has."""
    form = PICTURES[path.suffix.lower()]
    if picture.pixels.shape[2] > picture.colours and not form.alpha:
        raise ValueError(f"has transparency, which {form.name} cannot hold: try --format png")


def _encoded(picture: Picture, form: Format) -> np.ndarray:
    dtype = picture.dtype if picture.dtype in form.dtypes else form.dtypes[-1]
    pixels = picture.pixels.clip(0, 1) * np.float32(WHITE[dtype])
    return pixels if dtype == "float32" else np.rint(pixels).astype(dtype)


def _write_with_pillow(picture: Picture, pixels: np.ndarray, path: Path, form: Format, quality: int) -> None:
    by_format: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"quality": quality, "lossless": quality == 100, "exact": True},
        "AVIF": {"quality": quality, "subsampling": "4:4:4"},
    }
    options = by_format.get(form.name, {})
    if picture.exif:
        options["exif"] = picture.exif
    image = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
    image.save(path, form.name, icc_profile=picture.profile, **options)


def _write_tiff(picture: Picture, pixels: np.ndarray, path: Path) -> None:
    exif = Image.Exif()
    exif.load(picture.exif or b"")
    tifffile.imwrite(
        path,
        pixels if pixels.shape[2] > 1 else pixels[..., 0],
        byteorder="<",
        photometric="rgb" if picture.colours == 3 else "minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"] if pixels.shape[2] > picture.colours else None,
        compression="zlib",
        predictor=True,
        iccprofile=picture.profile,
        metadata=None,
        software=False,
        extratags=[(int(tag), "s", 0, str(exif[tag]).encode("latin-1"), True) for tag in TEXTS if tag in exif],
    )
    _append_directories(path, {tag: exif.get_ifd(tag) for tag in DIRECTORIES if tag in exif})


def _append_directories(path: Path, directories: dict[int, dict[int, Any]]) -> None:
    """tifffile writes none within the first: append them, and a first one that points to them, to a "<" TIFF."""
    with open(path, "r+b") as file:
        magic, first = struct.unpack("<4sI", file.read(8))
        if not directories or magic != TIFF[0]:
            return
        file.seek(first)
        (count,) = struct.unpack("<H", file.read(2))
        entries = [file.read(12) for _ in range(count)]
        for tag, directory in directories.items():
            offset = _even_end(file)
            lines = ImageFileDirectory_v2(ifh=b"II*\0\0\0\0\0", group=tag)
            for key, value in directory.items():
                lines[key] = _as_stored(value)
            file.write(lines.tobytes(offset))
            entries.append(struct.pack("<HHII", tag, 4, 1, offset))
        offset = _even_end(file)
        entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
        file.write(struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4))
        file.seek(4)
        file.write(struct.pack("<I", offset))


def _even_end(file: BinaryIO) -> int:
    if file.seek(0, io.SEEK_END) % 2:
        file.write(b"\0")
    return file.tell()


def _with_metadata(png: bytes, picture: Picture) -> bytes:
    chunks = b""
    if picture.profile:
        chunks += _chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(picture.profile))
    if picture.exif:
        chunks += _chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    return png[:PNG_HEADER] + chunks + png[PNG_HEADER:]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

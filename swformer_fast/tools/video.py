"""Videos, frame by frame."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor
from tqdm.auto import tqdm

from .files import VIDEOS

QUALITY = {
    "libx264": {"crf": "18"},
    "libx265": {"crf": "20"},
    "libvpx-vp9": {"crf": "24", "b": "0"},
    "libsvtav1": {"crf": "24"},
    "mpeg4": {"flags": "+qscale", "global_quality": "236"},
}
"""Encoders' options whose losses hardly show."""
COLOUR = ("color_range", "color_primaries", "color_trc", "colorspace")
# libswscale's bicubic, accurate_rnd, full_chroma_int and full_chroma_inp, which PyAV names since version 18. With less
# of them grey of 128 becomes 126.
SCALING = 0x4 | 0x40000 | 0x2000 | 0x4000
TO_RGB: Any = {"interpolation": SCALING, "dst_color_range": ColorRange.JPEG}


def codec_for(path: Path, codec: str | None) -> str:
    """The codec of a video to write; raises ValueError for one that this FFmpeg does not encode."""
    name = codec or VIDEOS[path.suffix.lower()]
    try:
        found = av.Codec(name, "w")
    except ValueError as error:
        raise ValueError(f"this FFmpeg has no encoder {name}") from error
    if found.type != "video":
        raise ValueError(f"{name} encodes no video")
    return name


def restore_video(
    restore: Callable[[Tensor, bool], Tensor],
    source: Path,
    target: Path,
    codec: str | None = None,
    crf: int | None = None,
) -> None:
    """Every frame restored, at its own time; sound is copied as it is.

    `restore` takes an image (3, H, W) and whether it has more than eight bits.
    Frames are stored upright, in the source's pixel format where the codec has it, with its description of colours.
    """
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        video: Any = reader.streams.best("video")  # a cover is one, too
        if video is None:
            raise ValueError("holds no video")
        sound = reader.streams.audio
        writer.metadata.update(reader.metadata)
        output: Any = None
        time: int | None = None
        damaged = 0
        copies: dict[int, Any] = {}
        bar = tqdm(total=video.frames or None, unit="frame", leave=False, disable=None)
        waiting = []  # sound that comes before the first frame: players expect the picture's stream first
        packet: Any
        for packet in reader.demux(video, *sound):
            if packet.stream is not video:
                if packet.dts is not None:  # else it ends the stream
                    waiting.append(packet)
            else:
                try:
                    frames = packet.decode()
                except av.InvalidDataError:
                    frames, damaged = [], damaged + 1
                for frame in frames:
                    pixels = _restored(restore, frame)
                    if output is None:
                        output = _add_stream(writer, video, frame, pixels, codec_for(target, codec), crf)
                        copies = {stream.index: _add_copy(writer, stream) for stream in sound}
                    time = _time(frame, output.codec_context, time)
                    writer.mux(output.encode(_stored(pixels, frame, output, time)))
                    bar.update()
            while output is not None and waiting:
                copy = waiting.pop(0)
                copy.stream = copies[copy.stream.index]
                writer.mux(copy)
        bar.close()
        if output is None:
            raise ValueError("holds no picture that can be decoded")
        writer.mux(output.encode())
    if damaged:
        tqdm.write(f"{source} is damaged: {damaged} packets and their frames are left out", file=sys.stderr)


def _depth(video_format: av.VideoFormat) -> int:
    return max(component.bits for component in video_format.components)


def _restored(restore: Callable[[Tensor, bool], Tensor], frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3), upright; of 16 bits where the frame has more than 8."""
    deep = _depth(frame.format) > 8
    kind, white = ("rgb48le", 65535) if deep else ("rgb24", 255)
    rgb = frame.reformat(format=kind, **TO_RGB).to_ndarray()
    upright = np.rot90(rgb, frame.rotation // 90).astype(np.float32) / np.float32(white)
    restored = restore(torch.from_numpy(upright).permute(2, 0, 1).contiguous(), deep)
    return np.ascontiguousarray(np.rint(restored.permute(1, 2, 0).numpy() * white).astype(rgb.dtype))


def _add_stream(writer: Any, video: Any, frame: av.VideoFrame, pixels: np.ndarray, codec: str, crf: int | None) -> Any:
    rate = video.average_rate or video.guessed_rate or Fraction(25)
    options = {**QUALITY.get(codec, {}), **({} if crf is None else {"crf": str(crf)})}
    avi = writer.format.name == "avi"
    if avi:  # which has no times, only an order
        options["bf"] = "0"
    stream = writer.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = pixels.shape[:2]
    stream.pix_fmt = _pixel_format(codec, frame, pixels)
    stream.time_base = 1 / rate if avi else video.time_base
    stream.codec_context.time_base = stream.time_base
    if video.sample_aspect_ratio:
        turned = frame.rotation % 180 != 0
        stream.codec_context.sample_aspect_ratio = video.sample_aspect_ratio ** (-1 if turned else 1)
    for name, value in _colours(frame, codec).items():
        setattr(stream.codec_context, name, value)
    return stream


def _add_copy(writer: Any, stream: Any) -> Any:
    copy = writer.add_stream_from_template(stream)
    copy.metadata.update(stream.metadata)  # its language and title
    copy.disposition = stream.disposition  # whether it is the one to play
    return copy


def _colours(frame: av.VideoFrame, codec: str) -> dict[str, int]:
    """How the stored numbers are to be understood: as the frame's, where these are no RGB and the codec can say so."""
    colours = {name: getattr(frame, name) for name in COLOUR}
    if codec == "mpeg4":
        colours |= {"colorspace": Colorspace.ITU601, "color_range": ColorRange.MPEG}
    elif frame.format.is_rgb:
        colours |= {"colorspace": Colorspace.ITU709, "color_range": ColorRange.MPEG}
    return colours


def _time(frame: av.VideoFrame, encoder: Any, last: int | None) -> int:
    """A frame's time in the encoder's ticks, after the last one's; where it has none, a frame's duration later."""
    if frame.pts is None or frame.time_base is None:
        return 0 if last is None else last + max(1, round(1 / (encoder.framerate * encoder.time_base)))
    time = round(frame.pts * frame.time_base / encoder.time_base)
    return time if last is None else max(time, last + 1)


def _pixel_format(codec: str, frame: av.VideoFrame, pixels: np.ndarray) -> str:
    """The frame's, or what comes next to it."""
    names = [video_format.name for video_format in av.Codec(codec, "w").video_formats or []]
    own = frame.format.name.replace("yuvj", "yuv")
    whole = frame.format.is_rgb or "444" in own
    odd = any(side % 2 for side in pixels.shape[:2])  # encoders refuse to halve such sides
    grey = own.startswith("gray")  # of which encoders and decoders differ in what is white
    wanted = ["yuv444p"] if whole or odd else ["yuv420p"] if grey else [own, "yuv420p"]
    if pixels.dtype == np.uint16:
        wanted = [f"{name.removesuffix('10le')}10le" for name in wanted] + wanted
    return next((name for name in wanted if name in names), names[0] if names else "yuv420p")


def _stored(pixels: np.ndarray, frame: av.VideoFrame, stream: Any, time: int) -> av.VideoFrame:
    """A frame to encode; it has all else from the one that was restored."""
    (height, width), encoder = pixels.shape[:2], stream.codec_context
    # What a new frame would not have goes with a converted one: where its chroma samples lie.
    rgb = frame.reformat(width, height, "rgb48le" if pixels.dtype == np.uint16 else "rgb24", **TO_RGB)
    rgb.make_writable()  # it may be the decoder's own
    plane: Any = rgb.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
    rows[:, : 3 * width * pixels.itemsize] = pixels.view(np.uint8).reshape(height, -1)
    stored = rgb.reformat(
        format=stream.pix_fmt,
        interpolation=SCALING,
        dst_colorspace=encoder.colorspace if encoder.colorspace in list(Colorspace) else Colorspace.ITU601,
        dst_color_range=encoder.color_range or ColorRange.MPEG,
    )
    for name in COLOUR:
        setattr(stored, name, getattr(encoder, name))
    stored.pts, stored.time_base = time, encoder.time_base
    return stored

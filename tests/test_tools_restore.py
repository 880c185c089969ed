"""`swformer-restore`: what it makes of a command line, and what becomes of the files."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import swformer_fast as sf

for package in ("PIL", "tifffile", "imagecodecs", "safetensors", "tqdm"):
    pytest.importorskip(package)

from PIL import Image

from swformer_fast._files import replacing
from swformer_fast.tools import batch, networks, pictures
from swformer_fast.tools.restore import command_line, main

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def network(identity: bool = False, **options: object) -> sf.SWFormer:
    torch.manual_seed(0)
    model = sf.SWFormer.from_preset("tiny", **options)
    for head in model.heads if identity else ():
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a network that returns its input."""
    path = tmp_path_factory.mktemp("weights") / "identity.safetensors"
    sf.pretrained.save_weights(network(identity=True), path)
    return str(path)


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    sf.pretrained.save_weights(network(), path, dtype=None)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with pictures a.png and b.png, and c.png one further down."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "b.png", "deep/c.png"):
        Image.fromarray(PIXELS).save(name)
    Path("note.txt").write_text("no picture")
    return tmp_path


def written(folder: Path) -> set[str]:
    here = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return here - {"a.png", "b.png", "deep/c.png", "note.txt"}


def pixels_of(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The words before any work."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# which files


@pytest.mark.parametrize(
    ("argv", "results"),
    [
        (["a.png"], {"a_restored.png"}),
        (["."], {"a_restored.png", "b_restored.png"}),
        ([".", "--recursive"], {"a_restored.png", "b_restored.png", "deep/c_restored.png"}),
        (["[ab].png"], {"a_restored.png", "b_restored.png"}),
        (["**/*.png"], {"a_restored.png", "b_restored.png", "deep/c_restored.png"}),
        (["a.png", "a.png", "./a.png"], {"a_restored.png"}),
        (["a.png", "--out", "x/y.tif"], {"x/y.tif"}),
        (["a.png", "--out", "new"], {"new/a_restored.png"}),
        ([".", "--recursive", "--out", "new", "--suffix", ""], {"new/a.png", "new/b.png", "new/deep/c.png"}),
        (["a.png", "--format", "webp", "--suffix=-x"], {"a-x.webp"}),
    ],
)
def test_results_of_inputs(argv: list[str], results: set[str], identity: str, folder: Path) -> None:
    assert main([*argv, "--weights", identity, "--dtype", "fp32"]) == 0
    assert written(folder) == results
    for name in results:
        if not name.endswith(".webp"):
            assert np.array_equal(pictures.read(Path(name)).pixels * 255, PIXELS)


def test_earlier_results_are_no_inputs(identity: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([".", "--weights", identity]) == 0
    message = refused(capsys, ".", "--weights", identity)
    assert re.search(r"a_restored.png and 1 more exist: --overwrite replaces them, --skip-existing", message)
    Path("a_restored.png").write_bytes(b"old")
    assert main([".", "--weights", identity, "--skip-existing"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert Path("a_restored.png").read_bytes() == b"old"
    assert main([".", "--weights", identity, "--overwrite"]) == 0
    assert "restored 2, failed 0" in capsys.readouterr().out
    assert np.array_equal(pixels_of("a_restored.png"), PIXELS)
    assert written(folder) == {"a_restored.png", "b_restored.png"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.png"], "there is no file or folder missing.png"),
        (["*.tif"], r"no file matches the pattern \*.tif"),
        (["empty"], "there is no picture or video in empty"),
        (["a.png", "--suffix", ""], "a.png would replace an input"),
        (["a.png", "--suffix", "", "--overwrite"], "a.png would replace an input"),
        (["a.png", "--out", "link.png", "--overwrite"], "link.png would replace an input"),
        (["a.png", "b.png", "--out", "x.png"], "x.png is one file for 2 inputs: give a folder"),
        (["a.png", "--out", "x.docx"], "x.docx must end in .png, .tif"),
        (["a.png", "--out", "x.mp4"], "a.png cannot become x.mp4: the one is a video, the other a picture"),
        (["a.png", "--format", "psd"], "invalid choice: 'psd'"),
        (["a.png", "deep/a.png", "--out", "new"], "a.png and deep/a.png would both become new/a_restored.png"),
        (["a.png", "--quality", "101"], "--quality must be at most 100"),
        (["a.png", "--tile", "50"], "must be auto, none or a multiple of 16, got 50"),
        (["a.png", "--threads", "0"], "must be at least 1"),
        (["a.png", "--device", "cuda"], "there is no --device cuda: "),
        (["a.png", "--device", "xpu"], "there is no --device xpu: "),
        (["a.png", "--device", "abacus"], "abacus"),
        (["a.png", "--weights", "note.txt"], "note.txt must end in .safetensors"),
        (["a.png", "--weights", "none"], "name_or_path must be a file"),
    ],
)
def test_what_is_refused_before_any_work(
    argv: list[str], words: str, identity: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if argv[-1] in ("cuda", "xpu") and getattr(torch, argv[-1]).is_available():
        pytest.skip("there is one")
    Path("empty").mkdir()
    Path("deep/a.png").write_bytes(Path("a.png").read_bytes())
    os.link("a.png", "link.png")
    before = written(folder)
    weights = [] if "--weights" in argv else ["--weights", identity]
    assert re.search(words, refused(capsys, *argv, *weights).replace("\n", " "))
    assert written(folder) == before


@pytest.mark.parametrize("out", [[], ["--out", "."]])
def test_a_picture_of_another_format_is_not_replaced(
    out: list[str], identity: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(PIXELS[::-1]).save("a.jpg")
    Path("b.png").unlink()
    before = Path("a.png").read_bytes()
    argv = [".", "--suffix", "", "--format", "png", "--weights", identity, *out]
    for overwrite in ([], ["--overwrite"]):
        assert "would replace an input: give --suffix or --out" in refused(capsys, *argv, *overwrite)
    assert Path("a.png").read_bytes() == before
    Path("a.png").unlink()
    for _ in range(2):  # what an interrupted run left is gone on with
        assert main([*argv, "--skip-existing"]) == 0
    assert written(folder) == {"a.jpg"}


def test_hidden_files_and_folders_are_left_out(identity: str, folder: Path) -> None:
    for name in (".hidden/d.png", "deep/.thumbnails/e.png", "deep/.f.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(Path("a.png").read_bytes())
    assert main([".", "--recursive", "--out", "new", "--weights", identity]) == 0
    assert {str(file.relative_to("new")) for file in Path("new").rglob("*.png")} == {
        "a_restored.png",
        "b_restored.png",
        "deep/c_restored.png",
    }
    assert main([".hidden", "--weights", identity]) == 0  # but for one that is named
    assert Path(".hidden/d_restored.png").exists()


def test_either_task_or_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one of the arguments --task --weights is required" in refused(capsys, "a.png")
    assert "not allowed with" in refused(capsys, "a.png", "--task", "haze", "--weights", "x.pth")
    assert "invalid choice: 'hail'" in refused(capsys, "a.png", "--task", "hail")


def test_tasks_name_the_weights_that_come_with_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from degradations import DEGRADATIONS

    assert set(networks.TASKS) == {task.replace("_", "-") for task in DEGRADATIONS}
    asked = []

    def from_pretrained(name: str, exit: str | None) -> sf.SWFormer:
        asked.append((name, exit))
        return network(exit=exit or "large")

    monkeypatch.setattr(sf.SWFormer, "from_pretrained", from_pretrained)
    for task in ("low_light", "low-light"):
        assert main(["a.png", "--task", task, "--exit", "small", "--overwrite"]) == 0
    assert asked == [("tiny-low-light", "small")] * 2


@pytest.mark.parametrize("package", ["PIL", "av"])
def test_missing_packages_are_named(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.mp4").write_bytes(b"")
    for name in [name for name in sys.modules if name.startswith("swformer_fast.tools.")]:
        if name.rpartition(".")[2] in ("batch", "pictures", "video"):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(sys.modules["swformer_fast.tools"], name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    message = refused(capsys, "a.mp4", "--task", "haze")
    assert f"{package} is missing: pip install 'sdo-swformer-fast[restore]'" in message


# the network


def test_result_is_that_of_restore_tiled(random: str, folder: Path) -> None:
    image = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
    model = sf.SWFormer.from_pretrained(random)
    for tile, exit in ((16, None), (512, "small")):
        expected = sf.restore_tiled(model, image, tile, 4, exit).clamp(0, 1)
        argv = ["a.png", "--weights", random, "--tile", str(tile), "--dtype", "fp32", "--overwrite"]
        assert main([*argv, *(["--exit", exit] if exit else [])]) == 0
        assert np.array_equal(pixels_of("a_restored.png"), (expected * 255).round().byte().permute(1, 2, 0).numpy())
    assert (pixels_of("a_restored.png").astype(int) - PIXELS).any()


def test_threads_do_not_change_a_bit(random: str, folder: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for count in ("1", "2"):
            argv = ["a.png", "--weights", random, "--tile", "16", "--threads", count, "--out", f"{count}.tif"]
            assert main([*argv]) == 0
            assert torch.get_num_threads() == int(count)
    finally:
        torch.set_num_threads(threads)
    assert Path("1.tif").read_bytes() == Path("2.tif").read_bytes()


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 7)])
def test_small_pictures(size: tuple[int, int], identity: str, folder: Path) -> None:
    small = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(small).save("small.png")
    assert main(["small.png", "--weights", identity, "--dtype", "fp32"]) == 0
    assert np.array_equal(pixels_of("small_restored.png"), small)


def test_numbers_that_are_not_finite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network(identity=True)
    model.heads[2].bias.fill_(torch.nan)
    sf.pretrained.save_weights(model, "nan.safetensors")
    assert main(["a.png", "--weights", "nan.safetensors"]) == 1
    assert "a.png the network gave numbers that are not finite: try --dtype fp32" in capsys.readouterr().err
    assert not Path("a_restored.png").exists()


def test_tile_is_the_largest_that_half_of_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    for bytes_free, tile in ((10**12, 4096), (10**9, 512), (10**6, 128)):
        monkeypatch.setattr(networks, "free_memory", lambda device, n=bytes_free: n)
        assert networks.tile_for(model) == tile
    large = networks.bytes_per_pixel(model)
    assert networks.bytes_per_pixel(model.bfloat16()) * 2 == large
    assert networks.bytes_per_pixel(network(exit="small")) <= large
    with sf.use_backend("reference"):
        assert networks.bytes_per_pixel(network()) >= large


def test_free_memory_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 2**20 < networks.free_memory(cpu) < 2**50
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal: 9 kB\nMemAvailable:  123 kB\n")
    assert networks.free_memory(cpu) == 123 * 1024
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal: 9 kB\n")
    assert 2**20 < networks.free_memory(cpu) < 2**50
    monkeypatch.delattr(os, "sysconf")
    assert networks.free_memory(cpu) == networks.FREE


def test_free_memory_is_no_more_than_a_container_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, limit in (("job", 3000), ("job/step", "max")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.stat").write_text("anon 1000\nfile 500\n")
    read = Path.read_text
    monkeypatch.setattr(networks, "CGROUPS", tmp_path)
    own = ["1:name=systemd:/\n0::/job/step\n"]
    monkeypatch.setattr(Path, "read_text", lambda self: own[0] if self.name == "cgroup" else read(self))
    assert networks.free_memory(torch.device("cpu")) == 2000
    (tmp_path / "job" / "memory.max").write_text("max\n")
    assert networks.free_memory(torch.device("cpu")) > 2**20
    (tmp_path / "memory.max").write_text("4000\n")  # as within a container
    (tmp_path / "memory.stat").write_text("anon 1000\n")
    own[0] = "0::/\n"
    assert networks.free_memory(torch.device("cpu")) == 3000


def test_dtype_is_bf16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(sf.backend, "multiplies_bf16", lambda fast=fast: fast)
        assert networks.best_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize("name", ["a.png", "deep.png", "deep.tif"])
def test_more_than_eight_bits_are_computed_in_fp32(
    name: str, random: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import imagecodecs
    import tifffile

    words = np.random.default_rng(1).integers(0, 65536, (20, 30, 3), np.uint16)
    Path("deep.png").write_bytes(imagecodecs.png_encode(words))
    tifffile.imwrite("deep.tif", (words / 65535).astype(np.float32), photometric="rgb")
    monkeypatch.setattr(sf.backend, "multiplies_bf16", lambda: True)
    assert main([name, "--weights", random, "--out", "auto.tif"]) == 0
    for dtype in ("bf16", "fp32"):
        assert main([name, "--weights", random, "--out", f"{dtype}.tif", "--dtype", dtype]) == 0
    auto, bf16, fp32 = (pictures.read(Path(f"{dtype}.tif")).pixels for dtype in ("auto", "bf16", "fp32"))
    assert not np.array_equal(bf16, fp32)
    assert np.array_equal(auto, bf16 if name == "a.png" else fp32)


@pytest.mark.parametrize(("fast", "dtype", "count"), [(True, "auto", 2), (False, "auto", 1), (True, "bf16", 1)])
def test_no_network_is_loaded_twice(
    fast: bool, dtype: str, count: int, identity: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one is for what has more bits than the first one's numbers."""
    import imagecodecs

    Path("deep.png").write_bytes(imagecodecs.png_encode(PIXELS.astype(np.uint16) * 257))
    monkeypatch.setattr(sf.backend, "multiplies_bf16", lambda: fast)
    loaded, load = [], networks.load
    monkeypatch.setattr(networks, "load", lambda *args: loaded.append(args) or load(*args))
    assert main(["a.png", "b.png", "deep.png", "--weights", identity, "--dtype", dtype]) == 0
    assert len(loaded) == count


def test_weights_for_other_channels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sf.pretrained.save_weights(network(in_channels=1), "grey.safetensors")
    assert "is for images of 1 channels, not for RGB" in refused(capsys, "a.png", "--weights", "grey.safetensors")


# failures


def test_a_bad_file_stops_nothing(
    identity: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    computed: list[Tensor] = []

    def restorer(self: networks.Restorer, image: Tensor) -> Tensor:
        computed.append(image)
        return image

    monkeypatch.setattr(networks.Restorer, "__call__", restorer)
    Path("aa.png").write_bytes(Path("a.png").read_bytes()[:200])
    Path("ab.jpg").write_text("no picture")
    Image.fromarray(np.zeros((50, 50), np.uint8)).save("ac.png")
    Path("ad.mp4").write_text("no video")
    Image.fromarray(np.dstack((PIXELS, PIXELS[..., :1]))).save("ae.png")
    argv = [".", "--weights", identity, "--max-pixels", "2000", "--out", "out", "--format", "jpg"]
    assert main(argv) == 1
    output = capsys.readouterr()
    assert "restored 2, failed 5" in output.out
    reasons = dict(line.split(" ", 1) for line in output.err.splitlines() if line.startswith("a"))
    assert "truncated" in reasons["aa.png"]
    assert "cannot identify" in reasons["ab.jpg"]
    assert reasons["ac.png"] == "has 50 x 50 pixels, more than --max-pixels 2000"
    assert reasons["ad.mp4"].startswith("cannot be restored: ")
    assert len(computed) == 2  # what cannot be written is not computed
    assert reasons["ae.png"] == "has transparency, which JPEG cannot hold: try --format png"
    assert {file.name for file in Path("out").iterdir()} == {"a_restored.jpg", "b_restored.jpg"}


def test_memory_that_does_not_suffice_is_told_in_words() -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        assert batch._sentence(error) == "needs more memory than there is: give a smaller --tile"
    assert batch._sentence(KeyError()) == "cannot be restored: KeyError"


def test_a_result_is_whole_or_as_it_was(folder: Path) -> None:
    with contextlib.suppress(RuntimeError), replacing(folder / "b.png") as partial:
        partial.write_bytes(b"half")
        assert (partial.parent, partial.suffix) == (folder, ".png")
        raise RuntimeError
    assert np.array_equal(pixels_of("b.png"), PIXELS)
    assert written(folder) == set()


@pytest.mark.skipif(os.name != "posix", reason="mode bits are of POSIX")
def test_results_have_the_mode_of_new_files(identity: str, folder: Path) -> None:
    before = os.umask(0o027)
    try:
        assert main(["a.png", "--weights", identity]) == 0
    finally:
        os.umask(before)
    assert Path("a_restored.png").stat().st_mode & 0o777 == 0o640


def test_interrupt_keeps_what_is_done(
    identity: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the second file's writing."""
    write, calls = pictures.write, []

    def interrupted(picture: pictures.Picture, path: Path, quality: int) -> None:
        write(picture, path, quality)
        calls.append(path)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pictures, "write", interrupted)
    assert main([".", "--recursive", "--weights", identity]) == 130
    assert written(folder) == {"a_restored.png"}
    output = capsys.readouterr()
    assert "interrupted: what is done is kept" in output.err
    assert "restored 1, failed 0" in output.out


SLOW = """
import sys, time
from swformer_fast.tools import pictures, restore
def slow(picture, path, quality):
    path.write_bytes(b"half")
    print("begun", flush=True)
    time.sleep(60)
pictures.write = slow
sys.exit(restore.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="no signals for a process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_from_a_terminal_and_the_end_of_a_job(number: signal.Signals, identity: str, folder: Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, ".", "--weights", identity],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert written(folder) == set()


def test_module_and_help() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "swformer_fast.tools.restore", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for option in command_line()._option_string_actions:
        assert option in run.stdout
    assert "exit status" in run.stdout


# videos


@pytest.fixture
def av() -> object:
    return pytest.importorskip("av")


def make_video(
    path: Path,
    codec: str,
    size: tuple[int, int] = (48, 64),
    kind: str = "yuv420p",
    sound: str | None = None,
) -> None:
    """Six frames of changing colours at uneven times."""
    import av

    times = [0, 25, 40, 65, 80, 105]
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream(codec, rate=30, options={"crf": "5"} if "264" in codec or "vp9" in codec else {})
        stream.height, stream.width, stream.pix_fmt = *size, kind
        stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        audio = writer.add_stream(sound, rate=48000, layout="mono") if sound else None
        for i, time in enumerate(times):
            rgb = np.stack((x / size[1], y / size[0], np.full_like(x, i / 6)), axis=2)
            frame = av.VideoFrame.from_ndarray((rgb * 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 600)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
        if audio is not None:
            wave = (np.sin(np.arange(9600) / 20)[None] * 20000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, 0
            writer.mux(audio.encode(frame))
            writer.mux(audio.encode())


def contents(path: Path) -> tuple[list[np.ndarray], list[Fraction], list[bytes]]:
    """Frames, their times and the packets of sound."""
    import av

    with av.open(str(path)) as reader:
        frames = list(reader.decode(video=0))
    with av.open(str(path)) as reader:
        packets = reader.demux(*reader.streams.audio) if reader.streams.audio else []
        sound = [bytes(packet) for packet in packets if packet.size]
    return [frame.to_ndarray(format="rgb24") for frame in frames], [f.pts * f.time_base for f in frames], sound


def stored(path: Path) -> list[np.ndarray]:
    """Frames in the pixel format of the file."""
    import av

    with av.open(str(path)) as reader:
        return [frame.to_ndarray() for frame in reader.decode(video=0)]


@pytest.mark.parametrize(
    ("suffix", "codec", "sound"),
    [
        (".mp4", "libx264", "aac"),
        (".mkv", "libx264", "flac"),
        (".mov", "libx264", "aac"),
        (".webm", "libvpx-vp9", "libopus"),
        (".avi", "mpeg4", "mp3"),
    ],
)
def test_videos_keep_frames_times_and_sound(
    suffix: str, codec: str, sound: str, identity: str, folder: Path, av: Any
) -> None:
    source = Path(f"v{suffix}")
    make_video(source, codec, sound=sound)
    assert main([str(source), "--weights", identity, "--dtype", "fp32"]) == 0
    before, after = contents(source), contents(Path(f"v_restored{suffix}"))
    assert after[1] == before[1]
    assert after[2] == before[2]
    assert len(after[2]) > 1
    for a, b in zip(before[0], after[0], strict=True):
        assert abs(a.astype(int) - b).mean() < 3
    assert written(folder) == {str(source), f"v_restored{suffix}"}


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("yuv420p", (48, 64), "yuv420p"),
        ("yuv422p", (48, 64), "yuv422p"),
        ("yuv444p", (47, 63), "yuv444p"),
        ("yuv420p10le", (48, 64), "yuv420p10le"),
    ],
)
def test_pixel_format_is_kept(
    kind: str, size: tuple[int, int], expected: str, identity: str, folder: Path, av: Any
) -> None:
    make_video(Path("v.mp4"), "libx264", size, kind)
    assert main(["v.mp4", "--weights", identity, "--dtype", "fp32", "--crf", "1"]) == 0
    with av.open("v_restored.mp4") as reader:
        assert reader.streams.video[0].pix_fmt == expected
        assert (reader.streams.video[0].height, reader.streams.video[0].width) == size
    (before, *_), (after, *_) = contents(Path("v.mp4")), contents(Path("v_restored.mp4"))
    for a, b in zip(before, after, strict=True):
        assert abs(a.astype(int) - b).mean() < 1


def test_frames_of_odd_sides_and_of_rgb(identity: str, folder: Path, av: Any) -> None:
    make_video(Path("v.mkv"), "ffv1", (47, 63), "bgr0")
    assert main(["v.mkv", "--weights", identity, "--codec", "libx264", "--dtype", "fp32", "--crf", "0"]) == 0
    with av.open("v_restored.mkv") as reader:
        assert reader.streams.video[0].pix_fmt == "yuv444p"
    (before, *_), (after, *_) = contents(Path("v.mkv")), contents(Path("v_restored.mkv"))
    assert abs(before[3].astype(int) - after[3]).mean() < 1


def test_description_of_colours_is_kept(identity: str, folder: Path, av: Any) -> None:
    make_video(Path("plain.mp4"), "libx264")
    with av.open("plain.mp4") as reader, av.open("v.mp4", "w") as writer:
        stream = writer.add_stream("libx264", rate=30, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 2
        context.sample_aspect_ratio = Fraction(4, 3)
        for frame in reader.decode(video=0):
            rgb = frame.reformat(format="rgb24")
            writer.mux(stream.encode(rgb.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=2)))
        writer.mux(stream.encode())
    assert main(["v.mp4", "--weights", identity, "--dtype", "fp32", "--crf", "0"]) == 0
    with av.open("v_restored.mp4") as reader:
        context = reader.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 2)
        assert reader.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
    # As stored and without loss: RGB doubles an error of chroma, and what a lossy encoder drops depends on its threads.
    before, after = stored(Path("v.mp4")), stored(Path("v_restored.mp4"))
    for a, b in zip(before, after, strict=True):
        assert abs(a.astype(int) - b).mean() < 0.5  # another matrix or range is off by 6


def test_videos_of_telephones_are_turned_upright(identity: str, folder: Path, av: Any) -> None:
    make_video(Path("v.mp4"), "libx264")
    data = Path("v.mp4").read_bytes()
    unity = b"".join(n.to_bytes(4, "big") for n in (65536, 0, 0, 0, 65536, 0, 0, 0, 0x40000000))
    quarter = b"".join((n % 2**32).to_bytes(4, "big") for n in (0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 0x40000000))
    place = data.index(unity, data.index(b"tkhd"))
    Path("v.mp4").write_bytes(data[:place] + quarter + data[place + len(unity) :])
    assert main(["v.mp4", "--weights", identity]) == 0
    (before, *_), (after, *_) = contents(Path("v.mp4")), contents(Path("v_restored.mp4"))
    assert after[0].shape == (64, 48, 3)
    assert abs(np.rot90(before[3], -1).astype(int) - after[3]).mean() < 3  # a quarter clockwise


def test_a_cover_is_not_the_video(identity: str, folder: Path, av: Any) -> None:
    make_video(Path("plain.mkv"), "libx264", sound="aac")
    with av.open("plain.mkv") as reader, av.open("v.mkv", "w") as writer:
        cover = writer.add_stream("mjpeg")
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        copies = [writer.add_stream_from_template(stream) for stream in reader.streams]
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")
        frame.pts = 0
        for packet in cover.encode(frame.reformat(format="yuvj420p")):
            writer.mux(packet)
        for packet in reader.demux():
            if packet.size:
                packet.stream = copies[packet.stream.index]
                writer.mux(packet)
    with av.open("v.mkv") as reader:
        assert reader.streams[0].width == 32
    assert main(["v.mkv", "--weights", identity]) == 0
    (before, *_), (after, *_) = contents(Path("plain.mkv")), contents(Path("v_restored.mkv"))
    assert len(before) == len(after)
    assert abs(before[3].astype(int) - after[3]).mean() < 3


def test_what_is_said_of_each_sound_is_kept(identity: str, folder: Path, av: Any) -> None:
    make_video(Path("plain.mkv"), "libx264", sound="aac")
    with av.open("plain.mkv") as reader, av.open("v.mkv", "w") as writer:
        picture, sound = reader.streams
        copies = [writer.add_stream_from_template(stream) for stream in (picture, sound, sound)]
        for copy, language in zip(copies[1:], ("ger", "fre"), strict=True):
            copy.metadata["language"] = language
        copies[2].disposition = av.stream.Disposition.default
        for packet in reader.demux(picture):
            if packet.size:
                packet.stream = copies[0]
                writer.mux(packet)
        for copy in copies[1:]:
            reader.seek(0)
            for packet in reader.demux(sound):
                if packet.size:
                    packet.stream = copy
                    writer.mux(packet)
    assert main(["v.mkv", "--weights", identity]) == 0
    for name in ("v.mkv", "v_restored.mkv"):
        with av.open(name) as reader:
            said = [(s.metadata["language"], bool(s.disposition.value)) for s in reader.streams.audio]
            assert said == [("ger", False), ("fre", True)]


@pytest.mark.parametrize(
    ("name", "codec", "kind"),
    [
        ("v.mkv", "libx264rgb", "rgb24"),
        ("v.mov", "png", "rgb24"),
        ("v.mkv", "ffv1", "gray"),
        ("v.avi", "mjpeg", "yuvj420p"),
    ],
)
def test_colours_that_the_result_stores_in_another_way(
    name: str, codec: str, kind: str, identity: str, folder: Path, av: Any
) -> None:
    """RGB, grey, and full range in a file that cannot say so."""
    make_video(Path(name), codec, kind=kind)
    assert main([name, "--weights", identity, "--dtype", "fp32"]) == 0
    (before, *_), (after, *_) = contents(Path(name)), contents(Path(f"v_restored{name[1:]}"))
    assert abs(before[3].astype(int) - after[3]).mean() < 3


@pytest.mark.parametrize(("name", "form"), [("v.avi", "avi"), ("v.mkv", "h264")])
def test_frames_without_times_of_their_own(name: str, form: str, identity: str, folder: Path, av: Any) -> None:
    """AVI keeps no times of H.264's frames, which come in disorder, a bare stream none at all."""
    with av.open(name, "w", format=form) as writer:
        stream = writer.add_stream("libx264", rate=25, options={"bf": "3"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(24):
            pixels = np.full((48, 64, 3), 10 * i, np.uint8)
            pixels[:, 2 * i : 2 * i + 4] = 255
            writer.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        writer.mux(stream.encode())
    assert main([name, "--weights", identity]) == 0
    after, times, _ = contents(Path(name.replace("v", "v_restored", 1)))
    assert len(after) == len(stored(Path(name))) == 24
    assert sorted(set(times)) == times
    assert times[-1] - times[0] == pytest.approx(23 / 25, abs=2 / 25)


def test_a_damaged_packet_costs_its_frames_alone(
    identity: str, folder: Path, av: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video(Path("v.mkv"), "libx264", sound="flac")
    with av.open("v.mkv") as reader:
        packet = [bytes(packet) for packet in reader.demux(video=0)][3]
    data = Path("v.mkv").read_bytes()
    assert data.count(packet) == 1
    Path("v.mkv").write_bytes(data.replace(packet, b"\xff" * len(packet)))
    assert main(["v.mkv", "--weights", identity]) == 0
    assert "v.mkv is damaged: 1 packets and their frames are left out" in capsys.readouterr().err
    frames, _, sound = contents(Path("v_restored.mkv"))
    assert 0 < len(frames) < 6
    with av.open("v.mkv") as reader:
        assert sound == [bytes(packet) for packet in reader.demux(audio=0) if packet.size]


def test_videos_that_are_read_and_not_written(identity: str, folder: Path, av: Any) -> None:
    make_video(Path("v.M4V"), "libx264", sound="aac")
    assert main(["v.M4V", "--weights", identity]) == 0
    assert main(["v.M4V", "--weights", identity, "--format", "mp4", "--codec", "mpeg4"]) == 0
    assert written(folder) == {"v.M4V", "v_restored.mkv", "v_restored.mp4"}
    before, after = contents(Path("v.M4V")), contents(Path("v_restored.mkv"))
    assert [len(part) for part in after] == [len(part) for part in before]
    assert after[2] == before[2]


def test_other_format_and_codec(identity: str, folder: Path, av: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make_video(Path("v.mkv"), "libx264", sound="aac")
    assert main(["v.mkv", "a.png", "--weights", identity, "--format", "mp4", "--codec", "libx265"]) == 0
    assert written(folder) == {"v.mkv", "v_restored.mp4", "a_restored.png"}
    with av.open("v_restored.mp4") as reader:
        assert reader.streams.video[0].codec_context.name == "hevc"
    argv = ["v.mkv", "--weights", identity, "--overwrite", "--codec"]
    assert "this FFmpeg has no encoder h999" in refused(capsys, *argv, "h999")
    assert "aac encodes no video" in refused(capsys, *argv, "aac")


def test_video_interrupted(identity: str, folder: Path, av: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_video(Path("v.mp4"), "libx264")
    calls = []

    def restorer(self: networks.Restorer, image: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return image

    monkeypatch.setattr(networks.Restorer, "__call__", restorer)
    assert main(["v.mp4", "--weights", identity]) == 130
    assert written(folder) == {"v.mp4"}


def test_files_without_pictures(identity: str, folder: Path, av: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with av.open("v.mp4", "w") as writer:
        stream = writer.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 48000
        writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
    assert main(["v.mp4", "--weights", identity]) == 1
    assert "v.mp4 holds no video" in capsys.readouterr().err

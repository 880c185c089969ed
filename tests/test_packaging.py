"""What is installed, what an import loads, and that neither breaks anybody else's package."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"sdo_fast", "swformer_fast", "swformer_kernels"}


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel of a copy of the sources, so that the build leaves nothing in the checkout."""
    source = folder / "source"
    ignore = shutil.ignore_patterns(".venv*", ".git", "build", "*.so", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=ignore)
    (source / "swformer_fast" / "weights").mkdir(exist_ok=True)
    (source / "swformer_fast" / "weights" / "tiny-test.safetensors").touch()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    run = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("pure"), SDO_SWFORMER_SKIP_EXT="1")


@pytest.fixture(scope="module")
def pure_site(pure_wheel: Path) -> Path:
    """A folder in which the pure-Python wheel is unpacked, as an installer would."""
    site = pure_wheel.parent / "site"
    zipfile.ZipFile(pure_wheel).extractall(site)
    return site


def top_level_names(wheel: Path) -> set[str]:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    return {name for name in names if not name.endswith(".dist-info")}


def test_top_level_names_of_the_wheel(pure_wheel: Path) -> None:
    assert top_level_names(pure_wheel) == PACKAGES
    files = zipfile.ZipFile(pure_wheel).namelist()
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(files)
    assert not any(name.endswith(".so") for name in files)


def test_every_module_is_in_the_wheel(pure_wheel: Path) -> None:
    roots = {package: ROOT for package in PACKAGES} | {"swformer_kernels": ROOT / "kernels"}
    modules = {str(f.relative_to(root)) for package, root in roots.items() for f in (root / package).rglob("*.py")}
    assert modules == {name for name in zipfile.ZipFile(pure_wheel).namelist() if name.endswith(".py")}


def test_console_tools_are_in_the_wheel(pure_wheel: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
        lines = wheel.read(name).decode().splitlines()
    for tool, module in (("swformer-restore", "restore"), ("swformer-eval", "evaluate")):
        assert f"{tool} = swformer_fast.tools.{module}:main" in lines


def test_nothing_imports_the_console_tools() -> None:
    python("import sys, swformer_fast; assert not {'swformer_fast.tools', 'PIL', 'av'} & set(sys.modules)")


def test_weights_are_in_the_wheel(pure_wheel: Path) -> None:
    weights = {f"swformer_fast/weights/{f.name}" for f in (ROOT / "swformer_fast" / "weights").glob("*.safetensors")}
    files = {name for name in zipfile.ZipFile(pure_wheel).namelist() if "/weights/" in name}
    assert files == weights | {"swformer_fast/weights/tiny-test.safetensors"}


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_wheel_with_extensions(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert top_level_names(wheel) == PACKAGES
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert any(name.startswith("swformer_fast/_C_") for name in libraries)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import swformer_fast as sf; print(sf.__file__, sf.backends()['cpp'])"
    path, state = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert path.startswith(str(tmp_path))
    assert state == "available"


def test_pure_python_install_passes_the_reference_tests(pure_site: Path) -> None:
    tests = sorted(map(str, (ROOT / "tests").glob("test_reference_*.py")))
    environment = {**os.environ, "PYTHONPATH": str(pure_site)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", f"--rootdir={ROOT}", *tests]
    run = subprocess.run(command, cwd=pure_site, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    code = (
        "import swformer_fast as sf, torch; print(sf.__file__)\n"
        "print(sf.backends()['cpp']); print(sf.why_not('haar_dwt2d', torch.ones(1, 1, 2, 2)))\n"
        "x = torch.randn(1, 2, 5, 6); assert torch.allclose(sf.functional.haar_dwt2d(x), sf.reference.haar_dwt2d(x))"
    )
    path, state, reason = python(code, pure_site, PYTHONPATH=str(pure_site)).strip().split("\n")
    assert path.startswith(str(pure_site))
    assert "was not built" in state
    assert reason.startswith("reference runs (not cpp: the compiled extension was not built")


def test_no_compiler_means_pure_python_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0
    lines = [line for line in run.stderr.splitlines() if "sdo-swformer-fast" in line]
    assert lines == ["sdo-swformer-fast: installing the pure Python packages (no C++ compiler found)"]


def test_forcing_cuda_without_nvcc_fails(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "SDO_SWFORMER_FORCE_CUDA": "1", "NVCC": "no-such-nvcc"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "no nvcc was found" in run.stderr


@pytest.mark.parametrize("package", ["swformer_fast", "sdo_fast"])
def test_import_loads_nothing_heavy(package: str) -> None:
    code = (
        f"import sys, {package}, torch\n"
        "heavy = {'triton', 'diffusers', 'transformers', 'safetensors', 'huggingface_hub', 'swformer_kernels'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "assert '/_C_' not in maps.replace('torch/_C', '')\n"
    )
    python(code)


def test_packages_do_not_import_each_other() -> None:
    python("import sys, swformer_fast; assert 'sdo_fast' not in sys.modules")
    python("import sys, sdo_fast; assert 'swformer_fast' not in sys.modules")


def test_transformers_and_diffusers_still_import_beside_us() -> None:
    """Both import the PyPI project `kernels`; the checkout's folder of that name must not stand in its way."""
    missing = {"diffusers", "kernels", "transformers"} - {d.name for d in metadata.distributions()}
    if missing:
        pytest.skip(f"not installed: {missing}")
    code = (
        "import kernels, swformer_fast, sdo_fast, swformer_kernels\n"
        "assert kernels.__file__ and 'site-packages' in kernels.__file__, kernels\n"
        "from transformers import LlamaModel\n"
        "from diffusers import UNet2DModel\n"
    )
    python(code, PYTHONPATH=str(ROOT))


def test_workflow_runs_every_version() -> None:
    """Each torch of requirements/, on the Python that its file names."""
    files = {file.stem.removeprefix("torch"): file.read_text() for file in (ROOT / "requirements").glob("torch*.txt")}
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    versions = dict(re.findall(r'torch: "(.+)", python: "(.+)"', workflow))
    assert set(versions) == set(files)
    for torch, text in files.items():
        assert text.startswith(f"# Python {versions[torch]}\ntorch=={torch}.")

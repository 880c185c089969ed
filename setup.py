"""Build of sdo-swformer-fast: extensions on the LibTorch stable ABI, one shared object per CPU instruction set.

Environment variables:
  SDO_SWFORMER_SKIP_EXT=1    install the pure Python packages only
  SDO_SWFORMER_SKIP_CUDA=1   leave the CUDA sources out even where nvcc exists
  SDO_SWFORMER_FORCE_CUDA=1  fail instead of leaving the CUDA sources out
  TORCH_CUDA_ARCH_LIST       the CUDA targets, e.g. "8.0;9.0+PTX" (default: 8.0 to 10.0, what this nvcc knows)
  CXX, NVCC, MAX_JOBS        the compilers and the number of parallel compile jobs
  DEBUG=1                    -O1 and debug information
  SANITIZE=address,undefined C++ for this machine's instruction set alone, under sanitizers (as `make sanitize` does)
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = "0x020a000000000000"


def enabled(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


SANITIZE = []
if os.environ.get("SANITIZE"):
    # Calls instead of checks in line: GCC takes minutes for each file's thousands.
    SANITIZE = [f"-fsanitize={os.environ['SANITIZE']}", "-fno-omit-frame-pointer", "-g1"]
    SANITIZE += ["--param=asan-instrumentation-with-call-threshold=0"]
# No -ffast-math: inf and NaN must propagate as in the reference.
CXX_FLAGS = [
    "-std=c++20",
    *(["-O1", "-g"] if enabled("DEBUG") else ["-O3"]),
    *SANITIZE,
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
]
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx2": ["-march=x86-64-v3"],
    },
    "aarch64": {"neon": ["-march=armv8.2-a+fp16"]},
}
CUDA_TARGETS = ["8.0", "8.6", "9.0", "10.0"]


def pure_python(reason: str) -> list[Extension]:
    print(f"sdo-swformer-fast: installing the pure Python packages ({reason})", file=sys.stderr)
    return []


def find_nvcc() -> str | None:
    if enabled("SDO_SWFORMER_SKIP_CUDA"):
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else None) or shutil.which("nvcc")
    if nvcc and shutil.which(nvcc):
        return nvcc
    if enabled("SDO_SWFORMER_FORCE_CUDA"):
        raise SystemExit("SDO_SWFORMER_FORCE_CUDA is set but no nvcc was found: set NVCC or CUDA_HOME")
    return None


def cuda_target_flags(nvcc: str) -> list[str]:
    supported = set(re.findall(r"compute_(\d+)", subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    flags = []
    for target in re.split(r"[;, ]+", asked) if asked else CUDA_TARGETS:
        number = target.removesuffix("+PTX").replace(".", "")
        if not asked and number not in supported:
            continue
        code = f"[sm_{number},compute_{number}]" if target.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    if not asked:
        newest = flags[-1].split("compute_")[1].split(",")[0]
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def find_extensions() -> list[Extension]:
    if enabled("SDO_SWFORMER_SKIP_EXT"):
        return pure_python("SDO_SWFORMER_SKIP_EXT is set")
    variants = INSTRUCTION_SETS.get(platform.machine().replace("AMD64", "x86_64").replace("arm64", "aarch64"))
    if sys.platform != "linux" or variants is None:
        return pure_python(f"no compiled extension for {sys.platform} on {platform.machine()}")
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        return pure_python("no C++ compiler found")
    try:
        import torch
    except ImportError:
        return pure_python("torch is not importable while building; use pip install --no-build-isolation")
    if not shutil.which("ninja"):
        return pure_python("ninja was not found")
    if SANITIZE:
        capability = torch.backends.cpu.get_cpu_capability().lower()
        variants = {isa: flags for isa, flags in variants.items() if isa in (capability, "neon")}
    extensions = []
    for package, folder in (("swformer_fast", "swformer"), ("sdo_fast", "sdo")):
        sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder / "cpu").rglob("*.cpp"))
        if sources:
            extensions += [
                Extension(f"{package}._C_{isa}", sources, extra_compile_args=f) for isa, f in variants.items()
            ]
        cuda_sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder / "cuda").glob("*.cu"))
        if cuda_sources and find_nvcc():
            extensions.insert(0, Extension(f"{package}._C_cuda", cuda_sources))  # first: nvcc takes longest
    return extensions


class NinjaBuild(build_ext):
    """Compiles every extension in one ninja graph, so that rebuilds compile only what changed.

    torch's own BuildExtension links Python and, for CUDA sources, libraries that the CPU build of torch lacks.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        import torch

        torch_home = Path(torch.__file__).parent
        include = [f"-I{ROOT / 'csrc' / 'common'}", f"-isystem{torch_home / 'include'}"]
        include += [f"-isystem{torch_home / 'include/torch/csrc/api/include'}"]
        defines = [f"-DTORCH_TARGET_VERSION={MINIMUM_TORCH}"]
        link = ["-shared", f"-L{torch_home / 'lib'}", "-Wl,--as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        cxx, nvcc = os.environ.get("CXX", "c++"), find_nvcc()
        lines = [
            f"cxx = {cxx}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  description = compile $name",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -o $out $in $flags",
            "  description = link $name",
        ]
        if nvcc:
            lines += [
                "rule compile_cuda",
                f"  command = {shlex.quote(nvcc)} -MMD -MF $out.d $flags -c $in -o $out",
                "  description = compile $name",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link_cuda",
                f"  command = {shlex.quote(nvcc)} -ccbin $cxx -o $out $in $flags",
                "  description = link $name",
            ]
        build_dir = Path(self.build_temp).resolve()
        targets = []
        for extension in self.extensions:
            cuda = extension.name.endswith("_C_cuda")
            if cuda:
                flags = ["-ccbin", cxx, "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
                flags += ["-DUSE_CUDA", *cuda_target_flags(str(nvcc)), *(f.replace("-isystem", "-I") for f in include)]
            else:
                flags = [*CXX_FLAGS, *extension.extra_compile_args, *include]
            objects = []
            for source in extension.sources:
                object_file = build_dir / extension.name / Path(source).relative_to("csrc").with_suffix(".o")
                objects.append(str(object_file))
                rule = "compile_cuda" if cuda else "compile"
                lines += [f"build {object_file}: {rule} {ROOT / source}", f"  flags = {shlex.join(flags + defines)}"]
                lines += [f"  name = {extension.name} {source}"]
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            link_flags = [*link, *SANITIZE]
            if cuda:
                link_flags = ["-shared", *(f for f in link[1:] if not f.startswith("-Wl")), "-cudart", "static"]
            lines += [f"build {output}: {'link_cuda' if cuda else 'link'} {' '.join(objects)}"]
            lines += [f"  flags = {shlex.join(link_flags)}", f"  name = {extension.name}"]
            targets.append(str(output))
        build_dir.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text("\n".join([*lines, f"default {' '.join(targets)}", ""]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.check_call([shutil.which("ninja") or "ninja", "-C", str(build_dir), *jobs])


PACKAGES = ["sdo_fast", "sdo_fast.losses", "sdo_fast.reference", "sdo_fast.training", "swformer_kernels"]
PACKAGES += ["swformer_fast", "swformer_fast.ops", "swformer_fast.reference", "swformer_fast.tools"]

extensions = find_extensions()
# They link no Python: one wheel serves every Python that torch's stable ABI does.
wheel = {"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {}

setup(
    packages=PACKAGES,
    package_dir={"swformer_kernels": "kernels/swformer_kernels"},
    package_data={
        "sdo_fast": ["py.typed"],
        "swformer_fast": ["py.typed", "weights/*.safetensors"],
        "swformer_kernels": ["py.typed"],
    },
    ext_modules=extensions,
    options=wheel,
    cmdclass={"build_ext": NinjaBuild},
)

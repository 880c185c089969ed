"""The kernels for AVX2 where those for AVX-512 are taken: a part of the suite in a process that knows AVX2 alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdo_fast
import swformer_fast as sf

CAPABILITY = torch.backends.cpu.get_cpu_capability()
HERE = Path(__file__).parent
KERNELS = ("haar", "pointwise", "depthwise_gelu", "wavelet_mix", "fourier_mix", "local_branches", "multiscale_ffn")
KERNELS += ("channel_attention", "channel_statistics", "sums", "kernel_sizes", "step", "shortcut")
CONTRACT = ("cpp", "layouts", "parameters_of_half_precision", "each_gradient_alone")


def test_library_is_that_of_the_instruction_set() -> None:
    wanted = os.environ.get("ATEN_CPU_CAPABILITY", CAPABILITY).lower()
    assert wanted == CAPABILITY.lower()
    if wanted not in ("avx2", "avx512") or sf.backends()["cpp"] != "available":
        pytest.skip(f"no library for {wanted} here")
    sdo_fast.backends()
    maps = Path("/proc/self/maps").read_text()
    for package in ("swformer_fast", "sdo_fast"):
        loaded = {variant for variant in ("avx2", "avx512") if f"/{package}/_C_{variant}.so" in maps}
        assert loaded == {wanted}


@pytest.mark.skipif(CAPABILITY != "AVX512", reason=f"the suite itself runs on {CAPABILITY} here")
def test_kernels_of_avx2() -> None:
    files = [__file__, str(HERE / "test_contract.py"), *(str(HERE / f"test_{name}.py") for name in KERNELS)]
    others = "triton or reference or compile or opcheck"
    chosen = f"not ({others}) and (not test_contract or {' or '.join(CONTRACT)})"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen]
    # Without the switch Inductor takes code for AVX-512 out of its cache.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr

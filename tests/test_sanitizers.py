"""The memory that C++ kernels share, under a compiler's sanitizers; `make sanitize` runs the kernels so."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import sdo_fast
import swformer_fast as sf

COMMON = Path(__file__).parent.parent / "csrc" / "common"
CXX = os.environ.get("CXX", "c++").split()
pytestmark = pytest.mark.skipif(not shutil.which(CXX[0]), reason="no C++ compiler")

POOL = """
#include <cstring>
#include <thread>
#include "pool.h"

void work(uint32_t state) {
  std::vector<pool::Pool::Block> held;
  for (int i = 0; i < 200; ++i) {
    state = state * 1664525 + 1013904223;
    if (held.size() < 3) {
      held.push_back(pool::instance().take(pool::kSmallest * (1 + (state >> 30))));
      std::memset(held.back().memory, i, 64);
    } else {
      pool::instance().give(held.back());
      held.pop_back();
    }
    if (state >> 28 == 0) pool::instance().clear();
  }
  for (const auto& block : held) pool::instance().give(block);
}

int main() {
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < 8; ++i) threads.emplace_back(work, i);
  for (auto& thread : threads) thread.join();
  pool::instance().clear();
}
"""

MEMORY = """
#include <cstdlib>
#include "pool.h"
#include "scratch.h"

// Argument: 0, all is well; 1 and 2, it writes past the end of a piece, to what a frame has given back; 3 and 4, so in
// the pool.
int main(int, char** arguments) {
  const int fault = std::atoi(arguments[1]);
  scratch::Frame outer;
  volatile float* piece = outer.take<float>(5);
  {
    scratch::Frame inner;
    volatile float* dead = inner.take<float>(5);
    dead[4] = 1;
    if (fault == 2) piece = dead;
  }
  outer.zeros<float>(5);
  piece[fault == 1 ? 5 : 4] = 1;

  const size_t size = pool::kSmallest + 1;
  pool::instance().give(pool::instance().take(2 * size));
  const pool::Pool::Block block = pool::instance().take(size);
  if (fault == 4) pool::instance().give(block);
  static_cast<volatile char*>(block.memory)[fault == 3 ? size : size - 1] = 1;
  if (fault != 4) pool::instance().give(block);
  pool::instance().give(pool::instance().take(size));
}
"""


def build(folder: Path, sanitizer: str, program: str) -> Path:
    """The program under this sanitizer; headers that are in `folder` come before the kernels'."""
    (folder / "main.cpp").write_text(program)
    command = [*CXX, "-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", f"-I{folder}", f"-I{COMMON}"]
    built = subprocess.run([*command, "main.cpp", "-o", "main"], cwd=folder, capture_output=True, text=True)
    if f"lib{sanitizer[0]}san" in built.stderr:
        pytest.skip(f"the compiler lacks the {sanitizer} sanitizer's library")
    assert built.returncode == 0, built.stderr
    return folder / "main"


def report(*command: str | Path) -> str:
    """What the sanitizer reports; nothing where the program ends well."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["TSAN_OPTIONS"] = "halt_on_error=1"  # what a race has broken may not end
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this compiler's thread sanitizer does not run where the system randomises addresses so much")
    assert bool(result.returncode) == bool(result.stderr)
    return result.stderr


def test_threads_share_the_pool(tmp_path: Path) -> None:
    assert report(build(tmp_path, "thread", POOL)) == ""


def test_a_pool_without_its_lock_is_noticed(tmp_path: Path) -> None:
    locked = (COMMON / "pool.h").read_text()
    unlocked = locked.replace("const std::lock_guard lock(mutex_);", "")
    assert unlocked != locked
    (tmp_path / "pool.h").write_text(unlocked)
    assert "data race" in report(build(tmp_path, "thread", POOL))


def test_each_piece_of_memory_has_an_end(tmp_path: Path) -> None:
    program = build(tmp_path, "address", MEMORY)
    assert report(program, "0") == ""
    for fault, kind in enumerate(("heap-buffer-overflow", "heap-use-after-free", *["use-after-poison"] * 2), 1):
        assert kind in report(program, str(fault))


@pytest.mark.skipif("libasan" not in os.environ.get("LD_PRELOAD", ""), reason="of `make sanitize`")
def test_the_libraries_are_built_with_sanitizers() -> None:
    for package in (sf, sdo_fast):
        assert package.backends()["cpp"] == "available"
        folder = Path(package.__file__).parent
        (library,) = (f for f in folder.glob("_C_*.so") if str(f) in Path("/proc/self/maps").read_text())
        assert b"__asan_" in library.read_bytes()
        assert b"__ubsan_handle" in library.read_bytes()

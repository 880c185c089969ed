"""The tuner, as far as a CPU can rehearse it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from swformer_kernels import _haar, haar_dwt2d

from benchmarks.gpu import Rehearsal
from benchmarks.inspection import tune

rehearsed = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on the CPU")


class Stopwatch(Rehearsal):
    """Runs, and says that it took as long as the tile that is in force has bytes."""

    def seconds(self, run: Any) -> float:
        run()
        return float(_haar._TILES["interpreter"][0][1])


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> tune.Setting:
    monkeypatch.setitem(_haar._TILES, "interpreter", _haar._TILES["default"])
    first = next(tune.TABLES["haar"](torch.device("cpu")))
    return tune.Setting(first.name, "haar_dwt2d", ((1, 2, 6, 8),), first.current, (), first.use, ("haar_dwt2d fp32",))


def _search(setting: tune.Setting, *candidates: Any, budget: float = 60) -> list[tune.Trial]:
    setting = replace(setting, candidates=candidates)
    return tune.search(setting, Stopwatch(), setting.shapes, budget)


@rehearsed
def test_search_times_each_candidate_and_restores_the_table(setting: tune.Setting) -> None:
    before = _haar._TILES["interpreter"]
    trials = _search(setting, (1024, 4), setting.current, (4096, 8))
    assert [t.candidate for t in trials] == [setting.current, (1024, 4), (4096, 8)]
    assert [t.seconds for t in trials] == [pytest.approx(setting.current[0]), pytest.approx(1024), pytest.approx(4096)]
    assert _haar._TILES["interpreter"] == before


@rehearsed
def test_candidate_that_changes_the_result_is_refused(setting: tune.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = haar_dwt2d.haar_dwt2d

    def broken(x: torch.Tensor, *taps: torch.Tensor) -> torch.Tensor:
        return correct(x, *taps) * (1 if _haar._TILES["interpreter"][0][1] == setting.current[0] else 1.001)

    monkeypatch.setattr(haar_dwt2d, "haar_dwt2d", broken)
    right, wrong = _search(setting, (1024, 4))
    assert not right.problem
    assert wrong.problem == "wrong result of haar_dwt2d fp32"
    assert wrong.seconds == float("inf")


@rehearsed
def test_candidate_that_does_not_run_says_why(setting: tune.Setting) -> None:
    _, failed = _search(setting, ("a tile", 4))
    assert failed.problem.startswith("TypeError")
    assert _haar._TILES["interpreter"][0][1:] == setting.current


@rehearsed
def test_search_ends_with_its_budget(setting: tune.Setting) -> None:
    assert len(_search(setting, (1024, 4), (4096, 4), budget=0)) == 1


def test_tables_name_launches_that_exist() -> None:
    from benchmarks.inspection.launches import LAUNCHES, meta

    for make in tune.TABLES.values():
        for table in make(torch.device("cpu")):
            launches = list(LAUNCHES[table.family].launches(meta, table.shapes[0]))
            assert set(table.launches) <= {launch.name for launch in launches}, table.name
            assert table.launches or any(launch.main for launch in launches), table.name
            assert table.current in table.candidates, table.name
            table.use(table.current)


def test_every_family_has_a_table() -> None:
    from benchmarks.inspection.launches import LAUNCHES

    tables = [table for make in tune.TABLES.values() for table in make(torch.device("cpu"))]
    folds = {"fold_norm", "fold_attention"}  # of parameters alone
    assert {table.family for table in tables} == set(LAUNCHES) - folds
    assert len({table.name for table in tables}) == len(tables)


@rehearsed
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("channel_attention", "pointwise") else pytest.param(name, marks=pytest.mark.slow)
        for name in tune.TABLES
    ],
)
def test_dry_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every table is searched: its candidates run and give the same results, and the new table is printed."""
    tables = list(tune.TABLES[name](torch.device("cpu")))
    assert tune.main([name, "--dry-run", "--seconds", "3600"]) == 0
    text = capsys.readouterr().out
    assert "REHEARSAL ON THE CPU" in text
    assert "Error" not in text
    assert "wrong result" not in text
    for table in tables:
        assert f"{table.name} = " in text
    assert [t.current for t in tune.TABLES[name](torch.device("cpu"))] == [t.current for t in tables]


@rehearsed
def test_tuner_says_what_it_had_no_time_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["channel_attention", "--dry-run", "--seconds", "-1"]) == 0
    text = capsys.readouterr().out
    assert "not reached in -1 s: channel_attention._TILE, _TILES_A_PARTIAL, channel_attention._WEIGHTS" in text


@rehearsed
def test_tuner_asks_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["haar"])
    assert "not tuned: no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["no-such-table"])
    assert "unknown table no-such-table" in capsys.readouterr().err

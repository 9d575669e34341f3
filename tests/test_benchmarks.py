"""The harness of benchmarks/: what it measures, and that it ends when a process does."""

import pytest

from benchmarks import harness


def works():
    return lambda: sum(range(1000))


def dies():
    raise ValueError("no data here")


def dies_at_work():
    def work():
        raise ValueError("no room here")

    return work


def test_a_pair_of_timings():
    row = harness.pair("a row", "tests.test_benchmarks", "works", "works", {}, 2, 1)
    assert row["label"] == "a row" and row["pairs"] == 2 and row["baseline_s"] > 0
    assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
    assert row["baseline_peak"] >= 0 and row["project_peak"] >= 0


@pytest.mark.parametrize("broken", ["dies", "dies_at_work"])
def test_a_process_that_ends_early_ends_the_benchmark(broken):
    with pytest.raises(SystemExit, match=f"error: a row: the process of {broken} ended early"):
        harness.pair("a row", "tests.test_benchmarks", "works", broken, {}, 1, 1)

"""What the benchmarks share. A ratio is printed and kept; `make bench` collects all into `reports/benchmarks.html`."""

from __future__ import annotations

import statistics
import time

import pytest

RATIOS: list[dict] = []


@pytest.fixture
def medians():
    """Median seconds of each call; the calls take turns, so that the machine's other work falls on all alike."""

    def measure(*calls, repeats: int = 3) -> list[float]:
        times = [[] for _ in calls]
        for _ in range(repeats):
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
        return [statistics.median(taken) for taken in times]

    return measure


@pytest.fixture
def record(request):
    """Keep a measured number: its name, value and unit, and the goal that it is compared with."""

    def keep(name: str, value: float, unit: str, *, goal: str = "") -> None:
        RATIOS.append({"name": name, "value": value, "unit": unit, "goal": goal, "test": request.node.nodeid})
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{name}: {value:.3g} {unit}" + (f" (goal: {goal})" if goal else ""))

    return keep


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    output_json["ratios"] = RATIOS

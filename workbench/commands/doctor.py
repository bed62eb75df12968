"""The command that says what is installed, what the machine offers, and what is missing for which feature."""

import importlib.util
import os
import platform
import shutil
from ctypes.util import find_library
from pathlib import Path

from workbench import __version__, paths
from workbench.commands.options import command
from workbench.io import version_of

SHOWN = ("torch", "diffusers", "transformers", "numpy", "scikit-learn", "zarr", "papermill", "jupyterlab")
FEATURES = {
    "JupyterLab": (("jupyterlab",), "[lab]"),
    "the edit studio as a page": (("voila",), "[lab]"),
    "drawing avatars": (("python_avatars", "cairosvg", "library cairo"), "[data], and libcairo2"),
    "tests": (("pytest", "xdist", "nbval", "nbstripout", "pytest_benchmark", "ruff"), "[test]"),
    "tests in a browser": (("playwright", "program chromium"), "[test], and chromium"),
    "reports as PDF": (("program chromium",), "chromium or chrome"),
    "documentation site": (("sphinx", "myst_nb", "numpydoc", "furo"), "[docs]"),
    "pre-commit checks": (("pre_commit",), "[dev]"),
    "stores at s3:// addresses": (("s3fs",), "s3fs"),
}
"""What a feature needs beside the package itself, and the extra (`pip install -e ".[lab]"`) or program that has it."""


@command("doctor", example="workbench doctor")
def doctor():
    """Show versions, device, threads, memory and caches, and what is missing for which feature."""
    print("\n".join([*_versions(), *_machine(), *_caches(), *_features()]))


def _versions() -> list[str]:
    found = {name: version_of(name) for name in SHOWN}
    pins = [line.split("==") for line in _constraints() if "==" in line]
    other = [f"{name} {version_of(name)} (pinned {pin})" for name, pin in pins if version_of(name) not in (None, pin)]
    lines = ["versions", f"  workbench {__version__} of {paths.home()}, Python {platform.python_version()}"]
    lines += ["  " + ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())]
    return [*lines, f"  other than pinned: {', '.join(other) or 'none'}"]


def _machine() -> list[str]:
    import joblib
    import psutil
    import torch

    from workbench.diffusion.memory import free_memory
    from workbench.diffusion.models import best_device
    from workbench.diffusion.parallel import THREADS, thread_count

    device, memory = best_device(), psutil.virtual_memory()
    name = (
        f" ({torch.cuda.get_device_name(device)}, {_size(free_memory(device))} free)" if device.type == "cuda" else ""
    )
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU-only build of torch"
    given = f", {THREADS} = {os.environ[THREADS]}" if THREADS in os.environ else ""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return [
        "machine",
        f"  {platform.platform()}, {os.cpu_count()} cores, of which {joblib.cpu_count()} for this process{load}",
        f"  device {device}{name}; {cuda}; {thread_count()} threads compute{given}",
        f"  memory {_size(memory.available)} free of {_size(memory.total)}; "
        f"disk {_size(shutil.disk_usage(paths.data()).free)} free",
    ]


def _caches() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    stores = len(list(paths.cache().glob("*.zarr")))
    places = {
        f"{stores} extracted stores and other cached results; rebuilt on demand": paths.cache(),
        "models of the hub": Path(HF_HUB_CACHE),
        "reports": paths.reports(),
    }
    return ["caches", *(f"  {_size(_bytes(place))} in {place}: {what}" for what, place in places.items())]


def _features() -> list[str]:
    lines = ["features"]
    for feature, (needs, remedy) in FEATURES.items():
        missing = [need for need in needs if not _present(need)]
        lines += [f"  {feature}: " + (f"missing {', '.join(missing)}; install {remedy}" if missing else "ready")]
    return lines


def _present(need: str) -> bool:
    """Whether there is a module, a "library x" of the system, or a "program" that prints pages."""
    kind, _, name = need.rpartition(" ")
    if kind == "library":
        return find_library(name) is not None
    if kind == "program":
        from workbench.report.printing import BROWSERS

        return any(map(shutil.which, BROWSERS))
    return importlib.util.find_spec(name) is not None


def _constraints() -> list[str]:
    file = paths.home() / "constraints.txt"
    return file.read_text(encoding="utf-8").split() if file.exists() else []


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) if folder.is_dir() else 0


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

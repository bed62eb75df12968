"""Parts of the checks on a device; each keeps its results in a JSON file as they come.

python tests/gpu/parts.py FOLDER PART ... [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import operations
import speed
import torch
from mirror import mirror

import workbench as wb
from workbench.diffusion.memory import free_memory
from workbench.hspace import extract as extraction
from workbench.hspace.store import read_store
from workbench.io import write_text

DTYPES = ("float32", "bfloat16")


@dataclass
class Report:
    """Results of a part, in a file that is whole after each of them."""

    path: Path
    dry: bool
    results: dict = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def keep(self, name: str, values: dict) -> None:
        self.results[name] = values
        write_text(self.path, json.dumps(self.results, indent=1, default=str))
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        print(f"{name}: {shown}", flush=True)

    def model(self, name: str = "avataaars32", **options) -> wb.Model:
        """A model for the device; in a dry run an untrained network of 8 x 8 pixels, never compiled."""
        options = {"device": self.device, **options}
        if not self.dry:
            return speed.network(name, **options)
        sys.path.append(str(Path(__file__).parents[1]))
        from conftest import random_unet

        kept = {key: value for key, value in options.items() if key in ("device", "dtype")}
        return wb.wrap(random_unet(), wb.NoiseSchedule.linear(), name="tiny", **kept)


def correctness(report: Report) -> None:
    """Every operation on the device against the CPU, in float32 and in bfloat16."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    devices = {dtype: report.device for dtype in DTYPES}
    if report.dry:
        devices["float32"], operations.STEPS = mirror(), 4
    models = {dtype: report.model(device=device, dtype=dtype) for dtype, device in devices.items()}
    reference = report.model(device="cpu")
    for name, found in operations.compare(reference, models, operations.Inputs(reference)):
        for label, result in found.items():
            report.keep(f"{name}, {label}", result)


def speeds(report: Report) -> None:
    """The network and extraction beside it, eager and compiled; then with CUDA graphs, and a small network."""
    dry = report.dry
    limits = speed.peaks(report.device, side=64 if dry else 8192, megabytes=1 if dry else 4096)
    report.keep("peaks", limits)
    large, small = (speed.NETWORK, 16 if dry else 32), ("avataaars32", 4)
    todo = [("bfloat16", "eager", large), ("bfloat16", "default", large), ("float32", "eager", large)]
    todo += [("bfloat16", "reduce-overhead", large)]
    todo += [("bfloat16", mode, small) for mode in ("eager", "default", "reduce-overhead")]
    for dtype, mode, (name, batch) in todo:
        model = report.model(name, dtype=dtype, mode=mode, batch=batch)
        found = speed.network_rates(model, batch_size=batch, steps=4 if dry else 25, limits=limits)
        report.keep(f"{name} in batches of {batch}, {dtype} {mode}", found)
        if name == speed.NETWORK and dtype == "bfloat16" and mode != "reduce-overhead":
            sizes = {"chunks": 1 if dry else 3, "steps": 4 if dry else 50, "batch_size": batch}
            report.keep(f"extraction, {mode}", speed.extraction_share(model, **sizes))


def edits(report: Report) -> None:
    """A grid of edits against its cells, and the Jacobian."""
    low = report.model(speed.NETWORK, dtype="bfloat16")
    report.keep("edit grid", speed.grid_against_cells(low, steps=4 if report.dry else 20))
    report.keep("Jacobian", speed.jacobian(report.model(speed.NETWORK), trained=report.model()))


def sharing(report: Report) -> None:
    """Two processes on one card extract one store, which is that of one process."""
    folder = report.path.parent / "stores"
    shutil.rmtree(folder, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, str(report.path.parent), "rank", *(["--dry"] if report.dry else [])]
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(command, env=environment) for environment in environments]
    codes = [process.wait() for process in processes]
    one, two = extract_shared(report, folder / "one.zarr"), read_store(folder / "two.zarr")
    arrays = [(two.group[name][:].astype(float), array[:].astype(float)) for name, array in one.group.arrays()]
    error = max(operations.relative_error(*pair) for pair in arrays)
    wrote = [len((folder / f"chunks{rank}").read_text().split()) for rank in range(2)]
    # The same batches on the same card; the store keeps float16.
    passed = codes == [0, 0] and two.complete and min(wrote) > 0 and error < 1e-3
    report.keep("two processes", {"passed": passed, "chunks": wrote, "error": error})
    shutil.rmtree(folder)


def extract_shared(report: Report, out: Path) -> wb.HStore:
    """Extract in chunks of four samples, and note those that this process wrote."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write, wrote = extraction.write_chunk, out.with_name(f"chunks{os.environ.get('RANK', '')}")

    def noted(store, chunk, values) -> None:
        write(store, chunk, values)
        with wrote.open("a") as file:
            file.write(f"{chunk}\n")

    small = mock.patch.object(extraction, "chunk_size", lambda *_, **__: 4)
    with small, mock.patch.object(extraction, "write_chunk", noted):
        return wb.extract(report.model(), 32, steps=10, batch_size=4, out=out, progress=False)


PARTS = {part.__name__: part for part in (correctness, speeds, edits, sharing)}


def machine(device: torch.device) -> dict:
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "free GiB": free_memory(device) / 2**30,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "rank"])
    parser.add_argument("--dry", action="store_true", help="a network of 8 x 8 pixels, to try the parts in a minute")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="the samples diverge")
    given.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in given.parts:
        report, start = Report(given.folder / f"{part}.json", given.dry), time.monotonic()
        if part == "rank":
            extract_shared(report, given.folder / "stores" / "two.zarr")
            continue
        if not given.dry and report.device.type == "cpu":
            parser.error(f"there is no CUDA device for {part}; try --dry")
        report.keep("machine", machine(report.device))
        PARTS[part](report)
        report.keep("time", {"seconds": time.monotonic() - start})
        failed += [name for name, values in report.results.items() if values.get("passed") is False]
    print(f"FAILED: {'; '.join(failed)}" if failed else f"passed: {' '.join(given.parts)}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

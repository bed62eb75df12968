"""Where the project's folders are.

Notebooks run from any directory (papermill and nbval start their kernels in different places), so nothing in the
project uses a relative path: it asks here.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Folder that holds `data/`, `notebooks/` and `reports/`.

    The clone that the package was installed from (`pip install -e .`), or the folder that the environment variable
    `WORKBENCH_HOME` names.

    Raises
    ------
    FileNotFoundError
        If that folder has no `data/`.
    """
    named = os.environ.get("WORKBENCH_HOME")
    root = Path(named).expanduser().resolve() if named else Path(__file__).resolve().parent.parent
    if not (root / "data").is_dir():
        raise FileNotFoundError(
            f"{root} has no data/ folder; install the workbench from a clone with `pip install -e .`, "
            "or set WORKBENCH_HOME to the clone"
        )
    return root


def data() -> Path:
    """Bundled models and images."""
    return home() / "data"


def models() -> Path:
    """Bundled models, one folder each."""
    return data() / "models"


def cache() -> Path:
    """Extracted stores, looked up by all of their inputs. Safe to delete."""
    return data() / "cache"


def directions() -> Path:
    """Saved directions."""
    return data() / "directions"


def boundaries() -> Path:
    """Saved boundaries."""
    return data() / "boundaries"


def edits() -> Path:
    """Figures, recipes and directions that an edit studio saved."""
    return data() / "edits"


def notebooks() -> Path:
    """The staged notebooks, without outputs."""
    return home() / "notebooks"


def profiles() -> Path:
    """YAML files with the parameters of a whole report."""
    return home() / "profiles"


def reports() -> Path:
    """Executed notebooks, their HTML and the index page."""
    return home() / "reports"

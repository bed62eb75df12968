"""A Jupyter-first workbench for the bottleneck space ("h-space") of diffusion models.

    import workbench as wb

    model = wb.load_model("avataaars32")
    run = wb.sample(model, seeds=range(8), steps=50, record_h=True)
    store = wb.extract(model, n=2000, steps=50)

Names load their modules when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib

_WHERE = {
    "analysis.intervals": ("Estimate",),
    "analysis.probes": ("expected_accuracy", "samples_needed"),
    "diffusion.loading": ("convert_checkpoint", "list_models", "load_model"),
    "diffusion.models": ("Model", "wrap"),
    "diffusion.schedule": ("NoiseSchedule",),
    "diffusion.training": ("TrainingSettings", "train_model"),
    "diffusion.memory": ("keep_freed_memory",),
    "diffusion.unet": ("Bottleneck",),
    "diffusion.inversion": ("invert",),
    "diffusion.sampling": ("Trajectory", "replay", "sample"),
    "datasets.classifiers": ("check_attributes", "load_classifier", "train_classifier"),
    "datasets.clip": ("Clip", "load_clip"),
    "datasets.clip_training": ("train_clip",),
    "datasets.domain": ("Domain", "domain_of"),
    "datasets.labelled": ("LabelledImages", "load_image", "load_images"),
    "hspace.store": ("HStore", "open_store"),
    "hspace.extract": ("extract",),
    "hspace.spaces": ("tap_table",),
    "directions.boundary": ("Boundary", "load_boundary", "move_jointly"),
    "directions.boundary_accuracy": ("accuracy_over_samples", "accuracy_over_time"),
    "directions.boundary_fit": ("fit_boundaries", "fit_boundary"),
    "directions.direction": ("Direction", "load_direction", "random_like"),
    "directions.selection": ("Selection", "find_from_selection"),
    "directions.asyrp": ("DeltaFunction", "load_asyrp"),
    "directions.jacobian": ("find_jacobian", "find_pullback"),
    "directions.learned": ("learn_directions",),
    "directions.pca": ("find_pca",),
    "directions.sparse": ("SparseCode", "fit_sparse_code"),
    "directions.words": ("boundary_from_text", "find_from_text"),
    "directions.supervised": ("find_from_labels", "find_from_scores", "find_many"),
    "benchmark.protocol": ("Protocol",),
    "benchmark.records": ("load_benchmark",),
    "benchmark.results": ("Benchmark",),
    "benchmark.run": ("run_benchmark",),
    "benchmark.methods": ("register_method",),
    "editing.asyrp": ("EditingInterval", "edit_asyrp", "find_interval"),
    "editing.asyrp_training": ("train_asyrp",),
    "editing.cross": ("Cross", "cross_boundary"),
    "editing.disentangle": ("cancel_effects", "disentangling_table", "few_examples"),
    "editing.edits": ("AtTap", "Edit", "MoveNoise", "MoveX", "Shift", "Swap", "Transport"),
    "editing.measure": ("Effects", "measure"),
    "editing.mixing_search": ("mixing_step",),
    "editing.render": ("EditGrid", "edit", "edit_grid", "render"),
    "evaluate": ("Evaluation", "evaluate_model"),
    "studio.recipe": ("open_recipe", "save_recipe"),
    "studio.session": ("EditSession",),
    "report.facts": ("read_facts", "record_facts"),
    "report.figures": ("save_figure",),
    "report.notebooks": ("run_notebook",),
    "report.sweep": ("sweep",),
    "studio.explorer": ("Explorer", "explore"),
    "studio.widgets": ("EditStudio",),
}
_MODULES = {
    "exercises": "exercises",
    "paths": "paths",
    "plots": "report.plots",
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names}

__version__ = "0.2.0.dev0"
__all__ = [*sorted(_NAMES), *sorted(_MODULES)]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"workbench.{_MODULES[name]}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"workbench.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""Boundaries that BoundaryDiffusion's code saves: pickles of a fitted `sklearn.svm.SVC`, read without executing them.

A pickle is a program. The reader here lets it name the linear support-vector classifier and numpy's arrays, and nothing
else; and even these names stand for plain records of this module, so that neither scikit-learn nor numpy runs anything
that a file asks for.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from workbench.diffusion.models import Model
from workbench.directions.boundary import Boundary
from workbench.paths import local

_KINDS = "biuf"
"""Kinds of numpy's types that are numbers."""


def convert_boundary(path: str | Path, model: Model, *, t: int, space: str, name: str | None = None) -> Boundary:
    """A `.sav` file of BoundaryDiffusion as a `Boundary`.

    Its accuracy and deviations are not in the file: move by distances, or take `boundary.measured(samples, labels)`.

    Parameters
    ----------
    path : path
    model : Model
        The one that it was fitted with, which the file does not name.
    t : int
        Timestep that it was fitted at; 500 for BoundaryDiffusion's own on CelebA-HQ and church.
    space : {"h", "x"}
        Latent space of the boundary; BoundaryDiffusion calls x_t "z".
    name : str, optional
        By default that of the file.

    Returns
    -------
    Boundary

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it names anything but a linear classifier and arrays of numbers, or is truncated; if the normal has another
        number of values than the space, or there is no such t.
    """
    path = local(path)
    saved = _read(path)
    arrays = _checked(saved, path)
    weights, intercept = (arrays["dual_coef_"] @ arrays["support_vectors_"])[0], float(arrays["intercept_"].ravel()[0])
    norm = float(np.linalg.norm(weights))
    if not np.isfinite(norm) or norm == 0.0 or not np.isfinite(intercept):
        raise ValueError(f"{path} has weights of length {norm} and intercept {intercept}; it is no boundary")
    if not 0 <= t < model.schedule.T:
        raise ValueError(f"t is {t}; {model.name} has the timesteps 0..{model.schedule.T - 1}")
    shape = model.h_shape if space == "h" else model.x_shape
    if weights.size != math.prod(shape):
        what = f"{path} has a normal of {weights.size} values; {space}_t of {model.name} has shape {shape}"
        raise ValueError(f"{what}; give the model and the space (h or x) that it was fitted in")
    provenance = {
        "model": model.provenance(),
        "etas": None,
        "seeds": None,
        "method": "svm of BoundaryDiffusion",
        "parameters": {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "classes": arrays["classes_"].tolist(),
            "support_vectors": len(arrays["support_vectors_"]),
            "scikit_learn": str(saved.get("_sklearn_version", "unknown")),
        },
    }
    return Boundary(
        normal=torch.from_numpy(weights / norm).float().view(shape),
        intercept=intercept / norm,
        t=t,
        space=space,
        name=path.stem if name is None else name,
        provenance=provenance,
        extras={"weight_norm": norm},
    )


def _read(path: Path) -> dict:
    """Attributes of the classifier that a file holds."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no boundary {path}; give a .sav file of BoundaryDiffusion")
    reader = _Reader(path.read_bytes())
    try:
        saved = reader.load()
    except _Refused as error:
        raise ValueError(f"{path} is refused: {error}; nothing of it was run") from error
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read; it is truncated or no pickle ({reason})") from error
    if type(saved) is not reader.classifier:
        raise ValueError(f"{path} holds no support-vector classifier; it is of type {type(saved).__name__}")
    return vars(saved)


def _checked(saved: dict, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a fitted linear classifier of two classes."""
    if saved.get("kernel") != "linear":
        raise ValueError(f"{path} has a classifier of kernel {saved.get('kernel')!r}; only a linear one is a boundary")
    arrays = {}
    for name in ("dual_coef_", "support_vectors_", "intercept_", "classes_"):
        value = getattr(saved.get(name), "values", None)
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{path} has no array {name}; the classifier is not fitted, or of sparse samples")
        arrays[name] = value.astype(np.float64)
    dual, support = arrays["dual_coef_"], arrays["support_vectors_"]
    if support.ndim != 2 or dual.shape != (1, len(support)) or arrays["classes_"].shape != (2,):
        classes = f"{arrays['classes_'].size} classes, {len(support)} support vectors and weights of shape {dual.shape}"
        raise ValueError(f"{path} has {classes}; a boundary has 2 classes and one weight a vector")
    return arrays


class _Refused(Exception):
    """The file asks for something that is not allowed."""


class _Reader(pickle.Unpickler):
    """An unpickler that knows a handful of names, each standing for a record or function made for this file alone.

    They are made anew for every file since a pickle can set attributes of what it names.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.classifier, self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Callable:
        # numpy 2 moved its core; scikit-learn and Python 2 renamed modules too.
        place = module.replace("numpy._core", "numpy.core").replace("svm._classes", "svm.classes")
        place = place.replace("__builtin__", "builtins")
        if (place, name) not in self._known:
            raise _Refused(f"it asks for {module}.{name}, and a boundary needs a linear SVC and arrays alone")
        return self._known[place, name]


def _stand_ins() -> tuple[type, dict[tuple[str, str], Callable]]:
    """The classifier's record, and all names that a file may use."""

    class Classifier:
        pass

    class Number:
        """`numpy.dtype`."""

        def __init__(self, code: str, *_) -> None:
            self.dtype = _number_type(code)

        def __setstate__(self, state: tuple) -> None:
            if state[1] in ("<", ">"):
                self.dtype = self.dtype.newbyteorder(state[1])

    class Array:
        """`numpy.ndarray`."""

        values = None

        def __setstate__(self, state: tuple) -> None:
            _, shape, number, fortran, content = state
            self.values = _array(content, number.dtype, shape, "F" if fortran else "C")

    def reconstruct(*_) -> Array:
        return Array()

    def from_buffer(content: bytes, number: Number, shape: tuple, order: str) -> Array:
        array = Array()
        array.values = _array(content, number.dtype, shape, order)
        return array

    def scalar(number: Number, content: bytes) -> float:
        return float(np.frombuffer(content, number.dtype, count=1)[0])

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise _Refused(f"it asks for the encoding {encoding!r}")
        return text.encode("latin1")

    def nothing(*content) -> bytes:
        if content:
            raise _Refused("it asks for bytes of something")
        return b""

    return Classifier, {
        ("sklearn.svm.classes", "SVC"): Classifier,
        ("numpy", "dtype"): Number,
        ("numpy", "ndarray"): Array,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
        ("numpy.core.multiarray", "scalar"): scalar,
        ("_codecs", "encode"): encode,
        ("builtins", "bytes"): nothing,
    }


def _number_type(code: str) -> np.dtype:
    if not isinstance(code, str) or code[:1] not in _KINDS or not code[1:].isdigit():
        raise _Refused(f"it asks for arrays of type {code!r}, which are no numbers")
    return np.dtype(code)


def _array(content: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(content, dtype).reshape(shape, order=order).copy()

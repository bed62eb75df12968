"""BoundaryDiffusion's pickles: their arrays are read, and nothing else that a pickle can do is done."""

from __future__ import annotations

import math
import os
import pickle
import sys

import numpy as np
import pytest
import sklearn
from sklearn.svm import SVC, LinearSVC

from workbench.directions.boundary import Boundary
from workbench.directions.legacy import convert_boundary


@pytest.fixture
def read(tiny):
    def of(path) -> Boundary:
        return convert_boundary(path, tiny, t=500, space="x")

    return of


@pytest.fixture(scope="module")
def samples(tiny):
    d = math.prod(tiny.x_shape)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, d)) + 0.5
    score = z @ rng.normal(size=d)
    return z, np.where(score > np.median(score), 1, -1)


@pytest.fixture(scope="module")
def fitted(samples):
    return SVC(kernel="linear").fit(*samples)


def save(thing, path, protocol=4):
    path.write_bytes(pickle.dumps(thing, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_hyperplane_is_that_of_scikit_learn(fitted, samples, protocol, tmp_path, read):
    z, labels = samples
    found = read(save(fitted, tmp_path / "smile_h.sav", protocol))
    norm = np.linalg.norm(fitted.coef_)
    np.testing.assert_allclose(found.normal.flatten(), fitted.coef_[0] / norm, atol=1e-7)
    np.testing.assert_allclose(found.distance(z), fitted.decision_function(z) / norm, atol=1e-5)
    assert found.extras == {"weight_norm": pytest.approx(norm)}
    parameters = found.provenance["parameters"]
    assert parameters["classes"] == [-1.0, 1.0]
    assert parameters["support_vectors"] == len(fitted.support_)
    assert parameters["scikit_learn"] == sklearn.__version__


def test_names_of_older_releases_are_the_same(fitted, tmp_path, read):
    """Before numpy 2 and scikit-learn 0.22 the same things were elsewhere."""
    content = pickle.dumps(fitted, protocol=2)
    older = content.replace(b"cnumpy._core.", b"cnumpy.core.").replace(
        b"csklearn.svm._classes", b"csklearn.svm.classes"
    )
    assert older != content
    (tmp_path / "old.sav").write_bytes(older)
    np.testing.assert_array_equal(read(tmp_path / "old.sav").normal, read(save(fitted, tmp_path / "new.sav")).normal)


class Guard:
    """Finds no scikit-learn."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        assert not name.startswith("sklearn")


def test_reading_runs_no_scikit_learn(fitted, tmp_path, monkeypatch, read):
    path = save(fitted, tmp_path / "smile.sav")
    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Guard, *sys.meta_path])
    with pytest.raises(AssertionError):
        pickle.loads(path.read_bytes())
    assert read(path).provenance["parameters"]["support_vectors"] == len(fitted.support_)


class Executes:
    """What a malicious pickle does: call something with arguments of its choice."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "attack",
    [
        lambda path: Executes(open, path, "w"),
        lambda path: Executes(os.system, f"touch {path}"),
        lambda path: Executes(eval, f"open({path!r}, 'w')"),
        lambda path: Executes(np.ndarray.tofile, np.zeros(3), path),
        lambda path: Executes(np.save, path, np.zeros(3)),
        lambda path: Executes(getattr, path, "upper"),
        lambda path: Executes(pickle.loads, pickle.dumps(Executes(open, path, "w"))),
    ],
)
def test_a_malicious_pickle_is_refused_and_does_nothing(attack, protocol, tmp_path, fitted, read):
    target = str(tmp_path / "executed")
    for thing in (attack(target), [fitted, attack(target)], {"classifier": fitted, "more": attack(target)}):
        path = save(thing, tmp_path / "evil.sav", protocol)
        with pytest.raises(ValueError, match="evil.sav is refused: it asks for .*; nothing of it was run"):
            read(path)
        assert not os.path.exists(target)


def test_a_malicious_part_of_a_classifier_is_refused(samples, tmp_path, read):
    classifier = SVC(kernel="linear").fit(*samples)
    classifier.class_weight_ = Executes(open, str(tmp_path / "executed"), "w")
    with pytest.raises(ValueError, match="is refused: it asks for .*open"):
        read(save(classifier, tmp_path / "evil.sav"))
    assert not (tmp_path / "executed").exists()


def test_the_control_a_plain_unpickling_would_have_run_it(tmp_path):
    """Otherwise the tests above could not fail."""
    path = save(Executes(open, str(tmp_path / "executed"), "w"), tmp_path / "evil.sav")
    pickle.loads(path.read_bytes()).close()
    assert (tmp_path / "executed").exists()


def test_one_file_can_not_change_how_the_next_is_read(fitted, tmp_path, read):
    """A pickle may set attributes of what it names; here, of the function that makes arrays."""
    # Push the function, then (None, {"values": 7}), and set these attributes of the function.
    evil = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}X\x06\x00\x00\x00valuesK\x07s\x86b."
    (tmp_path / "evil.sav").write_bytes(evil)
    with pytest.raises(ValueError):
        read(tmp_path / "evil.sav")
    assert np.isfinite(read(save(fitted, tmp_path / "good.sav")).intercept)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (SVC(kernel="linear"), "has no array dual_coef_"),
        ({"kernel": "linear"}, "holds no support-vector classifier; it is of type dict"),
        (np.zeros(3), "holds no support-vector classifier; it is of type Array"),
        (LinearSVC(), "is refused: it asks for sklearn.svm._classes.LinearSVC"),
        (np.array(["text"]), "is refused: it asks for arrays of type 'U4'"),
        (np.array([None]), "is refused: it asks for arrays of type 'O8'"),
    ],
)
def test_other_things_are_refused(thing, message, tmp_path, read):
    with pytest.raises(ValueError, match=message):
        read(save(thing, tmp_path / "other.sav"))


def test_other_classifiers_are_refused(samples, tmp_path, read):
    z, labels = samples
    with pytest.raises(ValueError, match="kernel 'rbf'; only a linear one"):
        read(save(SVC().fit(z, labels), tmp_path / "curved.sav"))
    three = SVC(kernel="linear").fit(z, np.arange(40) % 3)
    with pytest.raises(ValueError, match="has 3 classes"):
        read(save(three, tmp_path / "three.sav"))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_truncated_file_is_a_sentence(fitted, tmp_path, protocol, read):
    whole = pickle.dumps(fitted, protocol=protocol)
    for kept in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.sav").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="cut.sav can't be read; it is truncated or no pickle"):
            read(tmp_path / "cut.sav")
    with pytest.raises(FileNotFoundError, match="there is no boundary"):
        read(tmp_path / "none.sav")

"""Domains as records: photographs beside avatars, their parts, parameters of notebooks, and amounts read from
pixels."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import workbench as wb
from workbench import cli, paths
from workbench.datasets import celeba, eurosat
from workbench.datasets.domain import DOMAINS, EUROSAT
from workbench.datasets.pixel_amounts import AMOUNTS, measure_pixels
from workbench.editing.measure import measure
from workbench.report.parameters import list_notebooks, notebook_parameters, read_parameters
from workbench.report.plans import plan_sweep, read_profile

CLASSES = tuple(eurosat.COUNTS)


@pytest.fixture
def published(tmp_path):
    """Photographs as published: a folder for each class; and other files."""
    rng = np.random.default_rng(0)
    for name in CLASSES[:3]:
        (tmp_path / "EuroSAT" / name).mkdir(parents=True)
        for i in range(1, 41):
            picture = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "EuroSAT" / name / f"{name}_{i}.jpg")
    Image.fromarray(picture).save(tmp_path / "EuroSAT" / "Holiday_7.jpg")
    return tmp_path / "EuroSAT"


def test_the_parts_of_the_photographs_are_disjoint_complete_and_labelled(published, tmp_path):
    seen = {}
    for part in eurosat.PARTS:
        images = wb.load_images(eurosat.build(published, part=part, out=tmp_path / str(part), progress=False))
        assert images.names == list(CLASSES) and (images.labels.sum(axis=1) == 1).all()
        for file, row in images.labels.iterrows():
            assert row[file.split("_")[1]] == 1 and file not in seen
            seen[file] = part
        assert 0.03 < len(images) / 120 < 0.7
        assert (images.labels[:20].sum() > 0).sum() == 3, "the first images are of all classes"
    assert len(seen) == 120 and not any("Holiday" in file for file in seen)
    _, name = (first := wb.load_images(tmp_path / "0", size=8)).labels.index[0].split("_", 1)
    assert torch.equal(first[0], wb.load_image(published / name.split("_")[0] / name, size=8))


def test_the_part_of_a_photograph_depends_on_its_name_alone(published, tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for file in sorted(published.rglob("Forest_*.jpg"))[::2]:
            archive.write(file, f"2750/{file.name}")
    of_some = wb.load_images(eurosat.build(tmp_path / "some.zip", part=1, out=tmp_path / "a", progress=False))
    of_all = wb.load_images(eurosat.build(published, part=1, out=tmp_path / "b", progress=False))
    assert set(of_some.labels.index) < set(of_all.labels.index)


def test_what_is_no_photograph_of_the_set_is_refused(published, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "cat.jpg")
    with pytest.raises(ValueError, match="Forest_1.jpg"):
        eurosat.build(tmp_path / "other", out=tmp_path / "out")
    with pytest.raises(ValueError, match="part"):
        eurosat.build(published, part=3, out=tmp_path / "out")
    assert cli.main(["data", "eurosat"]) == 2 and eurosat.ORIGIN in capsys.readouterr().err
    assert cli.main(["data", "avataaars", str(published)]) == 2 and "drawn" in capsys.readouterr().err


def test_the_held_out_photographs_have_the_name_of_the_domain(published, home, capsys):
    with pytest.raises(FileNotFoundError, match="workbench data eurosat"):
        wb.load_images("eurosat")
    assert cli.main(["data", "eurosat", str(published)]) == 0
    assert len(wb.load_images("eurosat")) == len(wb.load_images(capsys.readouterr().out.strip())) > 0


def test_celeba_is_cropped_as_the_models_of_64_pixels_saw_it_in_parts_that_are_disjoint(tmp_path, monkeypatch, capsys):
    rng, folder = np.random.default_rng(0), tmp_path / "img_align_celeba"
    folder.mkdir()
    files = [f"{i:06d}.jpg" for i in range(1, 31)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (218, 178, 3), dtype=np.uint8)).save(folder / file, quality=95)
    smiles, others = rng.choice([-1, 1], 30), [1] * 29 + [-1]
    rows = [f"{file} {smile} {other}" for file, smile, other in zip(files, smiles, others, strict=True)]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(["30", "Smiling Young", *rows, ""]))
    monkeypatch.chdir(tmp_path)
    seen = {}
    for part in celeba.PARTS:
        assert cli.main(["data", "celeba64", str(folder), "--part", str(part)]) == 0
        images = wb.load_images(capsys.readouterr().out.strip())
        assert images.image_shape == (3, 64, 64) and set(images.labels.to_numpy().ravel()) <= {0, 1}
        seen |= {name: (images[i], images.labels.loc[name, "Smiling"]) for i, name in enumerate(images.labels.index)}
    assert sorted(seen) == [file.replace("jpg", "png") for file in files], "every face is in one part"
    assert [seen[file][1] for file in sorted(seen)] == [int(smile == 1) for smile in smiles]
    expected = wb.load_images(folder, size=64, crop="celeba64")[3]
    torch.testing.assert_close(seen["000004.png"][0], expected, rtol=0, atol=1.01 / 255)  # PNG rounds to 8 bits
    (tmp_path / "list_attr_celeba.txt").unlink()
    with pytest.raises(ValueError, match="no list_attr_celeba.txt"):
        celeba.build(folder, out=tmp_path / "out")
    assert cli.main(["data", "celeba64"]) == 2 and celeba.ORIGIN in capsys.readouterr().err


# Parameters of notebooks


@pytest.mark.parametrize("notebook", list_notebooks())
def test_a_domain_stands_for_the_parameters_that_a_notebook_has_of_it(notebook):
    values, known = read_parameters(notebook, {"domain": "eurosat"}), notebook_parameters(notebook)
    assert values and values.keys() == EUROSAT.parameters.keys() & known.keys()
    assert read_parameters(notebook, {"domain": "eurosat", "model_name": "mine"})["model_name"] == "mine"
    named = [v for key, v in values.items() if not key.endswith("_name") and key not in ("steps", "eta")]
    classes = {name for v in named for name in (v if isinstance(v, list) else [v])}
    assert classes <= set(CLASSES)


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_the_attributes_chosen_for_a_domain_are_known_to_both_of_its_classifiers(domain):
    given = [v for key, v in domain.choices.items() if key not in ("steps", "eta", "regions")]
    chosen = {name for v in given for name in (v if isinstance(v, list) else [v])}
    for name in (domain.labeller, domain.judge):
        assert chosen | domain.frequencies.keys() <= set(wb.load_classifier(name, device="cpu").attributes)
    assert (paths.models() / domain.model).is_dir()
    assert sum(eurosat.FREQUENCIES.values()) == pytest.approx(1)


def test_an_unknown_domain_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="'mars'.*avataaars, eurosat"):
        read_parameters("20_geometry", {"domain": "mars"})


def test_a_report_of_a_domain_replaces_the_profiles_names_and_has_a_folder_of_its_own():
    plain = read_profile("quick", check=False)
    other = read_profile("quick", domain="eurosat", check=False)
    assert other.folder == plain.folder / "eurosat" and all(run.out.parent == other.folder for run in other.runs)
    for name, values in other.parameters.items():
        assert values["model_name"] == "eurosat32"
        sizes = plain.parameters[name].keys() - EUROSAT.parameters.keys()
        assert {key: values[key] for key in sizes} == {key: plain.parameters[name][key] for key in sizes}


def test_a_sweep_varies_the_domain():
    plan = plan_sweep({"notebooks": ["00"], "matrix": {"domain": ["avataaars", "eurosat"], "seed": [1, 2]}})
    assert [run.varied["domain"] for run in plan.runs] == ["avataaars"] * 2 + ["eurosat"] * 2
    assert {run.parameters["model_name"] for run in plan.runs} == {"avataaars32", "eurosat32"}


# Amounts


def test_amounts_of_images_whose_values_are_known():
    def colour(red: float, green: float, blue: float) -> torch.Tensor:
        return torch.tensor([red, green, blue])[:, None, None].expand(3, 8, 8)

    checkerboard = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    images = torch.stack([colour(-1, -1, -1), colour(-1, 1, -1), colour(0, 0, 0), checkerboard.expand(3, 8, 8)])
    expected = [[0, 1 / 3, 0], [0.587, 1, 0], [0.5, 1 / 3, 0], [0.5, 1 / 3, 1]]
    assert np.allclose(measure_pixels(images), expected)
    assert np.allclose(measure_pixels(images[2:, :1]), expected[2:])
    scores = wb.load_classifier("pixels")(images)
    assert tuple(scores.columns) == AMOUNTS and np.allclose(scores, expected, atol=1e-9)


def test_an_edit_that_brightens_is_measured_by_its_rank_correlation(model):
    run = wb.sample(model, range(3), steps=4, progress=False)
    brighter = wb.MoveX(torch.ones(model.x_shape), t=run.timesteps[-1], name="brighter")
    effects = measure(run, brighter, [-0.4, -0.2, 0.2, 0.4], classifier=wb.load_classifier("pixels"))
    assert effects.monotonicity("Brightness")["brighter"] == pytest.approx(1)

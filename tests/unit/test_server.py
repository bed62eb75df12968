"""What the studio's page opens: names and files become directions, and a mistake is told before anything is served."""

from __future__ import annotations

import json
import os
import socket

import pytest
from planted import planted

import workbench as wb
from workbench import paths
from workbench.studio import server
from workbench.studio.server import find_editables, open_studio


@pytest.fixture
def saved(tiny_folder, tmp_path, monkeypatch):
    """Two directions of the tiny model and one of the bundled model's weights, in data/directions."""
    folder = tmp_path / "directions"
    monkeypatch.setattr(paths, "directions", lambda: folder)
    monkeypatch.setattr(paths, "boundaries", lambda: tmp_path / "boundaries")
    model = wb.load_model(tiny_folder, device="cpu")
    run = wb.sample(model, range(2), steps=4, record_h=True, progress=False)
    for seed, name in enumerate(("hair", "smile")):
        planted(model, run, seed, name).save(folder / f"{name}.safetensors")
    foreign = planted(model, run, 2, "foreign")
    foreign.provenance["model"]["hash"] = "0" * 16
    foreign.save(folder / "foreign.safetensors")
    return model, folder


def test_without_names_all_saved_ones_that_fit_are_taken(saved):
    model, _ = saved
    assert [d.name for d in find_editables(model, None, [750, 500, 250, 0])] == ["hair", "smile"]


def test_what_is_named_has_to_fit(saved):
    model, folder = saved
    assert [d.name for d in find_editables(model, [str(folder / "smile.safetensors")], [0])] == ["smile"]
    with pytest.raises(ValueError, match="foreign belongs to the model"):
        find_editables(model, [str(folder)], [0])
    with pytest.raises(FileNotFoundError, match="there is no direction at"):
        find_editables(model, ["none.safetensors"], [0])


def test_a_studio_is_opened_by_names(saved, tiny_folder, tmp_path):
    studio = open_studio(str(tiny_folder), seeds=[3, 4], steps=4, device="cpu")
    assert studio.wait() and list(studio.scales) == ["hair", "smile"]
    assert [button.description for button in studio.samples.children] == ["✓ seed 3", "seed 4"]


def test_without_any_saved_direction_principal_components_are_found(saved, tiny_folder, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(paths, "directions", lambda: tmp_path / "none")
    studio = open_studio(str(tiny_folder), seeds=[3], steps=4, device="cpu")
    assert studio.wait() and list(studio.scales) == ["PC1", "PC2", "PC3", "PC4"]


def test_an_explorer_is_opened_by_a_store(saved, tiny_folder, tmp_path):
    model, _ = saved
    store = wb.extract(model, 6, steps=4, out=tmp_path / "some.zarr", progress=False)
    explorer = server.open_explorer(str(store.path), model=str(tiny_folder), device="cpu")
    assert explorer.wait() and explorer.live and [d.name for d in explorer.desk.known] == ["hair", "smile"]
    assert not server.open_explorer(str(store.path), model="").live
    with pytest.raises(FileNotFoundError, match="some.zarr is of the model 'tiny'"):
        server.open_explorer(str(store.path))
    with pytest.raises(FileNotFoundError, match="no store at"):
        server.open_explorer(str(tmp_path / "none.zarr"))


def test_the_page_finds_what_is_named_from_here(saved, tmp_path, monkeypatch):
    _, folder = saved
    monkeypatch.chdir(folder.parent)
    options = {"model": "avataaars32", "directions": ["directions"], "clip": "mine", "steps": 4}
    (cell,) = json.loads(json.dumps(server._notebook("open_studio", options, "title")))["cells"]
    monkeypatch.chdir(tmp_path.parent)
    found = {}
    monkeypatch.setattr(server, "open_studio", lambda **given: found.update(given, here=os.getcwd()))
    exec(cell["source"], {})
    assert found == {**options, "here": str(folder.parent)}


def test_mistakes_are_told_before_anything_is_served(saved, tiny_folder, tmp_path):
    model, _ = saved
    store = wb.extract(model, 6, steps=4, out=tmp_path / "some.zarr", progress=False)
    studio = {"model": str(tiny_folder), "steps": 4, "device": "cpu"}
    explorer = {"store": str(store.path), "model": "", "directions": None, "classifier": "", "device": "cpu"}
    for serve, options, message in (
        (server.serve_studio, studio | {"seeds": range(49)}, "holds 48 samples; 49 seeds"),
        (server.serve_studio, studio | {"seeds": [1, 1]}, "seed 1 appears more than once"),
        (server.serve_studio, studio | {"eta": 2.0}, "eta must lie in"),
        (server.serve_explorer, explorer | {"methods": ["tsne"]}, "tsne"),
        (server.serve_explorer, explorer | {"methods": ["pca"], "directions": ["x"]}, "need the store's model"),
    ):
        with pytest.raises(ValueError, match=message):
            serve(options, on_ready=pytest.fail)


def test_a_port_that_is_taken_is_a_sentence():
    with socket.socket() as taken:
        taken.bind((server.LOOPBACK, 0))
        taken.listen()
        with pytest.raises(OSError, match="is taken .*; choose another with --port"):
            server._free_port(taken.getsockname()[1])


def test_no_configuration_of_the_users_opens_the_page_to_others(saved, tiny_folder, tmp_path, monkeypatch):
    from voila.app import Voila

    started = []
    monkeypatch.setattr(Voila, "start", lambda self: started.append((self.ip, self.token, self.port)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voila.json").write_text(json.dumps({"Voila": {"ip": "0.0.0.0", "token": "", "port": 1}}))
    addresses = []
    options = {"model": str(tiny_folder), "directions": None, "steps": 4, "device": "cpu"}
    try:
        server.serve_studio(options, on_ready=addresses.append)
    finally:
        Voila.clear_instance()
    ((ip, token, port),) = started
    assert ip == server.LOOPBACK and len(token) > 20
    assert addresses == [f"http://{server.LOOPBACK}:{port}/?token={token}"]

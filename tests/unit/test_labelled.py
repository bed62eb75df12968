from __future__ import annotations

import os
import shutil
import unicodedata
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from workbench.datasets import avataaars, labelled
from workbench.datasets.labelled import load_image, load_images
from workbench.diffusion.images import picture_to_tensor as to_tensor


def picture(seed: int, width: int = 12, height: int = 12) -> Image.Image:
    """Smooth in one channel, random in the others."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    values[..., 0] = np.linspace(0, 255, width)
    return Image.fromarray(values)


def save_pictures(root: Path, *names: str, seed: int = 0, **options) -> Path:
    """The picture of a seed under each of the names, in folders that are made."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, **options).save(root / name)
    return root


def expected(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32)).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture
def folder(tmp_path):
    """Five 12x12 images, `a.png` ... `e.png`, with labels in another order."""
    root = tmp_path / "faces"
    for i, name in enumerate("abcde"):
        save_pictures(root, f"{name}.png", seed=i)
    (root / "attributes.csv").write_text(
        "file,Smiling,Beard,Tilt\ne.png,1,1,0.5\nd.png,0,-1,\nc.png,1,1,-2.25\nb.png,0,-1,3\na.png,1,-1,0.1\n"
    )
    return root


def zip_of(folder: Path, target: Path, *, under: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.glob("*.png")):
            archive.write(path, under + path.name)
    return target


# Sources and access


def test_a_path_its_image_and_its_content_give_the_same(folder):
    path = folder / "a.png"
    for given in (path, str(path), path.read_bytes()):
        assert torch.equal(load_image(given, 7), to_tensor(Image.open(path), 7))


def test_a_folder_gives_images_and_labels_in_one_order(folder):
    images = load_images(folder, size=8)
    assert len(images) == 5
    assert list(images.labels.index) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert images.names == ["Smiling", "Beard", "Tilt"]
    for i, tensor in enumerate(images):
        assert torch.equal(tensor, to_tensor(picture(i), 8))
    assert repr(images) == "LabelledImages(5 images, 8x8, 3 attributes: Smiling, Beard, Tilt)"
    assert images.label("Beard").equals(images.labels["Beard"])
    with pytest.raises(ValueError, match="'Beards'; the known ones are Smiling, Beard, Tilt"):
        images.label("Beards")


def test_minus_one_becomes_zero_and_other_values_and_gaps_stay(folder):
    table = """file,Ones,Minus,Gap,Three,Flag,Tilt
        a.png,1,-1,,-1,True,0.1
        b.png,1,-1,-1,0,True,3
        c.png,1,-1,1,1,True,-2.25
        d.png,1,-1,1,0,True,
        e.png,1,-1,-1,1,True,0.5"""
    (folder / "attributes.csv").write_text(table)
    with pytest.warns(UserWarning, match="0 in column Three counts as missing"):
        labels = load_images(folder).labels
    assert labels[["Ones", "Minus", "Flag"]].to_dict("list") == {"Ones": [1] * 5, "Minus": [0] * 5, "Flag": [1] * 5}
    np.testing.assert_array_equal(labels["Gap"], [np.nan, 0, 1, 1, 0])
    np.testing.assert_array_equal(labels["Three"], [0, np.nan, 1, np.nan, 1])
    np.testing.assert_array_equal(labels["Tilt"], [0.1, 3, -2.25, np.nan, 0.5])


def test_every_kind_of_index(folder):
    images = load_images(folder)
    every = torch.stack(list(images))
    assert every.shape == (5, 3, 12, 12) and every.dtype == torch.float32
    assert torch.equal(images[2], every[2]) and torch.equal(images[-1], every[4])
    assert torch.equal(images[np.int64(1)], every[1])
    assert torch.equal(images[1:4], every[1:4]) and torch.equal(images[::-2], every[[4, 2, 0]])
    assert torch.equal(images[[3, 0, 3]], every[[3, 0, 3]])
    assert torch.equal(images[images.label("Smiling") == 1], every[[0, 2, 4]])
    assert torch.equal(images[torch.tensor([4])], every[[4]])
    assert images[[]].shape == (0, 3, 12, 12) and images[5:].shape == (0, 3, 12, 12)


@pytest.mark.parametrize("index", [5, -6, [0, 9], [True, False], [0.5]])
def test_an_image_that_does_not_exist_is_refused(index, folder):
    with pytest.raises(IndexError, match="there are 5 images"):
        load_images(folder)[index]


def test_select_and_at_size_keep_labels_and_images_together(folder):
    images = load_images(folder, size=6)
    bearded = images.select(images.label("Beard") == 1)
    assert list(bearded.labels.index) == ["c.png", "e.png"]
    assert torch.equal(bearded[:], images[[2, 4]])
    assert list(images.select([3, 1]).select([1]).labels.index) == ["b.png"]
    assert len(images.select([])) == 0
    orders = [list(images.shuffled(seed).labels.index) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == sorted(images.labels.index)
    larger = images.at_size(9)
    native = images.at_size(None)
    assert [each.image_shape for each in (images, larger, native)] == [(3, 6, 6), (3, 9, 9), (3, 12, 12)]
    assert torch.equal(larger[0], to_tensor(picture(0), 9)) and larger.labels.equals(images.labels)


@pytest.mark.parametrize("packed", [False, True])
def test_only_what_is_asked_for_is_decoded(packed, folder, tmp_path, monkeypatch):
    source = zip_of(folder, tmp_path / "faces.zip") if packed else folder
    decoded = []
    convert = labelled.picture_to_tensor
    monkeypatch.setattr(labelled, "picture_to_tensor", lambda *given: decoded.append(1) or convert(*given))
    images = load_images(source, size=8)
    chosen = images.select([0, 1, 2]).at_size(4)
    chosen.fingerprint  # noqa: B018
    assert len(decoded) == 0
    chosen[1]
    assert len(decoded) == 1
    images[:2]
    assert len(decoded) == 3


def test_a_zip_equals_its_folder(folder, tmp_path):
    loose = load_images(folder)
    beside = tmp_path / "packed"
    beside.mkdir()
    (beside / "attributes.csv").write_bytes((folder / "attributes.csv").read_bytes())
    zip_of(folder, beside / "images.zip")
    inside = zip_of(folder, tmp_path / "all.zip", under="faces/")
    with zipfile.ZipFile(inside, "a") as archive:
        archive.write(folder / "attributes.csv", "faces/attributes.csv")
        archive.writestr("__MACOSX/faces/._a.png", b"metadata")
    for source in (beside, beside / "images.zip", inside, str(inside)):
        packed = load_images(source)
        assert packed.labels.equals(loose.labels)
        assert torch.equal(packed[:], loose[:])
        assert packed.fingerprint == loose.fingerprint


def test_images_of_nested_folders_are_found_without_the_common_one(tmp_path):
    root = save_pictures(tmp_path / "root", "all/train/a.png", "all/test/b.png", ".hidden/c.png")
    assert list(load_images(root).labels.index) == ["test/b.png", "train/a.png"]
    (root / "attributes.csv").write_text("file,A\nall/train/a.png,1\nall/test/b.png,0\n")
    assert load_images(root).labels["A"].tolist() == [0, 1]
    assert load_images(root)[0].shape == (3, 12, 12)


def test_a_folder_without_labels_is_allowed(folder):
    (folder / "attributes.csv").unlink()
    images = load_images(folder)
    assert images.labels.shape == (5, 0) and images.names == []
    assert images[:2].shape == (2, 3, 12, 12)
    with pytest.raises(ValueError, match="no label file"):
        images.label("Smiling")


LIST = "a.png  1 -1\nb.png -1 -1\nc.png  1  1\nd.png -1  1\ne.png  1 -1\n"


@pytest.mark.parametrize("head", ["5\nSmiling Beard \n", "Smiling Beard\n", "image_id Smiling Beard\n"])
@pytest.mark.parametrize("place", ["inside", "beside"])
def test_celebas_list_is_read_with_and_without_its_count(head, place, folder):
    (folder / "attributes.csv").unlink()
    target = folder if place == "inside" else folder.parent
    (target / "list_attr_celeba.txt").write_text(head + LIST)
    labels = load_images(folder).labels
    assert list(labels.columns) == ["Smiling", "Beard"]
    assert labels["Smiling"].tolist() == [1, 0, 1, 0, 1] and labels["Beard"].tolist() == [0, 0, 1, 1, 0]


def test_folders_are_labels_as_afhq_and_lsun_have_them(tmp_path):
    names = ["train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/wild/d.png"]
    labels = load_images(save_pictures(tmp_path / "afhq", *names), labels="folders").labels
    assert labels.to_dict("list") == {"cat": [1, 0, 1, 0], "dog": [0, 1, 0, 0], "wild": [0, 0, 0, 1]}
    assert list(labels.index) == names
    packed = shutil.make_archive(str(tmp_path / "afhq"), "zip", tmp_path / "afhq")
    assert load_images(packed, labels="folders").labels.equals(labels)
    save_pictures(tmp_path / "kaggle", "Training/male/a.png", "Training/female/b.png", "Validation/male/c.png")
    assert load_images(tmp_path / "kaggle", labels="folders").names == ["female", "male"]
    save_pictures(tmp_path / "lsun", "bedroom_train/0/f/a.png", "church_outdoor_train_lmdb/1/2/b.png")
    assert load_images(tmp_path / "lsun", labels="folders").names == ["bedroom", "church_outdoor"]
    for single in ("afhq/train/cat", "lsun/bedroom_train"):
        with pytest.raises(ValueError, match='"folders".*has none'):
            load_images(tmp_path / single, labels="folders")


def test_aligned_celeba_images_are_cropped_as_its_models_saw_them(tmp_path):
    values = np.arange(218 * 178 * 3, dtype=np.uint32).reshape(218, 178, 3).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "000001.png")
    assert load_images(tmp_path).image_shape == (3, 218, 178)
    centre = load_images(tmp_path, size=178)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(centre, values[20:198] / 127.5 - 1, atol=1e-6)
    faces = load_images(tmp_path, crop="celeba64")
    assert faces.image_shape == (3, 128, 128)
    np.testing.assert_allclose(faces[0].permute(1, 2, 0).numpy(), values[57:185, 25:153] / 127.5 - 1, atol=1e-6)
    assert faces.at_size(64)[:].shape == (1, 3, 64, 64)
    assert faces.fingerprint != load_images(tmp_path, size=128).fingerprint
    with pytest.raises(ValueError, match="crop 'face'.*celeba64"):
        load_images(tmp_path, crop="face")
    picture(0).save(tmp_path / "000001.png")
    with pytest.raises(ValueError, match="is for images of 178 x 218 pixels, not .*; leave it out for others$"):
        load_images(tmp_path, crop="celeba64")[0]


def test_the_bundled_images_load_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    images = load_images("avataaars", size=32)
    assert len(images) == 2000 and images.names[0] == "Smiling" and images.names[-1] == "Tilt"
    batch = images[:8]
    assert batch.shape == (8, 3, 32, 32) and -1 <= batch.min() < -0.5 and 0.5 < batch.max() <= 1
    assert images.at_size(None).image_shape == (3, 64, 64)
    binary = images.labels.drop(columns="Tilt")
    assert binary.isin([0, 1]).all(axis=None) and len(binary.columns) == 14
    assert images.label("Tilt").tolist() == [avataaars.factors(10, i).tilt for i in range(2000)]


def read_in_child(images, start: int) -> tuple[int, np.ndarray]:
    return os.getpid(), images[start : start + 50].numpy()


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="this system cannot fork")
def test_forked_processes_read_the_same_zip():
    """An inherited handle would share its position with the parent; the reads of both would mix."""
    images = load_images("avataaars", size=16)
    here = images[:100]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        jobs = [pool.submit(read_in_child, images, start) for start in (0, 50)]
        assert torch.equal(images[:100], here)
        results = [job.result() for job in jobs]
    assert np.array_equal(np.concatenate([values for _, values in results]), here.numpy())
    assert os.getpid() not in {process for process, _ in results}


# Fingerprint


def test_the_fingerprint_is_of_content_names_order_selection_and_size(folder):
    images = load_images(folder)
    assert len(images.fingerprint) == 64 and int(images.fingerprint, 16) >= 0
    prints = {images.fingerprint, images.at_size(8).fingerprint}
    prints |= {images.select([0, 1]).fingerprint, images.select([1, 0]).fingerprint}
    assert images.shuffled(0).hash == images.hash == images.select(slice(None, None, -1)).hash
    os.utime(folder / "a.png", (0, 0))
    (folder / "attributes.csv").unlink()
    assert load_images(folder).fingerprint == load_images(folder, size=12).fingerprint == images.fingerprint
    (folder / "e.png").rename(folder / "f.png")
    prints.add(load_images(folder).fingerprint)
    content = bytearray((folder / "f.png").read_bytes())
    content[-1] ^= 1
    (folder / "f.png").write_bytes(content)
    prints.add(load_images(folder).fingerprint)
    assert len(prints) == 6


def test_a_replaced_zip_is_read_anew(folder, tmp_path):
    target = zip_of(folder, tmp_path / "faces.zip")
    before = load_images(target)
    first = before[0]
    picture(9).save(folder / "a.png")
    os.replace(zip_of(folder, tmp_path / "new.zip"), target)
    after = load_images(target)
    assert torch.equal(after[0], expected(picture(9))) and not torch.equal(after[0], first)
    assert after.fingerprint != before.fingerprint


# Bad input


def test_what_is_no_source_is_named(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("notes.txt", "no image")
    cut = zip_of(folder, tmp_path / "cut.zip")
    cut.write_bytes(cut.read_bytes()[:-40])
    for name, kind, words in (
        ("nowhere", FileNotFoundError, "nowhere"),
        ("empty", ValueError, "holds no images"),
        ("empty.zip", ValueError, "holds no images"),
        ("cut.zip", ValueError, "cut.zip is not a complete zip"),
        ("notes.txt", ValueError, "notes.txt is not a complete zip"),
        ("faces/a.png", ValueError, "a.png is a single image"),
    ):
        with pytest.raises(kind, match=words):
            load_images(tmp_path / name)
    for call in (lambda path: load_images(folder, labels=path), load_image):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            call(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", ["half", "nothing", "a header"])
def test_a_damaged_image_is_named(kept, folder):
    path = folder / "b.png"
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes({"half": half, "nothing": b"", "a header": b"GIF89a"}[kept])
    for call in (lambda: load_images(folder)[1], lambda: load_image(path)):
        with pytest.raises(ValueError, match=r"b\.png cannot be decoded"):
            call()


def test_a_damaged_member_of_a_zip_is_named(folder, tmp_path):
    target = zip_of(folder, tmp_path / "faces.zip")
    with zipfile.ZipFile(target) as archive:
        start = archive.getinfo("c.png").header_offset
    content = bytearray(target.read_bytes())
    content[start + 60 : start + 80] = bytes(20)
    target.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.png in .*faces\.zip cannot be decoded"):
        load_images(target)[2]


def test_linked_folders_are_read_and_a_link_in_a_circle_ends(tmp_path):
    save_pictures(tmp_path, "one/real/a.png", "two/cat/a.png")
    (tmp_path / "one" / "cat").symlink_to(tmp_path / "two" / "cat")
    (tmp_path / "two" / "cat" / "back").symlink_to(tmp_path / "one")
    assert list(load_images(tmp_path / "one").labels.index) == ["cat/a.png", "real/a.png"]


def test_images_of_several_sizes_need_a_size(folder):
    picture(0, 20, 16).save(folder / "d.png")
    images = load_images(folder)
    with pytest.raises(ValueError, match=r"d\.png has the shape \(3, 16, 20\) .*\(3, 12, 12\); .*size=64"):
        images[:]
    assert images.at_size(10)[:].shape == (5, 3, 10, 10)


def test_rows_that_do_not_match_are_counted_on_both_sides(folder):
    rows = "".join(f"{name}.png,1\n" for name in "abxyzuv")
    (folder / "attributes.csv").write_text("file,A\n" + rows)
    words = r"3 of 5 images have no row \(c.png, d.png, e.png\).*5 of 7 rows have no image \(u.png, v.png, x.png, ...\)"
    with pytest.raises(ValueError, match=words):
        load_images(folder)


BAD = {
    "attributes.csv": [
        ("file,A\na.png,1\nb.png,0\na.png,0\nc.png,1\nd.png,1\ne.png,1\n", r"more than one row for a\.png"),
        ("file,A,B\na.png,1,1\nb.png,0,yes\nc.png,1,1\nd.png,1,1\ne.png,1,1\n", r"column B .*'yes' in row b\.png"),
        ("", "has no rows"),
        ("file,A\n", "5 of 5 images have no row"),
        ("file,A\na.png,1,7\nb.png,1,7\n", "more values than the 2 columns"),
        ("file,A\na.png,1\nb.png,1,7\n", "cannot be read as a table"),
        ("file,A,A \na.png,1,0\n", "more than one column A"),
        ("file,A\na.png,inf\nb.png,1\n", "inf. in row a.png"),
        ("a.png,1\nb.png,0\n", "the first line must name the columns"),
        ("PK\x03\x04\x00\x00", "save it as CSV"),
    ],
    "list_attr_celeba.txt": [
        ("9\nA B\n" + LIST, "announces 9 rows and has 5"),
        ("A B\n" + LIST.replace("d.png -1  1", "d.png -1"), r"too few values in d\.png"),
        ("A B\n" + LIST.replace("d.png -1  1", "d.png -1  1 1"), "cannot be read as a table"),
        ("A\n" + LIST, "more values than the 2 columns"),
    ],
}


@pytest.mark.parametrize(("name", "content", "message"), [(name, *bad) for name, each in BAD.items() for bad in each])
def test_a_bad_table_is_a_sentence(name, content, message, folder):
    (folder / "attributes.csv").unlink()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load_images(folder)


TABLES = {
    "rows and columns of nothing": "file,A,B,,\r\na.png,1,0,,\r\n,,,,\r\nb.png,0,1,,\r\n,,,,\r\n   \r\n",
    "spaces": "file, A , B\n a.png , 1 , 0\n b.png, 0, 1\n",
    "semicolons": "file;A;B\na.png;1,0;0,0\nb.png;0,0;1,0\n",
    "semicolons, said": "sep=;\nfile;A;B\na.png;1;0\nb.png;0;1\n",
    "tabs": "file\tA\tB\na.png\t1\t0\nb.png\t0\t1\n",
    "quotes of R": '"A" "B"\n"a.png" 1 0\n"b.png" 0 1\n',
    "words": "file,A,B\na.png,yes,FALSE\nb.png,No,True\n",
    "backslashes": "file,A,B\nfaces\\a.png,1,0\nfaces\\b.png,0,1\n",
    "folders and another extension": "file,A,B\none/a.jpg,1,0\ntwo/b.jpg,0,1\n",
    "file_name of Hugging Face": "A,file_name,B\n1,a.png,0\n0,b.png,1\n",
    "the index of pandas": ",file,A,B\n0,a.png,1,0\n1,b.png,0,1\n",
    "the index of pandas before another column": ",A,file_name,B\n0,1,a.png,0\n1,0,b.png,1\n",
    "the index of pandas, twice": "Unnamed: 0,image,A,B\n0,a.png,1,0\n1,b.png,0,1\n",
}


@pytest.mark.parametrize("kind", [*TABLES, "utf-8-sig", "utf-16"])
def test_tables_are_read_as_programs_write_them(kind, tmp_path):
    text, encoding = (TABLES[kind], "utf-8") if kind in TABLES else (TABLES["tabs"], kind)
    save_pictures(tmp_path, "a.png", "b.png")
    for table in ("metadata.csv", "attributes.csv"):
        (tmp_path / table).write_bytes(text.encode(encoding))
        labels = load_images(tmp_path).labels
        assert labels.to_dict() == {"A": {"a.png": 1, "b.png": 0}, "B": {"a.png": 0, "b.png": 1}}
        assert (labels.dtypes == np.int64).all()


def test_letters_with_accents_match_however_they_are_composed(tmp_path):
    decomposed, composed = (unicodedata.normalize(form, "café.png") for form in ("NFD", "NFC"))
    picture(0).save(tmp_path / decomposed)
    for encoding in ("utf-8", "latin-1"):
        (tmp_path / "attributes.csv").write_bytes(f"file,Gesicht für\n{composed},1\n".encode(encoding))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            images = load_images(tmp_path)
        assert images.labels.to_dict() == {"Gesicht für": {decomposed: 1}} and images[0].shape == (3, 12, 12)
        assert ["Latin-1" in str(warning.message) for warning in said] == [True] * (encoding == "latin-1")


def test_what_a_table_has_beside_numbers_is_left_out_and_said(folder):
    rows = "".join(f"{name}.png,{'train' if i else ''},{i % 2}\n" for i, name in enumerate("abcdef"))
    (folder / "attributes.csv").write_text("file,split,A\n" + rows)
    with pytest.warns(UserWarning, match=r"column split holds 'train' in row b\.png; .*1 of 6 \(f\.png\)"):
        assert load_images(folder).names == ["A"]


KAGGLE, OFFICIAL = "image_id,A\n000001.jpg,-1\n000002.jpg,1\n", "2\nA\n000001.jpg -1\n000002.jpg  1\n"


@pytest.mark.parametrize(
    ("inner", "table", "content"),
    [
        ("img_align_celeba/img_align_celeba", "list_attr_celeba.csv", KAGGLE),
        ("Img/img_align_celeba_png", "Anno/list_attr_celeba.txt", OFFICIAL),
        ("CelebA-HQ-img", "CelebAMask-HQ-attribute-anno.txt", OFFICIAL.replace(" -", "  -").replace("A\n", "A \n")),
    ],
)
def test_celeba_as_it_is_distributed_has_its_labels(inner, table, content, tmp_path):
    ending = "png" if "png" in inner else "jpg"
    images = save_pictures(tmp_path / inner, f"000001.{ending}", f"000002.{ending}")
    (tmp_path / table).parent.mkdir(exist_ok=True)
    (tmp_path / table).write_text(content)
    for source in (tmp_path, images.parent, images, shutil.make_archive(str(images), "zip", images)):
        assert load_images(source).labels["A"].tolist() == [0, 1]
    next(images.glob("000002*")).unlink()
    for source, labels in ((images, None), (images, str(tmp_path / table))):
        with pytest.warns(UserWarning, match=r"1 of 2 \(000002\.jpg\)"):
            assert load_images(source, labels=labels).labels["A"].tolist() == [0]


def test_a_list_of_celeba_beside_other_folders_is_said_and_stops_nobody(tmp_path):
    save_pictures(tmp_path / "img_align_celeba", "000001.jpg", "000002.jpg")
    (tmp_path / "list_attr_celeba.csv").write_text(KAGGLE)
    faces = save_pictures(tmp_path / "ffhq", "00000.png", "00001.png")
    with pytest.warns(UserWarning, match="is taken for a list of other images: .*2 of 2 images have no row"):
        images = load_images(faces)
    assert len(images) == 2 and not images.names
    with pytest.warns(UserWarning, match="labels are read from .*list_attr_celeba.csv, outside of"):
        assert load_images(tmp_path / "img_align_celeba").names == ["A"]
    with pytest.raises(ValueError, match="2 of 2 images have no row"):
        load_images(faces, labels=tmp_path / "list_attr_celeba.csv")


def test_a_table_of_another_name_is_not_passed_over_in_silence(folder):
    (folder / "attributes.csv").rename(folder / "labels.csv")
    with pytest.warns(UserWarning, match=r"no labels are read.*labels\.csv.*give one as labels="):
        assert load_images(folder).names == []
    assert len(load_images(folder, labels=folder / "labels.csv").names) == 3


# Kinds of images


def test_all_that_pillow_reads_is_read_and_the_rest_is_named(tmp_path):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "JP2": "JPEG2000", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF"}
    kinds |= {"gif": "GIF", "ppm": "PPM", "tga": "TGA"} | ({"avif": "AVIF"} if features.check("avif") else {})
    for ending, kind in kinds.items():
        picture(0, 16, 16).save(tmp_path / f"a.{ending}", format=kind, save_all=False)
    for name in ("b.heic", "c.svg", "d.mpg", "Thumbs.db", "README.md", "LICENSE", "scores.csv", ".DS_Store"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "attributes.csv").write_text("file,A\n" + "".join(f"a.{ending},1\n" for ending in kinds))
    with pytest.warns(UserWarning) as said:
        images = load_images(tmp_path)
    assert len(images) == len(kinds) and images[:].shape == (len(kinds), 3, 16, 16)
    assert len(said) == 1 and "3 (b.heic, c.svg, d.mpg)" in str(said[0].message)


def test_the_first_frame_of_an_animation_and_what_a_plugin_registers_are_read(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (12, 12), color) for color in ("white", "black")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setitem(Image.registered_extensions(), ".heic", "PNG")  # as pillow-heif does
    picture(0).save(tmp_path / "b.heic", format="PNG")
    animated, registered = load_images(tmp_path)
    assert (animated == 1).all() and torch.equal(registered, expected(picture(0)))


def test_broken_images_are_refused_or_left_out_by_name(folder, tmp_path):
    (folder / "a.png").write_bytes(b"nothing")
    assert load_images(folder, size=8)[[1, 3]].shape == (2, 3, 8, 8), "nothing but the asked images is read"
    content = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"c\.png cannot be decoded.*skip_broken=True"):
        load_images(folder, size=8)[2]
    for source in (folder, zip_of(folder, tmp_path / "faces.zip")):
        with pytest.warns(UserWarning, match=r"a\.png.*c\.png"):
            images = load_images(source, skip_broken=True)
        assert list(images.labels.index) == ["b.png", "d.png", "e.png"] and images[:].shape == (3, 3, 12, 12)
    for name in "bde":
        (folder / f"{name}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of 5 images can be decoded"):
        load_images(folder, skip_broken=True)

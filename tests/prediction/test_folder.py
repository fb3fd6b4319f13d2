"""Which images are found, what their outputs are called, and what tells runs apart."""

from pathlib import Path

import pytest

from seg_torch.errors import InputError
from seg_torch.prediction.folder import JOURNAL, find_images, run_id


def test_files_that_differ_in_their_extension_get_outputs_of_their_own(tmp_path):
    for name in ("x/a.png", "x/a.jpg", "x/a.jpg.png", "b.PNG", "notes.txt", "x/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == {
        "b": tmp_path / "b.PNG",
        "x/a.jpg": tmp_path / "x/a.jpg",
        "x/a.jpg.png": tmp_path / "x/a.jpg.png",
        "x/a.png": tmp_path / "x/a.png",
        "x/c": tmp_path / "x/c.png",
    }


def test_d27_names_that_differ_only_in_case_get_outputs_of_their_own(tmp_path):
    names = ("A.jpg", "a.png", "X/b.png", "x/B.png", "c.png", "C.png", "c.png~.png", "d.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in found.values()} == set(names)
    assert len({name.casefold() for name in found}) == len(names)
    assert found["A.jpg"] == tmp_path / "A.jpg"
    assert found["a.png"] == tmp_path / "a.png"
    assert found["d"] == tmp_path / "d.png"


def test_d27_only_what_pillow_reads_by_itself_counts_as_an_image(tmp_path):
    for name in ("a.h5", "b.hdf", "c.grib", "d.mpg", "e.eps", "f.pdf", "g.jpg"):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == {"g": tmp_path / "g.jpg"}


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_images_is_refused_by_name(tmp_path, name):
    with pytest.raises(InputError, match=str(tmp_path / name)):
        find_images(tmp_path / name)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_e55_images_beside_the_outputs_are_found_and_the_outputs_are_not(tmp_path):
    touch(tmp_path, "a.jpg", "x/b.jpg", "x/mask/c.jpg")
    inputs = {"a": "a.jpg", "x/b": "x/b.jpg", "x/mask/c": "x/mask/c.jpg"}
    expected = {name: tmp_path / file for name, file in inputs.items()}
    assert find_images(tmp_path, tmp_path) == expected
    outputs = ("mask/a.png", "overlay/x/b.jpg", "legend.png", "dataset/images/a.jpg")
    touch(tmp_path, *outputs, f"{JOURNAL}/0.jsonl")
    assert find_images(tmp_path, tmp_path) == expected
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    assert find_images(tmp_path, tmp_path / "link") == expected
    with pytest.raises(InputError, match=r"mask: all 1 images there are outputs of predict"):
        find_images(tmp_path / "mask", tmp_path)
    # Of a folder into which no run has written.
    touch(tmp_path / "new", "mask/a.png")
    assert find_images(tmp_path / "new", tmp_path / "new") == {
        "mask/a": tmp_path / "new/mask/a.png"
    }


def test_e54_a_folder_without_images_says_what_is_there(tmp_path):
    touch(tmp_path, "a.HEIC", "b.heic", "x/c.dng", "README")
    with pytest.raises(InputError, match=r"no images below this folder, but 2 \.heic, 1 "):
        find_images(tmp_path)


def test_weights_decide_what_a_run_is_and_are_not_read_into_memory_at_once(
    compose, tmp_path, monkeypatch
):
    weights = tmp_path / "a.ckpt"
    cfg = compose("predict", "input=a", "output=b", f"checkpoint={weights}")
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("the whole file at once"))
    found = []
    for content in (bytes(3 << 20), bytes((3 << 20) - 1) + b"1", bytes(3 << 20)):
        weights.write_bytes(content)
        found.append(run_id(cfg))
    assert found[0] == found[2] != found[1]

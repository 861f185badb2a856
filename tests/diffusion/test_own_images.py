"""Images of one's own are read from files of many kinds, known by their hash, and refused with the name of the file."""

import gzip
import hashlib
import json
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from diffusion.data import array_files, own_images, picture_files
from diffusion.errors import UserError
from diffusion.images import evaluation
from diffusion.images.pixels import unscaled
from diffusion.problems.own_images import OwnClassesProblem, OwnImagesProblem
from diffusion.settings import DiffusionSettings, SamplerSettings, SettingsError, UnetSettings
from diffusion.statistics.evaluator import Drawn
from tests.launching import NO_FIGURES, done, launch, status
from tests.made_images import idx

N = 60
MODEL, DIFFUSION = UnetSettings(dim=8, dim_mults=(1, 2), attn_heads=(1, 1)), DiffusionSettings(timesteps=30)


@pytest.fixture
def grey() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (N, 12, 20, 1), dtype=np.uint8)


@pytest.fixture
def colours() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)


CLASSES = (np.arange(N) // 20).astype(np.uint8)


def write_folder(folder: Path, images: NDArray[np.uint8], classes: NDArray[np.uint8] | None = None) -> Path:
    """A PNG for each image, in a folder for each class if there are classes."""
    for i, image in enumerate(images):
        below = folder if classes is None else folder / f"class-{classes[i]}"
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(below / f"{i:03d}.png")
    return folder


def load(root: Path, size: tuple[int, ...] = (), channels: int | None = None) -> own_images.Loaded:
    own_images._loaded.clear()
    return own_images.load(root, size, channels)


def test_every_tenth_image_of_a_folder_is_held_out(grey: NDArray[np.uint8], tmp_path: Path) -> None:
    found = load(write_folder(tmp_path / "a", grey, CLASSES))
    held_out = np.arange(N) % 10 == 9
    for split, chosen in (("train", ~held_out), ("test", held_out)):
        assert np.array_equal(found.images[split], grey[chosen])  # type: ignore[index]
        assert np.array_equal(found.labels[split], CLASSES[chosen])  # type: ignore[index]
    (tmp_path / "a" / ".hidden").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    assert load(tmp_path / "a").sha256 == found.sha256
    other = grey.copy()
    other[5, 0, 0] ^= 1
    assert load(write_folder(tmp_path / "b", other, CLASSES)).sha256 != found.sha256
    assert load(write_folder(tmp_path / "c", grey, CLASSES[::-1])).sha256 != found.sha256


def test_a_folder_may_say_itself_what_is_for_tests(colours: NDArray[np.uint8], tmp_path: Path) -> None:
    write_folder(tmp_path / "train", colours[:40], CLASSES[:40])
    write_folder(tmp_path / "test", colours[40:], np.arange(20, dtype=np.uint8) % 2)
    found = load(tmp_path)
    assert found.shape == (16, 16, 3)
    assert np.array_equal(found.images["train"], colours[:40])
    assert len(found.images["test"]) == 20
    shutil.rmtree(tmp_path / "test" / "class-1")
    with pytest.raises(UserError, match=r"must hold the same classes; got \['class-0', 'class-1'\] and \['class-0'\]"):
        load(tmp_path)


def test_files_of_arrays_hold_the_same_as_a_folder(grey: NDArray[np.uint8], tmp_path: Path) -> None:
    of_pictures = load(write_folder(tmp_path / "pictures", grey, CLASSES)).sha256
    np.savez(tmp_path / "a.npz", arr_0=grey, arr_1=CLASSES)  # as `sample --export adm` writes
    np.savez_compressed(tmp_path / "b.npz", images=grey[..., 0], labels=CLASSES[:, None].astype(np.int64))
    assert load(tmp_path / "a.npz").sha256 == load(tmp_path / "b.npz").sha256 == of_pictures
    np.save(tmp_path / "a.npy", grey)
    assert load(tmp_path / "a.npy").sha256 == load(write_folder(tmp_path / "no-classes", grey)).sha256
    # Those that tell images for tests apart.
    train, test = np.arange(40), np.arange(40, N)
    names = [(f"{split}_images", f"{split}_labels") for split in ("train", "test")]
    np.savez(
        tmp_path / "medmnist.npz",
        **{names[0][0]: grey[train], names[0][1]: CLASSES[train, None]},
        **{names[1][0]: grey[test], names[1][1]: CLASSES[test, None]},
        val_images=grey[:1],
    )
    np.savez(
        tmp_path / "keras.npz",
        x_train=grey[train, ..., 0],
        y_train=CLASSES[train],
        x_test=grey[test, ..., 0],
        y_test=CLASSES[test],
    )
    (tmp_path / "idx").mkdir()
    for name, part in zip(("train", "t10k"), (train, test), strict=True):
        (tmp_path / "idx" / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(grey[part, ..., 0])))
        (tmp_path / "idx" / f"{name}-labels-idx1-ubyte").write_bytes(idx(CLASSES[part]))
    found = [load(tmp_path / name) for name in ("medmnist.npz", "keras.npz", "idx")]
    assert len({one.sha256 for one in found}) == 1
    assert np.array_equal(found[0].images["test"], grey[test])
    assert np.array_equal(found[0].labels["train"], CLASSES[train])


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, batch: Callable[[int], Any]) -> Path:
    """CIFAR-10's six files with other content, for whose hashes ours and torchvision's are exchanged."""
    folder = root / array_files.CIFAR_FOLDER
    folder.mkdir()
    md5 = {}
    for i, name in enumerate(array_files.CIFAR_MD5):
        content = pickle.dumps(batch(i), protocol=3)
        (folder / name).write_bytes(content)
        md5[name] = hashlib.md5(content).hexdigest()
    meta = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(array_files, "CIFAR_MD5", md5)
    *train, test = md5.items()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", list(map(list, train)))
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [list(test)])
    about = {**datasets.CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(datasets.CIFAR10, "meta", about)
    return root


def test_cifar_is_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list]
    assert dict(theirs) == array_files.CIFAR_MD5

    def batch(i: int) -> dict[str, Any]:
        random = np.random.default_rng(i)
        return {
            "data": random.integers(0, 256, (8, 3072), dtype=np.uint8),
            "labels": random.integers(0, 10, 8).tolist(),
            "filenames": ["x.png"] * 8,
        }

    root = write_cifar(tmp_path, monkeypatch, batch)
    found = load(root)
    assert load(root / array_files.CIFAR_FOLDER).sha256 == found.sha256
    for split in ("train", "test"):
        their = datasets.CIFAR10(root, train=split == "train", download=False)
        assert np.array_equal(found.images[split], their.data)  # type: ignore[index]
        assert np.array_equal(found.labels[split], their.targets)  # type: ignore[index]
    (root / array_files.CIFAR_FOLDER / "data_batch_3").write_bytes(b"")
    with pytest.raises(UserError, match=r"data_batch_3 is not CIFAR-10's own file: its md5 is d41d8cd98f"):
        load(root)


def test_a_pickle_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    root = write_cifar(tmp_path, monkeypatch, lambda i: {"data": Evil(), "labels": []})
    with pytest.raises(UserError, match=r"cannot be read: a pickle of arrays alone has no "):
        load(root)
    assert not (tmp_path / "executed").exists()


def picture(mode: str, size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.new(mode, size)


def animated(path: Path) -> None:
    picture("L").save(path, save_all=True, append_images=[Image.new("L", (20, 12), 9)])


def write_16_bit(path: Path) -> None:
    """A coloured PNG, which Pillow reads as if it had 8 bits."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 20, 12, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(12 * 121)))
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "unreadable": ("x.png", lambda path: path.write_bytes(b"no picture"), r"x\.png cannot be read: "),
    "cut off": ("x.png", lambda path: path.write_bytes((path.parent / "003.png").read_bytes()[:80]), "cannot be read"),
    "alpha": ("x.png", lambda path: picture("RGBA").save(path), r"x\.png has an alpha channel"),
    "16 bit": ("x.png", lambda path: picture("I;16").save(path), r"x\.png has 16 bits a channel"),
    "16 bit, coloured": ("x.png", write_16_bit, r"x\.png has 16 bits a channel"),
    "animated": ("x.png", animated, r"x\.png is animated: 2 frames"),
    "CMYK": ("x.jpg", lambda path: picture("CMYK").save(path), r"x\.jpg is in CMYK"),
    "another kind": ("x.gif", lambda path: picture("L").save(path), r"x\.gif is no PNG or JPEG"),
    "large": ("x.png", lambda path: picture("L", (80, 12)).save(path), r"x\.png is 12x80, larger than 64x64"),
    "odd size": (
        "x.png",
        lambda path: picture("L", (20, 13)).save(path),
        r"most are 12x20 grey, \S*x\.png is 13x20 grey",
    ),
    "coloured": ("x.png", lambda path: picture("RGB").save(path), r"x\.png is 12x20 coloured"),
    "mixed": ("x", lambda path: path.mkdir(), r"but not both: 000\.png lies beside the folder x"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_cannot_be_used_is_named(what: str, grey: NDArray[np.uint8], tmp_path: Path) -> None:
    name, write, words = BAD[what]
    write(write_folder(tmp_path, grey) / name)
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_a_folder_without_images_is_no_class(grey: NDArray[np.uint8], tmp_path: Path) -> None:
    (write_folder(tmp_path, grey, CLASSES) / "notes").mkdir()
    with pytest.raises(UserError, match=r"must hold the images of a class; notes holds none"):
        load(tmp_path)


def write_claim(path: Path, shape: tuple[int, ...]) -> None:
    """An npy file whose header claims an array of this shape, and which holds four bytes of it."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(b"four")


def write_npz(path: Path, **arrays: Any) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def write_member(path: Path, write: Callable[[Path], Any]) -> None:
    """An npz file with one member, arr_0, as `write` makes it."""
    write(path.with_name("member"))
    with zipfile.ZipFile(path, "w") as file:
        file.write(path.with_name("member"), "arr_0.npy")


GREY = np.zeros((N, 12, 20), np.uint8)
ONE_HOT = np.eye(3, dtype=np.uint8)[CLASSES]
IDX = array_files.IDX_NAMES[0]
BAD_ARRAYS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "floats": ("x.npy", lambda path: np.save(path, GREY / 255), r"must be uint8 .* got float64 \[60, 12, 20\]"),
    "other names": (
        "x.npz",
        lambda path: write_npz(path, x=GREY),
        "must hold images as one of train_images, x_train, images, arr_0; it holds x",
    ),
    "text": ("x.npy", lambda path: path.write_text("no array"), r"x\.npy cannot be read"),
    "npz as npy": ("x.npy", lambda path: write_npz(path, images=GREY), r"x\.npy must hold an array; it is an \.npz"),
    "npy as npz": ("x.npz", lambda path: write_claim(path, (4,)), r"x\.npz must be an \.npz file; it is an \.npy"),
    "large claim": ("x.npy", lambda path: write_claim(path, (10**9, 64, 64)), r"x\.npy cannot be read: "),
    "huge claim": ("x.npy", lambda path: write_claim(path, (2**62, 64, 64)), r"x\.npy cannot be read: "),
    "large claim inside": (
        "x.npz",
        lambda path: write_member(path, lambda member: write_claim(member, (10**11, 64, 64))),
        r"x\.npz cannot be read: ",
    ),
    "text inside": (
        "x.npz",
        lambda path: write_member(path, lambda member: member.write_text("no array")),
        r"images must be uint8 .*; got \|S8 \[\]",
    ),
    "large claim in IDX": (
        "idx",
        lambda path: (path.mkdir(), (path / IDX).write_bytes(struct.pack(">HBB3I", 0, 8, 3, 10**9, 64, 64))),
        "must be an IDX file of unsigned bytes",
    ),
    "one label": (
        "x.npz",
        lambda path: write_npz(path, images=GREY, labels=np.uint8(1)),
        r"must be one class for each image, as \[n\] or \[n, 1\]; got \[\] for 60 images in \S*x\.npz",
    ),
    "one-hot labels": (
        "x.npz",
        lambda path: write_npz(path, images=GREY, labels=ONE_HOT),
        r"as \[n\] or \[n, 1\]; got \[60, 3\] for 60 images",
    ),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_a_file_of_arrays_that_cannot_be_used_is_named(what: str, tmp_path: Path) -> None:
    name, write, words = BAD_ARRAYS[what]
    write(tmp_path / name)
    with pytest.raises(UserError, match=words):
        load(tmp_path / name)


def test_what_is_no_data_set_is_refused(grey: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs at least 20 images for training; .* holds 18 and those for tests"):
        load(write_folder(tmp_path / "few", grey[:20]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"needs at least 20 images for training; .* holds 0"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere is not there"):
        load(tmp_path / "nowhere")


def test_images_are_made_fit(colours: NDArray[np.uint8], tmp_path: Path) -> None:
    for i, image in enumerate(colours):
        Image.fromarray(image).resize((90, 90 + i)).save(tmp_path / f"{i:03d}.jpg")
    stripes = np.zeros((40, 120), np.uint8)
    stripes[:, :38] = stripes[:, -38:] = 255
    Image.fromarray(stripes).save(tmp_path / "999.png")
    found = load(tmp_path, (24, 24), 1)
    assert found.shape == (24, 24, 1)
    with Image.open(tmp_path / "000.jpg") as first:
        expected = first.convert("L").resize((24, 24), Image.Resampling.LANCZOS)
    assert np.array_equal(found.images["train"][0, ..., 0], np.asarray(expected))
    assert found.images["train"][-1].max() < 9  # the middle of the stripes
    cameras = Image.fromarray(colours[0]).resize((90, 90))  # with a preview behind it
    cameras.save(tmp_path / "000.jpg", format="MPO", save_all=True, append_images=[picture("RGB")])
    assert np.array_equal(load(tmp_path, (24, 24), 1).images["train"], found.images["train"])
    np.save(tmp_path / "a.npy", colours)
    small = load(tmp_path / "a.npy", (8, 8)).images["train"][0]
    assert np.array_equal(small, picture_files.fitted(Image.fromarray(colours[0]), (8, 8), 3))


def test_settings_say_what_the_images_are(grey: NDArray[np.uint8], tmp_path: Path) -> None:
    root = write_folder(tmp_path / "a", grey)
    problem = OwnImagesProblem(root=str(root)).absolute()
    assert (problem.size, problem.channels, problem.shape) == ((12, 20), 1, (12, 20, 1))
    assert problem.digest(inception=False) == {"data": problem.sha256}
    assert problem.absolute() == problem
    problem.check(UnetSettings(dim_mults=(1, 2, 4)))
    with pytest.raises(SettingsError, match=r"model\.dim-mults halves 12x20"):
        problem.check(UnetSettings(dim_mults=(1, 2, 4, 8)))
    moved = root.rename(tmp_path / "b")
    with pytest.raises(
        SettingsError, match=r"--data\.root must say where your images lie now; got none, and \S* is gone"
    ):
        problem.moved(None)
    problem.moved(str(moved)).prepare(print)
    picture("L").save(moved / "007.png")
    own_images._loaded.clear()
    with pytest.raises(UserError, match="are not those that the run began with: their sha256 is "):
        problem.moved(str(moved)).prepare(print)
    with pytest.raises(SettingsError, match=r"--data\.root must name your images"):
        OwnImagesProblem().absolute()
    with pytest.raises(SettingsError, match=r"data\.sha256 must be .*, that of .*; got 0123"):
        OwnImagesProblem(root=str(moved), sha256="0123").absolute()
    with pytest.raises(SettingsError, match=r"data\.size must be one or two numbers from 8 to 64; got \(65,\)"):
        replace(problem, size=(65,))


def test_images_of_too_few_pixels_are_refused_by_their_own_size(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((N, 4, 12), np.uint8))
    with pytest.raises(SettingsError, match=r"images must have 8 to 64 pixels on a side; got 4x12 in \S*a\.npy"):
        OwnImagesProblem(root=str(tmp_path / "a.npy")).absolute()
    assert OwnImagesProblem(root=str(tmp_path / "a.npy"), size=(16,)).absolute().shape == (16, 16, 1)


def test_few_test_images_are_held_out_at_many_timesteps(grey: NDArray[np.uint8], tmp_path: Path) -> None:
    root = write_folder(tmp_path / "a", grey[:23], CLASSES[:23])
    problem = OwnImagesProblem(root=str(root)).absolute()
    found = problem.build(MODEL, DIFFUSION).held_out()
    assert found is not None
    (x0,) = found
    images, counts = np.unique(unscaled(x0), axis=0, return_counts=True)
    assert {image.tobytes() for image in images} == {grey[i].tobytes() for i in (9, 19)}
    assert counts.tolist() == [256, 256]


def test_coloured_images_are_trained_and_judged(
    colours: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BOUND_IMAGES", 4)
    problem = OwnImagesProblem(root=str(write_folder(tmp_path / "a", colours))).absolute()
    torch.manual_seed(0)
    experiment = problem.build(MODEL, DIFFUSION)
    model = experiment.build_model().requires_grad_(False).eval()
    assert experiment.batch(0, 1, 0, 8, 8, torch.device("cpu")).shape == (8, 3, 16, 16)
    train = problem.data_set.read_images(Path(problem.root), "train")
    drawn = Drawn(train[:50], model, SamplerSettings(sampler="dpm++", steps=4))
    evaluator = problem.evaluator(MODEL, DIFFUSION, drawn)
    found = evaluator.metrics({name: unit.compute() for name, unit in evaluator.units().items()})
    assert evaluator.num_judged == 6  # as many as there are test images
    assert found["copies"].value == 1.0
    assert 8 < found["bits_per_dim"].value < 30  # noise has 8; the network has learnt nothing


def test_a_folder_for_each_class_is_drawn_by_class(grey: NDArray[np.uint8], tmp_path: Path) -> None:
    root = write_folder(tmp_path / "mine", grey, CLASSES)
    small = ("--model.dim", 8, "--model.dim-mults", 1, "--diffusion.timesteps", 21, "--train.batch-size", 4)
    small = (*small, "--name", "a", "--train.steps", 4, "--train.held-out-every", 4)
    done("train", "images-classes", "--data.root", root, *small, cwd=tmp_path)
    run = tmp_path / "runs" / "images-classes" / "a"
    assert json.loads((run / "experiment.json").read_text())["data"]["classes"] == 3
    assert (run / "figures" / "classes.png").exists()
    sample = ("sample", "images-classes/a", "--num-samples", 5, "--steps", 2, "--name", "s", "--classes")
    done(*sample, "1", cwd=tmp_path)
    with np.load(run / "samples" / "s" / "samples.npz") as drawn:
        assert drawn["arr_0"].shape == (5, 12, 20, 1) and drawn["arr_1"].tolist() == [1] * 5
    refused = launch(*sample, "3", cwd=tmp_path)
    assert refused.code == 2 and "--classes must lie between 0 and 2; got 3" in refused.err
    with pytest.raises(SettingsError, match=r"needs at least two classes, .*; got 1"):
        OwnClassesProblem(root=str(write_folder(tmp_path / "plain", grey))).absolute()
    with pytest.raises(SettingsError, match=r"data\.classes must be 3, .*; got 2"):
        OwnClassesProblem(root=str(root), classes=2).absolute()


def test_a_run_takes_no_other_images(colours: NDArray[np.uint8], tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", colours)
    small = ("--model.dim", 8, "--train.batch-size", 4, "--train.steps", 2, "--name", "a")
    done("train", "images", "--data.root", "mine", *small, cwd=tmp_path, **NO_FIGURES)
    done("sample", "images/a", "--num-samples", 3, "--steps", 2, "--name", "s", cwd=tmp_path, **NO_FIGURES)
    drawn = np.load(tmp_path / "runs" / "images" / "a" / "samples" / "s" / "samples.npz")["arr_0"]
    assert drawn.shape == (3, 16, 16, 3)
    done("export", "images/a", "model", cwd=tmp_path)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| data | The author's own images, 16x16 and coloured. Their sha256: " in card
    (command,) = re.findall(r"python launch\.py (train images .*?)`", card)
    again = (*command.replace("YOUR_IMAGES", "mine").split(), "--name", "again", "--train.steps", 2)
    assert "--data.sha256" in command
    done(*again, cwd=tmp_path, **NO_FIGURES)
    picture("RGB", (16, 16)).save(tmp_path / "mine" / "new.png")
    refused = launch("train", "images", "--data.root", "mine", *small, cwd=tmp_path)
    assert refused.code == 2 and "exists with other settings: data.sha256 is " in refused.err
    refused = launch("resume", "images/a", "--train.steps", 3, cwd=tmp_path)
    assert refused.code == 2 and "are not those that the run began with" in refused.err


def test_a_sweep_over_folders_trains_on_the_images_of_each(colours: NDArray[np.uint8], tmp_path: Path) -> None:
    for name, images in (("one", colours), ("two", 255 - colours)):
        write_folder(tmp_path / name, images)
    small = ("--model.dim", 8, "--train.batch-size", 4, "--train.steps", 2)
    swept = ("--name", "s", "--grid", "data.root=one,two")
    done("sweep", "images", *small, *swept, cwd=tmp_path, **NO_FIGURES)
    kept = [tmp_path / "runs" / "images" / f"s-{i:03d}" / "experiment.json" for i in range(2)]
    one, two = (json.loads(path.read_text())["data"] for path in kept)
    assert [one["root"], two["root"]] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert one["sha256"] != two["sha256"]
    assert [status(path.parent)["state"] for path in kept] == ["finished", "finished"]

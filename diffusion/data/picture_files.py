"""Images of the user's own in PNG or JPEG files: a folder of them, or a folder for each class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

PICTURES = (".png", ".jpg", ".jpeg")
OTHER_PICTURES = (".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3}
"""The modes of Pillow that are taken: eight bits a channel, no alpha. A palette is coloured."""
LARGEST = 64
"""Pixels on a side."""
NAMED = 3
"""Files that a message names."""


class Unfit(Exception):
    """A file cannot be used; the message completes a sentence that begins with its name."""


def read_split(
    folder: Path, size: tuple[int, ...], channels: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[str]]:
    """Returns images [n, height, width, channels] in the order of their names, their classes [n], and those' names.

    `size` is () to take the images as they are. Raises UserError with the names of files that cannot be used.
    """
    import numpy as np

    classes, pictures = _listed(folder)
    if classes and pictures:
        raise UserError(
            f"{folder} must hold images, or a folder for each class, but not both: "
            f"{pictures[0].name} lies beside the folder {classes[0].name}"
        )
    if len(classes) > 256:
        raise UserError(f"there may be at most 256 classes; {folder} holds {len(classes)} folders")
    files = [(path, 0) for path in pictures]
    for number, below in enumerate(classes):
        deeper, inside = _listed(below)
        if deeper:
            raise UserError(f"{below} must hold the images of a class and no folders; it holds {deeper[0].name}")
        if not inside:
            raise UserError(f"each folder in {folder} must hold the images of a class; {below.name} holds none")
        files += [(path, number) for path in inside]
    images, bad = [], []
    for path, _ in files:
        try:
            images.append(_read(path, size, channels))
        except Unfit as reason:
            bad.append(f"{path} {reason}")
    if bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise UserError("; ".join(bad[:NAMED]) + more)
    shapes = Counter(image.shape for image in images)
    if len(shapes) > 1:
        (usual, _), *_ = shapes.most_common(1)
        odd = next(i for i, image in enumerate(images) if image.shape != usual)
        raise UserError(
            "all images must have one size and be grey or coloured alike, else --data.size and --data.channels must "
            f"say what to make of them: most are {_words(usual)}, {files[odd][0]} is {_words(images[odd].shape)}"
        )
    labels = np.array([number for _, number in files], np.uint8)
    return (np.stack(images) if images else np.empty((0, 0, 0, 1), np.uint8)), labels, [path.name for path in classes]


def fitted(picture: Image, size: tuple[int, ...], channels: int | None) -> NDArray[np.uint8]:
    """Returns the pixels [height, width, channels], cut in the middle and scaled to the size, if one is asked for."""
    import numpy as np
    from PIL import Image, ImageOps

    picture = picture.convert("L" if (channels or CHANNELS[picture.mode]) == 1 else "RGB")
    if size and picture.size != (size[1], size[0]):
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    return array.reshape(*array.shape[:2], -1)


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the pictures in a folder, sorted; hidden ones and other files are left alone."""
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    known = (*PICTURES, *OTHER_PICTURES)
    pictures = [path for path in visible if path.suffix.lower() in known and not path.is_dir()]
    return [path for path in visible if path.is_dir()], pictures


def _read(path: Path, size: tuple[int, ...], channels: int | None) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    if path.suffix.lower() not in PICTURES:
        raise Unfit("is no PNG or JPEG")
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as picture:
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # a camera's, with previews behind it
                raise Unfit(f"is animated: {picture.n_frames} frames")  # type: ignore[attr-defined]
            if picture.format == "PNG" and _bits(path) == 16:
                raise Unfit("has 16 bits a channel; 8 are taken")
            if picture.mode in ("LA", "RGBA", "PA") or "transparency" in picture.info:
                raise Unfit("has an alpha channel: lay it on a background first")
            if picture.mode not in CHANNELS:
                raise Unfit(f"is in {picture.mode}, neither grey nor RGB")
            if not size and max(picture.size) > LARGEST:
                size_now = f"{picture.height}x{picture.width}"
                raise Unfit(f"is {size_now}, larger than {LARGEST}x{LARGEST}: --data.size makes it smaller")
            return fitted(ImageOps.exif_transpose(picture), size, channels)
    # SyntaxError is what Pillow raises for a broken PNG.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Unfit(f"cannot be read: {error}") from None


def _bits(path: Path) -> int:
    """Bits a channel of a PNG file, of which Pillow cuts 16 to 8 in silence where it is coloured."""
    with path.open("rb") as file:
        # A signature of 8 bytes, 8 for the head of the first chunk, 4 each for width and height, and then the bits.
        return file.read(25)[24]


def _words(shape: tuple[Any, ...]) -> str:
    return f"{shape[0]}x{shape[1]} {'grey' if shape[2] == 1 else 'coloured'}"

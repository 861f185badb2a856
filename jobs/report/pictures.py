"""Pictures that lie inside the page."""

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A picture of a run."""

    name: str
    """Its path below the run's folder."""
    text: str
    """What it shows."""
    uri: str
    """The picture itself, as a page holds it."""
    width: int
    height: int


def picture(folder: Path, name: str, text: str, width: int) -> Picture | None:
    """Returns the picture `name` of a run's folder, at most `width` pixels wide; None if there is none to be read.

    A link that leads out of the folder is not followed: the page may be passed on to people who may not see that file.
    """
    path = folder / name
    if leads_out(folder, path):
        return None
    try:
        with Image.open(path) as opened:
            # `open` reads the header only. This reads all, so a file that is half written fails here.
            image = opened.convert("RGB")
    except OSError:  # there is none, or it is being drawn
        return None
    # Pillow wants a height, too: this is more than any of our pictures has.
    image.thumbnail((width, 4 * width))
    content = BytesIO()
    image.save(content, "WEBP", quality=85, method=4)
    return Picture(name, text, f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}", *image.size)


def leads_out(folder: Path, path: Path) -> bool:
    """Whether a path in a folder is that of something elsewhere."""
    return not path.resolve().is_relative_to(folder.resolve())

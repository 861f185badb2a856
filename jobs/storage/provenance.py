"""Where a run comes from: command line, versions, git state, and a copy of the code. Importable without torch."""

import hashlib
import platform
import secrets
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from diffusion.errors import OutsideError
from jobs.files import named

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = ("launch.py", "commands", "diffusion", "jobs", "slurm")
NOT_CODE = ("__pycache__", ".*", "profiles")
"""Left out of a copy: what Python makes, what editors leave, and the profiles of sites, which only a launcher reads."""
PACKAGES = ("torch", "torchvision", "numpy", "denoising-diffusion-pytorch", "accelerate", "submitit", "wandb")


def describe(**more: Any) -> dict[str, Any]:
    """Returns the content of launch.json."""
    return {
        "created": datetime.now(UTC).isoformat(),
        "argv": sys.argv,
        "git_commit": _git("rev-parse", "HEAD").strip() or None,
        "git_diff": _git("diff", "HEAD") or None,
        "host": platform.node(),
        "wandb_id": secrets.token_hex(4),
        "python": platform.python_version(),
        "versions": versions(),
        **more,
    }


def versions() -> dict[str, str | None]:
    """Returns the installed versions of the packages that jobs import, None for one that is missing."""
    from importlib.metadata import PackageNotFoundError, version  # not for every `status`: it reads mail headers

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: found(package) for package in PACKAGES}


def code_folder(run: Path) -> Path:
    """Where a run keeps its copy of today's code: code/, or code-DIGEST/ if it began with other code.

    A job is a pickle of today's classes, so it needs today's code. No copy ever changes: a job that waits may need it.
    """
    first, today = run / "code", _digest(ROOT)
    return first if not first.exists() or _digest(first) == today else run / f"code-{today[:8]}"


def save_code(folder: Path) -> None:
    """Copies the code, so that a job that is queued again runs the same, whatever is edited in the meantime.

    The copy appears whole or not at all; one that is there already is left as it is.
    """
    if folder.exists():
        return
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    made.mkdir()
    try:
        for name in _files(ROOT):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            with named(folder):
                shutil.copyfile(ROOT / name, made / name)  # without its mode: the umask says who may read and delete it
        # The first copy says itself what the run began with; a later one is looked up by the digest in its name.
        if folder.name != "code" and folder.name != f"code-{_digest(made)[:8]}":
            raise OutsideError("the code was edited while it was copied for the job; start the job again")
        made.rename(folder)
    except OSError:
        if not folder.exists():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _digest(root: Path) -> str:
    """A hash of all files of the code below a folder, and of their names."""
    hashed = hashlib.sha256()
    for name in _files(root):
        hashed.update(f"{name}\0".encode() + hashlib.sha256((root / name).read_bytes()).digest())
    return hashed.hexdigest()


def _files(root: Path) -> list[Path]:
    """The names of all files of the code below a folder, sorted; a link that leads nowhere is none."""
    paths = [root / name for name in CODE]
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    names = [file.relative_to(root) for file in files]
    return [name for name in names if not any(fnmatch(part, unwanted) for part in name.parts for unwanted in NOT_CODE)]


def _git(*arguments: str) -> str:
    """Returns what git prints, and nothing where there is no git or no repository.

    Its bytes may be text in any encoding; the surrogates of `os.fsdecode` keep those that are not ours.
    """
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="surrogateescape") if done.returncode == 0 else ""

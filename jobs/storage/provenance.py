"""Where a run comes from: command line, versions, git state, and a copy of the code. Importable without torch."""

import platform
import secrets
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = ("launch.py", "commands", "diffusion", "jobs", "slurm")
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


def save_code(folder: Path) -> None:
    """Copies the code, so that a job that is queued again runs the same, whatever is edited in the meantime."""
    folder.mkdir()
    for name in CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy2(ROOT / name, folder / name)


def _git(*arguments: str) -> str:
    """Returns what git prints, and nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""

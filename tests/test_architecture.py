"""The house rules: imports flow one way, the command line imports nothing heavy, the pages and the faults are true."""

import ast
import functools
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import launch
import slurm.local
import slurm.signals
from jobs.runtime import signals
from jobs.storage import job_ids, provenance
from slurm import queue
from tests import faults
from tests.fault_list import FAULTS
from tests.slurm import site

ROOT = Path(__file__).resolve().parent.parent
README, HOW_IT_WORKS = ROOT / "README.md", ROOT / "docs" / "how-it-works.md"
PAGES = sorted(path for folder in (".", "docs", "tests", "benchmarks") for path in (ROOT / folder).glob("*.md"))
FORBIDDEN = {
    "diffusion": {"jobs", "slurm", "commands", "launch", "accelerate", "submitit", "wandb", "tyro"},
    "jobs": {"slurm", "commands", "launch", "tyro", "submitit"},
    "slurm": {"diffusion", "jobs", "commands", "launch", "torch", "torchvision", "accelerate", "wandb", "tyro"},
    "commands": {"launch", "torch", "torchvision", "diffusion.process.model", "wandb", "accelerate"},
    "launch.py": {"torch", "torchvision", "diffusion.process.model", "wandb", "accelerate"},
}

ARROWS = {
    "diffusion.errors": set(),
    "diffusion.settings": set(),
    "diffusion.process": set(),
    "diffusion.data": set(),
    "diffusion.figures": {"diffusion.settings"},
    "diffusion.statistics": {"diffusion.settings", "diffusion.process"},
    "diffusion.gaussian1d": {"diffusion.settings", "diffusion.process", "diffusion.statistics", "diffusion.figures"},
    "diffusion.images": {"diffusion.settings", "diffusion.process", "diffusion.statistics", "diffusion.figures"},
    "diffusion.digits": {
        "diffusion.data",
        "diffusion.process",
        "diffusion.statistics",
        "diffusion.figures",
        "diffusion.images",
    },
    "diffusion.problems": {"diffusion"},
    "jobs.files": set(),
    "jobs.terminal": set(),
    "jobs.runtime": set(),
    "jobs.health": {"jobs.runtime"},
    "jobs.experiments": {"diffusion", "jobs.files"},
    "jobs.storage": {"jobs.files", "jobs.experiments"},
    "jobs.tracking": {"jobs.storage"},
    "jobs.followers": {"diffusion.figures", "jobs.files", "jobs.runtime"}
    | {"jobs.experiments", "jobs.storage", "jobs.tracking"},
    "jobs.notify": {"jobs.storage", "jobs.tracking", "jobs.followers"},
    "jobs.watch": {"jobs.files", "jobs.terminal", "jobs.experiments", "jobs.storage", "jobs.tracking"},
    "jobs.doctor": {"diffusion.data", "jobs.files", "jobs.runtime", "jobs.storage", "jobs.tracking"},
    "jobs.train": {"diffusion.process", "diffusion.figures", "jobs.health", "jobs.notify", "jobs.followers"}
    | {"jobs.files", "jobs.terminal", "jobs.runtime", "jobs.experiments", "jobs.storage", "jobs.tracking"},
    "jobs.audit": {"jobs.health", "jobs.train"}
    | {"jobs.files", "jobs.terminal", "jobs.runtime", "jobs.experiments", "jobs.storage"},
    "jobs.sample": {"diffusion.settings", "diffusion.process", "jobs.health"}
    | {"jobs.files", "jobs.terminal", "jobs.runtime", "jobs.experiments", "jobs.storage", "jobs.followers"},
    "jobs.evaluate": {"diffusion.problems", "diffusion.statistics", "diffusion.figures", "jobs.health", "jobs.sample"}
    | {"jobs.files", "jobs.terminal", "jobs.runtime", "jobs.experiments", "jobs.storage", "jobs.followers"},
    "jobs.report": {"jobs.files", "jobs.terminal", "jobs.experiments", "jobs.storage", "jobs.tracking", "jobs.watch"}
    | {"jobs.sample", "jobs.evaluate"},
    "jobs.publish": {"diffusion.settings", "diffusion.process", "diffusion.gaussian1d", "diffusion.images"}
    | {"jobs.evaluate", "jobs.sample", "jobs.files", "jobs.experiments", "jobs.storage"},
}
"""What each room of diffusion/ and jobs/ may import of the others; only problems and experiments know all models."""
GROUND = {"diffusion.errors"}
"""What every room may import."""


@functools.cache
def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever in it, with their packages."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {".".join(parts[: i + 1]) for name in names for parts in [name.split(".")] for i in range(len(parts))}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_flow_one_way(package: str) -> None:
    files = [ROOT / package] if package.endswith(".py") else sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[package] for path in files}
    assert {path: names for path, names in wrong.items() if names} == {}


def modules(room: str) -> list[Path]:
    """The files of a room, or the one that is a room of its own."""
    path = ROOT / room.replace(".", "/")
    return sorted(path.rglob("*.py")) or [path.with_suffix(".py")]


def test_every_file_lies_in_a_room() -> None:
    rooms = {path for room in ARROWS for path in modules(room)}
    files = {path for package in ("diffusion", "jobs") for path in (ROOT / package).rglob("*.py")}
    assert files - rooms == {ROOT / "diffusion" / "__init__.py", ROOT / "jobs" / "__init__.py"}


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_what_lies_below_it(room: str) -> None:
    for path in modules(room):
        others = {".".join(name.split(".")[:2]) for name in imported(path) if "." in name} - {room}
        ours = {name for name in others if name.split(".")[0] in ("diffusion", "jobs")}
        assert {name for name in ours if not {name, name.split(".")[0]} & (ARROWS[room] | GROUND)} == set(), path


def test_what_jobs_and_slurm_must_both_know_is_the_same() -> None:
    assert set(signals.SIGNALS) == set(slurm.signals.SAVE)
    assert provenance.ROOT == slurm.local.ROOT
    for job_id in ("17", "17_3", "west:17_3"):
        assert job_ids.log_of(job_id) == queue.log_of(job_id)
        assert job_ids.number(job_id) == queue.number_of(job_id)
    assert [job_ids.element("17", i) for i in range(2)] == queue.elements_of("17", 2)


def test_no_two_rooms_import_each_other() -> None:
    order = list(ARROWS)
    for room, below in ARROWS.items():
        assert all(order.index(name) < order.index(room) for name in below if name in ARROWS)


@pytest.mark.parametrize("room", [room for room in ARROWS if (ROOT / room.replace(".", "/")).is_dir()])
def test_a_room_has_a_sentence_and_a_handful_of_doors(room: str) -> None:
    sentence, *doors = sorted(modules(room), key=lambda path: path.name != "__init__.py")
    tree = ast.parse(sentence.read_text())
    assert ast.get_docstring(tree) and len(tree.body) == 1
    assert 3 <= len(doors) <= 8


HEAVY = ("torch", "numpy", "accelerate", "matplotlib", "bokeh", "jinja2")
SLOW = ("typeguard", "importlib.metadata")  # for the questions that are asked all day


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], (*HEAVY, *SLOW, "commands")),
        (["status"], (*HEAVY, *SLOW, "commands.where", "commands.train")),
        (["train", "1d", "--help"], HEAVY),
        (["train", "nonsense"], HEAVY),
        (["resume", "nowhere"], HEAVY),
    ],
)
def test_the_command_line_answers_before_heavy_imports(
    arguments: list[str], unwanted: tuple[str, ...], tmp_path: Path
) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['launch.py', *{arguments!r}]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'launch.py')!r}, run_name='__main__')\n"
        "finally:\n"
        f"    print([name for name in {unwanted!r} if name in sys.modules], file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", launch.COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    place, sentence = launch.COMMANDS[name]
    module, _, kind = place.partition(".")
    command = getattr(import_module(f"commands.{module}"), kind)
    assert " ".join(inspect.getdoc(command).split("\n\n")[0].split()) == sentence


def test_the_readme_is_read_in_one_go() -> None:
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_in_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)|<img src=\"([^\"]+)\"", page.read_text())
    local = [link for pair in links for link in pair if link and "://" not in link]
    for link in local:
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link
    assert local or page != README


def headings(page: Path) -> set[str]:
    """Returns the headings of a page as links name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def listed_in(page: Path) -> set[str]:
    """Returns the paths in a page's file tree, folders without their last slash."""
    block = page.read_text().partition("<!-- file tree -->")[2].partition("```text\n")[2].partition("```")[0]
    listed, above = set(), [Path()]
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = above[depth] / line.split()[0]
        above[depth + 1 :] = [path]
        listed.add(path.as_posix())
    return listed


def sources() -> set[str]:
    """Returns every file that a job or a command may need, except the `__init__.py` of rooms."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "launch.py", "commands", "diffusion", "jobs", "slurm"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {path for path in tracked if not path.endswith("__init__.py") and (ROOT / path).exists()}


def test_the_file_tree_in_the_readme_is_the_tree() -> None:
    listed = listed_in(README)
    assert {path for path in listed if not (ROOT / path).exists()} == set()
    whole = [name for name in listed if not any(other.startswith(f"{name}/") for other in listed)]
    inside = {path for path in sources() if any(path.startswith(f"{folder}/") for folder in whole)}
    assert sources() - inside - listed == set()


def test_the_list_of_every_file_is_complete() -> None:
    listed = listed_in(HOW_IT_WORKS)
    assert {path for path in listed if not (ROOT / path).exists()} == set()
    assert {path for path in listed if (ROOT / path).is_file()} == sources()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`((?:commands|diffusion|jobs|slurm|tests|benchmarks|docs)/[^` ]*)`", page.read_text()))
    written_by_users = {"slurm/profiles/mysite.toml", "slurm/profiles/default.toml"}
    assert {path for path in named - written_by_users if not (ROOT / path).exists()} == set()


def test_what_the_tests_on_slurm_change_in_a_copy_of_the_code_is_there() -> None:
    for file, text in (("train/state.py", site.UPDATE), ("train/loop.py", site.START), ("sample/draw.py", site.DRAW)):
        assert (ROOT / "jobs" / file).read_text().count(text) == 1


def test_the_faults_that_tests_are_known_to_catch_fit_the_code(collected: frozenset[str]) -> None:
    known = collected | {test.partition("[")[0] for test in collected}
    files = {test.partition("::")[0] for test in collected}
    for fault in FAULTS:
        assert faults.written(fault) != (ROOT / fault.file).read_text()
        path, _, name = fault.test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), fault.name
        assert fault.test in known or path not in files, fault.name


def test_commands_in_the_pages_exist() -> None:
    helped = subprocess.run(
        [sys.executable, ROOT / "launch.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for page in PAGES:
        used = set(re.findall(r"python launch\.py ([a-z]+)", page.read_text()))
        assert {name for name in used if not re.search(rf"^\W*{name} ", helped, re.MULTILINE)} == set(), page
        assert used or page != README

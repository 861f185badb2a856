"""The gradient's shards are added up in one order: any number of processes that is not larger gives the same bytes."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.storage.checkpoints import steps
from jobs.storage.run_folder import RunFolder
from jobs.train.shards import VOTES, ShardSum, fold, halves, share, subtrees
from jobs.watch import detail
from tests.held import AFTER_STEP, held, start_held
from tests.jobs.test_resume import result
from tests.launching import NO_FIGURES, TINY, done, finish, launch

KINDS = {
    "fp32": (
        *("1d", *TINY, "--train.batch-size", "60", "--train.steps", "24", "--train.checkpoint-every", "8"),
        *("--train.held-out-every", "12"),
    ),
    "bf16": (
        *("mnist-small", "--model.dim", "8", "--model.dim-mults", "1", "--model.attn-heads", "1"),
        *("--train.batch-size", "12", "--train.steps", "4", "--train.log-every", "1", "--train.precision", "bf16"),
        *("--train.held-out-every", "4"),
    ),
}


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7, 8, 12])
def test_whoever_adds_up_the_shards_gets_the_same_sum(shards: int) -> None:
    leaves = {(i, i + 1): torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(shards)}
    whole = fold((0, shards), leaves)
    torch.testing.assert_close(whole, torch.stack(list(leaves.values())).sum(0))
    for processes in range(1, shards + 1):
        parts = [subtrees(share(rank, processes, shards), (0, shards)) for rank in range(processes)]
        nodes = [node for part in parts for node in part]
        assert all(left[1] == right[0] for left, right in pairwise(nodes))
        assert (nodes[0][0], nodes[-1][1]) == (0, shards)
        assert torch.equal(fold((0, shards), {node: fold(node, leaves) for node in nodes}), whole)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
def test_one_process_adds_up_its_shards_as_many_would(shards: int) -> None:
    parts = torch.randn(shards, 50 + VOTES, generator=torch.Generator().manual_seed(0))
    gradient = torch.zeros(50 + VOTES)
    assert ShardSum(gradient, shards, 0, 1).add_up(lambda shard: gradient.add_(parts[shard])) == []
    assert torch.equal(gradient, fold((0, shards), {(i, i + 1): part for i, part in enumerate(parts)}))


def test_a_process_with_a_power_of_two_of_the_shards_sends_one_sum() -> None:
    assert [subtrees(share(rank, 4, 16), (0, 16)) for rank in range(4)] == [[(0, 4)], [(4, 8)], [(8, 12)], [(12, 16)]]
    assert halves((0, 6)) == ((0, 4), (4, 6))


def command(kind: str, name: str, processes: int, *more: str) -> tuple[str, ...]:
    return ("train", *KINDS[kind], "--name", name, "--device", "cpu", "--gpus", str(processes), *more)


@pytest.mark.parametrize(("kind", "others"), [("fp32", (2, 3, 4)), ("bf16", (2, 4))])
def test_any_number_of_processes_trains_the_same_bytes(
    kind: str, others: tuple[int, ...], tmp_path: Path, mnist_root: Path
) -> None:
    env = {"MNIST_ROOT": str(mnist_root), **NO_FIGURES}
    runs = tmp_path / "runs" / KINDS[kind][0]
    done(*command(kind, "one", 1, "--train.grad-shards", "4"), cwd=tmp_path, **env)
    expected = result(runs / "one")
    assert b'"held_out_loss": 0.' in expected["metrics"] or b'"held_out_loss": 1.' in expected["metrics"]
    assert detail.describe(RunFolder(runs / "one"), None)["settings"]["train.grad-shards"] == 4
    for processes in others:
        done(*command(kind, f"on-{processes}", processes, "--train.grad-shards", "4"), cwd=tmp_path, **env)
        assert result(runs / f"on-{processes}") == expected
    if kind == "fp32":  # what this is about: another order gives other bytes
        done(*command(kind, "whole", 1), cwd=tmp_path, **env)
        assert result(runs / "whole") != expected


def kill_after(steps: int, *arguments: object, cwd: Path) -> None:
    """Starts a command and kills it when it has made so many steps."""
    process = start_held(AFTER_STEP, steps, *arguments, cwd=cwd)
    held(cwd)
    process.kill()
    assert finish(process).code == -9


def test_a_run_moves_between_numbers_of_processes_and_keeps_its_bytes(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "1d"
    more = ("--train.steps", "120", "--train.checkpoint-every", "20", "--train.keep-every", "40")
    worse = ("--train.lr", "1")  # its first checkpoint is its best
    more += (*worse, "--train.held-out-every", "20", "--train.keep-best")
    # In one process, which is done sooner: four would train the same bytes.
    done(*command("fp32", "still", 1, *more, "--train.grad-shards", "4"), cwd=tmp_path, **NO_FIGURES)
    kill_after(30, *command("fp32", "moved", 4, *more), cwd=tmp_path)
    assert json.loads((runs / "moved" / "experiment.json").read_text())["train"]["grad_shards"] == 4
    assert "train.grad-shards" not in detail.describe(RunFolder(runs / "moved"), None)["settings"]  # nobody has set it
    kill_after(50, "resume", "1d/moved", "--device", "cpu", "--gpus", 1, cwd=tmp_path)
    done("resume", "1d/moved", "--device", "cpu", "--gpus", 2, cwd=tmp_path, **NO_FIGURES)
    assert result(runs / "moved") == result(runs / "still")
    assert {step // 40 for step in steps(runs / "moved" / "checkpoints")} == {0, 1, 2, 3}  # 20, 40, 80, 100, 120
    assert "bytes may differ" not in (runs / "moved" / "log.txt").read_text()


def test_more_shards_than_before_are_said_whether_for_more_processes_or_because_resume_asks(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1d" / "a"
    done(*command("fp32", "a", 1, "--train.steps", "20"), cwd=tmp_path, **NO_FIGURES)
    more = ("--train.steps", "30", "--device", "cpu", "--gpus", "2")
    on_two = done("resume", "1d/a", *more, cwd=tmp_path, **NO_FIGURES)
    assert "bytes may differ from those of an uninterrupted run: grad_shards 1 before, 2 now" in on_two.out
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and np.isfinite(losses).all()
    more = ("--train.steps", "35", "--train.grad-shards", "6", "--device", "cpu")  # for less memory
    in_six = done("resume", "1d/a", *more, cwd=tmp_path, **NO_FIGURES)
    assert "bytes may differ from those of an uninterrupted run: grad_shards 2 before, 6 now" in in_six.out


def test_shards_that_do_not_divide_the_batch_are_refused(tmp_path: Path) -> None:
    refused = launch(*command("fp32", "a", 1, "--train.grad-shards", "7"), cwd=tmp_path)
    assert refused.code == 2
    assert "train.grad-shards must divide train.batch-size, 60; got 7" in refused.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_eight_processes_train_the_same_bytes_as_one(kind: str, tmp_path: Path, mnist_root: Path) -> None:
    more = ("--train.batch-size", "16", "--train.steps", "8", "--train.grad-shards", "8")
    for processes in (1, 8):
        name, env = f"on-{processes}", {"MNIST_ROOT": str(mnist_root), **NO_FIGURES}
        done(*command(kind, name, processes, *more), cwd=tmp_path, **env)
    runs = tmp_path / "runs" / KINDS[kind][0]
    assert result(runs / "on-8") == result(runs / "on-1")

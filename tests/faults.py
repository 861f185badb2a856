"""Shows that the tests can fail: `python -m tests.faults` writes faults into copies of the code, one at a time.

For each of them the test that is named beside it must fail, and pass without it. A fault is a replacement of text that
occurs once in its file; where the code has changed, the list says so at once, and the fault is written anew.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Fault:
    """One mistake that somebody might make, and the test that would tell."""

    name: str
    file: str
    old: str
    new: str
    test: str
    slurm: bool = False
    """The test starts a Slurm of its own."""


FAULTS = [
    # The mathematics.
    Fault(
        "ddpm adds the predicted noise instead of taking it away",
        "diffusion/process/samplers.py",
        "mu = (xt - (1 - alpha) / (1 - abar)",
        "mu = (xt + (1 - alpha) / (1 - abar)",
        "tests/diffusion/test_samplers.py::test_ancestral_steps_equal_the_librarys_p_sample",
    ),
    Fault(
        "ddim with eta adds noise and takes none away",
        "diffusion/process/samplers.py",
        "(1 - abar_prev - sigma**2) ** 0.5 * eps",
        "(1 - abar_prev) ** 0.5 * eps",
        "tests/diffusion/test_samplers.py::test_ddim_equals_the_librarys_ddim_sample[0.5]",
    ),
    Fault(
        "dpm++ is of first order",
        "diffusion/process/samplers.py",
        "d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous",
        "d = x0",
        "tests/diffusion/test_samplers.py::test_the_error_to_the_exact_ode_has_the_samplers_order",
    ),
    Fault(
        "heun is of first order",
        "diffusion/process/samplers.py",
        "h * (slope + slope_after) / 2",
        "h * slope",
        "tests/diffusion/test_samplers.py::test_the_error_to_the_exact_ode_has_the_samplers_order",
    ),
    Fault(
        "the cosine schedule has lost its offset",
        "diffusion/process/schedules.py",
        "s: float = 0.008",
        "s: float = 0.0",
        "tests/diffusion/test_schedules.py::test_betas_equal_the_librarys[1000]",
    ),
    Fault(
        "the exact score is scaled by b^2 instead of b",
        "diffusion/gaussian1d/mixture.py",
        "return torch.sqrt(1 - abar) * (r * z / v).sum(-1)",
        "return (1 - abar) * (r * z / v).sum(-1)",
        "tests/diffusion/test_mixture.py::test_optimal_eps_is_minus_b_times_the_score",
    ),
    Fault(
        "the loss floor leaves out what a network cannot know",
        "diffusion/gaussian1d/mixture.py",
        "(r * (a2 * self.stds**2 / v + b2 * z**2 / v**2)).sum(-1)",
        "(r * (b2 * z**2 / v**2)).sum(-1)",
        "tests/diffusion/test_mixture.py::test_the_loss_floor_is_the_mean_loss_of_the_optimal_prediction",
    ),
    Fault(
        "the floor of W1 is that of twice as many samples",
        "diffusion/gaussian1d/distances.py",
        "math.sqrt(2 / (math.pi * n)) *",
        "math.sqrt(1 / (math.pi * n)) *",
        "tests/diffusion/test_metrics.py::test_exact_samples_lie_at_the_floors",
    ),
    Fault(
        "a stratum of timesteps counts once in the bound",
        "diffusion/statistics/bits_per_dim.py",
        "return sizes * (kl / math.log(2)).numpy()",
        "return (kl / math.log(2)).numpy()",
        "tests/diffusion/test_likelihood.py::test_a_few_timesteps_estimate_the_same_sum_and_each_stratum_its_part[7]",
    ),
    Fault(
        "precision and recall are exchanged",
        "diffusion/statistics/features.py",
        '"precision": mean(balls > 0, seed=seed, which=Resampled.FAKE),\n'
        '        "recall": mean(reached, seed=seed, which=Resampled.REAL),',
        '"recall": mean(balls > 0, seed=seed, which=Resampled.FAKE),\n'
        '        "precision": mean(reached, seed=seed, which=Resampled.REAL),',
        "tests/diffusion/test_feature_metrics.py::test_overlap_equals_prdc[5]",
    ),
    Fault(
        "the two sets of a comparison are resampled alike",
        "diffusion/statistics/bootstrap.py",
        "Stream.BOOTSTRAP, replicate, which)",
        "Stream.BOOTSTRAP, replicate)",
        "tests/diffusion/test_bootstrap.py::test_the_two_sets_and_the_seeds_are_resampled_independently",
    ),
    Fault(
        "timesteps and noise come from the same stream of numbers",
        "diffusion/process/randomness.py",
        "np.array([seed, stream], dtype=np.uint64)",
        "np.array([seed, 0], dtype=np.uint64)",
        "tests/diffusion/test_randomness.py::test_each_part_of_the_address_changes_the_numbers",
    ),
    Fault(
        "neighbouring blocks of examples draw the same numbers",
        "diffusion/process/randomness.py",
        "np.array([0, 0, block, step], dtype=np.uint64)",
        "np.array([0, 0, 0, step], dtype=np.uint64)",
        "tests/diffusion/test_randomness.py::test_blocks_and_steps_do_not_overlap",
    ),
    Fault(
        "every epoch has the order of the first",
        "diffusion/images/experiment.py",
        "permutation(seed, Stream.EPOCH, epoch, len(self.images))",
        "permutation(seed, Stream.EPOCH, 0, len(self.images))",
        "tests/diffusion/test_mnist.py::test_every_image_comes_once_in_each_epoch_however_the_batch_is_split",
    ),
    Fault(
        "the gradient of a norm has a wrong sign",
        "diffusion/images/unet.py",
        "torch.addcmul(grad, y, along, value=-1)",
        "torch.addcmul(grad, y, along, value=1)",
        "tests/diffusion/test_unet.py::test_the_gradient_of_the_norm",
    ),
    # A training.
    Fault(
        "the learning rate falls from the first step on",
        "jobs/train/state.py",
        "return settings.lr * step / settings.warmup_steps",
        "return settings.lr",
        "tests/jobs/test_training.py::test_the_learning_rate_rises_to_its_peak_and_falls_along_a_cosine",
    ),
    Fault(
        "the average remembers the initial weights for long",
        "jobs/train/ema.py",
        "return min(decay, (1 + step) / (10 + step))",
        "return decay",
        "tests/jobs/test_training.py::test_the_average_forgets_its_beginning_and_then_remembers_as_long_as_it_is_told",
    ),
    Fault(
        "parts of a batch count as whole batches",
        "jobs/train/state.py",
        "losses.sum() / n)",
        "losses.mean())",
        "tests/jobs/test_training.py::test_an_update_is_that_of_plain_torch[100.0-24]",
    ),
    Fault(
        "parameters begin anywhere in memory",
        "jobs/train/flat_weights.py",
        "n += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT",
        "n += parameter.numel()",
        "tests/jobs/test_flat.py::test_parameters_keep_values_and_strides_and_are_aligned",
    ),
    Fault(
        "each process draws the first share of the batch",
        "jobs/runtime/world.py",
        "return self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size",
        "return 0, batch_size // self.size",
        "tests/jobs/test_parallel.py::test_any_number_of_processes_sees_the_same_bytes",
    ),
    Fault(
        "only the first process votes on stopping",
        "jobs/runtime/world.py",
        "torch.tensor([value], device=self.device)",
        "torch.tensor([value if self.rank == 0 else 0], device=self.device)",
        "tests/jobs/test_parallel.py::test_a_signal_to_one_process_stops_all_at_the_same_step",
    ),
    Fault(
        "SIGTERM is no reason to save",
        "jobs/runtime/signals.py",
        "    signal.SIGTERM: Stop.TERMINATE,\n",
        "",
        "tests/jobs/test_cancel.py::test_a_running_run_is_cancelled_with_a_last_checkpoint[1]",
    ),
    Fault(
        "a second Ctrl-C waits like the first",
        "jobs/runtime/signals.py",
        "self.requested == Stop.INTERRUPT:",
        "False:",
        "tests/jobs/test_stop.py::test_the_first_ctrl_c_is_a_request_and_the_second_ends_at_once",
    ),
    Fault(
        "cuDNN may add in any order",
        "jobs/runtime/numerics.py",
        "torch.backends.cudnn.deterministic = True",
        "torch.backends.cudnn.deterministic = False",
        "tests/jobs/test_numerics.py::test_every_job_computes_in_what_the_precision_says[bf16]",
    ),
    # What is on the disk.
    Fault(
        "a checkpoint gets its name before its bytes are on the disk",
        "jobs/storage/checkpoints.py",
        "            sync_file(temporary / file)\n",
        "",
        "tests/jobs/test_checkpoints.py::test_a_checkpoint_gets_its_name_when_its_bytes_are_on_the_disk",
    ),
    Fault(
        "a checkpoint's name may be lost with the machine",
        "jobs/storage/checkpoints.py",
        "        sync_folder(folder)\n",
        "",
        "tests/jobs/test_checkpoints.py::test_a_checkpoint_gets_its_name_when_its_bytes_are_on_the_disk",
    ),
    Fault(
        "a copy of a run takes its jobs for its own",
        "jobs/storage/run_folder.py",
        "        if self._is_copy(launch):\n",
        "        if False:\n",
        "tests/jobs/test_copies.py::test_a_copy_has_no_jobs_and_an_id_of_its_own",
    ),
    Fault(
        "a checkpoint that cannot be read is called damaged",
        "jobs/storage/checkpoints.py",
        "if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):",
        "if False:",
        "tests/jobs/test_checkpoints.py::test_what_cannot_be_read_is_not_damaged[5]",
    ),
    Fault(
        "a run whose checkpoints are all bad begins anew",
        "jobs/storage/checkpoints.py",
        "    if steps(folder):\n        raise",
        "    if False:\n        raise",
        "tests/jobs/test_faults.py::test_a_run_whose_checkpoints_are_all_damaged_stops_and_changes_nothing",
    ),
    Fault(
        "a name that another command has taken is continued",
        "commands/train.py",
        "    if is_new:\n        create(",
        "    if not run.exists():\n        create(",
        "tests/test_launch.py::test_a_name_that_another_command_has_just_taken_is_not_continued",
    ),
    Fault(
        "status.json is written in its place",
        "jobs/files.py",
        'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")',
        "temporary = path\n    yield path\n    return",
        "tests/jobs/test_files.py::test_a_file_is_the_old_one_until_the_new_one_is_on_the_disk",
    ),
    Fault(
        "the lines that a checkpoint covers may be lost with the machine",
        "jobs/train/recorder.py",
        "        self._metrics.sync()\n",
        "",
        "tests/jobs/test_slow_disk.py::test_lines_are_on_the_disk_before_the_checkpoint_that_covers_them",
    ),
    Fault(
        "a checkpoint is deleted under its name",
        "jobs/storage/checkpoints.py",
        "path.rename(doomed)\n    shutil.rmtree(doomed)",
        "shutil.rmtree(path)",
        "tests/jobs/test_checkpoints.py::test_a_checkpoint_that_is_being_deleted_is_none",
    ),
    Fault(
        "a checkpoint's hash is not compared",
        "jobs/storage/checkpoints.py",
        'if sha256(path / name) != recorded["sha256"]:',
        "if False:",
        "tests/jobs/test_checkpoints.py::test_a_damaged_checkpoint_is_named_and_the_newest_good_one_is_used[flip_a_byte]",
    ),
    Fault(
        "the oldest checkpoint passes for the newest",
        "jobs/storage/checkpoints.py",
        "if name.isdigit()), reverse=True)",
        "if name.isdigit()))",
        "tests/jobs/test_checkpoints.py::test_a_damaged_checkpoint_is_named_and_the_newest_good_one_is_used[flip_a_byte]",
    ),
    Fault(
        "one checkpoint too many is deleted",
        "jobs/storage/checkpoints.py",
        "steps(folder)[keep:]",
        "steps(folder)[keep - 1 :]",
        "tests/jobs/test_checkpoints.py::test_the_newest_are_kept",
    ),
    Fault(
        "a job that another has replaced goes on writing",
        "jobs/storage/ownership.py",
        "if token != self.token:",
        "if False:",
        "tests/jobs/test_faults.py::test_a_superseded_run_stops_without_writing",
    ),
    Fault(
        "the line of the checkpoint's own step is lost when it is continued",
        "jobs/storage/records.py",
        'if line["step"] <= step]',
        'if line["step"] < step]',
        "tests/jobs/test_faults.py::test_damage_to_the_newest_checkpoint_costs_steps_and_nothing_else",
    ),
    Fault(
        "lines after the checkpoint stay, and come twice",
        "jobs/storage/records.py",
        'if line["step"] <= step]',
        "]",
        "tests/jobs/test_faults.py::test_damage_to_the_newest_checkpoint_costs_steps_and_nothing_else",
    ),
    Fault(
        "a restart is counted twice",
        "jobs/storage/records.py",
        'previous.get("restarts", -1) + 1',
        'previous.get("restarts", -1) + 2',
        "tests/test_launch.py::test_the_same_command_continues_and_other_settings_are_refused",
    ),
    Fault(
        "MNIST's files are not compared with their hashes",
        "diffusion/data/idx.py",
        "elif (sha256 := hashlib.sha256(content).hexdigest()) != self.sha256[name]:",
        'elif (sha256 := "") is None:',
        "tests/jobs/test_mnist_files.py::test_wrong_file_is_named_and_kept[require]",
    ),
    # Samples and evaluations.
    Fault(
        "samples are drawn with weights that have changed since the job was planned",
        "jobs/sample/draw.py",
        "or sha256(path) != settings.weights_sha256",
        "",
        "tests/jobs/test_samples.py::test_a_job_draws_with_the_weights_that_were_planned[flip a byte]",
    ),
    Fault(
        "every shard holds the samples of the first",
        "jobs/sample/draw.py",
        "experiment, samples.settings, first, first + size)",
        "experiment, samples.settings, first - start, first - start + size)",
        "tests/jobs/test_samples.py::test_any_number_of_processes_writes_the_same_bytes[1d]",
    ),
    Fault(
        "every process draws every shard",
        "jobs/sample/job.py",
        "self.shards[process_rank() :: self.processes]",
        "self.shards",
        "tests/jobs/test_samples.py::test_each_shard_is_drawn_by_one_of_the_processes",
    ),
    Fault(
        "a set that has lost a shard counts as complete",
        "jobs/sample/sample_set.py",
        '"samples.npz").is_file() and not self.missing()',
        '"samples.npz").is_file()',
        "tests/jobs/test_samples.py::test_a_lost_or_cut_shard_is_drawn_again",
    ),
    Fault(
        "samples of other settings are added to a set",
        "jobs/sample/sample_set.py",
        "if manifest.get(key) != value:",
        "if False:",
        "tests/jobs/test_samples.py::test_what_would_change_existing_samples_is_refused",
    ),
    Fault(
        "samples are judged without a look at their hash",
        "jobs/evaluate/plan.py",
        'if sha256(path) != chosen.read_manifest()["sha256"]["samples.npz"]:',
        "if False:",
        "tests/jobs/test_evaluate.py::test_samples_that_are_not_those_that_were_drawn_are_refused",
    ),
    # Who looks on.
    Fault(
        "what wandb still has in memory counts as written",
        "jobs/tracking/follow_training.py",
        "            self._write_position(safe)",
        "            self._write_position(self._position)",
        "tests/jobs/test_tracking.py::test_a_kill_two_requeues_and_a_move_leave_one_curve",
    ),
    Fault(
        "a line that is read while it is written is lost",
        "jobs/storage/records.py",
        "_objects(self._rest + self._file.read())",
        "_objects(self._file.read())",
        "tests/jobs/test_tracking.py::test_a_line_that_is_read_while_it_is_written_comes_once_and_whole",
    ),
    Fault(
        "the dashboard does not know the loss floor",
        "jobs/train/recorder.py",
        '"loss_floor": floor}',
        '"loss_floor": None}',
        "tests/jobs/test_tracking.py::test_a_training_its_samples_and_their_evaluation_are_one_group_with_pictures",
    ),
    Fault(
        "a run that died without a word is shown as running",
        "jobs/watch/states.py",
        "    return _death(job)\n",
        '    return state, ""\n',
        "tests/jobs/test_overview.py::test_a_run_on_slurm",
    ),
    Fault(
        "a full disk behind the terminal ends the job",
        "jobs/runtime/surroundings.py",
        '            self._target.write(text.encode(encoding, "replace").decode(encoding))\n'
        "        except (OSError, ValueError):\n            self._give_up()",
        '            self._target.write(text.encode(encoding, "replace").decode(encoding))\n'
        "        except (OSError, ValueError):\n            raise",
        "tests/jobs/test_surroundings.py::test_who_reads_the_output_does_not_decide_over_the_run[> /dev/full 2>&1]",
    ),
    Fault(
        "the drill finds everything equal",
        "jobs/doctor/drill.py",
        "return b.is_file() and a.read_bytes() == b.read_bytes()",
        "return b.is_file()",
        "tests/jobs/test_drill.py::test_a_drill_finds_equal_results_and_would_see_a_changed_byte",
    ),
    # The command line, processes and Slurm.
    Fault(
        "a bug of ours is told as the user's mistake",
        "launch.py",
        "except (UserError, slurm_errors.UserError) as error",
        "except (UserError, slurm_errors.UserError, ValueError) as error",
        "tests/test_launch.py::test_a_sentence_for_the_user_and_a_traceback_for_us",
    ),
    Fault(
        "wrong use ends with the exit code of a failed job",
        "launch.py",
        '        print(f"error: {error}", file=sys.stderr)\n        return 2',
        '        print(f"error: {error}", file=sys.stderr)\n        return 1',
        "tests/test_launch.py::test_a_wrong_command_gets_one_sentence_and_writes_nothing",
    ),
    Fault(
        "a batch that cannot be shared equally is accepted",
        "commands/train.py",
        "if config.train.batch_size % processes:",
        "if False:",
        "tests/test_launch.py::test_a_wrong_command_gets_one_sentence_and_writes_nothing",
    ),
    Fault(
        "a run may be continued with other settings",
        "commands/train.py",
        "            check_same_settings(run, experiment, config)\n            if run.state()",
        "            if run.state()",
        "tests/test_launch.py::test_the_same_command_continues_and_other_settings_are_refused",
    ),
    Fault(
        "Ctrl-C ends one run of a sweep, and the next begins",
        "commands/sweep.py",
        "if codes[-1] == 130:",
        "if False:",
        "tests/jobs/test_sweep.py::test_ctrl_c_ends_the_whole_sweep",
    ),
    Fault(
        "a failed run of a sweep goes unnoticed",
        "commands/sweep.py",
        "return max(codes)",
        "return codes[-1]",
        "tests/jobs/test_sweep.py::test_a_sweep_goes_on_after_a_failed_run_and_says_in_the_end_that_one_has_failed",
    ),
    Fault(
        "a job of several processes always ends well",
        "slurm/local.py",
        "return failure or Outcome(max(codes.values()))",
        "return Outcome(0)",
        "tests/jobs/test_parallel.py::test_a_failing_process_ends_the_others",
    ),
    Fault(
        "SIGTERM is not passed on to the processes of a job",
        "slurm/signals.py",
        "SAVE = (signal.SIGINT, signal.SIGTERM,",
        "SAVE = (signal.SIGINT,",
        "tests/jobs/test_cancel.py::test_a_running_run_is_cancelled_with_a_last_checkpoint[2]",
    ),
    Fault(
        "processes outlive their parent",
        "slurm/worker.py",
        "    os.kill(os.getpid(), signal.SIGTERM)\n",
        "",
        "tests/jobs/test_overview.py::test_the_parent_of_several_processes_dies_and_so_do_they",
    ),
    Fault(
        "a job that was killed in its shell was not killed",
        "slurm/queue.py",
        "signal.Signals(number or code - 128).name",
        "signal.Signals(number).name",
        "tests/slurm/test_words.py::test_squeue",
    ),
    Fault(
        "a site's notice that names a job passes for the answer of sbatch",
        "slurm/queue.py",
        r'r"^(?:Submitted batch job )?(\d+)(?:;\S+| on cluster \S+)?\s*$"',
        r'r"job (\d+)"',
        "tests/slurm/test_words.py::test_sbatch",
    ),
    Fault(
        "a profile may have keys that nobody reads",
        "slurm/profile.py",
        "if key not in hints:",
        "if False:",
        "tests/slurm/test_profile.py::test_a_wrong_key_or_value_is_named",
    ),
    Fault(
        "a job of several nodes may leave GPUs idle",
        "slurm/submit.py",
        "if gpus % gpus_per_node:",
        "if False:",
        "tests/slurm/test_profile.py::test_nodes_must_be_filled",
    ),
    # What only a real Slurm shows.
    Fault(
        "a job is not queued again when it is told to save",
        "slurm/task.py",
        "        job_id = requeue()\n        self.came_back",
        "        job_id = None\n        self.came_back",
        "tests/slurm/test_survival.py::test_preemption_by_the_high_partition",
        slurm=True,
    ),
    Fault(
        "a preemption counts as a job that gets nowhere",
        "jobs/train/recorder.py",
        "if requeue.had_its_time() else {}",
        "",
        "tests/jobs/test_stop.py::test_a_job_that_gets_nowhere_is_queued_again_unless_it_has_had_two_whole_time_limits",
    ),
    Fault(
        "a job forbids to be queued again",
        "slurm/submit.py",
        '{"requeue": True,',
        '{"no-requeue": True,',
        "tests/slurm/test_survival.py::test_scontrol_requeue",
        slurm=True,
    ),
    Fault(
        "one failed task leaves the others waiting for it",
        "slurm/submit.py",
        '"--kill-on-bad-exit=1"',
        '"--kill-on-bad-exit=0"',
        "tests/slurm/test_task.py::test_a_task_that_fails_ends_the_others",
        slurm=True,
    ),
    Fault(
        "samples are put together before they are drawn",
        "slurm/place.py",
        'after = ":".join(job_ids) if job_ids else None',
        "after = None",
        "tests/slurm/test_arrays.py::test_sampling_through_slurm_writes_the_same_bytes_as_here",
        slurm=True,
    ),
    Fault(
        "a job gets the code that its run began with, whatever pickled the job",
        "jobs/storage/provenance.py",
        "    return first if not first.exists() or _digest(first) == today else run / f",
        "    return first if first else run / f",
        "tests/slurm/test_old_runs.py::test_a_run_of_an_earlier_version",
        slurm=True,
    ),
]


def written(fault: Fault) -> str:
    """The file with the fault in it; raises ValueError where the text that it replaces is not there once."""
    text = (ROOT / fault.file).read_text()
    if (found := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.name!r}: {fault.file} must hold {fault.old!r} once; it does {found} times")
    return text.replace(fault.old, fault.new)


@contextmanager
def copy() -> Iterator[Path]:
    """The checkout as it is, in a folder of its own."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
        for name in names:
            if name and (ROOT / name).is_file():  # else it has been deleted
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        yield Path(folder)


def run(tests: Sequence[str], where: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Runs the tests in a copy, whose code all processes import, and ends whatever they leave behind."""
    mark = uuid.uuid4().hex
    env = {"MNIST_ROOT": str(ROOT / "data"), "OMP_NUM_THREADS": "1", **os.environ}
    env |= {"PYTHONPATH": str(where), "FAULT": mark, "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "-rfE", "-m", "", "-p", "no:cacheprovider", *options, *tests]
    try:
        return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    finally:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"FAULT={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)


def try_out(fault: Fault) -> bool:
    """Whether the fault's test fails with it; says how."""
    started = time.monotonic()
    with copy() as where:
        (where / fault.file).write_text(written(fault))
        ended = run([fault.test], where, "-x")
    caught = ended.returncode == 1  # others mean that no test has run
    seconds = f"{time.monotonic() - started:.0f} s"
    print(f"{'caught' if caught else 'NOT CAUGHT':<11}{seconds:>6}  {fault.name}\n{'':19}{last_words(ended.stdout)[0]}")
    sys.stdout.flush()
    return caught


def last_words(out: str) -> list[str]:
    """What pytest says of each failure, in one line; without a failure its last line."""
    lines = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))] or out.splitlines()[-1:] or [""]
    return [line.replace("tests/", "", 1)[:160] for line in lines]


def pass_without(faults: Sequence[Fault], jobs: int) -> bool:
    """Whether the tests pass where the code is as it is; says which do not."""
    with copy() as where:
        tests = list(dict.fromkeys(fault.test for fault in faults))
        ended = run(tests, where, *(["--numprocesses", str(jobs), "--dist", "worksteal"] if jobs > 1 else []))
    print("Without a fault:", *last_words(ended.stdout), sep="\n  ", flush=True)
    return ended.returncode == 0


def table(faults: Sequence[Fault]) -> str:
    """The faults in Markdown."""
    rows = [f"| {fault.name} | `{fault.file}` | `{fault.test.removeprefix('tests/')}` |" for fault in faults]
    return "\n".join(["| fault | in | test that fails, below `tests/` |", "|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only faults whose name or file has one of them")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--slurm", action="store_true", help="those too whose tests start a Slurm, one at a time")
    parser.add_argument("--table", action="store_true", help="print the list and run nothing")
    asked = parser.parse_args()
    chosen = [f for f in FAULTS if not asked.words or any(word in f.name or word in f.file for word in asked.words)]
    if asked.table:
        print(table(chosen))
        return 0
    for fault in chosen:
        written(fault)
    here, there = ([f for f in chosen if f.slurm == slurm] for slurm in (False, True))
    good = not here or pass_without(here, asked.jobs)
    with ThreadPoolExecutor(asked.jobs) as pool:
        caught = dict(zip(here, pool.map(try_out, here), strict=True))
    if asked.slurm and there:
        good &= pass_without(there, 1)
        caught |= {fault: try_out(fault) for fault in there}
    print()
    for fault, is_caught in caught.items():
        print(f"{'caught' if is_caught else 'NOT CAUGHT':<11}{fault.name:<68}{fault.file}")
    print(f"{sum(caught.values())} of {len(caught)} faults are caught.")
    return 0 if good and all(caught.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

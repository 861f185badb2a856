"""Starts launch.py in the time that a fork takes: `python -m tests.warm FD` imports torch once, then forks on request.

Importing torch and what comes with it takes seconds, and hundreds of tests start a command that is about something
else. A command that is forked is a process of its own like any other: session, signals, folder, environment, streams.
Loaded before it began are the libraries, and those modules of the project that draw nothing, which were imported with
the same `OURS_READ`. The processes that it shares its work with (`slurm.local`), and the commands that a drill starts,
are forked in the same way, and import the project's modules anew. What a test wants to see of starting, or of variables
that libraries read when they are loaded, needs a plain start (`tests.launching.start(plain=True)`).
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    *("torch", "torch.distributed", "torch._dynamo.repro.after_dynamo", "torch._inductor.compile_fx"),
    *("accelerate", "denoising_diffusion_pytorch", "safetensors.torch", "torchvision"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.stats", "scipy.integrate"),
    *("PIL.Image", "tqdm", "tyro", "typeguard"),
)
OURS = ("commands", "diffusion", "jobs", "slurm", "tests")
COMMANDS = (
    *("commands.train", "commands.sample", "commands.evaluate", "commands.watch"),
    *("jobs.train.job", "jobs.train.loop", "jobs.sample.job", "jobs.evaluate.job", "slurm.local"),
)
"""What commands import; figures are not among it, because a test may leave out the plotting library."""
NO_MATPLOTLIB = ROOT / "tests" / "no_figures"
"""Where Python finds no plotting library."""
EARLY = ("PYTHON", "OMP_", "MKL_", "MPL", "LD_", "TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "CUDA")
"""Variables that begin so are read when a process or a library begins: too early for one that is forked."""
THREADS, COMPILE_THREADS = "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"
"""Two of them that a forked process can make up for."""
LATE = (THREADS, COMPILE_THREADS, "TORCHINDUCTOR_CACHE_DIR")
"""Those, and one that is read when it is used."""
OURS_READ = ("MNIST_ROOT", "FASHION_MNIST_ROOT")
"""Variables that the project reads when it is imported: a command with others imports it anew."""


def searched_first(folder: Path) -> str:
    """$PYTHONPATH for a process that looks into the folder first, then where we do: libraries may lie there."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


class Forked:
    """A process that has been forked, with what tests use of `subprocess.Popen`."""

    def __init__(self, warm: "Warm", pid: int, stdout: IO[str], stderr: IO[str]) -> None:
        self._warm, self.pid = warm, pid
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._warm.exit_code(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._warm.exit_code(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("launch.py", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it prints until all who hold its streams have closed them."""
        deadline = None if timeout is None else time.monotonic() + timeout
        found = ["", ""]

        def read(i: int, stream: IO[str]) -> None:
            with stream:
                found[i] = stream.read()

        readers = [
            threading.Thread(target=read, args=pair, daemon=True) for pair in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("launch.py", timeout or 0)
        self.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """The process that forks, seen from the tests."""

    def __init__(self) -> None:
        """Is served by one that all processes share among which pytest-xdist divides the tests; the first starts it."""
        address = f"\0warm-{os.environ.get('PYTEST_XDIST_TESTRUNUID') or uuid.uuid4().hex}"
        self._codes: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        while (connected := self._connect(address)) is None:
            if self._process is not None:
                raise RuntimeError("the process that forks has died; it has printed why")
            time.sleep(0.01)
        self._socket = connected
        atexit.register(self._close)

    def _connect(self, address: str) -> socket.socket | None:
        """Starts it if nobody has; None while one that another has started does not listen yet, or is ending."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            try:
                listening.bind(address)
            except OSError:
                pass
            else:
                listening.listen()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.warm", str(listening.fileno())],
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.PIPE,
                    pass_fds=[listening.fileno()],
                    start_new_session=True,
                )
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with contextlib.suppress(ConnectionError):
            connected.connect(address)
            if connected.recv(100):
                return connected
        connected.close()
        return None

    def _close(self) -> None:
        self._socket.close()  # at whose end ends what serves this process
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=10)  # closes its stdin, at whose end it ends

    def start(self, command: list[str], cwd: Path, env: dict[str, str]) -> Forked:
        """Forks what Python would run for the command: `FILE ARGUMENTS` or `-m MODULE ARGUMENTS`."""
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        request = json.dumps({"command": command, "cwd": str(cwd), "env": env}).encode()
        socket.send_fds(self._socket, [request], [their_out, their_err])
        os.close(their_out)
        os.close(their_err)
        while "pid" not in (answer := self._receive(None) or {}):
            pass
        self._codes.pop(answer["pid"], None)  # of an older process with this id
        return Forked(self, answer["pid"], open(out), open(err))

    def exit_code(self, pid: int, timeout_s: float | None) -> int | None:
        """How the process has ended, within the time; None if it has not."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while pid not in self._codes:
            left = None if deadline is None else max(0, deadline - time.monotonic())
            if self._receive(left) is None:
                return None
        return self._codes[pid]

    def _receive(self, timeout_s: float | None) -> dict[str, Any] | None:
        """The next thing that it says, None if it says nothing in time; ends of processes are kept."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return None
        message = self._socket.recv(1000)
        if not message:
            raise RuntimeError("the process that forks has died; it has printed why")
        answer: dict[str, Any] = json.loads(message)
        if "ended" in answer:
            self._codes[answer["ended"]] = answer["code"]
        return answer


def main() -> int:
    """Loads what commands import, and forks itself for each process that connects; ends with the first of them."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    for library in (*LIBRARIES, *COMMANDS):
        __import__(library)
    gc.freeze()  # else the first collection in each child would copy all of it
    gc.enable()
    for finalizer in [*weakref.finalize._registry]:  # type: ignore[attr-defined]
        finalizer.atexit = False  # else each child would take torch's operators apart at its end, and copy their memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:
            return 0
        tests, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            tests.send(b"ready")
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            return serve(tests)
        tests.close()


def serve(tests: socket.socket) -> int:
    """Forks until the tests are gone; in a process that has been forked, runs launch.py."""
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([tests, awake], [], [])
        if awake in ready:
            os.read(awake, 1000)
            _tell_ends(tests)
        if tests in ready:
            request, fds, _, _ = socket.recv_fds(tests, 1_000_000, 2)
            if not request:
                return 0
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for fd in (awake, wake):
                    os.close(fd)
                tests.close()
                _run(json.loads(request), fds)
            for fd in fds:
                os.close(fd)
            tests.send(json.dumps({"pid": pid}).encode())


def _tell_ends(tests: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        tests.send(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _run(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Becomes the command, and ends with its exit code."""
    os.setsid()
    for fd, number in zip(fds, (1, 2), strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    Path("/proc/self/comm").write_text(title(request["env"]))
    subprocess.Popen = Forking  # type: ignore[misc]
    _become(request["command"], request["env"])


def title(env: dict[str, str]) -> str:
    """What /proc calls a forked process, and all that are forked from it, whose environment it does not show."""
    return env["LAUNCHED_AS"][:15]


class Forking(subprocess.Popen[Any]):
    """Forks this process, which has loaded torch, where a command starts `launch.py` or one of a job's processes."""

    def __init__(self, args: Any, **options: Any) -> None:
        if (command := forkable(args)) is not None:
            env, keep = {**(options.get("env") or os.environ)}, options.get("pass_fds", ())
            options["preexec_fn"] = lambda: _fork_of(command, env, keep)
        super().__init__(args, **options)


def forkable(args: Any) -> list[str] | None:
    """What Python is told to run, if it need not start for that; None if it must."""
    command = [*map(str, args)] if isinstance(args, (list, tuple)) else []
    if command[:1] != [sys.executable]:
        return None
    command = [word for word in command[1:] if word not in ("-u", "-P")]
    return command if command[:1] == [str(ROOT / "launch.py")] or command == ["-m", "slurm.worker"] else None


def _fork_of(command: list[str], env: dict[str, str], keep: Collection[int]) -> NoReturn:
    """In a child of `subprocess`, whose streams, session and folder are made: does not return, so nothing is executed.

    Closes what a new program would not have inherited; `subprocess` waits for the end of one of those files.
    """
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):  # the one that has listed them
                os.close(fd)
    _forget_ours()
    _become(command, env)


def _forget_ours() -> None:
    """The project's modules are imported anew."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in OURS:
            del sys.modules[name]


def _slow(module: str, name: str, seconds: str) -> None:
    """Lets a function wait before each of its calls."""
    where = importlib.import_module(module)
    function = getattr(where, name)

    def slowed(*arguments: Any, **options: Any) -> Any:
        time.sleep(float(seconds))
        return function(*arguments, **options)

    setattr(where, name, slowed)


def _become(command: list[str], env: dict[str, str]) -> NoReturn:
    """Runs the command, and ends with its exit code."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if any(env.get(variable) != os.environ.get(variable) for variable in OURS_READ):
        _forget_ours()
    os.environ.clear()
    os.environ.update(env)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r", closefd=False)), "utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", line_buffering=True)
    if "LAUNCHED_WITHOUT" in env:
        sys.modules[env["LAUNCHED_WITHOUT"]] = None  # type: ignore[assignment]
        # The processes beside it, which follow a run, find none either.
        os.environ["PYTHONPATH"] = searched_first(NO_MATPLOTLIB)
    if "LAUNCHED_SLOWED" in env:
        _slow(*env["LAUNCHED_SLOWED"].split(":"))
    if env.get(THREADS, "1") != "1":
        importlib.import_module("torch").set_num_threads(int(env[THREADS]))
    importlib.import_module("torch._inductor.config").compile_threads = int(env.get(COMPILE_THREADS, "1"))
    sys.argv = command if command[0] != "-m" else command[1:]
    code = 0
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, but for taking libraries apart, which takes a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())

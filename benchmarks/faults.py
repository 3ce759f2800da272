"""The outcome of runs that are killed, stopped or hit a fault.

    python benchmarks/faults.py [--kills 30] [--process-kills 10] [--soak MINUTES]

Every case is a run of the command in a separate process, on a tiny random GPT-2. If possible, the
run is resumed, and its lens is compared byte by byte with that of a run without faults. Cases that
fill a disk need permission to mount one (root on Linux) and are skipped without it.
"""

import argparse
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tunedlens import builtin
from tunedlens.cli import train_command
from tunedlens.fit import PreconditionedMuon
from tunedlens.model import FrozenModel
from tunedlens.training import loop
from tunedlens.training.lock import LOCK

STEPS, UNBROKEN, UNBROKEN_TWO = 40, "unbroken", "unbroken-two"
SURVIVOR_SECONDS = 60
"""A process counts as hanging if it does not end within this time after the other was killed."""
Setup = Callable[[], None]


class Bench:
    """A folder with a model, a text and the lens of a run without faults."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.manual_seed(0)
        sizes = {"vocab_size": 4096, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
        config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
        GPT2LMHeadModel(config).save_pretrained(root / "model")
        AutoTokenizer.from_pretrained(builtin.FOLDER).save_pretrained(root / "model")
        rows = [f'{{"text": "row {i}: {i * i} is the square of {i}"}}' for i in range(3000)]
        (root / "rows.jsonl").write_text("\n".join(rows))
        self.flags = [
            *("--model", str(root / "model"), "--dataset", str(root / "rows.jsonl")),
            *("--streaming", "--seq-len", "16", "--batch-size", "4", "--device", "cpu"),
            *("--tokens", str(64 * STEPS), "--init-tokens", "640", "--evaluate-tokens", "60"),
            *("--precision", "fp32", "--kernel", "products"),
        ]
        start = time.monotonic()
        status, _ = self.finish(self.start(UNBROKEN))
        self.seconds = time.monotonic() - start
        assert status == 0, "the unbroken run failed"

    def start(self, name: str, setup: Setup | None = None, *more: str, stdout: int = 0) -> int:
        """Start a run in a separate process; returns its process id.

        Args:
            setup: called in the process before the run.
            more: further flags, or `--resume` and a folder instead of `--output`.
            stdout: a descriptor to print to instead of the log.
        """
        pid = os.fork()
        if pid:
            return pid
        log = os.open(self.root / f"{pid or os.getpid()}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(stdout or log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
        try:
            if setup:
                setup()
            output = [] if "--resume" in more else ["--output", str(self.root / name)]
            flags = more if "--resume" in more else (*self.flags, *more)
            os._exit(train_command([*flags, *output]))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(99)

    def start_two(self, name: str, setups: dict[int, Setup] | None = None, *more: str) -> list[int]:
        """Start a run in two processes, as a launcher does; returns their process ids by rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def join(rank: int) -> None:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in (ranks | where).items()})
            if setups and rank in setups:
                setups[rank]()

        return [self.start(name, lambda r=rank: join(r), *more) for rank in range(2)]

    def finish(self, pid: int) -> tuple[int, list[str]]:
        """The status of a process when it ends, and the lines that it printed."""
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status, (self.root / f"{pid}.log").read_text().splitlines()

    def resume(self, name: str, *, by_two: bool = False) -> str:
        """Resume a run, or start it if there is nothing to resume; returns the outcome."""
        folder = self.root / name
        if not (folder / "README.md").exists():
            flags = ["--resume", str(folder)] if list(folder.glob("state/*.safetensors")) else []
            start = self.start_two if by_two else lambda *given: [self.start(*given)]
            for status, lines in map(self.finish, start(name, None, *flags)):
                if status:
                    return f"NOT RESUMED: {lines[-1]}"
        return self.compare(folder, UNBROKEN_TWO if by_two else UNBROKEN)

    def compare(self, folder: Path, unbroken: str = UNBROKEN) -> str:
        """Compare a lens byte by byte with that of the run without faults."""
        lenses = [(self.root / run / "lens.safetensors").read_bytes() for run in (folder, unbroken)]
        return "identical" if lenses[0] == lenses[1] else "another lens"


def save_in_every_step() -> None:
    loop._SECONDS_PER_SAVE = -1


def at_step(number: int, act: Setup) -> None:
    """Call a function at the start of a step, counted from 1."""
    original, taken = PreconditionedMuon.step, []

    def step(self: PreconditionedMuon, *args: object) -> None:
        taken.append(1)
        if len(taken) == number:
            act()
        original(self, *args)

    PreconditionedMuon.step = step


def die_within_a_write(number: int, half: bool) -> None:
    """Die in a write: when half of a file is written, or before it gets its name."""
    save_in_every_step()
    name = "write_bytes" if half else "replace"
    original, calls = getattr(Path, name), []

    def call(self: Path, argument: bytes) -> object:
        calls.append(1)
        if len(calls) == number:
            if half:
                original(self, argument[: len(argument) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, argument)

    setattr(Path, name, call)


def kills(bench: Bench, count: int) -> dict[str, int]:
    """Kill runs at random moments, a third of them within a write, and resume each."""
    rng, outcomes = random.Random(0), {}
    for index in range(count):
        name = f"kill-{index}"
        if index % 3:
            pid = bench.start(name, save_in_every_step)
            time.sleep(rng.uniform(0, bench.seconds))
            os.kill(pid, signal.SIGKILL)
        else:
            number, half = rng.randrange(1, STEPS), rng.random() < 0.5
            pid = bench.start(name, lambda n=number, h=half: die_within_a_write(n, h))
        bench.finish(pid)
        outcome = bench.resume(name)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(bench.root / name)
    return outcomes


def process_kills(bench: Bench, count: int) -> Iterator[tuple[str, str, float]]:
    """Kill one of two processes, a third of them within a write, and resume both.

    Yields:
        The outcome of the other process, the outcome of the run after it was resumed, and the
        seconds that the other process took to end.
    """
    begin = time.monotonic()
    assert all(status == 0 for status, _ in map(bench.finish, bench.start_two(UNBROKEN_TWO)))
    seconds, rng = time.monotonic() - begin, random.Random(1)
    for index in range(count):
        name = f"process-kill-{index}"
        if index % 3:
            victim = rng.randrange(2)
            pids = bench.start_two(name, dict.fromkeys(range(2), save_in_every_step))
            while not (bench.root / name / LOCK).exists():  # until they are connected
                time.sleep(0.01)
            time.sleep(rng.uniform(0, seconds))
            os.kill(pids[victim], signal.SIGKILL)
        else:
            victim, number, half = 0, rng.randrange(1, STEPS), rng.random() < 0.5
            die = {0: lambda n=number, h=half: die_within_a_write(n, h), 1: save_in_every_step}
            pids = bench.start_two(name, die)
        status, _ = bench.finish(pids[victim])
        begin, survivor = time.monotonic(), pids[1 - victim]
        while not has_ended(survivor) and time.monotonic() - begin < SURVIVOR_SECONDS:
            time.sleep(0.01)
        waited = time.monotonic() - begin
        if not has_ended(survivor):
            os.kill(survivor, signal.SIGKILL)
        other, lines = bench.finish(survivor)
        if status == 0:
            ended = "the run was finished"
        else:
            ended = f"status {other}: {lines[-1]}" if other >= 0 else "HANGS"
        yield ended.replace(str(bench.root / name), "…"), bench.resume(name, by_two=True), waited
        shutil.rmtree(bench.root / name)


def has_ended(pid: int) -> bool:
    """Whether a child process has ended; its status can still be read."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextmanager
def small_disk(folder: Path):
    """A file system of one megabyte."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    """Leave no room on a disk."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def poison_states() -> None:
    """Make the states of one block NaN from layer 1 on, in step 5."""
    original, now = FrozenModel.states_at, []
    at_step(4, lambda: now.append(None))

    def states_at(self: FrozenModel, points: list, ids: torch.Tensor, mask: object = None) -> list:
        states = original(self, points, ids, mask)
        if now and now[0] is None:
            now[0] = ids[2].tolist()
        for row in range(len(ids)):
            if now and ids[row].tolist() == now[0]:
                for point, state in zip(points, states, strict=True):
                    if point.layer >= 1:
                        state[row] = torch.nan
        return states

    FrozenModel.states_at = states_at


def lose_the_reader() -> None:
    """Make reading the text fail after a few runs of documents."""
    original = datasets.IterableDataset.iter

    def read(self: datasets.IterableDataset, *args: object):
        for index, rows in enumerate(original(self, *args)):
            if index == 10:
                raise OSError("connection reset by peer")
            yield rows

    datasets.IterableDataset.iter = read


def no_wandb() -> None:
    """Point Weights & Biases at a port where nothing listens."""
    os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    os.environ.pop("WANDB_MODE", None)


def head() -> int:
    """A pipe whose reader has closed it."""
    read, write = os.pipe()
    os.close(read)
    return write


def faults(bench: Bench) -> list[tuple[str, str, str, str]]:
    """The name, the exit status, the last message and the lens of every case."""
    rows = []

    def case(
        name: str,
        setup: Setup | None = None,
        *more: str,
        stdout: int = 0,
        folder: str = "",
    ) -> None:
        folder = folder or f"case-{len(rows)}"
        status, lines = bench.finish(bench.start(folder, setup, *more, stdout=stdout))
        telling = [line for line in lines if re.search("left out|kept offline|ends with", line)]
        message = (telling or lines or [""])[-1]
        if spare := re.search("the lens is in (.*)", message):
            lens = "there: " + bench.compare(Path(spare[1]))
            shutil.rmtree(spare[1])
        elif status == 2 and not (bench.root / folder).exists():
            lens = "the run did not begin"
        else:
            lens = bench.resume(folder)
        rows.append((name, str(status), message.replace(str(bench.root), "…"), lens))

    for kind in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, kind)
        case(f"{kind} in a step", lambda n=number: at_step(20, lambda: os.kill(os.getpid(), n)))
    case("`| head`", None, stdout=head())
    case("reader raises", lose_the_reader)
    case("wandb refuses", no_wandb, "--wandb")
    case("NaN at step 5 layer 1", poison_states)
    case("--lr 1e30", None, "--lr", "1e30")
    try:
        with small_disk(bench.root / "disk") as disk:
            case("disk full", lambda: at_step(5, lambda: fill(disk)), folder="disk/run")
        with small_disk(bench.root / "disk") as disk:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            case("folder is read-only", folder="disk/run")
    except (OSError, subprocess.CalledProcessError) as error:
        rows.append(("disk full, folder is read-only", "skipped", str(error), ""))
    return rows


def soak(bench: Bench, minutes: float) -> None:
    """Print memory and speed of a long run, in the second and in the last fifth of its time."""
    steps = bench.root / "steps"

    def count_steps() -> None:
        original, file = PreconditionedMuon.step, steps.open("ab", buffering=0)

        def step(self: PreconditionedMuon, *args: object) -> None:
            original(self, *args)
            file.write(b".")

        PreconditionedMuon.step = step

    pid = bench.start("soak", count_steps, "--no-streaming", "--tokens", "1e12")
    samples, end = [], time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        time.sleep(1)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        done = steps.stat().st_size if steps.exists() else 0
        samples.append((seconds, done, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))
    os.kill(pid, signal.SIGTERM)
    bench.finish(pid)
    print("| fifth of the time | resident memory, MB | steps per second of CPU time |")
    print("|---|---:|---:|")
    fifth = len(samples) // 5
    for name, part in {"second": samples[fifth : 2 * fifth], "last": samples[-fifth:]}.items():
        (first, before, _), (last, after, memory) = part[0], part[-1]
        print(f"| {name} | {memory:.1f} | {(after - before) / (last - first):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument(
        "--process-kills", type=int, default=10, help="kills of one of two processes"
    )
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="only measure a run of this length"
    )
    flags = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        if flags.soak:
            return soak(bench, flags.soak)
        print("| fault | status | last message | lens |\n|---|---|---|---|")
        for row in faults(bench):
            print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |", flush=True)
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in kills(bench, flags.kills).items())
        print(f"| {flags.kills} × `kill -9` | -9 | | after `--resume`: {outcomes} |", flush=True)
        for ended, lens, waited in process_kills(bench, flags.process_kills):
            name = f"`kill -9` of one of two processes; the other ends after {waited:.2f} s"
            print(f"| {name} | -9 | {ended} | after `--resume`: {lens} |", flush=True)


if __name__ == "__main__":
    main()

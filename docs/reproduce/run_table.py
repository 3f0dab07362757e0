"""Runs the table of a plan: what the results lack, several runs at a time; then prints the table.

python docs/reproduce/run_table.py docs/reproduce/shapes.txt --parallel 2 --curves curves.png
python docs/reproduce/run_table.py docs/reproduce/shapes.txt --only 's0$' --minutes 60
python docs/reproduce/run_table.py docs/reproduce/voc_animals.txt --set WEIGHTS=mobilenet_v2.pth

A plan is a text file:

    # a comment
    BASE = --dataset shapes --iters 2400        a text that later lines use as $BASE
    speed-s0: python speed.py $BASE --seed 0    a run: its name and its command

Runs whose names differ by -s0, -s1, ... are the seeds of a row. $RUNS is the folder of the plan's
runs; a run whose command names a file of another run of the plan waits until that one has finished.

runs/<plan>/<name>/ is the folder of a run, <name>.txt beside it has its output. Flags, evaluations,
minutes and machine of each finished run go into the results at once. Ctrl-C, SIGTERM, and the end
of --minutes stop the runs, which save. The same command then goes on where they stopped.

The exit status is 1 if a run failed, and 128 + the signal's number after a signal.
"""

import argparse
import ctypes
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import table
from table import REPO, TableError

PROGRESS = 60  # seconds between two progress lines
GRACE = 30  # seconds before the end of --minutes at which runs are stopped, to save


@dataclass
class Run:
    """A run of the plan."""

    name: str
    command: str  # as the plan has it, without --set and --runs
    words: list[str]  # what is started
    folder: str  # its folder as commands name it, in REPO unless absolute
    process: subprocess.Popen | None = None
    began: float = 0.0
    output_start: int = 0  # length of the output file when it began

    @property
    def out(self) -> Path:
        """Its folder."""
        return REPO / self.folder

    @property
    def output(self) -> Path:
        """The file of what it prints."""
        return self.out.with_name(self.name + ".txt")

    @property
    def method(self) -> tuple[str, bool]:
        """What runs of about the same speed share."""
        return method_of(self.command)

    def iters(self) -> int | None:
        """Its number of steps, if that is known."""
        given = [b for a, b in itertools.pairwise(self.words) if a == "--iters"]
        if given:
            return int(given[-1])
        try:
            return json.loads((self.out / "args.json").read_text())["iters"]
        except (OSError, ValueError, KeyError):
            return None

    def step(self) -> int:
        """The last step in its log; 0 if there is none."""
        try:
            lines = (self.out / "log.jsonl").read_text().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return json.loads(line)["step"]
            except (ValueError, KeyError):  # it is being written
                continue
        return 0

    def progress(self) -> str:
        """For example: speed-s0 1200/4000."""
        return f"{self.name} {self.step()}/{self.iters() or '?'}"

    def seconds(self) -> float:
        """How long it ran, all parts together."""
        parts = re.findall(r"^run_table: ([\d.]+) s", self.output.read_text(errors="replace"), re.M)
        return sum(map(float, parts))

    def last_line(self) -> str:
        """The last line that it printed since it began."""
        text = self.output.read_bytes()[self.output_start :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


def method_of(command: str) -> tuple[str, bool]:
    """(script, whether it is labelled-only) of a command."""
    words = command.split()
    script = next((word for word in words if word.endswith(".py")), "")
    return script, "--labeled-only" in words


# ---------------------------------------------------------------------------------------- plan


def read_plan(path: Path, folder: Path, changes: dict[str, str]) -> list[Run]:
    """The runs of a plan file, in its order; `changes` are definitions that replace the plan's."""
    try:
        text = path.read_text()
    except OSError as e:
        raise TableError(f"{path}: cannot be read ({e.strerror}); give a plan") from None
    own = {"RUNS": f"runs/{path.stem}"}  # definitions as the plan has them
    names = {"RUNS": shlex.quote(str(folder))}  # and with the changes
    runs = {}
    for number, line in enumerate(text.splitlines(), 1):
        where, line = f"{path}:{number}", line.strip()
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"([A-Z_]+) *= *(.*)", line):
            name, value = match.groups()
            own[name] = expand(value, own, where)
            names[name] = expand(changes.get(name, value), names, where)
        elif match := re.fullmatch(r"([\w.+-]+): +(.*)", line):
            name, command = match.groups()
            if name in runs:
                raise TableError(f"{where}: {name} is there twice; rename one")
            words = start_words(expand(command, names, where), where)
            plain, out = expand(command, own, where), str(folder / name)
            runs[name] = Run(name, plain, [*words, "--out", out], out)
        else:
            raise TableError(f"{where}: neither `name: command` nor `NAME = text`")
    for name in changes:
        if name not in names or name == "RUNS":
            raise TableError(f"--set {name}: {path} has no line `{name} = ...`")
    return list(runs.values())


def expand(text: str, names: dict[str, str], where: str) -> str:
    """The text with the value of NAME for each $NAME."""

    def value(match: re.Match) -> str:
        if match[1] not in names:
            raise TableError(f"{where}: {match[0]} is not defined above")
        return names[match[1]]

    return re.sub(r"\$([A-Z_]+)", value, text)


def start_words(command: str, where: str) -> list[str]:
    """The words that start a command with this Python."""
    try:
        words = shlex.split(command)
    except ValueError as e:
        raise TableError(f"{where}: {e}") from None
    if words and words[0] == "python":
        return [sys.executable, *words[1:]]
    if words and words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    raise TableError(f"{where}: a command begins with python or torchrun")


def machine() -> str:
    """The name of the GPU, else of the CPU."""
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if names.strip():
            return names.splitlines()[0].strip()
    try:
        info = Path("/proc/cpuinfo").read_text()
        return re.search(r"^model name\s*: (.*)$", info, re.M)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------- runs


class Runner:
    """The runs of a plan on their way: waiting, running, finished or failed."""

    def __init__(self, plan: list[Run], only: str, opts: argparse.Namespace) -> None:
        """Decides what is to be run."""
        self.plan, self.results, self.parallel = plan, opts.results, opts.parallel
        self.records = table.load(opts.results)
        self.failed: dict[str, str] = {}
        self.running: list[Run] = []
        chosen = [run for run in plan if re.search(only, run.name)]
        self.waiting = [run for run in chosen if run.name not in self.records]
        for run in reversed(plan):  # a finished run whose file is needed and gone is run again
            if run in chosen and run not in self.waiting:
                needs = [file for other in self.waiting for file in self.files_of(run, other)]
                if not all(file.exists() for file in needs):
                    self.waiting.append(run)
        self.waiting.sort(key=plan.index)
        for run in chosen:
            held = self.records.get(run.name, {}).get("command", run.command)
            if run not in self.waiting and held != run.command:
                print(f"{run.name}: the results have it with another command: {held}", flush=True)

        self.clock = time.monotonic()
        self.deadline = self.clock + 60 * opts.minutes if opts.minutes else float("inf")
        self.grace = min(GRACE, 6 * opts.minutes) if opts.minutes else 0
        self.signals: list[int] = []  # that came and were not passed on yet
        self.signal = 0
        self.stopping = False
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // self.parallel))
        self.machine, self.torch = machine(), importlib.metadata.version("torch")

    def say(self, line: str) -> None:
        """Prints a line with the minutes since the start."""
        print(f"[{(time.monotonic() - self.clock) / 60:6.1f} min] {line}", flush=True)

    def files_of(self, run: Run, other: Run) -> list[Path]:
        """The files of `run` that the command of `other` names."""
        if run is other:
            return []
        return [REPO / word for word in other.words if word.startswith(f"{run.folder}/")]

    def blockers(self, run: Run) -> list[str]:
        """The runs that have to finish before `run`, and have not."""
        pending = [*self.waiting, *self.running, *(r for r in self.plan if r.name in self.failed)]
        return [other.name for other in pending if self.files_of(other, run)]

    def seconds_left(self, run: Run) -> float | None:
        """How long it would take, by finished runs of its row here, else of its script."""
        here = [r for r in self.records.values() if "minutes" in r and "command" in r]
        here = [r for r in here if r["machine"] == self.machine and r["threads"] == self.threads]
        row = [r for r in here if table.row_of(r["run"]) == table.row_of(run.name)]
        like = row or [r for r in here if method_of(r["command"]) == run.method]
        if not like:
            return None
        rates = [60 * r["minutes"] / r["args"]["iters"] for r in like]
        return statistics.mean(rates) * (run.iters() or like[-1]["args"]["iters"])

    def fits(self, run: Run) -> bool:
        """Whether to start it now. One that has saved a part goes on in any case."""
        if (run.out / "latest.pt").exists():
            return True
        left = self.seconds_left(run) or 0
        return time.monotonic() + left <= self.deadline - self.grace

    def go(self) -> None:
        """Runs until nothing is left, or a signal or the end of the minutes."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self.signals.append(number))
        said = time.monotonic()
        while True:
            for run in [run for run in self.running if run.process.poll() is not None]:
                self.finish(run)
            while self.signals:
                self.signal = self.signals.pop(0)
                self.stop(self.signal, f"signal {self.signal}")
            if not self.stopping and time.monotonic() > self.deadline - self.grace:
                self.stop(signal.SIGTERM, "the minutes are over")
            if not self.stopping:
                self.start_some()
            if not self.running:
                return
            if time.monotonic() > self.deadline + GRACE:
                self.stop(signal.SIGKILL, "they do not end")
                self.deadline = float("inf")
            if time.monotonic() > said + PROGRESS:
                said = time.monotonic()
                where = ", ".join(run.progress() for run in self.running)
                self.say(f"running {where}; {len(self.waiting)} wait")
            time.sleep(0.1)

    def stop(self, number: int, why: str) -> None:
        """Starts no more runs, and sends a signal to the running ones."""
        self.stopping = True
        if self.running:
            self.say(f"{why}: stopping {', '.join(run.name for run in self.running)}")
        for run in self.running:
            run.process.send_signal(number)

    def start_some(self) -> None:
        """Starts waiting runs, in the plan's order, while there is room."""
        for run in list(self.waiting):
            if len(self.running) == self.parallel:
                return
            if self.blockers(run) or not self.fits(run):
                continue
            self.waiting.remove(run)
            self.running.append(run)
            run.out.parent.mkdir(parents=True, exist_ok=True)
            if not (run.out / "log.jsonl").exists():
                run.output.unlink(missing_ok=True)
            env = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            with open(run.output, "ab") as file:
                run.output_start, run.began = file.tell(), time.monotonic()
                # a session of its own, so that Ctrl-C in a terminal reaches it once
                run.process = subprocess.Popen(
                    run.words,
                    cwd=REPO,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=end_with_parent if sys.platform == "linux" else None,
                )
            at = f" at step {run.step()}" if run.step() else ""
            self.say(f"{run.name}: started{at}")

    def finish(self, run: Run) -> None:
        """Keeps the result of a run that has ended, or says why there is none."""
        self.running.remove(run)
        status, last = run.process.returncode, run.last_line()
        with open(run.output, "a") as file:
            file.write(f"\nrun_table: {time.monotonic() - run.began:.1f} s, status {status}\n")
        record = table.read_run(run.out) if status == 0 else None
        if record:
            record["command"] = run.command
            record["minutes"] = round(run.seconds() / 60, 2)
            record |= {"machine": self.machine, "threads": self.threads, "torch": self.torch}
            table.save(record, self.results)
            self.records[run.name] = record
            result = f"mIoU {table.last_miou(record):.2f}, {record['minutes']:.1f} minutes"
            self.say(f"{run.name}: {result}; {len(self.waiting)} wait")
        elif self.stopping and status:
            self.waiting.append(run)
            self.say(f"{run.progress()}: stopped ({last})")
        else:
            last = last if status else "no evaluation at its last step"
            self.failed[run.name] = f"exit status {status}: {last}"
            self.say(f"{run.name}: FAILED, {self.failed[run.name]}")

    def report(self) -> None:
        """Says what is left and what failed."""
        for run in sorted(self.waiting, key=self.plan.index):
            why, left = "goes on with the same command", self.seconds_left(run)
            if blockers := self.blockers(run):
                why = f"waits for {', '.join(blockers)}"
            elif left and not self.fits(run):
                why = f"takes about {left / 60:.1f} minutes; {why}"
            print(f"left: {run.progress()}: {why}")
        for run in self.plan:
            if run.name in self.failed:
                print(f"failed: {run.name}: {self.failed[run.name]} ({run.output})")


def end_with_parent() -> None:
    """In a new process on Linux: it gets SIGTERM, and saves, when run_table.py is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def lock(folder: Path):
    """Keeps the folder to this process until it ends, where the system can do so."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "run_table.lock", "w")  # noqa: SIM115 - open until the end
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        raise TableError(f"{folder}: another run_table.py runs this plan; wait for it") from None
    return file


# ------------------------------------------------------------------------------------- command


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("plan", type=Path, help="text file with a run a line")
    p.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time")
    p.add_argument("--minutes", type=float, metavar="M", help="end within this time")
    p.add_argument("--only", default="", metavar="REGEX", help="only runs whose name matches")
    p.add_argument(
        "--set", action="append", default=[], metavar="NAME=TEXT", help="replace a definition"
    )
    p.add_argument("--runs", type=Path, default=Path("runs"), help="holds <plan>/<name>/")
    p.add_argument("--results", type=Path, metavar="JSONL", help="unset: runs/<plan>/results.jsonl")
    p.add_argument("--against", default="labeled", metavar="ROW", help="compare with this row")
    p.add_argument("--classes", action="store_true", help="print the IoU of each class, too")
    p.add_argument("--curves", type=Path, metavar="PNG", help="draw mIoU over steps")
    opts = p.parse_args()
    if opts.parallel < 1 or (opts.minutes is not None and opts.minutes <= 0):
        p.error("--parallel and --minutes are above 0")
    try:
        re.compile(opts.only)
    except re.error as e:
        p.error(f"--only {opts.only}: {e}")
    changes = {}
    for change in opts.set:
        name, equals, text = change.partition("=")
        if not equals:
            p.error(f"--set {change}: give NAME=TEXT")
        changes[name] = text
    if opts.curves:
        table.pyplot()  # it is missed now or after hours
    runs = opts.runs if opts.runs == Path("runs") else opts.runs.resolve()
    folder = runs / opts.plan.stem
    opts.results = opts.results or REPO / folder / "results.jsonl"
    plan = read_plan(opts.plan, folder, changes)
    held = lock(REPO / folder)
    runner = Runner(plan, opts.only, opts)
    runner.say(f"{runner.machine}, torch {runner.torch}, {runner.threads} threads a run")
    runner.say(f"{len(plan)} runs in {opts.plan}, {len(runner.waiting)} to be run")
    runner.go()
    runner.report()
    held.close()
    records = {run.name: runner.records[run.name] for run in plan if run.name in runner.records}
    if records:
        print()
        table.print_table(records, opts.against)
        if opts.classes:
            table.print_classes(records)
        if opts.curves:
            table.draw_curves(records, opts.curves)
    if runner.signal:
        return 128 + runner.signal
    return 1 if runner.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TableError as e:
        sys.exit(f"error: {e}")

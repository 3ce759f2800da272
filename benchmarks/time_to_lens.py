"""Seconds of the whole command, from the shell to the saved lens.

    python benchmarks/time_to_lens.py [flags of train.py]

It times the closed form (the median of three runs) and the default fit (one run).
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"


def seconds(flags: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), "--output", str(Path(folder) / "run"), *flags]
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - start


def main() -> None:
    closed = [seconds(["--fit", "closed-form", *sys.argv[1:]]) for _ in range(3)]
    print("| fit | seconds |\n|---|---:|")
    print(f"| closed form | {statistics.median(closed):.0f} |")
    print(f"| default | {seconds(sys.argv[1:]):.0f} |")


if __name__ == "__main__":
    main()

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from tunedlens.cli.guard import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the setting")
def test_freed_memory_is_used_again_without_page_faults():
    command = [sys.executable, "-c", FAULTS]
    usual, kept = (
        int(subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout)
        for name in ("usual", "kept")
    )
    assert 10 * kept < usual

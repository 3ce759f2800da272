import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from tunedlens.cli.guard import keep_freed_memory

def page_faults():
    for _ in range(3):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = page_faults()
keep_freed_memory()
print(usual, page_faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the setting")
def test_freed_memory_is_used_again_without_page_faults():
    command = [sys.executable, "-c", FAULTS]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usual, kept = map(int, printed.split())
    assert 10 * kept < usual

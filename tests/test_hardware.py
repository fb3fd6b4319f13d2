"""What the hardware is set to."""

import subprocess
import sys

import pytest

# Pages that the system had to provide for tensors of 64 MB, after a few to settle.
PROGRAM = """
import resource, sys, torch
from seg_torch.hardware import reuse_memory
if sys.argv[1] == "reuse":
    reuse_memory()
faults = []
for i in range(60):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[40:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_used_again_without_asking_the_system():
    command = [sys.executable, "-c", PROGRAM]
    usual, reused = (
        int(subprocess.run([*command, how], check=True, stdout=subprocess.PIPE).stdout)
        for how in ("usual", "reuse")
    )
    assert usual > 0, "nothing to gain here"
    assert reused < usual / 10

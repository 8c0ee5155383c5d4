"""The programs in docs/models.md run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import rank_environment

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(("number", "ranks"), [(0, 1), (1, 3)])
def test_the_programs_run(tmp_path, number, ranks):
    script = tmp_path / "program.py"
    script.write_text(BLOCKS[number])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with rank_environment():
        done = subprocess.run(
            [sys.executable, *torchrun, str(script)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 0, done.stderr

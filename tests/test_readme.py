"""The README's code does what the README says."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_torchrun_example_runs_on_three_ranks(tmp_path):
    first_block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert first_block is not None
    script = tmp_path / "my_attention.py"
    script.write_text(first_block.group(1), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "3", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=README.parent,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"rank {rank} holds 512 of 1536 tokens" for rank in range(3)
    ]

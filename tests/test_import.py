"""`import nnscaler_ring` is silent: torch and the standard library, no environment, no CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

REFUSED = (
    "click",
    "flash_attn",
    "flash_attn_interface",
    "matplotlib",
    "nnscaler",
    "pandas",
    "rich",
    "ring_attention_pytorch",
    "transformer_engine",
    "triton",
)

# Run in a fresh interpreter; it prints nothing until the import is over.
REPORT = """
import io, json, os, sys
import torch

refused = set(json.loads(sys.argv[1]))
asked, reads = [], []

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            asked.append(name)
            raise ImportError(name + " must not be imported")

class Environment(dict):
    def _read(self, *names):
        reads.append([str(name) for name in names])
    def __getitem__(self, name): self._read(name); return super().__getitem__(name)
    def get(self, name, default=None): self._read(name); return super().get(name, default)
    def __contains__(self, name): self._read(name); return super().__contains__(name)
    def __iter__(self): self._read("*"); return super().__iter__()
    def items(self): self._read("*"); return super().items()
    def keys(self): self._read("*"); return super().keys()
    def values(self): self._read("*"); return super().values()
    def copy(self): self._read("*"); return super().copy()

sys.meta_path.insert(0, Refuse())
os.environ = Environment(os.environ)
read_one = os.getenv
os.getenv = lambda *args: (reads.append(list(args)), read_one(*args))[1]
before = set(sys.modules)
out, err = sys.stdout, sys.stderr
sys.stdout, sys.stderr = io.StringIO(), io.StringIO()

import nnscaler_ring

text = sys.stdout.getvalue() + sys.stderr.getvalue()
sys.stdout, sys.stderr = out, err
print(json.dumps({
    "modules": sorted(set(sys.modules) - before),
    "asked": asked,
    "reads": reads,
    "text": text,
    "cuda": torch.cuda.is_initialized(),
    "dynamo": "torch._dynamo" in sys.modules,
    "names": [name for name in nnscaler_ring.__all__ if not hasattr(nnscaler_ring, name)],
    "threads": torch.get_num_threads(),
    "grad": torch.is_grad_enabled(),
    "dtype": str(torch.get_default_dtype()),
}))
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -W error -c code` in a folder that is not the repository."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd="/",
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_import_takes_torch_and_the_standard_library_only():
    done = run(REPORT, json.dumps(REFUSED))
    assert done.returncode == 0 and done.stderr == "", done
    report = json.loads(done.stdout)
    allowed = {*sys.stdlib_module_names, "torch", "nnscaler_ring"}
    others = [name for name in report["modules"] if name.partition(".")[0] not in allowed]
    assert "nnscaler_ring.core.op.ops" in report["modules"]
    assert others == [] and report["asked"] == [], report
    assert report["reads"] == [], report
    assert report["text"] == "", report
    assert not report["cuda"] and not report["dynamo"], report
    assert report["names"] == [], report
    assert (report["grad"], report["dtype"]) == (True, "torch.float32"), report


def test_import_before_torch_prints_and_warns_nothing():
    done = run("import nnscaler_ring")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done

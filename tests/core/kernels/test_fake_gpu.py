"""Kernels of real packages without a GPU: see fake_gpu.py. It takes a CUDA build of torch."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.__version__ < "2.11",
    reason="needs a CUDA build of torch 2.11 or newer; a GPU it does not need",
)


def passed_calls(kernel: str, compute_capability: str) -> int:
    """Of a process of its own: what is fake must not stay in the caches of this one."""
    digits = compute_capability.replace(".", "")
    target = digits + "a" * (int(digits) >= 90)
    cross_compile = {
        "FLASH_ATTENTION_ARCH": f"sm_{digits}",
        "CUTE_DSL_ARCH": f"sm_{target}",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.kernels.fake_gpu", kernel, compute_capability],
        env=os.environ | cross_compile,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) calls passed", done.stdout)
    assert found, done.stdout
    return int(found[1])


@pytest.mark.parametrize("compute_capability", ["8.0", "8.6", "9.0", "10.0", "12.0"])
def test_torch_takes_the_calls_of_torch_cuda(compute_capability):
    assert passed_calls("torch_cuda", compute_capability) == 160


@pytest.mark.full
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None
    or importlib.util.find_spec("flash_attn.cute") is None,
    reason="flash-attn-4 is not installed",
)
@pytest.mark.parametrize("compute_capability", ["9.0", "10.0", "12.0"])
def test_flash_attention_4_compiles_the_calls(compute_capability):
    """Minutes: every call of another kind is compiled for that compute capability."""
    assert passed_calls("flash_attn_4", compute_capability) > 50

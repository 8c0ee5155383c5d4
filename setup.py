"""Packaging of nnscaler_ring; the tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version as text, so that building does not import torch."""
    text = (ROOT / "nnscaler_ring" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('nnscaler_ring/__init__.py has no line like __version__ = "1.2.3"')
    return match.group(1)


def read_long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


CLI = ["click>=8.1", "rich>=13"]
DEMO = [*CLI, "matplotlib>=3.8"]
BENCH = [*CLI, "ring-attention-pytorch>=0.5.20"]
# For examples/energy_forecasting: HTTP, and the time zones that a slim system lacks.
ENERGY = [*DEMO, "requests>=2.32", "tzdata"]
# transformers 4.57 has the attention interface in all models that are supported.
HF = ["accelerate>=1.10", "transformers>=4.57"]
# pytest-xdist: two workers, as tests with ranks wait more than they compute. triton: the fused
# merge, interpreted where there is no GPU; it is made for Linux alone.
TEST = [
    *(*ENERGY, "hypothesis>=6.100", "pytest>=8", "pytest-xdist>=3.6"),
    "triton>=3; platform_system == 'Linux'",
]
# What the tests of nnscaler_ring.hf train with.
TEST_HF = [*HF, "datasets>=4", "peft>=0.17", "trl>=0.24"]
LINT = ["mypy>=1.11", "ruff>=0.12"]

setup(
    name="nnscaler_ring",
    version=read_version(),
    description="Exact context-parallel (ring) attention over torch.distributed ranks",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    author="The nnscaler_ring authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["nnscaler_ring", "nnscaler_ring.*"]),
    package_data={"nnscaler_ring": ["py.typed", "simulator/clusters/*.json"]},
    # Tested with 2.13; 2.9 is the first release whose fused CPU attention takes GQA.
    install_requires=["torch>=2.9"],
    extras_require={
        "cli": CLI,
        "demo": DEMO,
        "energy": ENERGY,
        "bench": BENCH,
        "hf": HF,
        "test": TEST,
        "lint": LINT,
        "dev": sorted({*DEMO, *BENCH, *TEST, *TEST_HF, *LINT}),
    },
    entry_points={"console_scripts": ["nnscaler-ring = nnscaler_ring.tools.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

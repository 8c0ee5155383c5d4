"""Packaging of nnscaler_ring; the tools are configured in pyproject.toml."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

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


def load_kernel_build() -> ModuleType:
    """How the C++ kernel is compiled: from its file, as the package needs torch."""
    path = ROOT / "nnscaler_ring" / "core" / "kernels" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("kernel_build", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernel_build = load_kernel_build()


def kernel_extensions() -> list[Extension]:
    """The C++ kernel where there is a compiler; without one the wheel is of Python alone."""
    try:
        kernel_build.compiler()
    except kernel_build.BuildError as error:
        print(f"the C++ kernel is left out: {error}")
        return []
    return [Extension("nnscaler_ring.core.kernels.native.libraries", [], optional=True)]


class BuildKernel(build_ext):
    """Compiles a library for each instruction set into the wheel.

    Not into a checkout (pip install -e), whose sources change: `nnscaler-ring build-kernel` does.
    """

    def run(self) -> None:
        if not self.inplace:
            super().run()

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            kernel_build.compile_into(folder)
        except kernel_build.BuildError as error:
            raise CompileError(str(error)) from error  # optional: a warning

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """The libraries know no Python: a wheel with them is for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


CLI = ["click>=8.1", "rich>=13"]
DEMO = [*CLI, "matplotlib>=3.8"]
BENCH = [*CLI, "ring-attention-pytorch>=0.5.20"]
# For examples/energy_forecasting: HTTP, time zones that a slim system lacks, holidays, and the
# baselines that its model is compared with.
ENERGY = [*DEMO, "requests>=2.32", "tzdata", "holidays>=0.50", "scikit-learn>=1.5"]
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
    package_data={
        "nnscaler_ring": ["py.typed", "simulator/clusters/*.json", "core/kernels/native/*.[hc]*"]
    },
    ext_modules=kernel_extensions(),
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPythonWheel},
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

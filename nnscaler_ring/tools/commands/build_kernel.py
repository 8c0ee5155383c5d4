"""`nnscaler-ring build-kernel`: the C++ kernel for CPUs, compiled on this machine."""

from __future__ import annotations

import click

from nnscaler_ring.core.kernels.native.build import BuildError
from nnscaler_ring.core.kernels.native.library import build, describe, library


@click.command("build-kernel")
@click.option("--optional", is_flag=True, help="Without a compiler, say so and end well.")
def build_kernel(optional: bool) -> None:
    """Compile the kernel `cpu_tiles` into the user's cache, unless it is there.

    From then on kernel="auto" takes it for float32, bfloat16 and float16 on CPUs.
    """
    try:
        build()
    except BuildError as error:
        if not optional:
            raise click.ClickException(str(error)) from error
        click.echo(f'kernel cpu_tiles is not compiled: {error}; kernel="auto" does without it')
        return
    if isinstance(library(), str):
        raise click.ClickException(describe())
    click.echo(f"kernel cpu_tiles: {describe()}")

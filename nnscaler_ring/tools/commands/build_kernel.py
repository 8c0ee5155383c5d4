"""`nnscaler-ring build-kernel`: the C++ kernel for CPUs, compiled on this machine."""

from __future__ import annotations

import json

import click

from nnscaler_ring.core.kernels.native.build import BuildError
from nnscaler_ring.core.kernels.native.library import build, library
from nnscaler_ring.tools.commands.options import json_option


@click.command("build-kernel")
@click.option("--optional", is_flag=True, help="Without a compiler, say so and end well.")
@json_option
def build_kernel(optional: bool, as_json: bool) -> None:
    """Compile the kernel `cpu_tiles` into the user's cache, unless it is there.

    From then on kernel="auto" takes it for float32, bfloat16 and float16 on CPUs.
    """
    try:
        build()
    except BuildError as error:
        if not optional:
            raise click.ClickException(str(error)) from error
        _tell({"compiled": False, "reason": str(error)}, as_json)
        return
    found = library()
    if isinstance(found, str):
        raise click.ClickException(found)
    facts = {"instruction_set": found.instruction_set, "folder": str(found.folder)}
    _tell({"compiled": True, **facts}, as_json)


def _tell(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    elif facts["compiled"]:
        click.echo(
            f"kernel cpu_tiles: compiled for {facts['instruction_set']}, in {facts['folder']}"
        )
    else:
        click.echo(
            f'kernel cpu_tiles is not compiled: {facts["reason"]}; kernel="auto" does without it'
        )

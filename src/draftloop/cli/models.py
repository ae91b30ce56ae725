"""`draftloop models pull`, `models import` and `models list`.

Contract: names go to `models/resolve.py`, what comes back is printed. Must not know how a model is fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftloop.cli.console import new_table, print_table, write
from draftloop.cli.options import load_settings
from draftloop.cli.progress import Bars, format_bytes, waiting

if TYPE_CHECKING:
    from draftloop.backends.architecture import Architecture

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME", help="owner/name on the Hub, package:NAME, a .gguf file. Default: the pair."
    ),
]
GgufFile = Annotated[Path, typer.Argument(metavar="FILE", help="A .gguf file.")]
NewName = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Default: the file's name without .gguf.")
]


def build_app() -> typer.Typer:
    """The three commands."""
    app = typer.Typer(help="Get models, and list those that are here.", rich_markup_mode=None)
    app.command("pull")(pull)
    app.command("import")(import_)
    app.command("list")(list_)
    return app


def pull(context: typer.Context, names: Names = None) -> None:
    """Download models and convert them; without a NAME, the pair of the settings."""
    settings = load_settings(context).config
    with waiting("looking for the models"):
        from draftloop.models.resolve import pull as pull_model
    for name in names or [settings.models.target.name, settings.models.draft.name]:
        folder = pull_model(name, progress=Bars())
        write(f"{name} is ready in {folder}\n")


def import_(context: typer.Context, file: GgufFile, name: NewName = None) -> None:
    """Convert a .gguf file to a 4-bit folder and give it a name."""
    load_settings(context)
    with waiting("reading the file"):
        from draftloop.models.resolve import import_gguf
    model = import_gguf(file, name, Bars())
    write(f"{model.name} is ready in {model.folder}\n")


def list_(context: typer.Context) -> None:
    """List the models that are here, and the package models that are not."""
    load_settings(context)
    with waiting("looking into the caches"):
        from draftloop.models.packages import PACKAGE_MODELS
        from draftloop.models.resolve import Kind, list_models

        models = list_models()
    table = new_table("name", "kind", "size >", "architecture", "path")
    for model in models:
        table.add_row(
            model.name,
            model.kind.value,
            format_bytes(model.size_bytes),
            describe(model.architecture),
            str(model.folder),
        )
    here = {model.name for model in models}
    for package in PACKAGE_MODELS:
        if package.name not in here:
            size = format_bytes(package.total_bytes)
            table.add_row(package.name, Kind.PACKAGE.value, size, "", "not here: draftloop models pull")
    print_table(table)


def describe(architecture: Architecture) -> str:
    """`qwen2, 28 layers of 1536, 4-bit`."""
    a = architecture
    weights = f"{a.quantization.bits}-bit" if a.quantization else a.dtype
    return f"{a.model_type}, {a.num_layers} layers of {a.hidden_size}, {weights}"

"""`declip export`: a model in another project's format, compared with ours before it is reported."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from declip_cli.cli.console import emit, note, user_errors
from declip_cli.cli.options import Assume, Force, Json

_FORMATS = Literal["openclip", "huggingface", "onnx"]


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Run folder, model folder or checkpoint.")],
    to: Annotated[_FORMATS, typer.Option("--to", help="Target format.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    license: Annotated[
        str,
        typer.Option("--license", help="License for the model card, as the Hub names it.", show_default="not stated"),
    ] = "",
    old_license: Annotated[str, typer.Option("--licence", hidden=True)] = "",
    assume: Assume = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model for OpenCLIP, transformers or ONNX, read it back there and compare the embeddings.

    Example: `declip export runs/declip-vit-b32 --to huggingface --out clip-vit-b32 --license mit`
    """
    with user_errors():
        from declip_cli.interop.assumptions import parse_assumptions
        from declip_cli.interop.export import export as write
        from declip_cli.interop.model_card import Card
        from declip_cli.interop.read import load_model
        from declip_cli.interop.run_facts import read_run_facts

        if old_license:
            note("note: --licence was renamed to --license; the old name will be removed in the next version")
        opened = load_model(model, option="MODEL", given=parse_assumptions(assume or ()), log=note)
        card = Card(name=out.resolve().name, license=license or old_license, facts=read_run_facts(model))
        emit(write(opened, to, out, card=card, force=force).to_json(), as_json=as_json)

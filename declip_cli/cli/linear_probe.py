"""`declip linear-probe`: train a linear classifier on frozen features."""

from enum import StrEnum
from typing import Annotated

import typer

from declip_cli.cli.console import emit, note, progress_of, user_errors
from declip_cli.cli.options import (
    Assume,
    BatchSize,
    DataRoot,
    Html,
    Json,
    Model,
    NoCache,
    Threads,
    note_skipped,
    open_model,
)


class FeatureChoice(StrEnum):
    """What the classifier is trained on."""

    pre = "pre"
    post = "post"


def linear_probe(
    dataset: Annotated[str, typer.Argument(help="Known name, `demo`, or a folder with `train/` and `test/`.")],
    model: Model = None,
    assume: Assume = None,
    data_root: DataRoot = None,
    features: Annotated[
        FeatureChoice, typer.Option(help="Image features before (`pre`, as CLIP did) or after the projection.")
    ] = FeatureChoice.pre,
    shots: Annotated[int, typer.Option(min=0, help="Training images per class; 0 uses all.")] = 0,
    seed: Annotated[int, typer.Option(help="Draws the shots and, without a val split, the held-out images.")] = 0,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also score raw pixels; `demo` does so by itself.")
    ] = False,
    html: Html = None,
    batch_size: BatchSize = 128,
    threads: Threads = 0,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Train a linear classifier on frozen image features; its penalty is chosen on validation images.

    Example: `declip linear-probe cifar100 --model runs/declip-vit-b32 --json`
    """
    with user_errors():
        from declip_cli.evaluate import linear_probe as probe
        from declip_cli.evaluate.encoding import FeatureOptions
        from declip_cli.evaluate.probe_split import open_probe_sets
        from declip_cli.evaluate.score_page import write_score_page

        sets = open_probe_sets(dataset, data_root=data_root)
        opened = open_model(model, assume=assume, threads=threads)
        with progress_of(dataset) as tell:
            options = FeatureOptions(
                batch_size=batch_size, threads=threads, use_cache=not no_cache, progress=tell, log=note
            )
            report = probe.linear_probe(
                opened,
                sets,
                features=features.value,
                shots=shots,
                seed=seed,
                with_baseline=True if baseline else None,
                options=options,
            )
        note_skipped(dataset, report.skipped)
        for line in report.notes:
            note(f"{dataset}: {line}")
        if html is not None:
            write_score_page(html, [(report.to_json(), report.predictions)])
            note(f"the page is {html}")
        emit(report.to_json(), as_json=as_json)

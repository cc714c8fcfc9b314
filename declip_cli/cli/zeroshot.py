"""`declip zeroshot`: classify images by the words of their classes."""

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from declip_cli.cli.console import emit, emit_row, note, progress_of, user_errors
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
from declip_cli.errors import EvaluateError

if TYPE_CHECKING:
    from declip_cli.data.dataset import Dataset
    from declip_cli.evaluate.encoding import FeatureOptions
    from declip_cli.evaluate.label import LabelReport
    from declip_cli.evaluate.zeroshot import ZeroshotReport
    from declip_cli.model.checkpoint import PretrainedModel


class Precision(StrEnum):
    """Number format of the forward passes."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def zeroshot(
    datasets: Annotated[
        Optional[list[str]],  # noqa: UP007, UP045
        typer.Argument(
            metavar="DATASET",
            help="Known names, `demo`, or folders of class folders. With --labels: any images, `-` for paths on stdin.",
        ),
    ] = None,
    model: Model = None,
    assume: Assume = None,
    data_root: DataRoot = None,
    templates: Annotated[
        str,
        typer.Option(
            help="Prompts: `1`, `6`, `8`, `80`, a file with one template a line, or a JSON file of texts by class. "
            "Default: the set's own, else `80`."
        ),
    ] = "",
    classes: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(help="File of class names, one a line, or `folder<TAB>name`."),
    ] = None,
    labels: Annotated[
        Optional[str],  # noqa: UP007, UP045
        typer.Option(
            metavar="LABELS",
            help="Label images of unknown classes, a row each: `cat,dog`, or a file with one label a line.",
        ),
    ] = None,
    predictions: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(help="Write a JSON line per image: path, label, top 5, scores."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Add accuracy per class and the most confused pairs.")
    ] = False,
    html: Html = None,
    list_sets: Annotated[bool, typer.Option("--list", help="List the known data sets and what is there.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data sets over the network first.")] = False,
    precision: Annotated[Precision, typer.Option(help="`auto` is bf16 where native.")] = Precision.auto,
    batch_size: BatchSize = 128,
    threads: Threads = 0,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Classify images by the words of their classes, without any training on them.

    Example: `declip zeroshot imagenet cifar10 --model runs/declip-vit-b32 --json`
    """
    with user_errors():
        if list_sets:
            _show_list(data_root, as_json=as_json)
            return
        names = list(dict.fromkeys(datasets or []))
        _check(names, labels, classes, has_scores=bool(predictions or report or html))
        from declip_cli.data.benchmarks.torchvision_sets import download as download_set
        from declip_cli.evaluate import zeroshot as evaluation
        from declip_cli.evaluate.encoding import FeatureOptions
        from declip_cli.evaluate.report import write_predictions
        from declip_cli.evaluate.score_page import write_score_page

        options = FeatureOptions(
            batch_size=batch_size, precision=precision.value, threads=threads, use_cache=not no_cache, log=note
        )
        for name in names if download else ():
            note(f"{name} is in {download_set(name, data_root=data_root)}")
        if labels is not None:
            unlabeled = _open_any(names[0], data_root)
            opened = open_model(model, assume=assume, threads=threads)
            _show_labels(_label(opened, unlabeled, labels, templates, options), as_json=as_json)
            return
        found = [_open(name, data_root, classes) for name in names]
        opened = open_model(model, assume=assume, threads=threads)
        reports = []
        for dataset in found:
            with progress_of(dataset.name) as tell:
                one = evaluation.zeroshot(opened, dataset, templates=templates, options=replace(options, progress=tell))
            if cut := one.num_truncated_prompts:
                note(f"{one.dataset}: {cut} prompts are longer than {opened.context_length} tokens and were cut")
            note_skipped(one.dataset, one.skipped)
            reports.append(one)
        if predictions is not None:
            count = write_predictions(predictions, {one.dataset: one.predictions for one in reports})
            note(f"{count} predictions are in {predictions}")
        if html is not None:
            write_score_page(html, [(one.to_json(), one.predictions) for one in reports])
            note(f"the page is {html}")
        emit(_result(reports, with_report=report), as_json=as_json)


def _check(names: list[str], labels: str | None, classes: Path | None, *, has_scores: bool) -> None:
    if not names:
        raise typer.BadParameter("name a data set, `demo` or a folder; --list shows the known ones")
    if labels is None and "-" in names:
        raise typer.BadParameter("reading stdin needs --labels")
    if labels is not None and (len(names) > 1 or classes is not None or has_scores):
        raise typer.BadParameter("--labels takes one collection, and no --classes, --predictions, --report or --html")
    if classes is not None and len(names) > 1:
        raise EvaluateError(
            f"--classes names the classes of one data set (got {len(names)})",
            remedy="score the data sets one at a time",
        )


def _open(name: str, data_root: Path | None, classes: Path | None) -> "Dataset":
    from declip_cli.data.benchmarks.known import known_sets
    from declip_cli.data.catalog import classified, evaluation_split, open_dataset

    if name in known_sets() and not known_sets()[name].num_classes:
        raise EvaluateError(
            f"{name} has captions and no classes, so there is nothing to classify", remedy=f"declip retrieve {name}"
        )
    return classified(open_dataset(name, evaluation_split(name), data_root=data_root), classes)


def _open_any(name: str, data_root: Path | None) -> "Dataset":
    from declip_cli.data.catalog import open_dataset
    from declip_cli.data.files_dataset import open_list

    return open_list(sys.stdin) if name == "-" else open_dataset(name, data_root=data_root)


def _label(
    model: "PretrainedModel", dataset: "Dataset", labels: str, templates: str, options: "FeatureOptions"
) -> "LabelReport":
    from declip_cli.evaluate.label import label_images, read_labels

    with progress_of(dataset.name) as tell:
        return label_images(
            model, dataset, read_labels(labels), templates=templates, options=replace(options, progress=tell)
        )


def _show_labels(found: "LabelReport", *, as_json: bool) -> None:
    note_skipped(found.dataset, found.skipped)
    if as_json:
        emit(found.to_json(), as_json=True)
        return
    for one in found.predictions:
        emit_row((one.path, one.label, f"{one.probability:.4f}"))


def _show_list(data_root: Path | None, *, as_json: bool) -> None:
    from declip_cli.data.benchmarks.known import list_known

    listed = list_known(data_root)
    if as_json:
        emit({"datasets": listed}, as_json=True)
        return
    emit_row(("name", "task", "classes", "metric", "expected", "is_there"))
    for entry in listed:
        classes, there = entry["num_classes"] or "-", "yes" if entry["is_there"] else "no"
        emit_row((entry["name"], entry["task"], classes, entry["metric"], entry["expected"], there))


def _result(reports: "list[ZeroshotReport]", *, with_report: bool) -> dict[str, Any]:
    from declip_cli.evaluate.report import class_report

    results = [{**report.to_json(), **(class_report(report.predictions) if with_report else {})} for report in reports]
    if len(results) == 1:
        return results[0]
    return {
        "model": reports[0].model,
        "results": results,
        "average_score": sum(report.score for report in reports) / len(reports),
        "seconds": sum(report.seconds for report in reports),
    }

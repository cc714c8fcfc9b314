"""`declip zeroshot`: classify pictures by the words of their classes."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from declip_cli.cli.console import emit, emit_row, note, progress_of, user_errors
from declip_cli.cli.loading import open_model
from declip_cli.cli.options import BatchSize, DataRoot, Json, Model, Threads
from declip_cli.errors import EvaluateError

if TYPE_CHECKING:
    from declip_cli.data.dataset import Dataset
    from declip_cli.evaluate.features import FeatureOptions
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
        typer.Argument(metavar="DATASET", help="Known names, `demo`, or folders of class folders."),
    ] = None,
    model: Model = None,
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
    predictions: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(help="Write a JSON line per picture: path, label, top 5, scores."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Add accuracy per class and the most confused pairs.")
    ] = False,
    list_sets: Annotated[bool, typer.Option("--list", help="List the known data sets and what is there.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch the data sets over the network first.")] = False,
    precision: Annotated[Precision, typer.Option(help="`auto` is bf16 where native.")] = Precision.auto,
    batch_size: BatchSize = 128,
    threads: Threads = 0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute all features anew.")] = False,
    as_json: Json = False,
) -> None:
    """Classify pictures by the words of their classes, without any training on them.

    Example: `declip zeroshot imagenet cifar10 --model runs/declip-vit-b32 --json`
    """
    with user_errors():
        if list_sets:
            _show_list(_listed(data_root), as_json=as_json)
            return
        names = _names(datasets, classes)
        from declip_cli.evaluate.features import FeatureOptions

        options = FeatureOptions(
            batch_size=batch_size, precision=precision.value, threads=threads, use_cache=not no_cache, say=note
        )
        if download:
            _download(names, data_root)
        found = [_open(name, data_root, classes) for name in names]
        reports = _score(found, open_model(model, threads=threads), templates, options)
        if predictions is not None:
            _write(predictions, reports)
        emit(_result(reports, with_report=report), as_json=as_json)


def _names(datasets: list[str] | None, classes: Path | None) -> list[str]:
    names = list(dict.fromkeys(datasets or []))
    if not names:
        raise typer.BadParameter("name a data set, `demo` or a folder; --list shows the known ones")
    if classes is not None and len(names) > 1:
        raise EvaluateError(
            f"--classes names the classes of one data set (got {len(names)})",
            remedy="score the data sets one at a time",
        )
    return names


def _show_list(entries: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        emit({"datasets": entries}, as_json=True)
        return
    emit_row(("name", "task", "classes", "metric", "expected", "is_there"))
    for entry in entries:
        classes, there = entry["num_classes"] or "-", "yes" if entry["is_there"] else "no"
        emit_row((entry["name"], entry["task"], classes, entry["metric"], entry["expected"], there))


def _listed(data_root: Path | None) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from declip_cli.data.catalogue import list_known

    return [asdict(entry) for entry in list_known(data_root)]


def _download(names: list[str], data_root: Path | None) -> None:
    from declip_cli.data.catalogue import download

    for name in names:
        note(f"{name} is in {download(name, data_root=data_root)}")


def _open(name: str, data_root: Path | None, classes: Path | None) -> "Dataset":
    from declip_cli.data.benchmarks.known import known_sets
    from declip_cli.data.catalogue import classified, evaluation_split, open_dataset

    if name in known_sets() and not known_sets()[name].num_classes:
        raise EvaluateError(
            f"{name} has captions and no classes, so there is nothing to classify", remedy=f"declip retrieve {name}"
        )
    return classified(open_dataset(name, evaluation_split(name), data_root=data_root), classes)


def _score(
    datasets: "list[Dataset]", model: "PretrainedModel", templates: str, options: "FeatureOptions"
) -> "list[ZeroshotReport]":
    from dataclasses import replace

    from declip_cli.evaluate.zeroshot import zeroshot

    reports = []
    for dataset in datasets:
        with progress_of(dataset.name) as tell:
            report = zeroshot(model, dataset, templates=templates, options=replace(options, progress=tell))
        if report.num_cut:
            note(f"{dataset.name}: {report.num_cut} prompts are longer than {model.context_length} tokens and were cut")
        for cause, skipped in report.skipped.items():
            note(f"{dataset.name}: skipped {skipped['count']} pictures, {cause} (first: {skipped['first']})")
        reports.append(report)
    return reports


def _write(path: Path, reports: "list[ZeroshotReport]") -> None:
    from declip_cli.evaluate.report import write_predictions

    count = write_predictions(path, {report.dataset: report.predictions for report in reports})
    note(f"{count} predictions are in {path}")


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

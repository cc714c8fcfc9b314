"""`declip retrieve`: score retrieval on a data set, or search pictures by text or picture."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from declip_cli.cli.console import emit, emit_row, note, progress_of, user_errors
from declip_cli.cli.loading import open_model
from declip_cli.cli.options import BatchSize, DataRoot, Json, Model, Threads

if TYPE_CHECKING:
    from declip_cli.data.dataset import Dataset
    from declip_cli.evaluate.features import FeatureOptions
    from declip_cli.evaluate.retrieve import RetrievalReport
    from declip_cli.evaluate.search import Query, SearchReport
    from declip_cli.model.checkpoint import PretrainedModel


def retrieve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|PATH",
            help="Known name, `demo`, a folder with captions.jsonl, or shards. To search: also any folder of pictures, "
            "the folder of a saved index, or `-` for paths on stdin.",
        ),
    ],
    model: Model = None,
    data_root: DataRoot = None,
    query: Annotated[
        Optional[str],  # noqa: UP007, UP045
        typer.Option(help="Search for this text instead of scoring."),
    ] = None,
    query_image: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(help="Search for pictures like this one."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 10,
    index: Annotated[
        str, typer.Option(help='Description for faiss, such as "HNSW32" or "IVF4096,PQ64". Default: exact.')
    ] = "",
    index_dir: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(help="Keep the index in this folder; later searches encode only what is new or changed."),
    ] = None,
    html: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(help="Also write the hits as a page for a browser."),
    ] = None,
    batch_size: BatchSize = 128,
    threads: Threads = 0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute all features anew.")] = False,
    as_json: Json = False,
) -> None:
    """Score how well pictures and captions find each other; with a query, search pictures.

    Examples: `declip retrieve flickr30k`, `declip retrieve photos/ --query "a red bus in the rain" -k 3`
    """
    text = (query or "").strip()
    if query is not None and not text:
        raise typer.BadParameter("--query is empty")
    if text and query_image is not None:
        raise typer.BadParameter("give --query or --query-image, not both")
    is_search = bool(text) or query_image is not None
    if not is_search:
        _refuse({"--index": index, "--index-dir": index_dir, "--html": html, "reading stdin": source == "-"})
    with user_errors():
        from declip_cli.evaluate.features import FeatureOptions
        from declip_cli.evaluate.search import Query

        options = FeatureOptions(batch_size=batch_size, threads=threads, use_cache=not no_cache, say=note)
        if not is_search:
            report = _score(_open(source, data_root), open_model(model, threads=threads), options)
            emit(report.to_json(), as_json=as_json)
            return
        asked = Query(text=text, image=query_image)
        is_saved = index_dir is None and _is_index(source)
        settings = _Settings(k, index, Path(source) if is_saved else index_dir)
        dataset = None if is_saved else _open(source, data_root)
        found = _search(dataset, asked, open_model(model, threads=threads), settings, options)
        if html is not None:
            _write(html, found, asked)
        _show(found, k, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Settings:
    k: int
    index: str
    index_dir: Path | None


def _is_index(source: str) -> bool:
    from declip_cli.evaluate.vectors import is_store

    return is_store(Path(source))


def _refuse(options: dict[str, object]) -> None:
    for option, value in options.items():
        if value:
            raise typer.BadParameter(f"{option} needs --query TEXT or --query-image FILE")


def _open(source: str, data_root: Path | None) -> "Dataset":
    from declip_cli.data.catalogue import open_dataset
    from declip_cli.data.files_dataset import open_list

    return open_list(sys.stdin) if source == "-" else open_dataset(source, data_root=data_root)


def _score(dataset: "Dataset", model: "PretrainedModel", options: "FeatureOptions") -> "RetrievalReport":
    from declip_cli.evaluate.retrieve import retrieve

    with progress_of(dataset.name) as tell:
        report = retrieve(model, dataset, options=replace(options, progress=tell))
    _tell_skipped(report.skipped)
    return report


def _search(
    dataset: "Dataset | None",
    query: "Query",
    model: "PretrainedModel",
    settings: "_Settings",
    options: "FeatureOptions",
) -> "SearchReport":
    from declip_cli.evaluate.search import search, search_saved

    with progress_of(dataset.name if dataset is not None else "index") as tell:
        options = replace(options, progress=tell)
        if settings.index_dir is not None:
            report = search_saved(
                model, dataset, query, folder=settings.index_dir, k=settings.k, index=settings.index, options=options
            )
        else:
            assert dataset is not None
            report = search(model, dataset, query, k=settings.k, index=settings.index or "Flat", options=options)
    _tell_skipped(report.skipped)
    return report


def _tell_skipped(skipped: dict[str, dict[str, int | str]]) -> None:
    for cause, entry in skipped.items():
        note(f"skipped {entry['count']} pictures, {cause} (first: {entry['first']})")


def _write(html: Path, report: "SearchReport", query: "Query") -> None:
    from declip_cli.evaluate.gallery import write_gallery

    write_gallery(html, report, query_image=query.image.read_bytes() if query.image else b"")
    note(f"the hits are in {html}")


def _show(report: "SearchReport", k: int, *, as_json: bool) -> None:
    if len(report.hits) < k:
        note(f"{len(report.hits)} hits, as many as there are pictures (asked for {k})")
    if as_json:
        emit(report.to_json(), as_json=True)
        return
    for hit in report.hits:
        emit_row((hit.path, f"{hit.score:.4f}", *([hit.caption] if hit.caption else [])))

"""`declip retrieve`: score retrieval on a data set, or search images by text or image."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from declip_cli.cli.console import emit, emit_row, note, progress_of, user_errors
from declip_cli.cli.options import Assume, BatchSize, DataRoot, Json, Model, NoCache, Threads, note_skipped, open_model

if TYPE_CHECKING:
    from declip_cli.evaluate.search import SearchReport
    from declip_cli.serve.server import SearchServer


def retrieve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|PATH",
            help="Known name, `demo`, a folder with captions.jsonl, or shards. To search: also any folder of images, "
            "the folder of a saved index, or `-` for paths on stdin.",
        ),
    ],
    model: Model = None,
    assume: Assume = None,
    data_root: DataRoot = None,
    query: Annotated[
        Optional[list[str]],  # noqa: UP007, UP045
        typer.Option(help="Search for this text instead of scoring; several are added up."),
    ] = None,
    query_image: Annotated[
        Optional[Path],  # noqa: UP007, UP045
        typer.Option(help="Search for images like this one; with --query, for both together."),
    ] = None,
    minus: Annotated[
        Optional[list[str]],  # noqa: UP007, UP045
        typer.Option(metavar="TEXT", help="Search for images unlike this text, too; may be repeated."),
    ] = None,
    within: Annotated[
        str, typer.Option(metavar="GLOB", help='Search only this folder, or paths such as "holiday/*.jpg".')
    ] = "",
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
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
    serve: Annotated[
        bool, typer.Option("--serve", help="Search in a browser, on a page of this machine, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 picks a free one.")] = 0,
    batch_size: BatchSize = 128,
    threads: Threads = 0,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Score how well images and captions find each other; with a query, or on a page, search images.

    Examples: `declip retrieve flickr30k`, `declip retrieve photos/ --query "a red bus in the rain" -k 3`
    """
    texts, unwanted = _stripped("--query", query), _stripped("--minus", minus)
    has_query = bool(texts) or query_image is not None
    of_query = {"--minus": bool(unwanted), "--within": bool(within), "--html": html is not None}
    of_search = {"--index": bool(index), "--index-dir": index_dir is not None, "reading stdin": source == "-"}
    if serve and (has_query or any(of_query.values())):
        raise typer.BadParameter("--serve takes queries from the page: omit those of the command line, and --html")
    for option, value in (of_query if serve else of_query | of_search).items():
        more = ", or --serve" if option in of_search else ""
        if value and not has_query:
            raise typer.BadParameter(f"{option} needs --query TEXT or --query-image FILE{more}")
    is_search = has_query or serve
    with user_errors():
        from declip_cli.data.catalog import open_dataset
        from declip_cli.data.files_dataset import open_list
        from declip_cli.evaluate import retrieve as evaluation
        from declip_cli.evaluate.collection import open_collection
        from declip_cli.evaluate.encoding import FeatureOptions
        from declip_cli.evaluate.gallery import write_gallery
        from declip_cli.evaluate.search import Query, search
        from declip_cli.evaluate.vectors import is_store
        from declip_cli.serve.searcher import Searcher
        from declip_cli.serve.server import SearchServer

        if is_search and index_dir is None and is_store(Path(source)):
            dataset, index_dir = None, Path(source)  # a saved index
        else:
            dataset = open_list(sys.stdin) if source == "-" else open_dataset(source, data_root=data_root)
        opened, name = (
            open_model(model, assume=assume, threads=threads),
            dataset.name if dataset is not None else "index",
        )
        with progress_of(name) as tell:
            options = FeatureOptions(
                batch_size=batch_size, threads=threads, use_cache=not no_cache, progress=tell, log=note
            )
            if serve:
                collection = open_collection(opened, dataset, index=index, folder=index_dir, options=options)
            elif is_search:
                asked = Query(texts=texts, image=query_image, minus=unwanted)
                found = search(
                    opened, dataset, asked, k=k, within=within, index=index, folder=index_dir, options=options
                )
            else:
                assert dataset is not None
                scores = evaluation.retrieve(opened, dataset, options=options)
        if serve:
            note_skipped(name, collection.skipped)
            searcher = Searcher(opened, collection, options, quick=not index)
            _serve(SearchServer(searcher, port=port, log=note), as_json=as_json)
            return
        if not is_search:
            note_skipped(name, scores.skipped)
            emit(scores.to_json(), as_json=as_json)
            return
        note_skipped(name, found.skipped)
        if html is not None:
            write_gallery(html, found, query_image=query_image.read_bytes() if query_image else b"")
            note(f"the hits are in {html}")
        _show(found, k, as_json=as_json)


def _serve(server: "SearchServer", *, as_json: bool) -> None:
    """Say where the page is, and serve it until Ctrl-C, which is its usual end."""
    with server, suppress(KeyboardInterrupt):
        emit({"address": server.address}, as_json=as_json)
        note("open the address in a browser, or ask it for JSON: ADDRESS + search?text=…&k=…; Ctrl-C ends it")
        server.serve_forever()


def _stripped(option: str, texts: list[str] | None) -> tuple[str, ...]:
    found = tuple(text.strip() for text in texts or ())
    if not all(found):
        raise typer.BadParameter(f"{option} is empty")
    return found


def _show(report: "SearchReport", k: int, *, as_json: bool) -> None:
    if len(report.hits) < k:
        note(f"{len(report.hits)} hits, as many as there are images (asked for {k})")
    if as_json:
        emit(report.to_json(), as_json=True)
        return
    for hit in report.hits:
        emit_row((hit.path, f"{hit.score:.4f}", *([hit.caption] if hit.caption else [])))

"""The page of a run, and of several runs over each other: curves, scores, first pairs, settings, advice."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from declip_cli.pages.charts import CHART_STYLE, line_chart
from declip_cli.pages.frame import REPORT_STYLE, render_page, table, write_page
from declip_cli.pages.run_files import Reports, RunFiles, differences, read_run_files

PAGE_FILE = "report.html"
"""In the run folder."""
_MAX_NOTES = 60
_MAX_CHARS = 300
"""Of a text from outside."""
_GROUPS: tuple[tuple[str, str, dict[str, bool]], ...] = (
    ("losses", "Loss", {"may_log": True}),
    ("spread", "Spread of features, 0 is collapsed", {}),
)
"""Values of a report that stand in one chart."""
_CHARTS: tuple[tuple[str, str, dict[str, bool]], ...] = (
    ("learning_rate", "Learning rate", {}),
    ("logit_scale", "Logit scale", {}),
    ("gradient_norm", "Gradient norm, largest before clipping", {"may_log": True}),
    ("samples_per_second", "Speed, pairs per second", {}),
    ("wait_share", "Waiting for data, share of the time", {"is_share": True}),
    ("peak_memory_mib", "Peak memory, MiB", {}),
    ("loss_scale", "Loss scale of float16", {"may_log": True}),
)
"""Values of a report that have a chart each."""


def write_run_page(path: Path, reports: Reports) -> None:
    """Write the page of a run in progress into its folder; `reports` are those of the page before.

    Raises:
        EvaluateError: there is no run, or the page cannot be written.
    """
    page = render_run(read_run_files(path, reports))
    write_page(path / PAGE_FILE, page, what="page", option="--out")


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several over each other; return where it is.

    Args:
        paths: run folders, at least one.
        out: the file; None takes `report.html` in the first folder.

    Raises:
        EvaluateError: there is no run in a folder, or the page cannot be written.
    """
    runs = [read_run_files(path) for path in paths]
    out = out or paths[0] / PAGE_FILE
    page = render_run(runs[0]) if len(runs) == 1 else render_comparison(runs)
    write_page(out, page, what="page", option="--out")
    return out


def render_run(run: RunFiles) -> str:
    """Make the page of one run."""
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="about">{escape(_summary(run))}</p>',
        *_section("Curves", f'<div class="grid">{"".join(_charts([run]))}</div>' if run.reports.last else ""),
        *_section("Scores", _score_table([run])),
        *_section("Pairs as the model saw them", _sample_cards(run)),
        *_section("Notes and advice", _notes(run)),
        *_section("Data", _data(run)),
        *_section("Settings", _settings(run)),
        *_section("Versions", table(("package", "version"), sorted(run.versions.items()))),
    ]
    return render_page(f"{run.name} – declip", "\n".join(parts), style=REPORT_STYLE + CHART_STYLE)


def render_comparison(runs: Sequence[RunFiles]) -> str:
    """Make a page of several runs: curves over each other, what differs, scores."""
    names = _names(runs)
    rows = [(name, _summary(run)) for name, run in zip(names, runs, strict=True)]
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        '<p class="about">Curves are drawn over the pairs seen, so that runs of different batch sizes compare.</p>',
        table(("run", "what and how far"), rows),
        *_section("Scores", _score_table(runs)),
        *_section("Curves", f'<div class="grid">{"".join(_charts(runs))}</div>'),
        *_section("Settings that differ", _differing(runs)),
    ]
    title = ", ".join(names)
    return render_page(f"{title[:_MAX_CHARS]} – declip", "\n".join(parts), style=REPORT_STYLE + CHART_STYLE)


def _section(name: str, content: str) -> Iterator[str]:
    if content:
        yield f"<h2>{name}</h2>\n{content}"


def _summary(run: RunFiles) -> str:
    last, settings = run.reports.last, run.settings
    what = f"{settings.get('method.name', '?')} on {settings.get('model.arch', '?')}"
    if not last:
        return f"{what}; no report yet"
    hours, rest = divmod(round(last.get("seconds") or 0), 3600)
    spent = f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
    steps = f"step {last['step']:,} of {last.get('total_steps') or 0:,}"
    return f"{what}; {steps}; {last['samples_seen']:,} pairs seen; {spent}"


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Name each run so that no two are alike."""
    names: list[str] = []
    for run in runs:
        names.append(run.name if run.name not in names else f"{run.name} ({len(names) + 1})")
    return names


def _charts(runs: Sequence[RunFiles]) -> Iterator[str]:
    """Draw all curves: of one run related ones in one chart, over steps; of several runs each value by itself."""
    x, x_name = ("step", "step") if len(runs) == 1 else ("samples_seen", "pairs seen")
    names = _names(runs)
    for title, paths, how in _groups(runs):
        if len(runs) == 1:
            charts = {title: [runs[0].reports.curve(path, name) for name, path in paths.items()]}
        else:
            charts = {
                f"{title}: {name}" if name else title: [
                    run.reports.curve(path, of, x=x) for of, run in zip(names, runs, strict=True)
                ]
                for name, path in paths.items()
            }
        for heading, curves in charts.items():
            series = [one for one in curves if one is not None]
            if series:
                yield line_chart(heading, series, x_name=x_name, **how)


def _groups(runs: Sequence[RunFiles]) -> Iterator[tuple[str, dict[str, tuple[str, ...]], dict[str, bool]]]:
    """List what there is to draw: a title, the values that belong together with where they are, and how."""
    for group, title, how in _GROUPS:
        kinds = dict.fromkeys(kind for run in runs for kind in run.reports.names_of(group))
        yield title, {kind: (group, kind) for kind in kinds}, how
    scores = dict.fromkeys(score for run in runs for score in run.reports.scores())
    for dataset in dict.fromkeys(path[1] for path in scores):
        paths = {".".join(path[2:]): path for path in scores if path[1] == dataset}
        yield f"Scores on {dataset}", paths, {"is_share": True}
    for key, title, how in _CHARTS:
        yield title, {"": (key,)}, how


def _score_table(runs: Sequence[RunFiles]) -> str:
    """Show the last value of each score, in percent."""
    rows = []
    for path in dict.fromkeys(score for run in runs for score in run.reports.scores()):
        curves = [run.reports.curve(path, "") for run in runs]
        cells = ["–" if one is None else f"{one.y[-1]:.2%} at step {one.x[-1]:,.0f}" for one in curves]
        rows.append((path[1], ".".join(path[2:]), *cells))
    return table(("data set", "measure", *(_names(runs) if len(runs) > 1 else ["last"])), rows) if rows else ""


def _sample_cards(run: RunFiles) -> str:
    cards = []
    for sample in run.samples:
        views = [view for view in sample.get("views", ()) if str(view.get("image")).startswith("data:image/jpeg;")]
        images = "".join(
            f'<img alt="view {escape(str(view.get("kind")))}" title="{escape(str(view.get("kind")))}" '
            f'src="{escape(view["image"])}">'
            for view in views
        )
        texts = "".join(
            f'<p><span class="pale">{escape(str(text.get("kind")))}:</span> '
            f"{escape(str(text.get('text'))[:_MAX_CHARS])}</p>"
            for text in sample.get("texts", ())
        )
        cards.append(f'<div class="card"><div class="views">{images}</div>{texts}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _notes(run: RunFiles) -> str:
    lines = run.notes[-_MAX_NOTES:]
    more = len(run.notes) - len(lines)
    items = [f"<li>{escape(line[:_MAX_CHARS])}</li>" for line in lines]
    if more:
        items.insert(0, f'<li class="pale">{more} earlier lines are in log.txt</li>')
    return f'<ul class="words">{"".join(items)}</ul>' if items else ""


def _data(run: RunFiles) -> str:
    last, facts = run.reports.last, run.facts
    pairs, seen = facts.get("num_pairs") or 0, last.get("samples_seen") or 0
    rows: list[tuple[str, object]] = [
        ("pairs in the data set", f"{pairs:,}{'' if facts.get('is_counted', True) else ', an estimate'}"),
        ("pairs seen", f"{seen:,}" + (f", {seen / pairs:.2f} passes" if pairs else "")),
        ("batches skipped because their gradient was NaN or infinite", f"{last.get('num_bad_steps') or 0:,}"),
    ]
    for cause, found in (last.get("skipped") or {}).items():
        count, first = (*found, "?")[:2] if isinstance(found, list) else (found, "?")
        rows.append((f"skipped, {cause}"[:_MAX_CHARS], f"{count} (first: {first})"[:_MAX_CHARS]))
    if run.reports.num_damaged:
        rows.append(("lines of metrics.jsonl that cannot be read", run.reports.num_damaged))
    return table(("what", "how many"), rows)


def _settings(run: RunFiles) -> str:
    recipe, differing = differences(run.asked)
    base = f"recipe {recipe}" if recipe else "defaults"
    rows = [(key, _cut(there), _cut(here)) for key, there, here in differing]
    shown = table(("setting", base, "here"), rows) if rows else f"<p>Exactly the {escape(base)}.</p>"
    every = [(key, _cut(value)) for key, value in (run.settings | run.facts).items()]
    return (
        f'<p class="pale">What differs from the {escape(base)}, the nearest there are:</p>{shown}'
        f"<details><summary>All settings, as settled, with data and machine</summary>"
        f"{table(('setting', 'value'), every)}</details>"
    )


def _differing(runs: Sequence[RunFiles]) -> str:
    every = [
        run.settings | run.facts | {f"version of {name}": version for name, version in run.versions.items()}
        for run in runs
    ]
    rows = []
    for key in dict.fromkeys(key for one in every for key in one):
        values = [one.get(key, "absent") for one in every]
        if any(value != values[0] for value in values):
            rows.append((key, *map(_cut, values)))
    return table(("setting", *_names(runs)), rows) if rows else "<p>None: all settings and versions are the same.</p>"


def _cut(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "…"

"""The arithmetic of `data_efficiency.py`: means, standard errors, paired differences, pairs saved; table, picture."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_efficiency_rows import ABLATION, ROWS

REFERENCE = "clip"
RIVALS = ("clip", "clip-plain", "slip", "rocket")
"""What a method of ours has to beat."""
SCORES = {
    "zeroshot_top1": "zero-shot top-1",
    "zeroshot_top5": "zero-shot top-5",
    "image_to_text_r10": "image→text R@10",
    "text_to_image_r10": "text→image R@10",
    "probe_top1": "linear probe",
    "further_text_to_image_r10": "text→image R@10 on images of a further vendor",
    "further_zeroshot_top1": "zero-shot top-1 on images of a further vendor",
}
_SHORT_SCORES = ("text_to_image_r10", "further_text_to_image_r10")
"""Of the tables that show one score for each set of images."""
_ORDER = list(ROWS)
_KINDS = {"best": "Best against best", "equal_time": f"Within the time that {REFERENCE} took"}
_PAGE = """# What it saves

How good are models that learn from fewer pairs? This page is written by `tests/benchmarks/data_efficiency.py`; do not
edit it.

* **Pairs**: {fit_pairs} of emoji and clip art by {fit}; {fit_pairs_like_scored_ones} others resembled scored images
  (perceptual hashes within 4 of 64 bits) and were left out. Smaller shares are nested, the same for all rows.
* **Choices** (when to stop, tuned settings): {validation}, {num_validation} emoji.
* **Scores**: {final}, {num_final} emoji, held out from every choice; {num_like} of them, such as flags, resemble
  drawings of {validation}. Left out: {left_out}, whose drawings others share.
* **Second check**: the images of `--further`, an archive that plays no other part, are "a further vendor". They are not
  compared with the training pairs: a few flags may resemble some, for all rows alike.
* **What it does not show**: emoji and clip art are not the web, and a tiny model is not ViT-B/32. Runs end after
  600 steps of 128 pairs, most of them before their patience does, as the last table says; another shows longer runs.
* **Time** is that of one CPU core beside another run, good to a tenth. Models are scored every 60 steps, so a row uses
  0.8 to 0.9 of the time that {reference} took.

<!-- not run: minutes to hours, and the archive is not part of the project -->
```sh
pip install -e '.[plots]'
run="python tests/benchmarks/data_efficiency.py dev.tar --work WORK --processes 2"
$run --dry-run                                                 # how long it takes
$run --tune clip slip rocket declip small --trials 5 --tune-size 0.25 --max-steps 400 --eval-every 50 --patience 3
run="$run --further another_vendor.tar --max-steps 600 --eval-every 60 --patience 3"
$run --rows clip slip small rocket declip                      # goes on where it stopped
$run --rows clip+simsiam clip+simsiam+mlm clip+simsiam+mlm+views --sizes 0.25   # the paper's ablation
$run --rows clip-plain clip+words clip+sigmoid clip+positives declip+simclr aclip --sizes 0.25 --seeds 0 2
$run --rows clip small --sizes 0.125 --seeds 0 1 --max-steps 1200               # longer, with the fewest pairs
$run --summary --page docs/what-it-saves.md
```

`clip` has the image augmentation of the others; `clip-plain` crops only, as it was published. `small` is the recipe of
that name (method, augmentation and peak rate; here the rate is constant). Its trials are compositions of supervisions,
where those of the others vary the settings; all start from the same settings, and only trials that every row has run
count. A trial is one run of one seed: half a point between two of them means little. Weak and strong views share one
crop, and `slip` and `rocket` match the captions with a view that is only cropped, as in their papers; the papers' own
crops were not tried. A factor is that of the means, with those of the seeds in parentheses. The runs' JSON lines are in
`what-it-saves/`.

"""


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample over the root of its size; None below two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_difference(ours: Mapping[int, float], others: Mapping[int, float]) -> tuple[float, float | None] | None:
    """Return the mean difference of the seeds that both have, and its standard error; None without such seeds."""
    differences = [ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())]
    return (statistics.mean(differences), standard_error(differences)) if differences else None


def pairs_needed(curve: Mapping[int, float], score: float) -> tuple[str, float]:
    """Find how many pairs reach a score, by linear interpolation in the logarithm of the pairs.

    Args:
        curve: pairs → score, at least one; where it crosses the score upward first is what counts.
        score: what is to be reached.

    Returns:
        A sign and the pairs: `=`; `<`, when the fewest pairs are good enough; `>`, when the most are not.
    """
    points = sorted(curve.items())
    if points[0][1] >= score:
        return ("=" if points[0][1] == score else "<"), float(points[0][0])
    for (few, low), (many, high) in zip(points, points[1:], strict=False):
        if high >= score:
            share = (score - low) / (high - low)
            return "=", math.exp(math.log(few) + share * (math.log(many) - math.log(few)))
    return ">", float(points[-1][0])


def saving(reference: Mapping[int, float], ours: Mapping[int, float], pairs: int) -> tuple[str, float]:
    """Return the data-efficiency factor: pairs that the reference needs for our score ÷ `pairs`, with a sign."""
    sign, needed = pairs_needed(reference, ours[pairs])
    return sign, needed / pairs


def _by_seed(lines: Sequence[Mapping[str, Any]], kind: str, row: str, pairs: int, score: str) -> dict[int, float]:
    chosen = [line for line in lines if (line["row"], line["pairs"]) == (row, pairs) and line[kind] is not None]
    return {line["seed"]: line[kind]["scores"][score] for line in chosen if score in line[kind]["scores"]}


def _latest(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Keep one line of each cell, the last that was run."""
    return list({(line["row"], line["size"], line["seed"]): line for line in lines}.values())


def summarize(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum up the cells.

    Args:
        lines: of `cells.jsonl`; of a cell that was run again the last counts.

    Returns:
        kind (`best`, `equal_time`) → score → a list of entries: `row`, `pairs`, `num_seeds`, `mean`, `error`,
        `minus_clip` and `minus_rival` (mean and standard error of paired differences), `rival`, `factor_clip` and
        `factor_rival` (sign and number, of the means; None where the other has one size only), and `factors_clip`
        (those of each seed); beside them `rows`, facts on each row's cells, and `ablation`.
    """
    lines = _latest(lines)
    found: dict[str, Any] = {"rows": _facts(lines)}
    for kind in _KINDS:
        found[kind] = {score: _entries(lines, kind, score) for score in SCORES}
    return found | {"ablation": _ablation(lines)}


def summarize_all(lines: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> dict[str, Any]:
    """Sum up the cells of runs with the same limits, and under `other_limits` (steps → summary) those of other runs."""
    others: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["limits"] != limits:
            others.setdefault(line["limits"]["max_steps"], []).append(line)
    found = summarize([line for line in lines if line["limits"] == limits])
    return found | {"other_limits": {steps: summarize(some) for steps, some in sorted(others.items())}}


def _facts(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    facts = {}
    for row in sorted({line["row"] for line in lines}, key=_ORDER.index):
        own = [line for line in lines if line["row"] == row]
        facts[row] = {
            "num_cells": len(own),
            "num_trials": min(line["num_trials"] for line in own),
            "num_settings": len({line["digest"] for line in own}),
            "seconds": sum(line["seconds"] for line in own) / len(own),
            "num_still_rising": sum(not line["has_stopped_rising"] for line in own),
            "raw_pixels_top1": own[0]["best"]["scores"]["raw_pixels_top1"],
        }
    return facts


def _entries(lines: Sequence[Mapping[str, Any]], kind: str, score: str) -> list[dict[str, Any]]:
    cells = sorted({(line["pairs"], line["row"]) for line in lines}, key=lambda cell: (cell[0], _ORDER.index(cell[1])))
    seeds = {(row, pairs): _by_seed(lines, kind, row, pairs, score) for pairs, row in cells}
    means = {cell: statistics.mean(values.values()) for cell, values in seeds.items() if values}
    entries = []
    for row, pairs in means:
        curves = {other: {n: mean for (name, n), mean in means.items() if name == other} for other, _ in means}
        rivals = [name for name in RIVALS if name != row and (name, pairs) in means]
        rival = max(rivals, key=lambda name: means[name, pairs], default=None)
        entry = {"row": row, "pairs": pairs, "num_seeds": len(seeds[row, pairs]), "mean": means[row, pairs]}
        entry |= {"error": standard_error(list(seeds[row, pairs].values())), "rival": rival}
        for name, other in (("clip", REFERENCE), ("rival", rival)):
            is_there = other is not None and other in curves and other != row
            minus = paired_difference(seeds[row, pairs], seeds.get((other, pairs), {})) if is_there else None
            factor = saving(curves[other], curves[row], pairs) if is_there and len(curves[other]) > 1 else None
            entry |= {f"minus_{name}": minus, f"factor_{name}": factor}
        if entry["factor_clip"] is not None:
            entry["factors_clip"] = [
                saving({n: seeds[REFERENCE, n][seed] for n in curves[REFERENCE]}, {pairs: score}, pairs)
                for seed, score in seeds[row, pairs].items()
                if all(seed in seeds[REFERENCE, n] for n in curves[REFERENCE])
            ]
        entries.append(entry)
    return entries


def _points(value: float, error: float | None = None, *, sign: str = "") -> str:
    text = f"{100 * value:{sign}.1f}"
    return text if error is None else f"{text} ± {100 * error:.1f}"


def _difference(found: tuple[float, float | None] | None) -> str:
    return "–" if found is None else _points(*found, sign="+")


def _factor(found: tuple[str, float] | None, seeds: Sequence[tuple[str, float]] = ()) -> str:
    if found is None:
        return "–"
    texts = [f"{'' if sign == '=' else sign + ' '}{number:.2f}" for sign, number in (found, *seeds)]
    return f"{texts[0]} ({', '.join(texts[1:])})" if seeds else texts[0]


def table(summary: Mapping[str, Any]) -> str:
    """Write the summary in Markdown: a table for each kind and score, then what each row cost."""
    parts = []
    for kind, title in _KINDS.items():
        for score, name in SCORES.items():
            if not summary[kind][score]:
                continue
            lines = [f"## {title}: {name}", ""]
            lines += [
                "| row | pairs | seeds | score | − clip | best rival | − rival | factor (clip), by seed | (rival) |"
            ]
            lines += ["|---|---|---|---|---|---|---|---|---|"]
            for one in summary[kind][score]:
                minus = [_difference(one[key]) for key in ("minus_clip", "minus_rival")]
                cells = [one["row"], one["pairs"], one["num_seeds"], _points(one["mean"], one["error"]), minus[0]]
                cells += [one["rival"] or "–", minus[1], _factor(one["factor_clip"], one.get("factors_clip", ()))]
                cells.append(_factor(one["factor_rival"]))
                lines.append(f"| {' | '.join(map(str, cells))} |")
            parts.append("\n".join(lines))
    if summary["ablation"]:
        parts.append(_ablation_table(summary["ablation"]))
    for steps, some in summary["other_limits"].items():
        parts += [_all_rows(f"Runs of up to {steps} steps", some, pairs) for pairs in _sizes(some)]
    return "\n\n".join([*parts, _costs(summary["rows"])]) + "\n"


def _all_rows(title: str, summary: Mapping[str, Any], pairs: int) -> str:
    """Compare all rows at one size, those that were run at no other size, too."""
    scores = [score for score in _SHORT_SCORES if summary["best"][score]]
    columns = " | ".join(f"{SCORES[score]} | − clip | best rival | − rival" for score in scores)
    lines = [f"## {title}, {pairs} pairs: best against best", ""]
    lines += [f"| row | seeds | {columns} | seconds | not stopped |", f"|{'---|' * (4 * len(scores) + 4)}"]
    found = [[one for one in summary["best"][score] if one["pairs"] == pairs] for score in scores]
    for entries in zip(*found, strict=True):
        cells = [entries[0]["row"], entries[0]["num_seeds"]]
        for one in entries:
            cells += [_points(one["mean"], one["error"]), _difference(one["minus_clip"])]
            cells += [one["rival"] or "–", _difference(one["minus_rival"])]
        facts = summary["rows"][entries[0]["row"]]
        cells += [f"{facts['seconds']:.0f}", f"{facts['num_still_rising']} of {facts['num_cells']}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _ablation(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say what each further supervision of the paper brings, for the pairs with which all of them were run."""
    ran = [{line["pairs"] for line in lines if line["row"] == row} for row in ABLATION]
    entries = []
    for pairs, score in itertools.product(sorted(set.intersection(*ran)), ("zeroshot_top1", *_SHORT_SCORES)):
        before: dict[int, float] = {}
        for row in ABLATION:
            found = _by_seed(lines, "best", row, pairs, score)
            if not found:
                continue
            values = list(found.values())
            entry = {"score": score, "pairs": pairs, "row": row, "num_seeds": len(values)}
            entry |= {"mean": statistics.mean(values), "error": standard_error(values)}
            entries.append(entry | {"minus_before": paired_difference(found, before)})
            before = found
    return entries


def _ablation_table(entries: Sequence[Mapping[str, Any]]) -> str:
    lines = ["## The paper's ablation, best against best", "", "| score | pairs | row | seeds | | − the row before |"]
    lines += ["|---|---|---|---|---|---|"]
    for one in entries:
        cells = [SCORES[one["score"]], one["pairs"], one["row"], one["num_seeds"]]
        cells += [_points(one["mean"], one["error"]), _difference(one["minus_before"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def overview(summary: Mapping[str, Any]) -> str:
    """Write in Markdown what each row reached with how many pairs, best against best, on both sets of images."""
    parts = []
    for score in _SHORT_SCORES:
        means = {(one["row"], one["pairs"]): _points(one["mean"], one["error"]) for one in summary["best"][score]}
        if not means:
            continue
        sizes = _sizes(summary)
        lines = [f"## In short: {SCORES[score]}, %", ""]
        lines += [f"| row | {' | '.join(f'{pairs} pairs' for pairs in sizes)} |", f"|---|{'---|' * len(sizes)}"]
        for row in _compared(summary):
            lines.append(f"| {row} | {' | '.join(means.get((row, pairs), '–') for pairs in sizes)} |")
        parts.append("\n".join(lines) + "\n\n")
    wide = max((len(_sizes(summary, row)) for row in summary["rows"]), default=1)
    single = {size for row in summary["rows"] if len(_sizes(summary, row)) < wide for size in _sizes(summary, row)}
    parts += [f"{_all_rows('All rows', summary, pairs)}\n\n" for pairs in sorted(single)]
    return "".join(parts)


def _sizes(summary: Mapping[str, Any], row: str | None = None) -> list[int]:
    """Return the numbers of pairs with which a row, or any, was run."""
    return sorted({one["pairs"] for one in summary["best"]["text_to_image_r10"] if row in (None, one["row"])})


def _costs(rows: Mapping[str, Any]) -> str:
    if not rows:
        return "No cell has been run yet."
    lines = ["## What each row cost", ""]
    lines += ["| row | cells | trials of tuning | mean seconds a run | not stopped at the end | raw pixels (probe) |"]
    lines += ["|---|---|---|---|---|---|"]
    for row, facts in rows.items():
        mixed = f" ({facts['num_settings']} different settings)" if facts["num_settings"] > 1 else ""
        cells = [row, f"{facts['num_cells']}{mixed}", facts["num_trials"], f"{facts['seconds']:.0f}"]
        cells += [facts["num_still_rising"], _points(facts["raw_pixels_top1"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def choices(trials: Sequence[Mapping[str, Any]]) -> str:
    """Write in Markdown what each trial of the search scored on the validation vendor, and what it took."""
    if not trials:
        return ""
    rows = list(dict.fromkeys(line["row"] for line in trials))
    found = {(line["trial"], line["row"]): line for line in trials}
    lines = ["## Choices: mean recall on the validation vendor, %, and seconds of training", ""]
    lines += [f"| trial | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    for trial in sorted({number for number, _ in found}):
        cells = (found.get((trial, row)) for row in rows)
        texts = ("–" if one is None else f"{_points(one['validation'])} ({one['seconds']:.0f} s)" for one in cells)
        lines.append(f"| {trial} | {' | '.join(texts)} |")
    lines += ["", "Trial 0 has each row's own settings. What others change:", ""]
    changed: dict[tuple[int, str], list[str]] = {}
    for line in sorted(trials, key=lambda one: (one["trial"], rows.index(one["row"]))):
        settings = dict(line["settings"])
        weights = settings.pop("method.weights", None)
        row = line["row"] if weights is None else f"{line['row']} ({_setting(weights)})"
        text = ", ".join(f"{name.partition('.')[2]} {_setting(value)}" for name, value in settings.items())
        if line["settings"]:
            changed.setdefault((line["trial"], text), []).append(row)
    for (trial, text), names in changed.items():
        lines.append(f"* {trial}: {', '.join(names)}{': ' if text else ''}{text}")
    return "\n".join(lines) + "\n\n"


def tried(lines: Sequence[Mapping[str, Any]]) -> str:
    """Write in Markdown what single runs beside the search scored on the validation vendor; none of them counts."""
    if not lines:
        return ""
    parts = ["## Tried besides, one run each: mean recall on the validation vendor, %", ""]
    parts += ["| run | row | pairs | steps | recall | seconds |", "|---|---|---|---|---|---|"]
    for line in lines:
        cells = [line["name"], line["row"], line["pairs"], line["steps"], _points(line["validation"])]
        parts.append(f"| {' | '.join(map(str, cells))} | {line['seconds']:.0f} |")
    return "\n".join(parts) + "\n\n"


def _setting(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, Mapping):
        return " + ".join(f"{weight:g} {term}" for term, weight in value.items() if weight)
    return " ".join(value) or "none" if isinstance(value, list | tuple) else str(value)


def write_page(
    summary: Mapping[str, Any],
    corpus: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    work: Path,
    page: Path | None,
) -> None:
    """Write `table.md` and, where matplotlib is installed, `picture.svg` into a folder; the page, too, if asked for."""
    text = overview(summary) + choices(trials) + tried(others) + table(summary)
    (work / "table.md").write_text(text, encoding="utf-8")
    draw_picture(summary, work / "picture.svg")
    if page is not None:
        words = {key: ", ".join(corpus[key]) for key in ("fit", "left_out")}
        counts = {f"num_{key}": corpus["pairs"][corpus[key]] for key in ("validation", "final")}
        counts["num_like"] = corpus["near_duplicates"][f"{corpus['final']} ~ {corpus['validation']}"]
        head = _PAGE.format_map({**corpus, **words, **counts, "reference": f"`{REFERENCE}`"})
        draw_picture(summary, page.with_suffix(".svg"))
        picture = f"![score against pairs]({page.stem}.svg)\n\n" if page.with_suffix(".svg").is_file() else ""
        page.write_text(head + picture + text, encoding="utf-8")


def draw_picture(summary: Mapping[str, Any], path: Path, score: str = "text_to_image_r10") -> None:
    """Draw a score against the pairs, one line a row with standard errors; nothing without matplotlib."""
    if not summary["rows"]:
        return
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install -e '.[plots]'")
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), _KINDS.items(), strict=True):
        for row in _compared(summary):
            points = [one for one in summary[kind][score] if one["row"] == row]
            values = [[100 * (one[key] or 0.0) for one in points] for key in ("mean", "error")]
            axes.errorbar([one["pairs"] for one in points], values[0], yerr=values[1], label=row, marker="o", capsize=3)
        sizes = _sizes(summary)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{pairs:,}" for pairs in sizes])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="pairs", title=title)
    figure.axes[0].set_ylabel(f"{SCORES[score]}, %")
    figure.axes[0].legend()
    with rc_context({"svg.hashsalt": path.stem}):  # the same scores make the same file
        figure.savefig(path, metadata={"Date": None})


def _compared(summary: Mapping[str, Any]) -> list[str]:
    """Return the rows that were run at the most sizes."""
    num = {row: len(_sizes(summary, row)) for row in summary["rows"]}
    return [row for row in num if num[row] == max(num.values())]

"""Every command that the pages show in blocks of `sh`, as a reader would type it, on the demo and small replacements.

Trainings are planned, not run, without an estimate of their memory. A block that cannot run here follows a line
`<!-- not run: WHY -->`. Of a block of output (`$ declip …`), the keys are compared with those that the command prints.
"""

import re
import shlex
from glob import glob

import pytest

from declip_cli.evaluate import linear_probe
from declip_cli.train import estimate
from tests.command_line import declip
from tests.generate_docs import ROOT, pages

BLOCK = re.compile(r"(<!-- not run: .+ -->\n *)?```(\w*)\n(.*?)```", re.S)
IN_SHORT = {"pretrain": ["--dry-run"], "prepare": ["--force"], "linear-probe": ["--shots=2"]}
"""Added to what is shown; of an option given twice the last counts."""
ONE_STEP = ["--data", "demo", "--steps", "1", "--batch-size", "2", "--threads", "1", "--set", "train.eval=[]"]
ONE_STEP += ["--set", "model.image_side_px=8"]


def shown():
    """Every command line of the pages: page, command, and the lines of output shown below it."""
    for page in pages():
        for omitted, language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            text = text.replace("\\\n", " ")
            if language == "sh" and not omitted:
                yield from ((page.name, line.strip(), []) for line in text.splitlines() if line.strip())
            elif not language and not omitted:
                for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
                    command, *output = part.splitlines()
                    yield page.name, command, output


# .ci/run sets up environments; what several pages show runs once, with the most output.
LINES = sorted((one for one in shown() if not one[1].startswith("python3 -m venv")), key=lambda one: len(one[2]))
SHOWN = {line.partition("  #")[0].strip(): (page, line, output) for page, line, output in LINES}.values()
assert len(SHOWN) > 25


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_image):
    """A folder with what the pages speak of: photos, shards, runs of a very small model, the demo's files."""
    here = tmp_path_factory.mktemp("docs")
    (here / "assets").symlink_to(ROOT / "assets")
    (here / "photos" / "holiday").mkdir(parents=True)
    (here / "labels.txt").write_text("cat\ndog\n")
    for number, name in enumerate(("cat", "photos/beach", "photos/holiday/dog")):
        (here / f"{name}.jpg").write_bytes(make_image(number))
        (here / f"{name}.txt").write_text(f"image of {name}")
    assert declip("prepare", here / "assets" / "demo" / "openclipart.tar", "--out", here / "shards").exit_code == 0
    done = declip("pretrain", *ONE_STEP, "--out", here / "runs" / "OLD")
    assert done.exit_code == 0, done.stderr
    (here / "runs" / "declip-vit-b32").symlink_to("OLD")
    return here


NOTHING = estimate.MemoryEstimate(
    weights=0, logits=0, cast_weights=0, per_pair=1, embedded_per_pair=0, batch_size=1, micro_batch_size=1
)


@pytest.mark.parametrize(("page", "line", "output"), SHOWN, ids=[f"{page}: {line}" for page, line, _ in SHOWN])
def test_a_command_that_is_shown_runs(page, line, output, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("DECLIP_RUNS", "runs")
    monkeypatch.setenv("DECLIP_CACHE", "cache")  # images are encoded once for all commands
    monkeypatch.setattr(linear_probe, "RAW_SIDE_PX", 2)
    monkeypatch.setattr(estimate, "estimate_memory", lambda run: NOTHING)
    words, stdin = typed(line)
    result = declip(*words, *IN_SHORT.get(words[0], []), stdin=stdin)
    assert result.exit_code == 0, (page, line, result.stderr)
    keys = {row.partition("\t")[0] for row in output if "\t" in row and "/" not in row.partition("\t")[0]}
    assert keys <= {row.partition("\t")[0] for row in result.stdout.splitlines()}, (page, line)


def typed(line):
    """Words of the one `declip` command of a line, and what is piped into it."""
    before, _, rest = line.partition("declip ")
    stdin = ""
    if before:
        folder, pattern = re.fullmatch(r"find (\S+) -name '(\S+)' \| ", before).groups()
        stdin = "\n".join(glob(f"{folder}/**/{pattern}", recursive=True))
    words = shlex.split(rest, comments=True)
    end = next((number for number, word in enumerate(words) if word in ("|", ">", "&")), len(words))
    return words[:end], stdin

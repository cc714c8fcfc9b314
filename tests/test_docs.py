"""The pages: generated parts are those of the code, links lead somewhere, the README stays short."""

import re

import pytest

from tests.generate_docs import COMMAND, ROOT, pages, renewed

PAGES = pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_generated_parts_are_those_of_the_code(page):
    text = page.read_text(encoding="utf-8")
    assert renewed(text) == text, f"run: {COMMAND}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in headings_of(file), f"{page.name} links to {target}"


def headings_of(file):
    """Anchors as GitHub makes them from headings."""
    lines = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in text, f"README.md does not link docs/{page.name}"

"""The project's pages: every link leads to a file and a heading that exist, and README.md stays short."""

import re
from collections.abc import Iterator

import pytest
from documented import pages
from launched import CHECKOUT

PAGES = [*(page for page in pages() if page.endswith(".md")), "CHANGELOG.md"]


def text_of(page: str) -> str:
    """The page without its code blocks, in which nothing is a link or a heading."""
    return re.sub(r"^```.*?^```$", "", (CHECKOUT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        repeats = sum(1 for known in anchors if re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", known))
        anchors.add(f"{anchor}-{repeats}" if repeats else anchor)
    return anchors


def broken_links(page: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (CHECKOUT / page).parent / name if name else CHECKOUT / page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors_of(str(target.resolve().relative_to(CHECKOUT.resolve()))):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page: str) -> None:
    assert list(broken_links(page)) == []


def test_the_tests_named_in_the_table_of_faults_exist() -> None:
    """As `test_name`, `file.py::test_name` or, shortened, `...part of a name...`."""
    files = list((CHECKOUT / "tests").rglob("test_*.py"))
    known = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)}
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", text_of("docs/faults.md")))
    assert named
    assert named - known == set()


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", text_of("README.md")))
    assert {page.name for page in (CHECKOUT / "docs").glob("*.md")} - linked == set()


def test_the_readme_has_at_most_1200_words() -> None:
    assert len((CHECKOUT / "README.md").read_text().split()) <= 1200

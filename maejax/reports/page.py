"""An HTML file that needs nothing else: its style, its script and its images are inside.

Pages are trees of elements, and only `page` makes text of them: whatever a run has written is escaped there.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

Element = ElementTree.Element
Child = Element | str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Element:
    """An element. `class_` and `for_` are written so; `data_x` means data-x; attributes that are None are left out."""
    element = Element(name)
    for key, value in attributes.items():
        if value is not None:
            element.set(key.rstrip("_").replace("_", "-"), str(value))
    _append(element, children)
    return element


def _append(element: Element, children: Iterable[Child]) -> None:
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif isinstance(child, str):
            if len(element):
                element[-1].tail = (element[-1].tail or "") + child
            else:
                element.text = (element.text or "") + child
        elif child is not None:
            _append(element, child)


def section(title: str, *children: Child, note: str | None = None) -> Element:
    """A part of the page under a heading; its first words in small print say how to read it."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else None, *children)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[Child]],
    *,
    kind: str | None = None,
    row_kinds: Iterable[str | None] = (),
) -> Element:
    """A table that scrolls where it is too wide; its columns after the first are numbers, aligned to the right.

    `kind` and `row_kinds` are classes of page.css: "text" for columns of words, "changed" for a row that stands out.
    """
    kinds = iter(row_kinds)
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", (tag("th", text, scope="col") for text in header))),
            tag("tbody", (tag("tr", (tag("td", cell) for cell in row), class_=next(kinds, None)) for row in rows)),
            class_=kind,
        ),
        class_="scroll",
    )


def facts(pairs: Iterable[tuple[str, Child]]) -> Element:
    """Names and what they are, below one another."""
    return tag("dl", ((tag("dt", name), tag("dd", value)) for name, value in pairs))


def fold(summary: str, *children: Child) -> Element:
    """What is shown when asked for, and in print."""
    return tag("details", tag("summary", summary), *children)


def page(title: str, *body: Child) -> str:
    """The file's text."""
    here = Path(__file__).parent
    style, script = (
        tag(name, (here / f"page.{end}").read_text()) for name, end in (("style", "css"), ("script", "js"))
    )
    html = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            tag("link", rel="icon", href="data:,"),  # or the browser asks a server for one
            style,
        ),
        tag("body", tag("main", *body), script),
        lang="en",
    )
    return "<!doctype html>\n" + ElementTree.tostring(html, encoding="unicode", method="html") + "\n"


def write(path: Path, text: str) -> None:
    """Writes a page; what is no character (file names may hold such bytes) becomes a question mark."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_bytes(text.encode(errors="replace"))
    draft.rename(path)

"""A page that was written, read strictly: what a browser would mend is a failure."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "hr", "img", "input", "col"}
_VOID_IN_SVG = {"rect", "line", "path", "stop", "use"}


@dataclass
class Element:
    """An element with its attributes, its children, and all text in it."""

    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=lambda: [])
    pieces: list[str] = field(default_factory=lambda: [])

    def find(self, tag: str, **attributes: str) -> list[Element]:
        """All elements in it with this tag and these attributes; ``class_`` is one of the classes."""
        wanted = attributes.pop("class_", None)
        found = [child for child in self.children if child.tag == tag]
        found = [e for e in found if wanted is None or wanted in e.attributes.get("class", "").split()]
        found = [e for e in found if all(e.attributes.get(name) == value for name, value in attributes.items())]
        return found + [e for child in self.children for e in child.find(tag, **attributes, **_class(wanted))]

    @property
    def text(self) -> str:
        """All text in it, in order."""
        return "".join(self.pieces)


def _class(wanted: str | None) -> dict[str, str]:
    return {} if wanted is None else {"class_": wanted}


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = self._add(tag, attrs)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _VOID_IN_SVG, f"<{tag}/> is no void element"
        self._add(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> ends <{self.open[-1].tag}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.pieces.append(data)

    def _add(self, tag: str, attrs: list[tuple[str, str | None]]) -> Element:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice at {self.getpos()}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        return element


def read_page(text: str) -> Element:
    """The tree of a page.

    Raises:
        AssertionError: elements are not closed in their order, an id is there twice, or a reference has no target.
    """
    assert text.startswith("<!doctype html>\n")
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], f"not closed: {[element.tag for element in reader.open[1:]]}"
    ids = [element.attributes["id"] for element in _all(reader.root) if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    for element in _all(reader.root):
        for name in ("aria-labelledby", "for"):
            assert set(element.attributes.get(name, "").split()) <= set(ids)
        if element.attributes.get("href", "").startswith("#"):
            assert element.attributes["href"][1:] in ids
    return reader.root


def _all(element: Element) -> list[Element]:
    return [found for child in element.children for found in (child, *_all(child))]


def everything(page: Element) -> list[Element]:
    """All elements of a page."""
    return _all(page)

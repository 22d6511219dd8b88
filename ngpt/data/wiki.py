"""MediaWiki dumps to plain articles."""

import html
import re
from collections.abc import Iterator

_TITLE = re.compile(rb"<title>(.*?)</title>")
_TEXT = re.compile(rb'<text xml:space="preserve">(.*?)</text>', re.DOTALL)
_REDIRECT = re.compile(r"\s*#\s*redirect", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DROPPED_TAGS = re.compile(r"<(ref|math|gallery|timeline|hiero)\b[^>]*?(?:/>|>.*?</\1\s*>)", re.DOTALL | re.IGNORECASE)
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_DROPPED_LINK = re.compile(r"\s*(?:image|file|media|category|[a-z]{2,3}(?:-[a-z]+)*|simple)\s*:", re.IGNORECASE)
_EXTERNAL = re.compile(r"\[(?:https?|ftp|mailto|news|irc):[^\s\]]*\s*([^\]]*)\]")
_EMPHASIS = re.compile(r"'{2,}")
_HEADING = re.compile(r"^=+[ \t]*(.*?)[ \t]*=+[ \t]*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_RULE = re.compile(r"^-{4,}", re.MULTILINE)
_SWITCH = re.compile(r"__[A-Z]{3,}__")
_SPACES = re.compile(r"[ \t\u00a0]+")
_LINE_ENDS = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")


def articles(dump: bytes) -> Iterator[tuple[str, str]]:
    """The (title, text) of each complete page that is neither a redirect nor empty, in the dump's order, without markup."""
    position = 0
    while (end := dump.find(b"</page>", position)) >= 0:
        page = dump[position:end]
        position = end + len(b"</page>")
        title, text = _TITLE.search(page), _TEXT.search(page)
        if title is None or text is None:
            continue
        source = html.unescape(text.group(1).decode("utf-8"))
        if _REDIRECT.match(source):
            continue
        if body := plain_text(source):
            yield html.unescape(title.group(1).decode("utf-8")), body


def plain_text(source: str) -> str:
    """Wiki markup to plain text: templates, tables, comments, references, pictures and formulas go, links keep their label."""
    text = _DROPPED_TAGS.sub("", _COMMENT.sub("", source))
    text = _remove_nested(_remove_nested(text, "{{", "}}"), "{|", "|}")
    text = _TAG.sub("", _LINE_BREAK.sub("\n", text))
    # A picture's caption holds links: the innermost are resolved first, until none is left.
    changed = 1
    while changed:
        text, changed = _LINK.subn(_label, text)
    text = _EMPHASIS.sub("", _EXTERNAL.sub(r"\1", text))
    text = _RULE.sub("", _SWITCH.sub("", text))
    text = _LIST_MARK.sub("", _HEADING.sub(r"\1", text))
    # Entities were escaped twice in the dump: once for XML, once by the author.
    text = _SPACES.sub(" ", html.unescape(text))
    return _BLANK_LINES.sub("\n\n", _LINE_ENDS.sub("\n", text)).strip()


def _label(link: re.Match[str]) -> str:
    content = link.group(1)
    if _DROPPED_LINK.match(content):
        return ""
    return content.removeprefix(":").rpartition("|")[2]


def _remove_nested(text: str, opening: str, closing: str) -> str:
    """Remove balanced pairs with all that they hold. An opening that is never closed stays."""
    kept: list[str] = []
    starts: list[tuple[int, int]] = []  # position of each open pair, pieces kept before it
    done = 0
    for mark in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text):
        if mark.group() == opening:
            kept.append(text[done : mark.start()])
            starts.append((mark.start(), len(kept)))
            done = mark.start()
        elif starts:
            _, pieces = starts.pop()
            del kept[pieces:]
            done = mark.end()
    kept.append(text[done:])
    return "".join(kept)

"""Tables of Markdown, for tests of what people read."""

from markdown_it import MarkdownIt


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, as a reader sees them."""
    result: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        if token.type == "table_open":
            result.append([])
        elif token.type == "tr_open":
            result[-1].append([])
        elif token.type in ("th_open", "td_open"):
            children = tokens[number + 1].children or []
            result[-1][-1].append("".join(child.content for child in children))
    return result

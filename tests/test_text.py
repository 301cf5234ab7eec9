"""Names from outside, made safe for each place they are shown in."""

import csv
import io

import markdown_it
import matplotlib.pyplot as plt
import pytest
import yaml

from hf_sgdr._utils.text import csv_cell, html_text, markdown_text, plot_text, printable

NASTY = [
    "\x1b[31mred\x1b[0m",
    "\x9b31m",
    "two\nlines\r\n",
    '=HYPERLINK("http://x","y")',
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1+1",
    " =1+1",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[a](javascript:alert(1))",
    "![a](http://x/y.png)",
    "| a | b |",
    "**bold** _it_ `code` ~~no~~",
    "# heading",
    "- item",
    "1. item",
    "---",
    "<!-- -->",
    "&lt;b&gt;",
    "a: b\n- c",
    "{{ jinja }} {% x %}",
    "$\\frac{1}{0}$",
    "$",
    "\u202ecod.exe",
    "no\u2028yes: true",
    "\udcff",
    "http://example.org",
    "user@example.org",
]


@pytest.mark.parametrize("name", NASTY)
def test_a_terminal_gets_no_control(name):
    shown = printable(name)
    assert shown.isprintable()
    assert printable(shown) == shown
    shown.encode("utf-8")


def test_ordinary_names_are_left_alone():
    for name in ("cats", "Ωmega", "犬", "🐕‍🦺", "naïve café", "a b", "50%", "#1"):
        assert printable(name) == csv_cell(name) == name


@pytest.mark.parametrize("name", NASTY)
def test_a_spreadsheet_computes_nothing(name):
    file = io.StringIO(newline="")
    csv.writer(file).writerow([csv_cell(name), "next"])
    (row,) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert len(row) == 2
    assert row[0].lstrip()[:1] not in ("=", "+", "-", "@", "\t", "\r")


@pytest.mark.parametrize("name", NASTY)
def test_markdown_shows_the_name_and_nothing_else(name):
    parser = markdown_it.MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])
    cell = parser.render(f"| a | b |\n|---|---|\n| {markdown_text(name)} | x |\n")
    assert cell.count("<td>") == 2
    inside = cell.split("<td>")[1].split("</td>")[0]
    assert "<" not in inside
    paragraph = parser.render(f"Class {markdown_text(name)}.")
    assert paragraph.count("<") == 2


@pytest.mark.parametrize("name", NASTY)
def test_html_and_yaml_round_trip(name):
    assert not set('<>"') & set(html_text(name))
    assert yaml.safe_load(yaml.safe_dump({"label": printable(name)})) == {"label": printable(name)}


@pytest.mark.parametrize("name", [*NASTY, "x" * 500])
def test_a_picture_shows_it(name):
    figure, ax = plt.subplots()
    ax.set_title(plot_text(name))
    figure.canvas.draw()
    plt.close(figure)
    assert len(plot_text("x" * 500)) == 40

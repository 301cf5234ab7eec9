import markdown_it
import numpy as np
import pytest
from PIL import Image

from hf_sgdr._utils.plots import new_axes, plot_images
from hf_sgdr.inference.report import Picture, Section, Table, render

NASTY = '<img src=x onerror=alert(1)> "quoted" | **bold** [a](javascript:b)\n$x$'


def sections():
    ax = new_axes(3, 2)
    ax.plot([1, 2])
    table = Table(NASTY, [NASTY, "number", "share"], [[NASTY, 3, 0.25], ["b", None, None]])
    return [Section(NASTY, [NASTY], [Picture(ax, "curve", NASTY)], [table])]


def shown(text):
    return markdown_it.MarkdownIt("commonmark").enable("table").render(text)


def test_html_and_markdown_show_the_same_words_and_no_markup_of_others(tmp_path):
    render(tmp_path / "r.html", NASTY, sections())
    render(tmp_path / "r.md", NASTY, sections())
    page, markdown = (tmp_path / "r.html").read_text(), shown((tmp_path / "r.md").read_text())
    for text in (page, markdown):
        assert text.count("<img") == 1
        assert "<strong>" not in text
        assert "<a " not in text
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        assert text.count("<td") >= 4
        assert "0.2500" in text
        assert "–" in text
    assert page.count("<h1>") == markdown.count("<h1>") == 1
    assert page.count("<h2>") == markdown.count("<h2>") == 1


def test_numbers_stand_to_the_right_and_the_first_cell_names_the_row(tmp_path):
    render(tmp_path / "r.html", "t", [Section("", tables=[Table("c", ["name", "n"], [["a", 1], ["b", 2]])])])
    text = (tmp_path / "r.html").read_text()
    assert '<tr><th scope="row">a</th><td class="number">1</td></tr>' in text
    render(tmp_path / "r.md", "t", [Section("", tables=[Table("c", ["name", "n"], [["a", 1], ["b", 2]])])])
    assert "| --- | ---: |\n| a | 1 |\n| b | 2 |\n" in (tmp_path / "r.md").read_text()


def test_pictures_lie_beside_the_markdown_and_inside_the_html(tmp_path):
    render(tmp_path / "my [report].md", "t", sections())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my [report]-curve.png", "my [report].md"]
    assert 'src="my%20%5Breport%5D-curve.png"' in shown((tmp_path / "my [report].md").read_text())
    with Image.open(tmp_path / "my [report]-curve.png") as picture:
        assert picture.size == (450, 300)
    render(tmp_path / "one.html", "t", sections())
    assert len(list(tmp_path.iterdir())) == 3
    assert 'width="288" height="192"' in (tmp_path / "one.html").read_text()


def test_a_table_without_rows_and_a_plot_in_a_larger_figure(tmp_path):
    ax = plot_images([np.zeros((4, 4, 3), dtype=np.uint8)], [["a"]])
    render(tmp_path / "r.html", "t", [Section("", [], [Picture(ax, "p", "d")], [Table("c", ["name"], [])])])
    assert "<tbody>\n</tbody>" in (tmp_path / "r.html").read_text()


def test_another_ending_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match=r"r\.pdf: give a name that ends in \.html or \.md\."):
        render(tmp_path / "r.pdf", "t", sections())
    assert not list(tmp_path.iterdir())

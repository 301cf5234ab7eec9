from datetime import date

import markdown_it
import numpy as np
import pytest
from PIL import Image

from hf_sgdr.inference.evaluation import Evaluation
from hf_sgdr.inference.interpretation import ClassifierInterpretation
from hf_sgdr.inference.report import write_report

NASTY = '<img src=x onerror=alert(1)> "quoted" | **bold** [a](javascript:b)\n$x$'


def evaluation(model=NASTY, names=(NASTY, "b", "c"), unreadable=None):
    """Four images: one mistake, and a third class that neither occurs nor is predicted."""
    probabilities = np.array([[0.75, 0.25, 0], [0.2, 0.8, 0], [0.9, 0.1, 0], [0.6, 0.4, 0]])
    result = ClassifierInterpretation(probabilities, [0, 1, 0, 1], names)
    return Evaluation(model, NASTY, None, 0, result, {NASTY: NASTY} if unreadable is None else unreadable)


def rendered(text):
    return markdown_it.MarkdownIt("commonmark").enable("table").render(text)


def test_html_and_markdown_show_the_same_words_and_no_markup_of_others(tmp_path):
    write_report(tmp_path / "r.html", evaluation())
    write_report(tmp_path / "r.md", evaluation())
    page, markdown = (tmp_path / "r.html").read_text(), rendered((tmp_path / "r.md").read_text())
    for text in (page, markdown):
        assert text.count("<img") == 2
        assert "<strong>" not in text
        assert "<a " not in text
        assert "&lt;img src=x onerror=alert(1)&gt;" in text
        assert text.count("<td") >= 4
        assert "75.0%" in text
        assert "3 of 4 right, 75.0%; of other images like these between 30% and 95%, with 95% confidence." in text
        assert f"Evaluated on {date.today()}." in text
        assert text.index("3 of 4 right") < text.index("Evaluated on") < text.index("<table")
        assert "–" in text
    assert page.count("<h1>") == markdown.count("<h1>") == 1
    assert page.count("<h2>") == markdown.count("<h2>") == 3


def test_numbers_stand_to_the_right_and_the_first_cell_names_the_row(tmp_path):
    write_report(tmp_path / "r.html", evaluation(names="abc"))
    row = '<tr><th scope="row">b</th><td>a</td><td class="number">1</td></tr>'
    assert (
        f'<th scope="col" class="number">images</th></tr></thead>\n<tbody>\n{row}\n'
        in (tmp_path / "r.html").read_text()
    )
    write_report(tmp_path / "r.md", evaluation(names="abc"))
    assert "| --- | --- | ---: |\n| b | a | 1 |\n" in (tmp_path / "r.md").read_text()


def test_pictures_lie_beside_the_markdown_and_inside_the_html(tmp_path):
    write_report(tmp_path / "my [report].md", evaluation())
    pictures = [tmp_path / f"my [report]-{name}.png" for name in ("classes", "confusion-matrix")]
    assert sorted(tmp_path.iterdir()) == [*pictures, tmp_path / "my [report].md"]
    assert 'src="my%20%5Breport%5D-classes.png"' in rendered((tmp_path / "my [report].md").read_text())
    write_report(tmp_path / "one.html", evaluation())
    assert len(list(tmp_path.iterdir())) == 4
    for path in pictures:
        with Image.open(path) as picture:  # at 150 dots an inch, a page has 96 of them
            width, height = (round(pixels * 96 / 150) for pixels in picture.size)
        assert f'width="{width}" height="{height}"' in (tmp_path / "one.html").read_text()


def test_what_there_is_none_of_is_not_told(tmp_path):
    for kind in ("html", "md"):
        write_report(tmp_path / f"r.{kind}", evaluation(unreadable={}))
        assert "Left out" not in (tmp_path / f"r.{kind}").read_text()


def test_another_ending_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match=r"r\.pdf: give a name that ends in \.html or \.md\."):
        write_report(tmp_path / "r.pdf", evaluation())
    assert not list(tmp_path.iterdir())

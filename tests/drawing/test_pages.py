"""Pages: what they are given is text, never HTML, and nothing that they name is missing."""

import re

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from seg_torch.drawing.page import figure, render
from seg_torch.labels import Labels

HOSTILE = """<script>alert("1")</script> & 'co'"""
LABELS = Labels((HOSTILE, "b"), np.array([(0, 128, 255), (1, 2, 3)]))
FINDINGS = {
    "problems": [{"message": HOSTILE, "pixels": {"7": 1234, "9": 1}}],
    "notes": [HOSTILE],
    "duplicates": [{}] * 3,
    "mean": [0.5],
    "std": [0.25],
    "classes": {HOSTILE: {"weight": 1.5}, "b": {"weight": 0.0}},
}


def page(**changed: object) -> str:
    images = [Image.new("RGB", (800, 400), (200, 0, 0)), Image.new("RGB", (20, 10))]
    values = {
        "title": HOSTILE,
        "findings": FINDINGS,
        "labels": LABELS,
        "duplicates": [figure(images, HOSTILE)],
        "samples": [("train", [figure(images, HOSTILE)], [0])],
        "header": ["class", HOSTILE],
        "rows": [[HOSTILE], ["5 %\n7"]],
    }
    return render("inspect.html", **{**values, **changed})


def test_whatever_a_file_or_class_is_called_is_text_on_the_page():
    text = page()
    assert "<script" not in text
    title = "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &#39;co&#39;"
    assert f"<h1>{title}</h1>" in text
    # The title twice, problem, note, two figures (caption and two images), key, header, row.
    assert text.count(title) == text.count("alert(") == 2 + 1 + 1 + 2 * 3 + 1 + 1 + 2
    assert '<i style="background:#0080ff"></i>' in text
    assert "<td>7: 1,234\n9: 1</td>" in text
    assert "loss.weights=[1.5000,0.0000]</pre>" in text


def test_images_of_a_page_lie_in_it_and_are_small():
    image = figure([Image.new("RGB", (800, 400), (200, 0, 0))], "red").sources[0]
    assert re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/]+=*", image)
    assert len(image) < 4000


def test_a_value_that_a_template_names_and_is_not_given_is_an_error():
    with pytest.raises(UndefinedError, match="notes"):
        page(findings={key: value for key, value in FINDINGS.items() if key != "notes"})

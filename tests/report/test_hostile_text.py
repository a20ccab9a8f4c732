"""Text that others wrote, on pages, in tables and on screens: shown as it is, and obeyed nowhere."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from fedpact.cli.progress import Progress
from fedpact.report.compare import Runs, compared, comparison_markdown
from fedpact.report.page import render
from fedpact.report.read import read_run
from fedpact.screen import printable, say, shown

XSS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<script >alert(1)</script >",
    "<script\n>alert(1)</script\n>",
    "<script\x00>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    "<img/src=x/onerror=alert(1)>",
    '<img src="x`><script>alert(1)</script>"`>',
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<svg><use href='data:image/svg+xml;base64,PHN2Zz4=#x'></use></svg>",
    "</svg><script>alert(1)</script>",
    "</text></svg><img src=x onerror=alert(1)>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "<style>@import 'http://evil.example/x.css';</style>",
    "<style>*{background:url(//evil.example)}</style>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    '<meta http-equiv=Content-Security-Policy content="default-src *">',
    "<base href=//evil.example/>",
    "<iframe src=javascript:alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<object data=javascript:alert(1)>",
    "<embed src=javascript:alert(1)>",
    "<form action=//evil.example><input name=x autofocus onfocus=alert(1)>",
    "<body onload=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)>",
    "<audio src=x onerror=alert(1)>",
    "<marquee onstart=alert(1)>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<a href=javascript:alert(1)>x</a>",
    "<a href=' \x01javascript:alert(1)'>x</a>",
    "<!--<img src=--><img src=x onerror=alert(1)//>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?xml version='1.0'?><!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><x>&e;</x>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "` onmouseover=`alert(1)",
    '" style="background:url(//evil.example)" x="',
    "{{ 7 * 7 }}{% for x in range(9) %}{{ config }}{% endfor %}",
    "${7*7} #{7*7} <%= 7*7 %>",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "＜script＞alert(1)＜/script＞",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
]
ELEMENTS = (
    "html head meta title style body h1 h2 h3 p div table caption thead tbody tr th td span strong i ul li ol code "
    "figure figcaption svg text path circle rect g desc"
)
ATTRIBUTES = (
    "lang charset name content http-equiv class scope colspan xmlns viewbox width height role aria-label d cx cy r x y "
    "text-anchor transform fill-opacity"
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.odd: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.odd.append(data)

    def unknown_decl(self, data: str) -> None:
        self.odd.append(data)

    def handle_pi(self, data: str) -> None:
        self.odd.append(data)


def hostile_run(make_run: Any, text: str, name: str = "one") -> Path:
    """A run folder where whatever can be a text is `text`."""
    other = f"{text} too"
    rows = [
        (turn, who, f"{kind}/{objective}", 0.1 * turn + 0.2)
        for turn in (0, 2, 4)
        for who in ("all", text, "south")
        for objective in (text, other)
        for kind in ("heldout", "heldout_greedy", "heldout_personal", "train/weight", f"cosine/{text}/south")
    ]
    rows += [(turn, text, f"cosine/{text}/south/{other}", -0.4) for turn in (0, 2, 4)]
    ledger = [{"decision": "refused", "bytes_in": 3, "reason": text, "peer": text, "counts": {text: 1}}]
    folder: Path = make_run(
        name, rows=rows, ledger=ledger, objectives=(text, other), primary=text, members=(text, "south"), label=text
    )
    run = json.loads((folder / "run.json").read_text())
    run |= {"name": text, "contract": text, "threads": text, "versions": {"fedpact": text, text: text}}
    run["config"] |= {text: text, "completion": text, "seed": text}
    run["config"]["algorithm"] |= {"name": text, text: [text]}
    run["model"] = {"path": text, "sha256": text}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.mark.parametrize("text", XSS)
def test_no_text_adds_an_element_an_attribute_or_an_address_to_a_page(make_run, text):
    records = [read_run(hostile_run(make_run, text)), read_run(hostile_run(make_run, text, "two"))]
    html = render(records, title=text)
    page = Page(html)
    assert page.elements <= set(ELEMENTS.split()) and page.odd == []
    names = {name for name, _ in page.attributes}
    assert names <= set(ATTRIBUTES.split()) and not any(name.startswith("on") for name in names)
    values = [value or "" for name, value in page.attributes if name not in ("aria-label", "xmlns")]
    assert not any(re.search(r"javascript:|data:|//", value) for value in values)
    assert [value for name, value in page.attributes if name == "content" and "default-src" in (value or "")] == [
        POLICY
    ]
    assert html.index(POLICY) < html.index("<title>")  # nothing of others stands before it
    assert "".join(printable(text).split()) in "".join("".join(page.texts).split())  # the text itself is there to read
    assert "<script" not in html.lower()


def test_the_hostile_page_has_every_part_of_a_page(make_run):
    html = render([read_run(hostile_run(make_run, "<b>"))], title="<b>")
    for part in ("Members, held out", "Objective weights", "Conflict between", "With private", "likeliest", "Traffic"):
        assert part in html


def test_no_page_holds_a_control_or_a_bidirectional_character(make_run):
    text = "evil\x1b[31m\u202egpj.exe\u2066\x07\u200f\x9b1m"
    html = render([read_run(hostile_run(make_run, text))], title=text)
    assert all(line.isprintable() for line in html.split("\n"))


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*XSS, "a|b", "a\\|b", "a\\", "a\nb | c", "[x](javascript:alert(1))", "![x](//evil)"])
def test_no_name_breaks_a_markdown_table_or_becomes_a_tag_or_a_link(make_run, text):
    record = read_run(hostile_run(make_run, text))
    runs = [Runs(text, text, {1: record}), Runs("plain", "plain", {1: record})]
    found = compared(runs, objectives=[text], leading=text, baseline="plain", axes=[text])
    lines = comparison_markdown(found).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 5 and all(line.isprintable() for line in lines)  # header, rule, start, and two variants
    # GitHub's rule: a backslash takes the character after it into the cell
    cells = [re.sub(r"\\.", "", line).count("|") for line in table]
    assert set(cells) == {cells[1]}
    assert not re.search(r"<[a-zA-Z/!?]", "".join(lines)) and "](" not in "".join(lines)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "=cmd|' /C calc'!A0", "\t=1"])
def test_a_name_in_a_table_is_no_formula(make_run, text):
    record = read_run(hostile_run(make_run, text))
    runs = [Runs(text, "firm", {1: record}), Runs("plain", "firm", {1: record})]
    found = compared(runs, objectives=[text], leading=text, baseline="plain", axes=[text])
    names = [line.split("|")[1].strip() for line in comparison_markdown(found).splitlines() if line.startswith("|")]
    assert not any(name.startswith(("=", "+", "-1", "@")) for name in names)
    assert any(name.startswith("'") for name in names)


# --- screens ---------------------------------------------------------------------------------------------------------

HIDDEN = [chr(code) for code in (*range(32), *range(127, 160), 0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F))]
HIDDEN += [chr(code) for code in (*range(0x2066, 0x206A), 0x2028, 0x2029, 0xFEFF, 0xE0001, 0xD800)]


@pytest.mark.parametrize("character", HIDDEN, ids=lambda character: f"{ord(character):04x}")
def test_nothing_unseen_reaches_a_screen(character):
    line = shown(f"a{character}b")
    assert character not in line and len(line) == 3 and line[0] + line[2] == "ab"
    line.encode()  # a terminal could write it


@pytest.mark.parametrize(
    "text", ["plain", "größe 数 한국 ñ", "a  b", "می\u200cخواهم", "👩\u200d🔬", "[red]x[/red]", ":smile:"]
)
def test_what_people_write_stays_as_it_is(text):
    assert shown(text) == text


def test_what_is_said_is_one_line():
    stream = io.StringIO()
    say("north\n\x1b[2Jfedpact: all is well\r", to=stream)
    assert stream.getvalue() == "north \ufffd[2Jfedpact: all is well \n"


MARKUP = [
    "[red]x[/red]",
    "[link=http://evil.example]x[/link]",
    "[/]",
    "[bold",
    ":skull:",
    "\\[red]",
    "[@click=x()]y[/]",
]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_in_a_name_or_a_reason_is_printed_as_it_is(text, capfd):
    progress = Progress(3, label=text)
    progress.round_done(1, [{"who": "all", "key": f"heldout/{text}", "value": 0.5}])
    progress.dropped(text, text)
    out, err = capfd.readouterr()
    assert out.startswith(f"{text}  round   1/3") and err == f"dropped {text}: {text}\n"


@pytest.mark.parametrize("text", [*MARKUP, "\x1b[31mred", "\u202eabc"])
def test_rich_shows_a_text_of_ours_without_obeying_it(text):
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, width=200, color_system="truecolor").print(Text(shown(text)))
    assert stream.getvalue() == f"{shown(text)}\n"


@pytest.mark.parametrize("text", ["\x1b[2J\x1b[H", "\u202etxt.exe", "a\nfedpact: ok", "\x9b31m", "\x07"])
def test_progress_lines_stay_lines(text, capfd):
    progress = Progress(3, label=text)
    progress.round_done(1, [{"who": "north", "key": f"train/reward/{text}", "value": 0.5}])
    progress.dropped(f"north{text}", f"no reply {text}")
    out, err = capfd.readouterr()
    for one in (out, err):
        assert one.count("\n") == 1 and one.rstrip("\n").isprintable()

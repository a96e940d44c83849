"""The report as one page that needs no network and no script."""

from __future__ import annotations

from html import escape

from halos_pl.inspect.charts import histogram
from halos_pl.inspect.style import STYLE
from halos_pl.inspect.words import HEADINGS, KINDS, Facts, Section, counted, number, sections, visible


def page(facts: Facts) -> str:
    """The whole document; texts of the data are text in it, whatever they hold."""
    names = ", ".join(x["name"] for x in facts["sources"])
    body = [
        f"<header><h1>{_safe(names)}</h1><p>{number(facts['rows'])} {KINDS[facts['kind']]}</p></header>",
        _warnings(facts),
    ]
    for section in sections(facts):
        body.append(f"<section><h2>{section.title}</h2>{_lines(section)}")
        if section.title == "length":
            body += [_table(facts), _charts(facts)]
        body.append("</section>")
    if facts["examples"]:
        body.append(f"<section><h2>examples</h2>{_LEGEND}")
        body += [_example(i, x) for i, x in enumerate(facts["examples"], 1)]
        body.append("</section>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(names)}</title><style>{STYLE}</style>"
    )
    content = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{content}\n</main></body></html>\n'


_LEGEND = (
    '<p class="legend"><span class="prompt"><span class="t">read</span></span>'
    '<span class="scored"><span class="t">scored</span></span>'
    '<span class="scored"><span class="t special">special</span></span>'
    '<span class="scored"><span class="t eos">end</span></span>'
    '<span class="cut">✂ cut off</span> shades tell tokens apart</p>'
)


def _safe(text: str) -> str:
    return escape(visible(text))


def _warnings(facts: Facts) -> str:
    cards = [
        f'<li class="{x["level"]}"><p>{_safe(x["text"])}</p><p class="remedy">{_safe(x["remedy"])}</p></li>'
        for x in facts["warnings"]
    ]
    if not any(x["level"] == "warning" for x in facts["warnings"]):
        cards.insert(0, '<li class="fine"><p>nothing to warn of</p></li>')
    return f'<ul class="advice">{"".join(cards)}</ul>'


def _lines(section: Section) -> str:
    rows, before = [], None
    for label, text in section.lines:
        rows.append(f"<dt>{'' if label == before else _safe(label)}</dt><dd>{_safe(text)}</dd>")
        before = label
    return f"<dl>{''.join(rows)}</dl>"


def _table(facts: Facts) -> str:
    head = "".join(f"<th>{x}</th>" for x in HEADINGS.values())
    rows = [
        f"<tr><th>{name}</th>{''.join(f'<td>{number(values[key])}</td>' for key in HEADINGS)}</tr>"
        for name, values in facts["lengths"].items()
    ]
    head_row = f"<thead><tr><th>tokens</th>{head}</tr></thead>"
    return f'<div class="wide"><table>{head_row}<tbody>{"".join(rows)}</tbody></table></div>'


def _charts(facts: Facts) -> str:
    """Prompt and whole by themselves, completions by class where there are two."""
    drawn, limit = facts["histograms"], facts["truncation"]["max_length"]
    classes = {name: x for name, x in drawn.items() if name not in ("prompt", "whole")}
    order = list(classes)
    figures = [
        _figure("prompt", histogram({"prompt": drawn["prompt"]})),
        _figure(_told(order), histogram({name: classes[name] for name in order})),
        _figure("whole", histogram({"whole": drawn["whole"]}, limit=limit)),
    ]
    return f'<div class="charts">{"".join(figures)}</div>'


def _told(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} ↑ and {names[1]} ↓"


def _figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{caption}, tokens</figcaption>{picture}</figure>"


def _example(index: int, example: Facts) -> str:
    head = f"<h3>{index}. {_safe(example['place'])} <small>{_safe(example['why'])}</small></h3>"
    return f"<article>{head}{''.join(map(_part, example['parts']))}</article>"


def _part(part: Facts) -> str:
    read_only = part["name"] == "prompt"
    cut = f", {number(part['cut'])} more cut off" if part["cut"] else ""
    told = f"{part['name']} <small>{counted(part['tokens'], 'token')} {'read' if read_only else 'scored'}{cut}</small>"
    scissors = '<span class="cut">✂</span>' if part["cut"] else ""
    shown = "".join(_piece(i, x) for i, x in enumerate(part["pieces"]))
    text = scissors + shown if read_only else shown + scissors
    kind = "prompt" if read_only else f"scored {part['name']}"
    return f'<div class="{kind}"><h4>{told}</h4><div class="tokens">{text}</div></div>'


def _piece(index: int, piece: Facts) -> str:
    if "left_out" in piece:
        return f'<span class="left-out">… {number(piece["left_out"])} tokens …</span>'
    if not piece["text"]:
        return ""
    text = _safe(piece["text"]).replace("\n", '<span class="newline">⏎</span>\n')
    odd = " odd" if index % 2 else ""
    return f'<span class="t{odd} {piece["kind"]}">{text}</span>'

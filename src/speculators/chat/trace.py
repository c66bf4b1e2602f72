"""Answers as one HTML page without scripts and without anything from the network."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import accumulate

from speculators.chat.answer import Answer, Drafted, Step, depths_of

__all__ = ["trace_page"]

WIDTH, HEIGHT = 960, 120
"""Of the plot, in CSS pixels."""

SMOOTHED = 12
"""Over how many steps the line of the plot is averaged."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.text a { color: inherit; text-decoration: none; border-left: 1px solid #d0d7de; }
.text a:hover { outline: 1px solid #0969da; }
.drafted { background: #c8ecd0; } .own { background: #fde3c4; } .refused { background: #f6d0d0; }
.unused { background: #eceff2; }
.key span, td.tokens span { border-radius: 3px; padding: 0 .25em; margin-right: .25em;
  white-space: pre; font-family: ui-monospace, monospace; font-size: .85em; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
td, th { border-bottom: 1px solid #d8dee4; padding: .2rem .5rem; vertical-align: top; }
td.number { text-align: right; } tr:target { outline: 2px solid #0969da; }
details summary { cursor: pointer; margin: .5rem 0; }
svg { width: 100%; height: auto; } svg text { font-size: 10px; fill: #57606a; }
"""


def trace_page(title: str, about: Sequence[tuple[str, str]], answers: Iterable[Answer]) -> str:
    """A page that shows, for each step of each answer, what was proposed and what was accepted.

    Args:
        title: of the page, in plain text, as all others.
        about: what the page says about how the answers came about: label → value.
        answers: each with its steps.

    Returns:
        a complete HTML document.

    """
    listed = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in about)
    parts = [_answer(number, answer) for number, answer in enumerate(answers, 1)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>"
        f"<table>{listed}</table>"
        '<p class="key"><span class="drafted">drafted and accepted</span>'
        '<span class="own">the verifier\'s own</span>'
        '<span class="refused">drafted and refused</span>'
        '<span class="unused">drafted after that, so never looked at</span></p>\n'
        "<p>A line in front of a token begins a step, one pass of the verifier: click on it.</p>\n"
        f"{''.join(parts)}</body></html>\n"
    )


def _answer(number: int, answer: Answer) -> str:
    length = answer.acceptance_length
    figures = [f"{answer.tokens} tokens in {len(answer.steps)} passes of the verifier"]
    if length is not None:
        figures.append(f"acceptance length {length:.2f}")
    if answer.seconds > 0:
        figures.append(f"{answer.tokens / answer.seconds:.1f} tokens/s")
    text = "".join(
        f'<a href="#{_name(number, place)}">'
        + "".join(
            f'<span class="{"drafted" if piece.drafted else "own"}">{escape(piece.text)}</span>'
            for piece in step.pieces
        )
        + "</a>"
        for place, step in enumerate(answer.steps)
    )
    rows = "".join(_row(number, place, step) for place, step in enumerate(answer.steps))
    return (
        f"<h2>{number}. {escape(answer.prompt)}</h2>\n<p>{'; '.join(figures)}</p>\n"
        f"{_plot(answer)}\n"
        f'<div class="text">{text}</div>\n<details open><summary>Step by step</summary>\n'
        "<table><thead><tr><th>step</th><th>accepted</th><th>proposed, then the verifier's own"
        f"</th></tr></thead><tbody>\n{rows}</tbody></table></details>\n"
    )


def _name(number: int, place: int) -> str:
    return f"answer-{number}-step-{place}"


def _row(number: int, place: int, step: Step) -> str:
    own = "" if step.own is None else f'<span class="own">{_visible(step.own)}</span>'
    accepted = f"{step.accepted} of {step.offered}" if step.drafted else "prompt"
    shown = "<br>".join(_level(level) for level in _levels(step.drafted))
    return (
        f'<tr id="{_name(number, place)}"><td class="number">{place}</td>'
        f'<td>{accepted}</td><td class="tokens">{shown} {own}</td></tr>\n'
    )


def _levels(drafted: Sequence[Drafted]) -> list[list[tuple[Drafted, bool]]]:
    """The proposal, a chain in one line or a tree by depth, each token with whether it was tried.

    The verifier looks at the children of what it has accepted, and at no others.
    """
    depths = depths_of(drafted)
    is_chain = depths == list(range(1, len(drafted) + 1))
    levels: list[list[tuple[Drafted, bool]]] = []
    for token, depth in zip(drafted, depths, strict=True):
        row = 0 if is_chain else depth - 1
        levels += [[] for _ in range(row + 1 - len(levels))]
        levels[row].append((token, token.parent < 0 or drafted[token.parent].accepted))
    return levels


def _level(tokens: Iterable[tuple[Drafted, bool]]) -> str:
    return "".join(
        f'<span class="{"drafted" if token.accepted else "refused" if tried else "unused"}">'
        f"{_visible(token.text)}</span>"
        for token, tried in tokens
    )


def _visible(text: str) -> str:
    """A token's text, with its white space to be seen."""
    return escape(
        text.replace("\n", "\N{RETURN SYMBOL}").replace("\t", "\N{RIGHTWARDS ARROW TO BAR}")
    )


def _plot(answer: Answer) -> str:
    """Accepted tokens by step along the text: a bar each, and a running mean."""
    steps = [step for step in answer.steps if step.drafted]
    if not steps:
        return ""
    most = max(step.offered for step in steps)
    begins = list(accumulate((step.added for step in answer.steps), initial=0))
    places = [n for n, step in enumerate(answer.steps) if step.drafted]
    across, up = (WIDTH - 40) / max(1, begins[-1]), (HEIGHT - 30) / most

    def x(token: float) -> float:
        return 34 + token * across

    def y(count: float) -> float:
        return HEIGHT - 20 - count * up

    bars = "".join(
        f'<rect x="{x(begins[n]):.1f}" y="{y(step.accepted):.1f}" fill="#8fd19e" '
        f'width="{max(1.0, step.added * across - 1):.1f}" height="{step.accepted * up:.1f}"/>'
        for n, step in zip(places, steps, strict=True)
    )
    points = []
    for last, n in enumerate(places):
        window = steps[max(0, last + 1 - SMOOTHED) : last + 1]
        mean = sum(step.accepted for step in window) / len(window)
        points.append(f"{x(begins[n] + steps[last].added / 2):.1f},{y(mean):.1f}")
    ticks = "".join(
        f'<line x1="34" x2="{WIDTH - 6}" y1="{y(count):.1f}" y2="{y(count):.1f}" stroke="#e4e8ec"/>'
        f'<text x="28" y="{y(count) + 3:.1f}" text-anchor="end">{count}</text>'
        for count in range(most + 1)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="accepted tokens by step">'
        f'{ticks}{bars}<polyline points="{" ".join(points)}" fill="none" stroke="#0969da" '
        f'stroke-width="1.5"/><text x="34" y="{HEIGHT - 4}">drafted tokens accepted in each step, '
        f"along the {begins[-1]} tokens of the answer; the line is the mean of {SMOOTHED} steps"
        "</text></svg>"
    )

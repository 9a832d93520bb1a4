"""LaTeX of tables and sweeps: every number in its place, and escaped names."""

from __future__ import annotations

import re

from fastbgad.experiments.results.latex import escaped, latex_text
from fastbgad.experiments.results.summary import summarize
from tests.experiments.results.conftest import NUMBERS, RESULTS
from tests.made_up_results import result, sweep, table


def assert_sound_latex(text: str) -> None:
    """What LaTeX would stumble over: braces, environments, rows of another length, bare special letters."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    plain = re.sub(r"\\[\\{}&%$#_]", "", body.replace(r"\\", "\n"))
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{([^}]*)\}", body):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    tabulars = re.findall(r"\\begin\{tabular\}\{([lrc]+)\}(.*?)\\end\{tabular\}", body, re.DOTALL)
    assert tabulars
    for align, content in tabulars:
        rows = [line for line in content.splitlines() if line.rstrip().endswith(r"\\")]
        assert len(rows) > 2
        for row in rows:
            spans = [int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            assert len(re.findall(r"(?<!\\)&", row)) + 1 + sum(spans) == len(align), row
        for start, end in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", content):
            assert 2 <= int(start) <= int(end) <= len(align)
    outside = re.sub(r"\\label\{[^}]*\}|\$[^$]*\$", "", plain)
    assert not re.search(r"[_#^~±†−]", outside)


def test_latex_holds_the_numbers_of_both_selections_apart():
    text = latex_text(summarize(table(), RESULTS, NUMBERS))
    assert_sound_latex(text)
    last, best = text.split(r"\begin{table*}")[1:]
    assert r"\label{tab:toy-image-auroc-last}" in last
    assert r"\label{tab:toy-image-auroc-best}" in best
    assert "selects the epoch by the test set" in best
    assert "selects the epoch" not in last
    # NFAD, BGAD, and DRA, which is published only.
    assert r"carpet & 90.00 & 92.00 $\pm$1.41 & +2.00 & -- & \textbf{98.50 $\pm$0.71} & -- & 60.00 \\" in last
    assert r"carpet & 90.00 & 93.00 $\pm$1.41 & +3.00 & -- & \textbf{99.50 $\pm$0.71} & -- & 60.00 \\" in best
    assert r"Mean & 93.00 & 94.00 $\pm$1.41 & +1.00 & 95.00 $\pm$0.20 & \textbf{97.00 (1/2 seeds)} & +2.00" in last


def test_latex_escapes_names_and_survives_emptiness():
    hostile = table(categories=["a_b&c%d#{x}$~^\\"], title="100% \\of_it")
    assert_sound_latex(latex_text(summarize(hostile, {}, NUMBERS)))
    assert escaped("k\udce4rn") == r"k\textbackslash{}xe4rn"
    assert escaped("a_b & 50% {x} \\ BGAD†") == r"a\_b \& 50\% \{x\} \textbackslash{} BGAD$^\dagger$"
    text = latex_text(summarize(table(), {}, NUMBERS))
    assert_sound_latex(text)
    assert "carpet & 90.00 & -- (0/2 cells) & -- & -- & -- (0/2 cells) & -- & 60.00" in text
    assert r"\textbf" not in text


def test_latex_of_several_settings_and_of_sweeps():
    both = table(settings=["one_class", "hard_subsets"])
    text = latex_text(summarize(both, {}))
    assert_sound_latex(text)
    assert r"\multicolumn{7}{l}{\emph{Hard subsets}} \\" in text
    plan = sweep(methods=["bgad", "nfad"])
    there = {one: result(one, 0.9) for one in plan.cells}
    text = latex_text(summarize(plan, there))
    assert_sound_latex(text)
    assert r"0.01 & 90.00 $\pm$0.00 & -- & 90.00 $\pm$0.00 & -- \\" in text
    assert text.count(r"\begin{table*}") == 3

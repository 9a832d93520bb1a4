"""Accuracy on real defect photographs: the parts of `benchmarks/real.py`.

`sets` finds categories and splits them, `grid` names the runs, `bench` measures one, `work` does the missing ones,
`results` keeps them; `summary`, `charts`, `report` and `gallery` make the page.
"""

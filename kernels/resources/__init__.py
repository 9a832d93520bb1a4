"""The ahead-of-time gate: compiles the kernels without a GPU and checks the resources that they need."""

from .budget import BUDGET, SHARED_LIMIT, broken_rules, over_budget, read_budget, updated_budget
from .command import main
from .compilation import Resources, ResourcesError, compile_variant
from .machine_code import count_local_in_loops
from .table import Row, collect, markdown_table, text_table

__all__ = [
    "BUDGET",
    "SHARED_LIMIT",
    "Resources",
    "ResourcesError",
    "Row",
    "broken_rules",
    "collect",
    "compile_variant",
    "count_local_in_loops",
    "main",
    "markdown_table",
    "over_budget",
    "read_budget",
    "text_table",
    "updated_budget",
]

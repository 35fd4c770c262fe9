"""docs/data.md lists the rules as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.contracts.spec import ChecksSpec
from tasks.data.checks import IMAGE_RULES, MODEL_RULES, PAST_RULES, SPLIT_RULES, Rule, limit_text

DOC = (Path(__file__).parents[3] / "docs/data.md").read_text()
RULES = (*IMAGE_RULES, *SPLIT_RULES, *PAST_RULES, *MODEL_RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_is_listed_with_its_default(rule: Rule) -> None:
    (row,) = (line for line in DOC.splitlines() if line.startswith(f"| `{rule.name}` |"))
    limit = rule.limit(ChecksSpec())
    text = limit_text(rule, limit)
    assert row.endswith(f"| {text} | {limit.severity} |")
    assert f"| {rule.says} |" in row


def test_every_limit_of_the_spec_belongs_to_a_rule() -> None:
    """And the other way round, but for the three that are always asked."""
    assert {rule.name for rule in RULES} - set(ChecksSpec.model_fields) == {"decodes", "labelled", "agrees"}
    assert set(ChecksSpec.model_fields) <= {rule.name for rule in RULES}

"""Rules and ClusterConfig: what is chosen, and every message when it cannot be."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchclust import ClusterConfig, cluster_, named_clusterings, summary
from torchclust.model.rules import Candidate, resolve_rules


def net() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "dw": nn.Conv2d(8, 8, 3, groups=8),
            "norm": nn.BatchNorm2d(8),
            "head": nn.Linear(8, 10),
            "tiny": nn.Linear(2, 3),
        }
    )


def chosen(*args: Any, **kwargs: Any) -> dict[str, int]:
    model = cluster_(net(), *args, **kwargs)
    return {name: clustering.n_clusters for name, clustering in named_clusterings(model)}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (16, {"stem.weight": 16, "head.weight": 16}),
        (ClusterConfig(5), {"stem.weight": 5, "head.weight": 5, "tiny.weight": 5}),
        ({"*": 16, "head.weight": 64}, {"stem.weight": 16, "head.weight": 64}),
        ({"*": 16, "stem.*": None}, {"head.weight": 16}),
        ({"stem.*": None, "*": 16}, {"stem.weight": 16, "head.weight": 16}),
        ({"Conv2d": 8}, {"stem.weight": 8}),
        ({"Linear": {"n_clusters": 4}}, {"head.weight": 4, "tiny.weight": 4}),
        ({"dw.weight": 8}, {"dw.weight": 8}),
        ({"dw*": 4}, {"dw.weight": 4, "dw.bias": 4}),
        ({"*.weight": 16}, {"stem.weight": 16, "head.weight": 16}),
        ({"norm.weight": 3, "head.bias": 4}, {"norm.weight": 3, "head.bias": 4}),
    ],
    ids=str,
)
def test_rules_choose(rules: Any, expected: dict[str, int]) -> None:
    assert chosen(rules) == expected


def test_options_are_every_rules_default() -> None:
    rules = {
        "*": 16,
        "head.weight": {"n_clusters": 4, "init": "linear"},
        "stem.*": ClusterConfig(9),
    }
    model = cluster_(net(), rules, init="density", gradient="mean")
    configs = {name: c.config for name, c in named_clusterings(model)}
    assert configs["head.weight"] == ClusterConfig(4, init="linear", gradient="mean")
    assert configs["stem.weight"] == ClusterConfig(9)


@pytest.mark.parametrize(
    ("rules", "options", "error", "message"),
    [
        (
            {"heda.weight": 4},
            {},
            ValueError,
            r"matches no parameter .*did you mean 'head\.weight'\?",
        ),
        ({"Conv3d": 4}, {}, ValueError, r"rule 'Conv3d' matches no .*did you mean 'Conv2d'\?"),
        (
            {"zzzzzz": 4},
            {},
            ValueError,
            r"matches no parameter and no module class; parameters her",
        ),
        (
            {"tiny.weight": 16},
            {},
            ValueError,
            r"cannot cluster 'tiny\.weight' \(Linear, 6 elements\) into 16 clusters: a tensor "
            r"needs more elements than clusters\.\nLower n_clusters, or leave it out:  "
            r'cluster_\(model, \{"\*": 16, "tiny\.weight": None\}\)',
        ),
        ({"*": 1}, {}, ValueError, r"rule '\*': n_clusters must be between 2 and 256, got 1"),
        ({"*": "many"}, {}, TypeError, r"rule '\*' must be an int, a ClusterConfig, a dict of its"),
        ({"*": True}, {}, TypeError, r"rule '\*' must be an int, .*got True"),
        ({4: 4}, {}, TypeError, r"a pattern must be a string such as 'layers\.\*\.weight', got 4"),
        (
            {"*": {"n_cluster": 4}},
            {},
            TypeError,
            "unknown option 'n_cluster' in rule .* mean 'n_clu",
        ),
        (
            "sixteen",
            {},
            TypeError,
            "rules must be an int, a ClusterConfig or a mapping .* got 'sixt",
        ),
        (True, {}, TypeError, "rules must be an int, .*got True"),
        (16, {"initial": "linear"}, TypeError, r"unknown option 'initial' in cluster_\(.*'init'"),
        (16, {"qqq": 1}, TypeError, r"unknown option 'qqq' .*valid: n_clusters, codebook_dtype"),
        (
            16,
            {"n_clusters": 8},
            TypeError,
            r"n_clusters is the second argument: cluster_\(model, 16",
        ),
        (
            {"*": 4},
            {"n_clusters": 8},
            TypeError,
            r"n_clusters is given by the rules; write it ther",
        ),
        (
            ClusterConfig(8),
            {"init": "linear"},
            TypeError,
            r"a ClusterConfig says everything already; put init into it: "
            r"ClusterConfig\(n_clusters=8, init='linear'\)",
        ),
    ],
)
def test_rules_errors(
    rules: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = net()
    with pytest.raises(error, match=message):
        cluster_(model, rules, **options)
    assert not list(named_clusterings(model))


def test_not_strict_warns_and_goes_on() -> None:
    with pytest.warns(UserWarning, match=r"rule 'heda\.weight' matches no parameter"):
        assert chosen({"heda.weight": 4, "head.weight": 5}, strict=False) == {"head.weight": 5}
    with pytest.warns(UserWarning, match="a tensor needs more elements than clusters"):
        assert chosen({"tiny.weight": 16, "head.weight": 5}, strict=False) == {"head.weight": 5}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"n_clusters": 1}, ValueError, "n_clusters must be between 2 and 256, got 1"),
        ({"n_clusters": 257}, ValueError, "n_clusters must be between 2 and 256, got 257"),
        ({"n_clusters": 16.0}, TypeError, r"n_clusters must be an int, got 16\.0"),
        ({"n_clusters": True}, TypeError, "n_clusters must be an int, got True"),
        ({"n_clusters": "16"}, TypeError, "n_clusters must be an int, got '16'"),
        ({"codebook_dtype": "int4"}, ValueError, "codebook_dtype must be one of 'float32', 'int8'"),
        ({"init": "best"}, ValueError, "init must be one of 'optimal', 'linear', 'density', 'rand"),
        ({"granularity": "row"}, ValueError, "granularity must be one of 'tensor', 'channel', 'gr"),
        ({"assignment": "soft"}, ValueError, "assignment must be one of 'fixed', 'nearest', got"),
        ({"gradient": "max"}, ValueError, "gradient must be one of 'sum', 'mean', got 'max'"),
        ({"max_iter": -1}, ValueError, "max_iter must be at least 0, got -1"),
        ({"max_iter": 1.5}, TypeError, r"max_iter must be an int, got 1\.5"),
        ({"preserve_sparsity": 1}, TypeError, "preserve_sparsity must be True or False, got 1"),
        (
            {"n_clusters": 2, "preserve_sparsity": True},
            ValueError,
            "n_clusters must be at least 3 with preserve_sparsity .* got 2",
        ),
        (
            {"n_clusters": 2, "codebook_dtype": "int8"},
            ValueError,
            "n_clusters must be at least 3 with codebook_dtype='int8' .* got 2",
        ),
        (
            {"codebook_dtype": "int8", "granularity": "channel"},
            ValueError,
            "granularity must be 'tensor' with codebook_dtype='int8', got 'channel'",
        ),
        ({"granularity": "group"}, ValueError, "granularity='group' needs group_size"),
        (
            {"granularity": "group", "group_size": 0},
            ValueError,
            "group_size must be at least 1, go",
        ),
        ({"granularity": "group", "group_size": 2.0}, TypeError, "group_size must be an int"),
        ({"group_size": 2}, ValueError, "group_size=2 needs granularity='group', got granular"),
    ],
    ids=str,
)
def test_config_errors(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClusterConfig(**fields)


def test_config_is_frozen_and_survives_json() -> None:
    config = ClusterConfig(7, granularity="group", group_size=3, assignment="nearest")
    assert ClusterConfig.from_json(config.to_json()) == config
    with pytest.raises(AttributeError):
        config.n_clusters = 8  # type: ignore[misc]


def test_summary_says_what_a_rule_left_alone() -> None:
    model = cluster_(net(), {"head.weight": 16})
    skipped = {row.name: row.skipped for row in summary(model).rows}
    assert skipped["head.weight"] is None
    assert skipped["stem.weight"] == "no rule clusters it"
    assert skipped["tiny.weight"] == "a tensor needs more elements than clusters"


NAMES = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(".".join)
PATTERNS = st.lists(st.sampled_from(["a", "b", "*", "?", "."]), min_size=1, max_size=4).map("".join)


@given(
    st.lists(
        st.tuples(NAMES, st.integers(1, 40)), min_size=1, max_size=6, unique_by=lambda t: t[0]
    ),
    st.dictionaries(PATTERNS, st.none() | st.integers(2, 32), max_size=4),
)
def test_the_last_rule_that_matches_wins(
    tensors: list[tuple[str, int]], rules: dict[str, int | None]
) -> None:
    """Over tensors that are all clusterable: the plainest reading of the contract, as a loop."""
    candidates = [Candidate((name,), frozenset({"Linear"}), "Linear", n) for name, n in tensors]
    unmatched = [p for p in rules if not fnmatch.filter([name for name, _ in tensors], p)]
    expected: dict[str, int | None] = {name: None for name, _ in tensors}
    impossible = False
    for name, n in tensors:
        winners = [(p, k) for p, k in rules.items() if fnmatch.fnmatchcase(name, p)]
        if winners and winners[-1][1] is not None:
            pattern, k = winners[-1]
            fits = n > k
            expected[name] = k if fits else None
            impossible |= not fits and pattern == name
    if unmatched or impossible:
        with pytest.raises(ValueError, match=r"matches no parameter|needs more elements"):
            resolve_rules(rules, candidates, {})
        return
    decisions = resolve_rules(rules, candidates, {})
    found = {
        c.name: d.config and d.config.n_clusters for c, d in zip(candidates, decisions, strict=True)
    }
    assert found == expected
    assert all((d.config is None) != (d.skipped is None) for d in decisions)


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text() | st.none(), max_size=3))
def test_any_rules_resolve_or_raise_cleanly(rules: dict[str, Any]) -> None:
    candidates = [Candidate(("fc.weight",), frozenset({"Linear"}), "Linear", 600)]
    try:
        (decision,) = resolve_rules(rules, candidates, {})
    except (TypeError, ValueError) as error:
        assert str(error)  # noqa: PT017
    else:
        assert decision.config is None or 2 <= decision.config.n_clusters <= 256

"""The rows of the papers' ablation and dense tables build, and have the printed sizes or a note.

FLOPs of SecViT's and STViT's rows: test_secvit.py and test_stvit.py.
"""
import bench
import paper_tables
import pytest
import torch


def flatten(tables):
    """pytest parameters, one per row, of a dict of tables."""
    rows = []
    for table, table_rows in tables.items():
        for row in table_rows:
            rows.append(pytest.param(row, id=f"{table}, {row[0]} {row[1]}"))
    return rows


def ablation_parameters(row):
    with torch.device("meta"):
        model = bench.ablation_builder(row)()
    return bench.count_parameters(model) / 1e6


@pytest.mark.parametrize("row", flatten(paper_tables.ABLATIONS))
def test_parameters_of_the_ablations(row):
    assert row.note or bench.matches(row.parameters, [ablation_parameters(row)])


@pytest.mark.parametrize("factory, options, expected", [
    ("clustr_t", {}, "2.16"),
    ("clustr_s", {}, "4.80"),
    ("clustr_b", {}, "7.49"),
    ("clustr_t", paper_tables.SINGLE, "1.99"),
    ("clustr_t", paper_tables.FINER, "2.11"),
    ("clustr_t", paper_tables.SINGLE | dict(aggregation="grid"), "2.10"),
    ("clustr_t", paper_tables.SINGLE | dict(aggregation="knn"), "2.10"),
])
def test_flops_of_clustr_as_the_paper_counts_them(factory, options, expected):
    row = paper_tables.Ablation("", "-", "-", factory, options)
    _, flops, _ = bench.measure_ablation(row)
    assert f"{flops:.2f}" == expected


@pytest.mark.parametrize("row", flatten(paper_tables.DENSE))
def test_parameters_of_the_dense_tables(row):
    same = bench.matches(row.parameters, [bench.dense_parameters(row)])
    assert same == (not row.note or row.parameters == "-")


@pytest.mark.parametrize("options, expected", [
    ({}, ""),
    ({"lce": False, "clusters": (2, 1)}, "lce=False, clusters=(2, 1)"),
    ({"cpe": "r"}, "cpe='r'"),
])
def test_options_are_printed_as_arguments(options, expected):
    assert bench.format_options(options) == expected

"""The papers' ablation and dense tables: what they print and what builds each row here.

Data of `python tests/bench.py --table`. Sizes are strings with the papers' digits, "-" for none.
A note says why ours, rounded, is another value.
"""
from typing import NamedTuple


class Ablation(NamedTuple):
    """A row of an ablation table."""
    title: str
    parameters: str     # in M
    flops: str          # multiply-adds at 224 x 224, in G
    factory: str
    options: dict       # arguments of the factory
    note: str = ""


class Dense(NamedTuple):
    """A row of a table of segmentation, detection or pose."""
    task: str
    backbone: str
    parameters: str     # in M
    options: dict       # arguments of the backbone
    note: str = ""


SINGLE = dict(ratios=((64,), (16,), (4,), (1,)))
FINER = dict(ratios=((16,), (4,), (1,), (1,)))
CLUSTR = {
    "ClusTR, Table 2": [
        Ablation("ClusTR-T", "11.7", "2.2", "clustr_t", {}),
        Ablation("ClusTR-S", "22.7", "4.8", "clustr_s", {}),
        Ablation("ClusTR-B", "40.2", "7.5", "clustr_b", {}),
    ],
    "ClusTR, Table 7: token aggregation": [
        Ablation("grid-based", "13.2", "2.1", "clustr_t", dict(**SINGLE, aggregation="grid")),
        Ablation("clustering", "10.8", "2.0", "clustr_t", SINGLE),
    ],
    "ClusTR, Table 8: sparse attention": [
        Ablation("spatial reduction", "13.2", "2.1", "clustr_t",
                 dict(**SINGLE, aggregation="grid")),
        Ablation("kNN attention", "13.2", "2.1", "clustr_t", dict(**SINGLE, aggregation="knn")),
        Ablation("ClusTR", "10.8", "2.0", "clustr_t", SINGLE),
    ],
    "ClusTR, Table 9: scales": [
        Ablation("single: 64, 16, 4, 1", "10.8", "2.0", "clustr_t", SINGLE),
        Ablation("single: 16, 4, 1, 1", "10.8", "2.1", "clustr_t", FINER),
        Ablation("multi-scale", "11.7", "2.2", "clustr_t", {}),
    ],
}

RELEASED = dict(released=True)
NO_COUNT = "no way of counting gives all four printed values"
SECVIT = {
    "SecViT, Table 6: ablations": [
        Ablation("SEC-Swin-T", "29", "4.9", "sec_swin_t", {},
                 "29 is also printed for Swin-T (28.29); a plain swap of the attention costs less"),
        Ablation("SecViT-T", "15", "2.5", "secvit_t", RELEASED),
        Ablation("SECA -> CSWSA", "15", "2.5", "secvit_t", dict(**RELEASED, attention="csw")),
        Ablation("w/o LCE", "15", "2.5", "secvit_t", dict(**RELEASED, lce=False)),
        Ablation("w/o CPE", "15", "2.5", "secvit_t", dict(**RELEASED, cpe=False)),
        Ablation("w/o Conv Stem", "14", "2.1", "secvit_t", dict(**RELEASED, conv_stem=False)),
    ],
    "SecViT, Table 7: clusters": [
        Ablation("64, 16, 4", "-", "4.3", "secvit_s", dict(**RELEASED, clusters=(64, 16, 4, 1)),
                 NO_COUNT),
        Ablation("64, 16, 2", "-", "4.3", "secvit_s", dict(**RELEASED, clusters=(64, 16, 2, 1)),
                 NO_COUNT),
        Ablation("64, 8, 2", "-", "4.3", "secvit_s", dict(**RELEASED, clusters=(64, 8, 2, 1)),
                 NO_COUNT),
        Ablation("32, 8, 2", "-", "4.4", "secvit_s", RELEASED),
    ],
}

NO_READING = "no reading of the text gives the printed size"
SEPARATE = dict(convolutions=False)
FLAT = dict(**SEPARATE, hierarchical=False, dims=(150,) * 4, heads=(3,) * 4)
LINGLO = {
    "LinGlo, Table 5: layout": [
        Ablation("C-C-H-H", "3.3", "-", "linglo_b0", dict(layout="CCHH"), NO_READING),
        Ablation("C-H-H-H", "3.4", "-", "linglo_b0", dict(layout="CHHH"), NO_READING),
        Ablation("H-H-H-H", "3.4", "-", "linglo_b0", {}, NO_READING),
    ],
    "LinGlo, Table 6: positional encoding": [
        Ablation("CPE", "-", "-", "linglo_b0", dict(cpe="cpe")),
        Ablation("R-CPE", "-", "-", "linglo_b0", dict(cpe="r")),
        Ablation("P-CPE", "-", "-", "linglo_b0", dict(cpe="p")),
        Ablation("RP-CPE", "-", "-", "linglo_b0", {}),
    ],
    "LinGlo, Fig. 4: attention": [
        Ablation("key-only", "-", "-", "linglo_b0", {}),
        Ablation("dot-product", "-", "-", "linglo_b0", dict(attention="dot")),
    ],
    "LinGlo, Fig. 5: inductive biases": [
        Ablation("LinGlo-b0", "-", "-", "linglo_b0", {}),
        Ablation("LinGlo-w/o-C-b0", "-", "-", "linglo_b0", SEPARATE),
        Ablation("LinGlo-w/o-CH", "-", "-", "linglo_b0", FLAT),
    ],
}

BARE = dict(stem="patch", projection=False, position=None, conv_ffn=False)  # STA-4stage
STEM = BARE | dict(stem="conv")
PROJECTION = STEM | dict(projection=True)
SWIN = BARE | dict(depths=(2, 2, 6, 2), dims=(96, 192, 384, 768), heads=(3, 6, 12, 24))
STVIT = {
    "STViT, Table 6: components": [
        Ablation("STA-4stage", "24.1", "3.97", "stvit_s", BARE),
        Ablation("+ Conv Stem", "24.2", "4.26", "stvit_s", STEM),
        Ablation("+ Projection", "25.2", "4.29", "stvit_s", PROJECTION),
        Ablation("+ CPE", "25.3", "4.30", "stvit_s", PROJECTION | dict(position="cpe")),
        Ablation("w/o CPE, + APE", "24.2", "4.26", "stvit_s", PROJECTION | dict(position="ape"),
                 "the paper repeats the values of + Conv Stem"),
        Ablation("w/o CPE, + RPE", "25.3", "4.29", "stvit_s", PROJECTION | dict(position="rpe")),
        Ablation("+ ConvFFN", "25.4", "4.37", "stvit_s", {}, "25.4 is truncated"),
        Ablation("w/o shortcut", "25.4", "4.37", "stvit_s", dict(ffn_shortcut=False),
                 "25.4 is truncated"),
    ],
    "STViT, Table 7: grids and iterations": [
        Ablation("8, 1, 1, 1", "-", "4.97", "stvit_s", BARE | dict(grids=(8, 1, 1, 1))),
        Ablation("8, 4, 1, 1", "-", "3.97", "stvit_s", BARE),
        Ablation("8, 4, 2, 1", "-", "3.27", "stvit_s", BARE | dict(grids=(8, 4, 2, 1))),
        Ablation("4, 2, 1, 1", "-", "4.15", "stvit_s", BARE | dict(grids=(4, 2, 1, 1)),
                 "two iterations would give 4.16"),
        Ablation("0 iterations", "-", "3.93", "stvit_s", BARE | dict(iterations=0)),
        Ablation("2 iterations", "-", "4.00", "stvit_s", BARE | dict(iterations=2)),
    ],
    "STViT, Table 9: isotropic comparison": [
        Ablation("Swin's size", "30", "4.3", "stvit_s", SWIN, "4.3 is truncated"),
        Ablation("STViT-S's size, RPE", "24", "4.0", "stvit_s", BARE | dict(position="rpe")),
        Ablation("STViT-S's size", "24", "4.0", "stvit_s", BARE),
    ],
}
ABLATIONS = CLUSTR | SECVIT | LINGLO | STVIT

LIKE_PVTV2 = "the paper's sizes are those that PVTv2's paper prints"
DENSE = {
    "ClusTR, Tables 3-6": [
        Dense("semfpn", "clustr_s", "26.4", {}),
        Dense("upernet", "clustr_s", "52.5", {}),
        Dense("mask_rcnn", "clustr_s", "42.3", {}),
        Dense("retinanet", "clustr_s", "32.4", {}),
        Dense("pose", "clustr_s", "-", {},
              "the paper does not say which head gave its 59.4 AP; ours is mmpose's plain one"),
    ],
    "SecViT, Tables 3-5": [
        Dense("mask_rcnn", "secvit_t", "34", RELEASED),
        Dense("retinanet", "secvit_t", "24", RELEASED),
        Dense("mask_rcnn", "secvit_s", "45", RELEASED),
        Dense("retinanet", "secvit_s", "35", RELEASED),
        Dense("cascade_mask_rcnn", "secvit_s", "83", RELEASED),
        Dense("mask_rcnn", "secvit_b", "73", RELEASED),
        Dense("retinanet", "secvit_b", "63", RELEASED),
        Dense("cascade_mask_rcnn", "secvit_b", "111", RELEASED),
        Dense("mask_rcnn", "secvit_l", "115", RELEASED),
        Dense("retinanet", "secvit_l", "105", RELEASED),
        Dense("semfpn", "secvit_t", "18", RELEASED),
        Dense("semfpn", "secvit_s", "29", RELEASED),
        Dense("semfpn", "secvit_b", "57", RELEASED),
        Dense("semfpn", "secvit_l", "99", RELEASED),
        Dense("upernet", "secvit_s", "56", RELEASED),
        Dense("upernet", "secvit_b", "84", RELEASED),
        Dense("upernet", "secvit_l", "130", RELEASED, "does not fit the paper's other sizes of L"),
    ],
    "LinGlo, Tables 3-4": [
        Dense("retinanet", "linglo_b0", "13.0", {}, LIKE_PVTV2),
        Dense("retinanet", "linglo_b1", "23.8", {}, LIKE_PVTV2),
        Dense("retinanet", "linglo_b2", "35.1", {}, LIKE_PVTV2),
        Dense("semfpn", "linglo_b0", "7.6", {}, LIKE_PVTV2),
        Dense("semfpn", "linglo_b1", "17.8", {}, LIKE_PVTV2),
        Dense("semfpn", "linglo_b2", "29.1", {}, LIKE_PVTV2),
    ],
    "STViT, Tables 3-5": [
        Dense("mask_rcnn", "stvit_s", "44", {}),
        Dense("mask_rcnn", "stvit_b", "70", {}),
        Dense("mask_rcnn", "stvit_l", "114", {}),
        Dense("cascade_mask_rcnn", "stvit_b", "108", {}),
        Dense("upernet", "stvit_s", "54", {}),
        Dense("upernet", "stvit_b", "80", {}, "80 is truncated"),
        Dense("upernet", "stvit_l", "125", {}),
    ],
}

"""COCO evaluation of train_dense.py: masks and matching against plain loops, exactly."""
import math
import pickle
import random
from bisect import bisect_left

import numpy as np
import pytest

from train_dense import (
    accumulate,
    box_overlaps,
    evaluate_coco,
    mask_overlaps,
    mask_runs,
    match_detections,
    match_image,
    oks,
    polygons_to_mask,
    rle_decode,
    rle_encode,
    segmentation_runs,
)

SQUARE = [2, 3, 6, 3, 6, 8, 2, 8]
SQUARE_RUNS = [27, 5, 7, 5, 7, 5, 7, 5, 76]
SIGMAS = [v / 1000 for v in (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)]  # of COCO's 17 body points
ALL = [(0, 1e10)]


# --------------------------------------------------------------------------------------------------------------- masks
def loop_runs(mask):
    """Run lengths by walking the pixels down the columns."""
    runs, value = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != value:
                runs, value = runs + [0], not value
            runs[-1] += 1
    return runs


def loop_string(runs):
    """COCO's string, one 5-bit group after the other."""
    text = ""
    for i, run in enumerate(runs):
        value, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text += chr(group + 32 * more + 48)
    return text


def loop_polygon(polygon, height, width):
    """Raster of one polygon, point by point, in floating point as COCO's tools do."""
    X, Y = ([math.trunc(5 * c + 0.5) for c in polygon[i::2]] for i in (0, 1))
    points = []
    for xs, ys, xe, ye in zip(X, Y, X[1:] + X[:1], Y[1:] + Y[:1]):
        dx, dy = abs(xe - xs), abs(ye - ys)
        if dx == dy == 0:
            continue
        back = xs > xe if dx >= dy else ys > ye
        if back:
            xs, ys, xe, ye = xe, ye, xs, ys
        slope = (ye - ys) / dx if dx >= dy else (xe - xs) / dy
        for d in range(max(dx, dy) + 1):
            t = max(dx, dy) - d if back else d
            points.append((xs + t, math.trunc(ys + slope * t + 0.5)) if dx >= dy else (math.trunc(xs + slope * t + 0.5), ys + t))
    flips = []
    for (u0, v0), (u, v) in zip(points, points[1:]):
        x = ((u if u < u0 else u - 1) + 0.5) / 5 - 0.5
        if u != u0 and x == math.floor(x) and 0 <= x <= width - 1:
            flips.append(int(x) * height + math.ceil(min(max((min(v, v0) + 0.5) / 5 - 0.5, 0), height)))
    scan = [sum(f <= i for f in flips) % 2 == 1 for i in range(height * width)]
    return np.array(scan, bool).reshape(width, height).T


def some_masks():
    rng = np.random.default_rng(0)
    yield from (np.zeros((5, 7), bool), np.ones((5, 7), bool), np.zeros((1, 1), bool), np.ones((1, 1), bool))
    yield from (rng.random(shape) < 0.5 for shape in ((1, 40), (40, 1), (2, 3), (3, 2)))
    first, last = np.zeros((2, 4, 6), bool)
    first[0, 0] = last[-1, -1] = True
    yield from (first, last)
    bars = np.zeros((300, 250), bool)
    bars[:, 40:200], bars[7] = True, False                                  # runs of one pixel, of hundreds, of thousands
    yield from (bars, ~bars, bars & (np.arange(250) % 60 < 30))
    yield from (rng.random(rng.integers(1, 30, 2)) < rng.choice([0.02, 0.5, 0.98]) for _ in range(100))


@pytest.mark.parametrize("polygons", [[], [[]], [[1, 2]], [[1, 1, 8, 1, 8, 8], [3, 3]]])
def test_polygons_of_fewer_than_three_points_cover_nothing(polygons):
    whole = [polygon for polygon in polygons if len(polygon) >= 6]
    assert np.array_equal(polygons_to_mask(polygons, 9, 9), polygons_to_mask(whole, 9, 9))
    assert polygons_to_mask(polygons, 9, 9).any() == bool(whole)


def test_codec_equals_loops_and_comes_back():
    for mask in some_masks():
        rle, runs = rle_encode(mask), loop_runs(mask)
        assert rle == dict(size=list(mask.shape), counts=loop_string(runs))
        for counts in (rle["counts"], rle["counts"].encode(), runs):
            decoded = rle_decode(dict(rle, counts=counts))
            assert decoded.dtype == bool and decoded.shape == mask.shape and (decoded == mask).all()


def test_runs_of_length_zero_are_no_error():
    expected = rle_decode(dict(size=[2, 3], counts=[0, 3, 3]))
    assert (rle_decode(dict(size=[2, 3], counts=[0, 1, 0, 2, 3, 0])) == expected).all() and expected.sum() == 3


@pytest.mark.parametrize("counts, message", [
    ("k05700000U", "cut off"),                                              # within the last value
    ("k05700000", "add up to 68"),                                          # before it
    ("k05700000U2U2", "add up to"),
    (b"k", "cut off"),
    ("", "cut off"),
    ("k05700000U2\n", "outside '0' to 'o'"),
    ("k05700000U2p", "outside '0' to 'o'"),
    ("k05700000Ué", "outside '0' to 'o'"),
    ("o" * 8 + "0", "9 characters"),
    ("j0", "add up to 26"),
    ("O", "from 0 on"),                                                     # -1
    (SQUARE_RUNS[:-1], "add up to 68 pixels, a 12x12 mask has 144"),
    ([144, 1], "add up to"),
    ([150, -6], "from 0 on"),
    ([72.0, 72.0], "whole numbers"),
    ([[72, 72]], "whole numbers"),
    ([], "whole numbers"),
])
def test_malformed_rle_is_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        rle_decode(dict(size=[12, 12], counts=counts))


def test_only_boolean_masks_are_encoded():
    for mask in (np.zeros((3, 3)), np.zeros((3, 3, 1), bool)):
        with pytest.raises(ValueError, match="boolean mask"):
            rle_encode(mask)


def test_polygon_worked_by_hand():
    mask = polygons_to_mask([SQUARE], 12, 12)
    expected = np.zeros((12, 12), bool)
    expected[3:8, 2:6] = True
    assert (mask == expected).all() and mask_runs(mask).tolist() == SQUARE_RUNS
    assert rle_encode(mask) == dict(size=[12, 12], counts="k05700000U2")


def test_polygons_equal_loops():
    rng = np.random.default_rng(1)
    drawn = 0
    for i in range(400):
        height, width = rng.integers(1, 25, 2).tolist()
        polygons = [rng.uniform(-8, 30, 2 * rng.integers(3, 9)) for _ in range(rng.integers(1, 4))]
        polygons = [np.round(p, i % 3).tolist() for p in polygons]          # halves and fifths meet every rounding
        polygons[0][2:4] = polygons[0][:2]                                  # an edge without length
        expected = np.any([loop_polygon(p, height, width) for p in polygons], 0)
        mask = polygons_to_mask(polygons, height, width)
        assert mask.shape == (height, width) and (mask == expected).all()
        drawn += 0 < mask.mean() < 1
    assert drawn > 200


def test_polygons_are_united_not_flipped():
    other = [4, 5, 9, 5, 9, 10, 4, 10]
    both = polygons_to_mask([SQUARE], 12, 12) | polygons_to_mask([other], 12, 12)
    assert both.sum() == 20 + 25 - 6 and (polygons_to_mask([SQUARE, other], 12, 12) == both).all()
    assert not polygons_to_mask([], 12, 12).any()


def test_four_numbers_are_boxes_if_the_first_polygon_has_four():
    assert (polygons_to_mask([[2, 3, 4, 5]], 12, 12) == polygons_to_mask([SQUARE], 12, 12)).all()
    assert (polygons_to_mask([SQUARE, [0, 0, 9, 9]], 12, 12) == polygons_to_mask([SQUARE], 12, 12)).all()  # two points: no area
    for polygons in ([[2, 3, 4, 5], SQUARE], [SQUARE[:-1]]):
        with pytest.raises(ValueError):
            polygons_to_mask(polygons, 12, 12)


def test_rle_of_another_image_size_is_refused():
    image = dict(id=8, height=12, width=12)
    assert segmentation_runs(dict(segmentation=rle_encode(np.ones((12, 12), bool))), image).tolist() == [0, 144]
    with pytest.raises(ValueError, match="image 8, a result: segmentation: .*in an image of size .12, 12"):
        segmentation_runs(dict(segmentation=rle_encode(np.ones((16, 9), bool))), image)


# ------------------------------------------------------------------------------------------------------------ overlaps
def loop_box(d, g, crowd):
    w, h = min(d[0] + d[2], g[0] + g[2]) - max(d[0], g[0]), min(d[1] + d[3], g[1] + g[3]) - max(d[1], g[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / (d[2] * d[3] if crowd else d[2] * d[3] + g[2] * g[3] - w * h)


def loop_mask(d, g, crowd):
    inter = int((d & g).sum())
    return inter / int(d.sum() if crowd else (d | g).sum()) if inter else 0.0


def loop_oks(d, g, box, area, sigmas):
    """One detection and one object, both flat x, y, v."""
    P, terms = len(sigmas), []
    labelled = [p for p in range(P) if g[3 * p + 2] > 0]
    for p in labelled or range(P):
        if labelled:
            dx, dy = d[3 * p] - g[3 * p], d[3 * p + 1] - g[3 * p + 1]
        else:
            (x, y, w, h), px, py = box, d[3 * p], d[3 * p + 1]
            dx, dy = max(0, x - w - px, px - x - 2 * w), max(0, y - h - py, py - y - 2 * h)
        terms.append(math.exp(-(dx ** 2 + dy ** 2) / (2 * sigmas[p]) ** 2 / (area + 2.0 ** -52) / 2))
    return sum(terms) / len(terms)


def test_box_overlaps_by_hand_and_by_loops():
    one = box_overlaps(np.array([[0.0, 0, 4, 2], [4, 0, 4, 2], [8, 8, 0, 0]]), np.array([[2.0, 0, 4, 4]] * 2), np.array([False, True]))
    assert one.tolist() == [[4 / 20, 4 / 8], [4 / 20, 4 / 8], [0, 0]]
    rng = np.random.default_rng(2)
    dt, gt = rng.uniform(0, 50, (30, 4)), rng.uniform(0, 50, (20, 4))
    dt[:15], gt[:10], crowd = dt[:15].round(-1), gt[:10].round(-1), rng.random(20) < 0.4     # with edges that touch, and empty
    assert box_overlaps(dt, gt, crowd).tolist() == [[loop_box(d, g, c) for g, c in zip(gt, crowd)] for d in dt.tolist()]


def test_mask_overlaps_equal_loops():
    rng = np.random.default_rng(3)
    for shape in ((9, 7), (1, 12), (12, 1), (40, 30)):
        masks = [rng.random(shape) < p for p in (0, 0, 0.1, 0.5, 0.5, 0.9, 1, 1)]
        dt, gt, crowd = masks[::-1], masks, rng.random(8) < 0.5
        overlaps = mask_overlaps([mask_runs(m) for m in dt], [mask_runs(m) for m in gt], crowd)
        assert overlaps.tolist() == [[loop_mask(d, g, c) for g, c in zip(gt, crowd)] for d in dt]
        assert 0 < overlaps.mean() < 1


def test_mask_overlaps_take_runs_of_length_zero():
    crowd = np.array([False])
    assert mask_overlaps([np.array([0, 4, 2])], [np.array([0, 1, 0, 2, 3, 0])], crowd).tolist() == [[3 / 4]]
    assert mask_overlaps([np.array([0, 1, 0, 2, 3, 0])], [np.array([0, 4, 2])], crowd).tolist() == [[3 / 4]]
    assert mask_overlaps([], [np.array([0, 6])], crowd).shape == (0, 1)


def test_oks_by_hand():
    sigmas, box, area = (0.1, 0.2), np.array([[10.0, 20, 5, 4]]), np.array([50.0])
    dt = np.array([[[10, 20, 1], [12, 23, 1]], [[13, 24, 0], [50, 50, 0]]], float)
    both, one, none = (np.array([[[10, 20, v], [15, 27, w]]], float) for v, w in ((2, 1), (1, 0), (0, 0)))
    first, second = math.exp(-25 / 0.04 / 50 / 2), math.exp(-25 / 0.16 / 50 / 2)        # every offset is (3, 4), exactly 5 long
    assert oks(dt[:1], both, box, area, sigmas).item() == pytest.approx((1 + second) / 2, abs=1e-14)
    assert oks(dt, one, box, area, sigmas)[:, 0].tolist() == pytest.approx([1, first], abs=1e-14)
    # enlarged box: x from 5 to 20, y from 16 to 28
    inside, outside = np.array([[[5, 16, 0], [20, 28, 0]], [[2, 32, 0], [23, 12, 0]]], float)
    assert oks(np.stack([inside, outside]), none, box, area, sigmas)[:, 0].tolist() == pytest.approx([1, (first + second) / 2], abs=1e-14)
    assert oks(dt[:1], both, box, np.zeros(1), sigmas).item() == 0.5        # an area of 0 divides by the smallest step instead


def test_oks_equals_loops():
    rng = np.random.default_rng(4)
    for sigmas in (SIGMAS, tuple(rng.uniform(0.01, 0.1, 133))):
        gt = rng.uniform(0, 99, (6, len(sigmas), 3)) * [1, 1, 0]
        gt[:4, :, 2] = rng.integers(0, 3, (4, len(sigmas)))
        dt = gt[rng.integers(0, 6, 9)] + rng.normal(0, 5, (9, len(sigmas), 3))
        boxes, areas = rng.uniform(5, 40, (6, 4)), rng.uniform(50, 5000, 6)
        expected = [[loop_oks(d.ravel().tolist(), g.ravel().tolist(), b, a, sigmas) for g, b, a in zip(gt, boxes, areas)] for d in dt]
        np.testing.assert_allclose(oks(dt, gt, boxes, areas, sigmas), expected, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------ matching
def outcomes(iou, ignored=None, crowd=None, gt_area=None, dt_area=None, ranges=ALL):
    D, G = np.shape(iou)
    no, one = np.zeros(G, bool), np.ones
    outcome, positives = match_detections(np.array(iou, float), np.array(no if ignored is None else ignored, bool),
                                          np.array(no if crowd is None else crowd, bool),
                                          np.array(one(G) if gt_area is None else gt_area, float),
                                          np.array(one(D) if dt_area is None else dt_area, float), ranges)
    assert outcome.shape == (len(ranges), 10, D) and outcome.dtype == np.int8
    return outcome, positives.tolist()


def test_equal_iou_takes_the_later_object():
    # the second detection can only have the earlier object, which the first one must have left
    assert outcomes([[0.8, 0.8], [0.8, 0]])[0][0, 0].tolist() == [1, 1]
    assert outcomes([[0.8, 0.8], [0, 0.8]])[0][0, 0].tolist() == [1, 0]
    assert outcomes([[0.9, 0.8], [0, 0.8]])[0][0, 0].tolist() == [1, 1]


def test_threshold_is_reached_by_equality():
    assert outcomes([[0.5]])[0][0, :, 0].tolist() == [1] + [0] * 9
    assert outcomes([[0.75]])[0][0, :, 0].tolist() == [1] * 6 + [0] * 4
    assert outcomes([[np.nextafter(0.5, 0)]])[0][0, :, 0].tolist() == [0] * 10
    assert outcomes([[1.0]])[0][0, :, 0].tolist() == [1] * 10


def test_an_object_matches_once_a_crowd_region_again_and_again():
    assert outcomes([[0.9], [0.9], [0.9]])[0][0, 0].tolist() == [1, 0, 0]
    outcome, positives = outcomes([[0.9], [0.9], [0.9]], ignored=[True], crowd=[True])
    assert outcome[0, 0].tolist() == [-1, -1, -1] and outcome[0, 9].tolist() == [0, 0, 0] and positives == [0]
    assert outcomes([[0.9], [0.9]], ignored=[True])[0][0, 0].tolist() == [-1, 0]         # ignored, but no crowd


def test_an_ignored_object_comes_after_every_other():
    # column 0 is ignored and overlaps more
    iou = [[0.95, 0.6], [0.9, 0.9]]
    outcome, positives = outcomes(iou, ignored=[True, False])
    assert outcome[0, 0].tolist() == [1, -1]                                # at 0.5 the object is found first
    assert outcome[0, 4].tolist() == [-1, 1]                                # at 0.7 only the ignored one is left for the first
    assert positives == [1]


def test_area_ranges_are_inclusive_and_concern_both_sides():
    ranges = [(0, 1024), (1024, 9216)]
    outcome, positives = outcomes([[0.9, 0], [0, 0], [0, 0.9]], gt_area=[1024, 9217], dt_area=[5000, 1024, 1], ranges=ranges)
    assert positives == [1, 1]
    assert outcome[:, 0].tolist() == [[1, 0, -1], [1, 0, -1]]               # matched ones have the object's range, not their own
    assert outcome[:, 9].tolist() == [[-1, 0, 0], [0, 0, -1]]               # unmatched ones their own


def test_nothing_to_match():
    assert outcomes(np.zeros((3, 0)), dt_area=[1, 2, 3], ranges=[(2, 9)])[0][0, 0].tolist() == [-1, 0, 0]
    outcome, positives = outcomes(np.zeros((0, 2)), ignored=[True, False])
    assert outcome.size == 0 and positives == [1]


# ------------------------------------------------------------------------------------------- whole evaluation, by loops
RANGES = {"": (0, 1e10), "s": (0, 1024), "m": (1024, 9216), "l": (9216, 1e10)}


def loop_match(iou, gt, ignored, dt_area, low, high, threshold):
    """(matched, ignored) of every detection and the number of objects to find."""
    out = [i or g["area"] < low or g["area"] > high for g, i in zip(gt, ignored)]
    order = [j for j in range(len(gt)) if not out[j]] + [j for j in range(len(gt)) if out[j]]
    used, flags = set(), []
    for row, area in zip(iou, dt_area):
        best, found = min(threshold, 1 - 1e-10), None
        for j in order:
            if j in used and not gt[j]["iscrowd"]:
                continue
            if found is not None and not out[found] and out[j]:
                break
            if row[j] >= best:
                best, found = row[j], j
        used.add(found)
        flags.append((found is not None, area < low or area > high if found is None else out[found]))
    return flags, out.count(False)


def loop_evaluate(images, truth, results, kind, categories):
    """Section by section as COCO's evaluation is written down, no vector in sight; the same metrics as evaluate_coco."""
    names = ["", "m", "l"] if kind == "keypoints" else ["", "s", "m", "l"]
    limits = [20] if kind == "keypoints" else [1, 10, 100]
    thresholds, points = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
    pairs, categories = {}, sorted(categories)
    for image in sorted(image["id"] for image in images):
        for k in categories:
            gt = [g for g in truth if (g["image_id"], g["category_id"]) == (image, k)]
            dt = sorted((d for d in results if (d["image_id"], d["category_id"]) == (image, k)), key=lambda d: -d["score"])[:limits[-1]]
            if kind == "bbox":
                iou = [[loop_box(d["bbox"], g["bbox"], g["iscrowd"]) for g in gt] for d in dt]
                areas = [d["bbox"][2] * d["bbox"][3] for d in dt]
            elif kind == "segm":
                iou = [[loop_mask(d["mask"], g["mask"], g["iscrowd"]) for g in gt] for d in dt]
                areas = [int(d["mask"].sum()) for d in dt]
            else:
                iou = [[loop_oks(d["keypoints"], g["keypoints"], g["bbox"], g["area"], SIGMAS) for g in gt] for d in dt]
                areas = [math.prod(max(d["keypoints"][i::3]) - min(d["keypoints"][i::3]) for i in (0, 1)) for d in dt]
            ignored = [g["iscrowd"] or kind == "keypoints" and g["num_keypoints"] == 0 for g in gt]
            pairs.setdefault(k, []).append((gt, dt, iou, ignored, areas))
    precision, recall = {}, {}
    for name in names:
        for i, threshold in enumerate(thresholds):
            for k in categories:
                ranked, positives = [], 0
                for gt, dt, iou, ignored, areas in pairs[k]:
                    flags, count = loop_match(iou, gt, ignored, areas, *RANGES[name], threshold)
                    ranked += [(d["score"], place, *f) for place, (d, f) in enumerate(zip(dt, flags))]
                    positives += count
                for limit in limits:
                    cell = loop_curve([r for r in ranked if r[1] < limit], positives, points)
                    precision[name, limit, i, k], recall[name, limit, i, k] = cell
    def mean(table, name, limit, which=range(10)):
        cells = [table[name, limit, i, k] for i in which for k in categories]
        if table is precision:                                              # thresholds, recall points, categories: numpy's order
            cells = [table[name, limit, i, k][r] for i in which for r in range(101) for k in categories]
        return np.mean([c for c in cells if c > -1]) if any(c > -1 for c in cells) else -1
    top = limits[-1]
    metrics = {"AP": mean(precision, "", top), "AP50": mean(precision, "", top, [0]), "AP75": mean(precision, "", top, [5])}
    metrics |= {f"AP{name}": mean(precision, name, top) for name in names[1:]}
    if kind == "keypoints":
        metrics |= {"AR": mean(recall, "", 20), "AR50": mean(recall, "", 20, [0]), "AR75": mean(recall, "", 20, [5])}
    else:
        metrics |= {f"AR{limit}": mean(recall, "", limit) for limit in limits}
    return metrics | {f"AR{name}": mean(recall, name, top) for name in names[1:]}


def loop_curve(ranked, positives, points):
    """Precision at every recall point and largest recall of (score, place, matched, ignored); -1 without positives."""
    if positives == 0:
        return [-1] * len(points), -1
    tp = fp = 0
    recalls, precisions = [], []
    for _, _, matched, ignored in sorted(ranked, key=lambda r: -r[0]):
        tp, fp = tp + (matched and not ignored), fp + (not matched and not ignored)
        recalls.append(tp / positives)
        precisions.append(tp / (tp + fp + 2.0 ** -52))
    best = [max(precisions[i:]) for i in range(len(precisions))]
    places = [bisect_left(recalls, point) for point in points]
    return [best[p] if p < len(best) else 0 for p in places], recalls[-1] if recalls else 0


CATEGORIES = [7, 2, 5, 11]                                                  # 11 is never annotated and never predicted


def random_box(rng):
    """On a grid of 32, so that IoU ties are common and areas meet the range limits 1024 and 9216."""
    return [32.0 * v for v in (rng.randrange(3), rng.randrange(3), rng.randint(1, 3), rng.randint(1, 3))]


def random_segmentation(rng, form):
    """Mask of 128 x 128 made of 32 x 32 blocks, and as polygons, list of counts or string."""
    blocks = [(x, y) for x in range(0, 128, 32) for y in range(0, 128, 32) if rng.random() < rng.choice((0.2, 0.6, 0.9))]
    mask = np.zeros((128, 128), bool)
    for x, y in blocks:
        mask[y:y + 32, x:x + 32] = True
    polygons = [[x, y, x + 32, y, x + 32, y + 32, x, y + 32] for x, y in blocks]
    return dict(mask=mask, segmentation={"polygons": polygons, "string": rle_encode(mask),
                                         "list": dict(size=[128, 128], counts=mask_runs(mask).tolist())}[form])


def random_problem(rng, kind):
    """Images, annotations, results: many equal scores and overlaps, crowds, empty images, images with results only."""
    images = [dict(id=i, height=128, width=128) for i in rng.sample(range(40), rng.randint(1, 4))]
    truth, results = [], []
    for image in images:
        for _ in range(rng.choice((0, 1, 4, 7))):
            points = [[rng.randrange(128), rng.randrange(128), rng.randrange(3)] for _ in SIGMAS]
            points = [[x, y, 0] for x, y, _ in points] if rng.random() < 0.2 else points
            g = dict(image_id=image["id"], category_id=rng.choice((2, 5)), bbox=random_box(rng), iscrowd=int(rng.random() < 0.2),
                     id=len(truth), area=rng.choice((500, 1024, 1025.5, 5000, 9216, 9217, 20000)))
            if kind == "segm":
                g |= random_segmentation(rng, "list" if g["iscrowd"] else rng.choice(("polygons", "string")))
            truth.append(g | dict(keypoints=sum(points, []), num_keypoints=sum(v > 0 for *_, v in points)))
        near = [g["keypoints"] for g in truth if g["image_id"] == image["id"]] or [[rng.randrange(128) for _ in range(51)]]
        many = {"bbox": 230, "segm": 30, "keypoints": 50}[kind]             # over three categories
        for _ in range(rng.choice((0, 2, 6, 12, 12, 12, many))):
            d = dict(image_id=image["id"], category_id=rng.choice((2, 5, 5, 7)), score=rng.choice((0, 0.25, 0.5, 0.75, 1.0)))
            if kind == "keypoints":
                scale = rng.choice((0, 3, 8))
                d["keypoints"] = [float(c + rng.randint(-1, 1) * scale) for c in rng.choice(near)]
            elif kind == "segm":
                d |= random_segmentation(rng, "string")
            else:
                d["bbox"] = random_box(rng)
            results.append(d)
    return images, truth, results


@pytest.mark.parametrize("kind, problems", [("bbox", 250), ("segm", 120), ("keypoints", 120)])
def test_metrics_equal_loops(kind, problems):
    rng, seen, crowded = random.Random(kind), set(), 0
    for _ in range(problems):
        images, truth, results = random_problem(rng, kind)
        expected = loop_evaluate(images, truth, results, kind, CATEGORIES)
        metrics = evaluate_coco(images, truth, results, kind, CATEGORIES)
        assert metrics == expected and list(metrics) == list(expected)      # exactly, to the last bit
        assert {type(value) for value in metrics.values()} == {float}
        seen |= {(name, value) for name, value in metrics.items()}
        crowded += any(sum(r["image_id"] == i["id"] and r["category_id"] == 5 for r in results) > 100 for i in images)
    for name in metrics:                                                    # each metric was missing, and took many values
        assert (name, -1.0) in seen and len([value for key, value in seen if key == name]) > problems // 10
    assert crowded or kind != "bbox"


def test_names_of_the_metrics():
    boxes, points = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl", "AP AP50 AP75 APm APl AR AR50 AR75 ARm ARl"
    for kind, names in (("bbox", boxes), ("segm", boxes), ("keypoints", points)):
        assert evaluate_coco([dict(id=1)], [], [], kind, [1]) == dict.fromkeys(names.split(), -1.0)


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_perfect_results_reach_one(kind):
    rng = random.Random(0)
    problems = [random_problem(rng, kind) for _ in range(5)]
    for i, (images, truth, _) in enumerate(problems):
        for x in (*images, *truth):
            x["image_id" if "image_id" in x else "id"] += 100 * i
    images, truth = (sum((p[j] for p in problems), []) for j in (0, 1))
    for number, g in enumerate(truth):                                      # no two objects overlap
        g["bbox"], g["num_keypoints"] = [100 * number, 0, 20, 50], 17
        g["keypoints"] = [1 if i % 3 == 2 else c + 10 ** 4 * number for i, c in enumerate(g["keypoints"])]
        g["mask"] = np.zeros((128, 128), bool)
        g["mask"][number % 128, 64 * (number // 128):][:64] = True
        g["segmentation"] = rle_encode(g["mask"])
    results = [{k: g[k] for k in ("image_id", "category_id", "bbox", "segmentation", "keypoints")} | dict(score=1.0)
               for g in truth if not g["iscrowd"]]
    metrics = evaluate_coco(images, truth, results, kind, CATEGORIES)
    assert 1 - 1e-14 < min(metrics[name] for name in metrics if name not in ("AR1", "AR10")) <= max(metrics.values()) <= 1


def one_image(boxes, detections, **more):
    """Truth and results of image 1, category 1: boxes, and (box, score) pairs."""
    truth = [dict(id=i, image_id=1, category_id=1, bbox=b, area=b[2] * b[3], iscrowd=0) | more for i, b in enumerate(boxes)]
    return [dict(id=1)], truth, [dict(image_id=1, category_id=1, bbox=b, score=s) for b, s in detections]


def test_metrics_worked_by_hand():
    a, b, c = [0, 0, 40, 40], [100, 0, 40, 40], [200, 0, 40, 40]
    metrics = evaluate_coco(*one_image([a, b], [(a, 0.9), (c, 0.8), (b, 0.7)]), "bbox", [1])
    # recall 0.5 at precision 1, recall 1 at 2 / 3: 51 and 50 of the 101 points; eps is below half a unit of 1 and of 3
    assert metrics["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-15)
    assert (metrics["AR1"], metrics["AR10"], metrics["APs"], metrics["ARm"]) == (0.5, 1, -1, 1)
    missed = evaluate_coco(*one_image([a, b], [(c, 0.8)]), "bbox", [1])
    assert (missed["AP"], missed["AR100"]) == (0, 0)                        # nothing found is 0, not missing
    assert evaluate_coco(*one_image([a], []), "bbox", [1])["AR100"] == 0


def test_an_object_with_id_0_counts_as_matched():
    metrics = evaluate_coco(*one_image([[0, 0, 40, 40]], [([0, 0, 40, 40], 0.5)]), "bbox", [1])
    assert (metrics["AP"], metrics["AR1"]) == (pytest.approx(1, abs=1e-15), 1)           # 1 / (1 + eps), as in COCO's tools


def test_size_split_takes_the_annotated_area():
    box = [0, 0, 40, 40]                                                    # 1600: medium
    metrics = evaluate_coco(*one_image([box], [(box, 0.5)], area=900), "bbox", [1])
    assert (metrics["ARs"], metrics["ARm"]) == (1, -1)


def test_an_area_in_the_keypoint_result_goes_first():
    truth = dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 70, 70], area=2000, iscrowd=0)
    truth |= dict(keypoints=[9, 9, 2, 60, 60, 2], num_keypoints=2)
    far = dict(image_id=1, category_id=1, keypoints=[500, 500, 1, 550, 550, 1], score=0.9)          # 2500: medium
    good = dict(far, keypoints=truth["keypoints"], score=0.5)
    metrics = [evaluate_coco([dict(id=1)], [truth], [dict(far, **area), good], "keypoints", [1], sigmas=(0.1, 0.1))["APm"]
               for area in ({}, dict(area=99999))]
    assert metrics == pytest.approx([0.5, 1], abs=1e-15)


@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_images_can_be_matched_anywhere_and_gathered_in_any_order(kind):
    rng = random.Random(1)
    for _ in range(20):
        images, truth, results = random_problem(rng, kind)
        matches = [match_image(i, *([x for x in xs if x["image_id"] == i["id"]] for xs in (truth, results)), kind)
                   for i in images]
        matches = pickle.loads(pickle.dumps(rng.sample(matches, len(matches))))
        assert accumulate(matches, kind, CATEGORIES[::-1]) == evaluate_coco(images, truth, results, kind, CATEGORIES)


def test_other_images_and_categories_are_left_out():
    images, truth, results = random_problem(random.Random(3), "bbox")
    expected = evaluate_coco(images, truth, results, "bbox", [2])
    others = [dict(x, image_id=99) for x in (*truth, *results)]
    mine = [[x for x in xs if x["category_id"] == 2] for xs in (truth, results)]
    assert 0 < expected["AP"] < 1 and evaluate_coco(images, *mine, "bbox", [2]) == expected
    assert evaluate_coco(images, truth + others[:len(truth)], others[len(truth):] + results, "bbox", [2]) == expected


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(score):
    with pytest.raises(ValueError, match="image 1 has a score"):
        evaluate_coco(*one_image([], [([0, 0, 9, 9], score)]), "bbox", [1])


def test_a_wrong_number_of_keypoints_is_refused():
    result = dict(image_id=1, category_id=1, keypoints=[0.0] * 51, score=1.0)
    with pytest.raises(ValueError, match="51"):
        evaluate_coco([dict(id=1)], [], [result], "keypoints", [1], sigmas=(0.1,) * 133)

"""COCO's files, masks and metrics: checks of JSON files; masks and matching against plain loops."""
import json
import math
import pickle
import random
from bisect import bisect_left

import numpy as np
import pytest

import train_dense

SQUARE = [2, 3, 6, 3, 6, 8, 2, 8]
SQUARE_RUNS = [27, 5, 7, 5, 7, 5, 7, 5, 76]
BODY_SIGMAS = (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)
SIGMAS = [sigma / 1000 for sigma in BODY_SIGMAS]    # of COCO's 17 points
ALL = [(0, 1e10)]


# --------------------------------------------------------------------------------- annotation files
HUGE = 10 ** 400                                    # no float64
DEEP = "[" * 100_000 + "]" * 100_000


def valid_annotations():
    image = dict(id=7, width=64, height=48, file_name="a.jpg")
    other = dict(id=8, width=20, height=30, file_name="folder/b.jpg")
    annotation = dict(id=3, image_id=7, category_id=5, bbox=[1, 2, 3.5, 4], area=9, iscrowd=0)
    category = dict(id=5, name="cat")
    return dict(
        images=[image, other],
        annotations=[annotation, dict(annotation, id=4)],
        categories=[category, dict(category, id=6)],
    )


def read_changed(folder, data):
    """What read_annotations makes of `data`, a dict or JSON text."""
    text = data if isinstance(data, str) else json.dumps(data)
    file = folder / "annotations.json"
    file.write_text(text)
    return train_dense.read_annotations(file)


def message_of(function, *arguments):
    with pytest.raises(train_dense.InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("key, change, message", [
    ("annotations", {"image_id": 999}, "annotation 3: unknown image id 999"),
    ("annotations", {"image_id": None}, "annotation 3: image_id None, expected a whole number"),
    ("annotations", {"image_id": [1]}, "annotation 3: image_id [1], expected a whole number"),
    ("annotations", {"image_id": "a7"}, "annotation 3: image_id 'a7', expected a whole number"),
    ("annotations", {"image_id": 7.5}, "annotation 3: image_id 7.5, expected a whole number"),
    ("annotations", {"category_id": 99}, "annotation 3: unknown category id 99"),
    ("annotations", {"category_id": "x"}, "annotation 3: category_id 'x', expected a whole"),
    ("annotations", {"id": "a-b"}, "annotation 'a-b': id 'a-b', expected a whole number"),
    ("annotations", {"id": HUGE}, "expected a whole number"),
    ("annotations", {"id": True}, "annotation True: id True, expected a whole number"),
    ("annotations", {"bbox": [1, 2, 3]}, "annotation 3: bbox [1, 2, 3], expected x, y, width"),
    ("annotations", {"bbox": [1, 2, 3, math.inf]}, "annotation 3: bbox [1, 2, 3, inf], expected"),
    ("annotations", {"bbox": [1, 2, 3, math.nan]}, "annotation 3: bbox [1, 2, 3, nan], expected"),
    ("annotations", {"bbox": [1, 2, 3, HUGE]}, "annotation 3: bbox [1, 2, 3, 1000"),
    ("annotations", {"bbox": [1, 2, 3, 1e30]}, "annotation 3: bbox [1, 2, 3, 1e+30], expected"),
    ("annotations", {"bbox": ["1", 2, 3, 4]}, "annotation 3: bbox ['1', 2, 3, 4], expected"),
    ("annotations", {"bbox": None}, "annotation 3: bbox None, expected x, y, width, height"),
    ("annotations", {"area": None}, "annotation 3: area None, expected a finite number"),
    ("annotations", {"area": HUGE}, "annotation 3: area 1000"),
    ("annotations", {"area": math.nan}, "annotation 3: area nan, expected a finite number"),
    ("annotations", {"iscrowd": 2}, "annotation 3: iscrowd 2, expected 0 or 1"),
    ("annotations", {"iscrowd": "yes"}, "annotation 3: iscrowd 'yes', expected 0 or 1"),
    ("annotations", {"iscrowd": []}, "annotation 3: iscrowd [], expected 0 or 1"),
    ("images", {"id": "a"}, "image 'a': id 'a', expected a whole number"),
    ("images", {"id": None}, "image without id at index 0: id None, expected a whole number"),
    ("images", {"width": 0}, "image 7: width 0, expected a whole number from 1 to 65535"),
    ("images", {"width": 10 ** 8}, "image 7: width 100000000, expected a whole number from 1 to"),
    ("images", {"height": -4}, "image 7: height -4, expected a whole number from 1 to 65535"),
    ("images", {"height": HUGE}, "image 7: height 1000"),
    ("images", {"height": 9.5}, "image 7: height 9.5, expected a whole number"),
    ("images", {"height": math.nan}, "image 7: height nan, expected a whole number"),
    ("images", {"height": None}, "image 7: height None, expected a whole number"),
    ("images", {"file_name": None}, "image 7: file_name None, expected a path inside the image"),
    ("images", {"file_name": ""}, "image 7: file_name '', expected a path inside"),
    ("images", {"file_name": "."}, "image 7: file_name '.', expected a path inside"),
    ("images", {"file_name": "/etc/a.jpg"}, "image 7: file_name '/etc/a.jpg', expected a path"),
    ("images", {"file_name": "../a.jpg"}, "image 7: file_name '../a.jpg', expected a path inside"),
    ("images", {"file_name": "b/../../a.jpg"}, "image 7: file_name 'b/../../a.jpg', expected"),
    ("images", {"file_name": "a\0.jpg"}, r"image 7: file_name 'a\x00.jpg', expected a path inside"),
    ("images", {"file_name": "\ud800.jpg"}, r"image 7: file_name '\ud800.jpg', expected a path"),
    ("categories", {"name": None}, "category 5: name None, expected a name"),
    ("categories", {"name": "\udfff"}, r"category 5: name '\udfff', expected a name"),
])
def test_a_bad_value_in_annotations_names_file_id_and_field(tmp_path, key, change, message):
    data = valid_annotations()
    data[key][0].update(change)
    text = message_of(read_changed, tmp_path, data)
    assert str(tmp_path / "annotations.json") in text
    assert message in text
    assert len(text) < 200 + len(str(tmp_path))


@pytest.mark.parametrize("key, number", [
    ("images", 8), ("images", "8"), ("annotations", 4), ("annotations", "4"), ("categories", 6)])
def test_an_id_that_occurs_twice_is_named(tmp_path, key, number):
    data = valid_annotations()
    data[key][0]["id"] = number
    kind = {"images": "image", "annotations": "annotation", "categories": "category"}[key]
    text = message_of(read_changed, tmp_path, data)
    file = tmp_path / "annotations.json"
    assert text == f"{file}: {kind} {int(number)}: another {kind} has the same id"


OTHER_FILES = {
    "empty": "",
    "cut off": '{"images": [',
    "a deep list": DEEP,
    "a deep list of images": '{"images": ' + DEEP + "}",
    "too many digits": '{"images": 1' + "0" * 5000 + "}",
    "a list": "[]",
    "a number": "7",
    "null as images": dict(valid_annotations(), images=None),
    "a dict as images": dict(valid_annotations(), images={"id": 7}),
    "a number as annotation": dict(valid_annotations(), annotations=[7]),
    "a string as category": dict(valid_annotations(), categories=["cat"]),
    "no annotations": dict(images=[], categories=[]),
    "no images": dict(annotations=[], categories=[]),
    "no categories": dict(annotations=[], images=[]),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_no_annotation_files(tmp_path, name):
    text = message_of(read_changed, tmp_path, OTHER_FILES[name])
    assert f"{tmp_path / 'annotations.json'} is no COCO annotation file" in text


def test_a_file_that_is_not_text_or_missing(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xff\xd8\xff\xe0")
    assert f"{file} is no COCO annotation file" in message_of(train_dense.read_annotations, file)
    missing = message_of(train_dense.read_annotations, tmp_path / "b.json")
    assert missing == f"cannot read {tmp_path / 'b.json'}: No such file or directory"
    assert f"cannot read {tmp_path}" in message_of(train_dense.read_annotations, tmp_path)


def test_valid_annotations_are_returned_as_they_are(tmp_path):
    data = valid_annotations()
    assert read_changed(tmp_path, data) == data


def test_ids_in_quotes_become_numbers(tmp_path):
    data = valid_annotations()
    for key in data:
        for entry in data[key]:
            entry["id"] = str(entry["id"])
    for annotation in data["annotations"]:
        annotation["image_id"] = "7"
        annotation["category_id"] = 5.0
    data["images"][0]["width"] = 64.0
    read = read_changed(tmp_path, data)
    assert read == valid_annotations()
    assert type(read["images"][0]["width"]) is int
    assert type(read["annotations"][0]["category_id"]) is int


def test_optional_fields_of_annotations(tmp_path):
    data = valid_annotations()
    first, second = data["annotations"]
    del first["id"], first["iscrowd"]
    second.update(id=None, iscrowd=None)
    read = read_changed(tmp_path, data)["annotations"]
    assert [annotation["iscrowd"] for annotation in read] == [0, 0]


def test_an_annotation_without_id_is_named_by_its_index(tmp_path):
    data = valid_annotations()
    data["annotations"][1].update(id=None, area="large")
    text = message_of(read_changed, tmp_path, data)
    assert "annotation without id at index 1: area 'large', expected a finite number" in text


def test_extreme_but_valid_annotations(tmp_path):
    data = valid_annotations()
    data["images"][0].update(width=65535, height=1, file_name="a/../..b.jpg", id=-(2 ** 62))
    data["annotations"] = [dict(data["annotations"][0], image_id=-(2 ** 62), area=1e308)]
    assert read_changed(tmp_path, data) == data


# ------------------------------------------------------------------------------------ results files
def read_changed_results(folder, results, *arguments):
    text = results if isinstance(results, str) else json.dumps(results)
    file = folder / "results.json"
    file.write_text(text)
    return train_dense.read_results(file, *arguments)


VALID_RESULT = dict(image_id=7, category_id=5, score=0.5, bbox=[1, 2, 3, 4])


@pytest.mark.parametrize("change, message", [
    ({"image_id": 77}, "unknown image id 77"),
    ({"image_id": [7]}, "image_id [7], expected a whole number"),
    ({"image_id": "x7"}, "image_id 'x7', expected a whole number"),
    ({"image_id": HUGE}, "image_id 1000"),
    ({"category_id": 6}, "unknown category id 6"),
    ({"category_id": None}, "category_id None, expected a whole number"),
    ({"score": None}, "score None, expected a finite number"),
    ({"score": "0.5"}, "score '0.5', expected a finite number"),
    ({"score": math.nan}, "score nan, expected a finite number"),
    ({"score": math.inf}, "score inf, expected a finite number"),
    ({"score": HUGE}, "score 1000"),
    ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3], expected x, y, width, height, numbers"),
    ({"bbox": [1, 2, 3, math.nan]}, "bbox [1, 2, 3, nan], expected x, y, width, height"),
    ({"bbox": [1, 2, 3, HUGE]}, "bbox [1, 2, 3, 1000"),
    ({"bbox": [1, 2], "segmentation": []}, "bbox [1, 2], expected x, y, width, height"),
])
def test_a_bad_result_names_file_image_and_field(tmp_path, change, message):
    result = VALID_RESULT | change
    text = message_of(read_changed_results, tmp_path, [VALID_RESULT, result], {7}, {5})
    shown = f"{result['image_id']!r:.60}"
    assert f"{tmp_path / 'results.json'}: result 1, image {shown}: {message}" in text


def test_a_result_without_a_field_is_named():
    results = [VALID_RESULT, VALID_RESULT | {"bbox": None}]
    text = message_of(train_dense.check_fields, "results.json", results, ["bbox"])
    assert text == "results.json: result 1, image 7: expected a bbox"


def test_results_are_written_in_order_of_their_images(tmp_path):
    results = [VALID_RESULT | {"image_id": i, "score": 1 / (1 + i)} for i in (9, 2, 9, 5)]
    path = tmp_path / "results.json"
    train_dense.write_coco_results(path, results)
    assert train_dense.read_results(path) == [results[i] for i in (1, 3, 0, 2)]


OTHER_RESULTS = {
    "a dict": "{}",
    "cut off": "[[",
    "a number": "7",
    "a number as result": "[7]",
    "a deep list": DEEP,
    "annotations": valid_annotations(),
}


@pytest.mark.parametrize("name", OTHER_RESULTS)
def test_other_files_are_no_results_files(tmp_path, name):
    text = message_of(read_changed_results, tmp_path, OTHER_RESULTS[name])
    assert f"{tmp_path / 'results.json'} is no COCO results file" in text


def test_results_of_every_kind(tmp_path):
    base = {key: VALID_RESULT[key] for key in ("image_id", "category_id", "score")}
    results = [VALID_RESULT, base | {"segmentation": []}, base | {"keypoints": [1, 2, 3]}]
    assert read_changed_results(tmp_path, results) == results
    assert read_changed_results(tmp_path, results, {7, 8}, {5}) == results
    assert read_changed_results(tmp_path, []) == []


def test_result_ids_in_quotes_become_numbers(tmp_path):
    result = VALID_RESULT | dict(image_id="7", category_id="5")
    assert read_changed_results(tmp_path, [result], {7}, {5}) == [VALID_RESULT]


def test_results_may_hold_ids_of_their_own(tmp_path):
    results = [VALID_RESULT | dict(id=[1]), VALID_RESULT | dict(id=[1])]
    assert read_changed_results(tmp_path, results) == results


# -------------------------------------------------------------------------------------------- masks
def loop_runs(mask):
    """Run lengths by walking the pixels down the columns."""
    runs = [0]
    value = False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != value:
                runs.append(0)
                value = not value
            runs[-1] += 1
    return runs


def loop_string(runs):
    """COCO's string, one 5-bit group after the other."""
    text = ""
    for i, run in enumerate(runs):
        value = run - (runs[i - 2] if i > 2 else 0)
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            text += chr(group + 32 * more + 48)
    return text


def loop_edge(xs, ys, xe, ye):
    """Points of one edge on the fine grid, from its start to its end."""
    dx = abs(xe - xs)
    dy = abs(ye - ys)
    if dx == dy == 0:
        return []
    reverse = xs > xe if dx >= dy else ys > ye
    if reverse:
        xs, xe = xe, xs
        ys, ye = ye, ys
    slope = (ye - ys) / dx if dx >= dy else (xe - xs) / dy
    points = []
    for d in range(max(dx, dy) + 1):
        t = max(dx, dy) - d if reverse else d
        if dx >= dy:
            points.append((xs + t, math.trunc(ys + slope * t + 0.5)))
        else:
            points.append((math.trunc(xs + slope * t + 0.5), ys + t))
    return points


def loop_polygon(polygon, height, width):
    """Raster of one polygon, point by point, in floating point as COCO's tools do."""
    X = [math.trunc(5 * c + 0.5) for c in polygon[0::2]]
    Y = [math.trunc(5 * c + 0.5) for c in polygon[1::2]]
    points = []
    for edge in zip(X, Y, X[1:] + X[:1], Y[1:] + Y[:1]):
        points += loop_edge(*edge)
    crossings = []
    for (u0, v0), (u, v) in zip(points, points[1:]):
        x = ((u if u < u0 else u - 1) + 0.5) / 5 - 0.5
        if u != u0 and x == math.floor(x) and 0 <= x <= width - 1:
            y = (min(v, v0) + 0.5) / 5 - 0.5
            crossings.append(int(x) * height + math.ceil(min(max(y, 0), height)))
    scan = []
    for i in range(height * width):
        scan.append(sum(crossing <= i for crossing in crossings) % 2 == 1)
    return np.array(scan, bool).reshape(width, height).T


def some_masks():
    rng = np.random.default_rng(0)
    for shape in ((5, 7), (1, 1)):
        yield np.zeros(shape, bool)
        yield np.ones(shape, bool)
    for shape in ((1, 40), (40, 1), (2, 3), (3, 2)):
        yield rng.random(shape) < 0.5
    first, last = np.zeros((2, 4, 6), bool)
    first[0, 0] = True
    last[-1, -1] = True
    yield first
    yield last
    bars = np.zeros((300, 250), bool)
    bars[:, 40:200] = True
    bars[7] = False                                 # runs of one pixel, of hundreds, of thousands
    yield bars
    yield ~bars
    yield bars & (np.arange(250) % 60 < 30)
    for _ in range(100):
        yield rng.random(rng.integers(1, 30, 2)) < rng.choice([0.02, 0.5, 0.98])


@pytest.mark.parametrize("polygons", [[], [[]], [[1, 2]], [[1, 1, 8, 1, 8, 8], [3, 3]]])
def test_polygons_of_fewer_than_three_points_cover_nothing(polygons):
    whole = [polygon for polygon in polygons if len(polygon) >= 6]
    mask = train_dense.polygons_to_mask(polygons, 9, 9)
    assert np.array_equal(mask, train_dense.polygons_to_mask(whole, 9, 9))
    assert mask.any() == bool(whole)


def test_encoder_equals_loops():
    for mask in some_masks():
        counts = loop_string(loop_runs(mask))
        assert train_dense.rle_encode(mask) == dict(size=list(mask.shape), counts=counts)


@pytest.mark.parametrize("form", ["string", "bytes", "list"])
def test_decoder_restores_the_mask(form):
    for mask in some_masks():
        counts = loop_runs(mask)
        if form != "list":
            counts = loop_string(counts)
        if form == "bytes":
            counts = counts.encode()
        decoded = train_dense.rle_decode(dict(size=list(mask.shape), counts=counts))
        assert decoded.dtype == bool
        assert np.array_equal(decoded, mask)


def test_runs_of_length_zero_are_no_error():
    expected = train_dense.rle_decode(dict(size=[2, 3], counts=[0, 3, 3]))
    decoded = train_dense.rle_decode(dict(size=[2, 3], counts=[0, 1, 0, 2, 3, 0]))
    assert (decoded == expected).all()
    assert expected.sum() == 3


@pytest.mark.parametrize("counts, message", [
    ("k05700000U", "cut off"),                      # within the last value
    ("k05700000", "add up to 68"),                  # before it
    ("k05700000U2U2", "add up to"),
    (b"k", "cut off"),
    ("", "cut off"),
    ("k05700000U2\n", "outside '0' to 'o'"),
    ("k05700000U2p", "outside '0' to 'o'"),
    ("k05700000Ué", "outside '0' to 'o'"),
    ("o" * 8 + "0", "9 characters"),
    ("j0", "add up to 26"),
    ("O", ">= 0"),                                  # -1
    (SQUARE_RUNS[:-1], "add up to 68, a 12x12 mask has 144"),
    ([144, 1], "add up to"),
    ([150, -6], ">= 0"),
    ([2 ** 63 - 1, 2 ** 63 - 1, 146], "add up to 18446744073709551760"),
    ([HUGE], "whole numbers"),
    ([72.0, 72.0], "whole numbers"),
    ([[72, 72]], "whole numbers"),
    ([], "whole numbers"),
])
def test_malformed_rle_is_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        train_dense.rle_decode(dict(size=[12, 12], counts=counts))


@pytest.mark.parametrize("mask", [np.zeros((3, 3)), np.zeros((3, 3, 1), bool)])
def test_only_boolean_masks_are_encoded(mask):
    with pytest.raises(ValueError, match="boolean mask"):
        train_dense.rle_encode(mask)


def test_polygon_worked_by_hand():
    mask = train_dense.polygons_to_mask([SQUARE], 12, 12)
    expected = np.zeros((12, 12), bool)
    expected[3:8, 2:6] = True
    assert (mask == expected).all()
    assert train_dense.mask_runs(mask).tolist() == SQUARE_RUNS
    assert train_dense.rle_encode(mask) == dict(size=[12, 12], counts="k05700000U2")


def test_polygons_equal_loops():
    rng = np.random.default_rng(1)
    neither_empty_nor_full = 0
    for i in range(400):
        height, width = rng.integers(1, 25, 2).tolist()
        polygons = [rng.uniform(-8, 30, 2 * rng.integers(3, 9)) for _ in range(rng.integers(1, 4))]
        polygons = [np.round(p, i % 3).tolist() for p in polygons]  # fifths, halves: all roundings
        polygons[0][2:4] = polygons[0][:2]          # an edge without length
        expected = np.any([loop_polygon(p, height, width) for p in polygons], 0)
        mask = train_dense.polygons_to_mask(polygons, height, width)
        assert np.array_equal(mask, expected)
        neither_empty_nor_full += 0 < mask.mean() < 1
    assert neither_empty_nor_full > 200


def test_polygons_are_united_not_flipped():
    other = [4, 5, 9, 5, 9, 10, 4, 10]
    first = train_dense.polygons_to_mask([SQUARE], 12, 12)
    both = first | train_dense.polygons_to_mask([other], 12, 12)
    assert both.sum() == 20 + 25 - 6
    assert (train_dense.polygons_to_mask([SQUARE, other], 12, 12) == both).all()
    assert not train_dense.polygons_to_mask([], 12, 12).any()


def test_four_numbers_are_boxes_if_the_first_polygon_has_four():
    square = train_dense.polygons_to_mask([SQUARE], 12, 12)
    assert (train_dense.polygons_to_mask([[2, 3, 4, 5]], 12, 12) == square).all()
    two_points = [0, 0, 9, 9]                       # no area
    assert (train_dense.polygons_to_mask([SQUARE, two_points], 12, 12) == square).all()


@pytest.mark.parametrize("polygons", [
    [[2, 3, 4, 5], SQUARE],
    [SQUARE[:-1]],
    [[math.nan] * 6],
    [[math.inf] * 6],
    [[1, 1, 8, 1, 8, 2 ** 20 + 1]],                 # would take gigabytes
    [[1, 1, 8, 1, 8, HUGE]],
])
def test_malformed_polygons_are_refused(polygons):
    with pytest.raises(ValueError):
        train_dense.polygons_to_mask(polygons, 12, 12)


IMAGE = dict(id=8, height=12, width=12)


def test_rle_of_another_image_size_is_refused():
    full = train_dense.rle_encode(np.ones((12, 12), bool))
    assert train_dense.segmentation_runs(dict(segmentation=full), IMAGE).tolist() == [0, 144]
    other = train_dense.rle_encode(np.ones((16, 9), bool))
    message = "image 8, a result: segmentation: .*in an image of size .12, 12"
    with pytest.raises(ValueError, match=message):
        train_dense.segmentation_runs(dict(segmentation=other), IMAGE)


@pytest.mark.parametrize("segmentation", [
    None,
    3,
    [[1, 2, 3]],
    [[[1, 2], [3]]],
    [["a"] * 6],
    [[math.inf] * 6],
    [HUGE],
    {"size": [3, 3], "counts": [9]},
    {"size": [12, 12], "counts": [9]},
    {"size": [12, 12]},
    {"counts": [144]},
])
@pytest.mark.parametrize("number", [5, None])
def test_malformed_segmentations_name_image_and_annotation(segmentation, number):
    entry = dict(segmentation=segmentation, id=number)
    name = "a result" if number is None else "annotation 5"
    with pytest.raises(ValueError, match=f"image 8, {name}: segmentation: "):
        train_dense.segmentation_runs(entry, IMAGE)


# ----------------------------------------------------------------------------------------- overlaps
def loop_box(d, g, crowd):
    w = min(d[0] + d[2], g[0] + g[2]) - max(d[0], g[0])
    h = min(d[1] + d[3], g[1] + g[3]) - max(d[1], g[1])
    if w <= 0 or h <= 0:
        return 0.0
    if crowd:
        return w * h / (d[2] * d[3])
    return w * h / (d[2] * d[3] + g[2] * g[3] - w * h)


def loop_mask(d, g, crowd):
    intersection = int((d & g).sum())
    union = int(d.sum()) if crowd else int((d | g).sum())
    return intersection / union if intersection else 0.0


def loop_oks(d, g, box, area, sigmas):
    """One detection and one object, both flat x, y, v."""
    P = len(sigmas)
    labelled = [p for p in range(P) if g[3 * p + 2] > 0]
    terms = []
    for p in labelled or range(P):
        px, py = d[3 * p:3 * p + 2]
        if labelled:
            dx = px - g[3 * p]
            dy = py - g[3 * p + 1]
        else:
            x, y, w, h = box
            dx = max(0, x - w - px, px - x - 2 * w)
            dy = max(0, y - h - py, py - y - 2 * h)
        e = (dx ** 2 + dy ** 2) / (2 * sigmas[p]) ** 2 / (area + 2.0 ** -52) / 2
        terms.append(math.exp(-e))
    return sum(terms) / len(terms)


def loop_table(function, dt, gt, crowd):
    """function(d, g, crowd) of all pairs, as nested lists."""
    rows = []
    for d in dt:
        rows.append([function(d, g, c) for g, c in zip(gt, crowd)])
    return rows


def test_box_overlaps_by_hand():
    dt = np.array([[0.0, 0, 4, 2], [4, 0, 4, 2], [8, 8, 0, 0]])
    gt = np.array([[2.0, 0, 4, 4]] * 2)
    iou = train_dense.box_overlaps(dt, gt, np.array([False, True]))
    assert iou.tolist() == [[4 / 20, 4 / 8], [4 / 20, 4 / 8], [0, 0]]


def test_box_overlaps_equal_loops():
    rng = np.random.default_rng(2)
    dt = rng.uniform(0, 50, (30, 4))
    gt = rng.uniform(0, 50, (20, 4))
    dt[:15] = dt[:15].round(-1)                     # with edges that touch, and empty ones
    gt[:10] = gt[:10].round(-1)
    crowd = rng.random(20) < 0.4
    expected = loop_table(loop_box, dt.tolist(), gt, crowd)
    assert train_dense.box_overlaps(dt, gt, crowd).tolist() == expected


@pytest.mark.parametrize("shape", [(9, 7), (1, 12), (12, 1), (40, 30)])
def test_mask_overlaps_equal_loops(shape):
    rng = np.random.default_rng(3)
    gt = [rng.random(shape) < p for p in (0, 0, 0.1, 0.5, 0.5, 0.9, 1, 1)]
    dt = gt[::-1]
    crowd = rng.random(8) < 0.5
    dt_runs = [train_dense.mask_runs(mask) for mask in dt]
    gt_runs = [train_dense.mask_runs(mask) for mask in gt]
    overlaps = train_dense.mask_overlaps(dt_runs, gt_runs, crowd)
    assert overlaps.tolist() == loop_table(loop_mask, dt, gt, crowd)
    assert 0 < overlaps.mean() < 1


def test_mask_overlaps_take_runs_of_length_zero():
    crowd = np.array([False])
    a = [np.array([0, 4, 2])]
    b = [np.array([0, 1, 0, 2, 3, 0])]
    assert train_dense.mask_overlaps(a, b, crowd).tolist() == [[3 / 4]]
    assert train_dense.mask_overlaps(b, a, crowd).tolist() == [[3 / 4]]
    assert train_dense.mask_overlaps([], [np.array([0, 6])], crowd).shape == (0, 1)


OKS_SIGMAS = (0.1, 0.2)
OKS_BOX = np.array([[10.0, 20, 5, 4]])
OKS_AREA = np.array([50.0])
FIRST = math.exp(-25 / 0.04 / 50 / 2)               # of an offset (3, 4), which is 5 long
SECOND = math.exp(-25 / 0.16 / 50 / 2)


def object_points(first_v, second_v):
    return np.array([[[10, 20, first_v], [15, 27, second_v]]], float)


def test_oks_counts_labelled_points_by_hand():
    dt = np.array([[[10, 20, 1], [12, 23, 1]], [[13, 24, 0], [50, 50, 0]]], float)
    both = train_dense.oks(dt[:1], object_points(2, 1), OKS_BOX, OKS_AREA, OKS_SIGMAS)
    assert both.item() == pytest.approx((1 + SECOND) / 2, abs=1e-14)
    one = train_dense.oks(dt, object_points(1, 0), OKS_BOX, OKS_AREA, OKS_SIGMAS)
    assert one[:, 0].tolist() == pytest.approx([1, FIRST], abs=1e-14)
    no_area = train_dense.oks(dt[:1], object_points(2, 1), OKS_BOX, np.zeros(1), OKS_SIGMAS)
    assert no_area.item() == 0.5                    # divides by the smallest step instead


def test_oks_without_labelled_points_by_hand():
    inside = [[5, 16, 0], [20, 28, 0]]              # enlarged box: x from 5 to 20, y from 16 to 28
    outside = [[2, 32, 0], [23, 12, 0]]
    dt = np.array([inside, outside], float)
    similarity = train_dense.oks(dt, object_points(0, 0), OKS_BOX, OKS_AREA, OKS_SIGMAS)
    assert similarity[:, 0].tolist() == pytest.approx([1, (FIRST + SECOND) / 2], abs=1e-14)


@pytest.mark.parametrize("points", [17, 133])
def test_oks_equals_loops(points):
    rng = np.random.default_rng(points)
    sigmas = SIGMAS if points == 17 else rng.uniform(0.01, 0.1, points)
    gt = rng.uniform(0, 99, (6, points, 3)) * [1, 1, 0]
    gt[:4, :, 2] = rng.integers(0, 3, (4, points))
    dt = gt[rng.integers(0, 6, 9)] + rng.normal(0, 5, (9, points, 3))
    boxes = rng.uniform(5, 40, (6, 4))
    areas = rng.uniform(50, 5000, 6)
    expected = np.zeros((9, 6))
    for i, d in enumerate(dt):
        for j, g in enumerate(gt):
            expected[i, j] = loop_oks(d.ravel(), g.ravel(), boxes[j], areas[j], sigmas)
    similarity = train_dense.oks(dt, gt, boxes, areas, sigmas)
    np.testing.assert_allclose(similarity, expected, rtol=0, atol=1e-14)


# ----------------------------------------------------------------------------------------- matching
def match(iou, ignored=None, crowd=None, gt_area=None, dt_area=None, ranges=ALL):
    """match_detections with defaults: nothing ignored, no crowd, areas of 1."""
    D, G = np.shape(iou)
    outcome, positives = train_dense.match_detections(
        np.array(iou, float),
        np.array(np.zeros(G) if ignored is None else ignored, bool),
        np.array(np.zeros(G) if crowd is None else crowd, bool),
        np.array(np.ones(G) if gt_area is None else gt_area, float),
        np.array(np.ones(D) if dt_area is None else dt_area, float),
        ranges,
    )
    assert outcome.shape == (len(ranges), 10, D)
    assert outcome.dtype == np.int8
    return outcome, positives.tolist()


@pytest.mark.parametrize("iou, expected", [
    ([[0.8, 0.8], [0.8, 0]], [1, 1]),               # the first takes the later object of two equals
    ([[0.8, 0.8], [0, 0.8]], [1, 0]),
    ([[0.9, 0.8], [0, 0.8]], [1, 1]),
])
def test_equal_iou_takes_the_later_object(iou, expected):
    assert match(iou)[0][0, 0].tolist() == expected


@pytest.mark.parametrize("iou, reached", [
    (0.5, 1), (0.75, 6), (np.nextafter(0.5, 0), 0), (1.0, 10)])
def test_threshold_is_reached_by_equality(iou, reached):
    assert match([[iou]])[0][0, :, 0].tolist() == [1] * reached + [0] * (10 - reached)


def test_an_object_matches_once():
    assert match([[0.9], [0.9], [0.9]])[0][0, 0].tolist() == [1, 0, 0]
    assert match([[0.9], [0.9]], ignored=[True])[0][0, 0].tolist() == [-1, 0]


def test_a_crowd_region_matches_repeatedly():
    outcome, positives = match([[0.9], [0.9], [0.9]], ignored=[True], crowd=[True])
    assert outcome[0, 0].tolist() == [-1, -1, -1]
    assert outcome[0, 9].tolist() == [0, 0, 0]
    assert positives == [0]


def test_an_ignored_object_comes_after_every_other():
    iou = [[0.95, 0.6], [0.9, 0.9]]                 # column 0 is ignored and overlaps more
    outcome, positives = match(iou, ignored=[True, False])
    assert outcome[0, 0].tolist() == [1, -1]        # at 0.5 the first takes the object
    assert outcome[0, 4].tolist() == [-1, 1]        # at 0.7 only the ignored one is left for it
    assert positives == [1]


def test_area_ranges_are_inclusive_and_concern_both_sides():
    outcome, positives = match(
        [[0.9, 0], [0, 0], [0, 0.9]],
        gt_area=[1024, 9217],
        dt_area=[5000, 1024, 1],
        ranges=[(0, 1024), (1024, 9216)],
    )
    assert positives == [1, 1]
    assert outcome[:, 0].tolist() == [[1, 0, -1], [1, 0, -1]]  # matched: the object's range
    assert outcome[:, 9].tolist() == [[-1, 0, 0], [0, 0, -1]]  # unmatched: the detection's


def test_nothing_to_match():
    outcome, _ = match(np.zeros((3, 0)), dt_area=[1, 2, 3], ranges=[(2, 9)])
    assert outcome[0, 0].tolist() == [-1, 0, 0]
    outcome, positives = match(np.zeros((0, 2)), ignored=[True, False])
    assert outcome.size == 0
    assert positives == [1]


# ----------------------------------------------------------------------- whole evaluation, by loops
def evaluate_coco(images, annotations, results, kind, categories, sigmas=SIGMAS):
    """match_image for each image, then accumulate."""
    matches = []
    for image in images:
        gt = [a for a in annotations if a["image_id"] == image["id"]]
        dt = [r for r in results if r["image_id"] == image["id"]]
        matches.append(train_dense.match_image(image, gt, dt, kind, sigmas))
    return train_dense.accumulate(matches, kind, categories)


RANGES = {"": (0, 1e10), "s": (0, 1024), "m": (1024, 9216), "l": (9216, 1e10)}
CATEGORIES = [7, 2, 5, 11]                          # 11 is never annotated and never predicted


def loop_match(iou, gt, ignored, dt_area, low, high, threshold):
    """(matched, ignored) of every detection and the number of objects to detect."""
    excluded = [i or g["area"] < low or g["area"] > high for g, i in zip(gt, ignored)]
    order = sorted(range(len(gt)), key=lambda j: excluded[j])
    used = set()
    flags = []
    for row, area in zip(iou, dt_area):
        best = min(threshold, 1 - 1e-10)
        match = None
        for j in order:
            if j in used and not gt[j]["iscrowd"]:
                continue
            if match is not None and not excluded[match] and excluded[j]:
                break
            if row[j] >= best:
                best = row[j]
                match = j
        used.add(match)
        outside = area < low or area > high
        flags.append((match is not None, outside if match is None else excluded[match]))
    return flags, excluded.count(False)


def loop_overlaps(dt, gt, kind):
    """IoU or OKS of all pairs, and the areas of the detections."""
    crowd = [g["iscrowd"] for g in gt]
    if kind == "bbox":
        boxes = [d["bbox"] for d in dt]
        areas = [w * h for _, _, w, h in boxes]
        return loop_table(loop_box, boxes, [g["bbox"] for g in gt], crowd), areas
    if kind == "segm":
        masks = [d["mask"] for d in dt]
        areas = [int(mask.sum()) for mask in masks]
        return loop_table(loop_mask, masks, [g["mask"] for g in gt], crowd), areas
    iou = []
    areas = []
    for d in dt:
        points = d["keypoints"]
        row = [loop_oks(points, g["keypoints"], g["bbox"], g["area"], SIGMAS) for g in gt]
        iou.append(row)
        width = max(points[0::3]) - min(points[0::3])
        height = max(points[1::3]) - min(points[1::3])
        areas.append(width * height)
    return iou, areas


def loop_pairs(image, category, annotations, results, kind, limit):
    """Objects, ranked detections and their overlaps in one image and category."""
    gt = [g for g in annotations if (g["image_id"], g["category_id"]) == (image, category)]
    dt = [d for d in results if (d["image_id"], d["category_id"]) == (image, category)]
    dt = sorted(dt, key=lambda d: -d["score"])[:limit]
    iou, areas = loop_overlaps(dt, gt, kind)
    ignored = [g["iscrowd"] or kind == "keypoints" and g["num_keypoints"] == 0 for g in gt]
    return gt, dt, iou, ignored, areas


def loop_curve(ranked, positives, points):
    """Precision at every recall point and largest recall of (score, rank, matched, ignored)."""
    if positives == 0:
        return [-1] * len(points), -1
    tp = 0
    fp = 0
    recalls = []
    precisions = []
    for _, _, matched, ignored in sorted(ranked, key=lambda r: -r[0]):
        tp += matched and not ignored
        fp += not matched and not ignored
        recalls.append(tp / positives)
        precisions.append(tp / (tp + fp + 2.0 ** -52))
    best = [max(precisions[i:]) for i in range(len(precisions))]
    reached = [bisect_left(recalls, point) for point in points]
    curve = [best[i] if i < len(best) else 0 for i in reached]
    return curve, recalls[-1] if recalls else 0


def loop_cells(pairs, name, threshold, limits):
    """{limit: (precision curve, recall)} of one category, area range and threshold."""
    ranked = []
    positives = 0
    for gt, dt, iou, ignored, areas in pairs:
        flags, count = loop_match(iou, gt, ignored, areas, *RANGES[name], threshold)
        for rank, (d, flag) in enumerate(zip(dt, flags)):
            ranked.append((d["score"], rank, *flag))
        positives += count
    points = np.linspace(0, 1, 101).tolist()
    cells = {}
    for limit in limits:
        cells[limit] = loop_curve([r for r in ranked if r[1] < limit], positives, points)
    return cells


def mean_of_valid(values):
    valid = [value for value in values if value > -1]
    return np.mean(valid) if valid else -1


def loop_evaluate(images, annotations, results, kind, categories):
    """Section by section as COCO's evaluation is written; the same metrics as evaluate_coco."""
    names = ["", "m", "l"] if kind == "keypoints" else ["", "s", "m", "l"]
    limits = [20] if kind == "keypoints" else [1, 10, 100]
    top = limits[-1]
    categories = sorted(categories)
    image_ids = sorted(image["id"] for image in images)
    cells = {}
    for k in categories:
        pairs = [loop_pairs(i, k, annotations, results, kind, top) for i in image_ids]
        for name in names:
            for t, threshold in enumerate(np.linspace(0.5, 0.95, 10).tolist()):
                cells[name, t, k] = loop_cells(pairs, name, threshold, limits)

    def precision(name, thresholds):                # thresholds, recalls, categories: numpy's order
        values = []
        for t in thresholds:
            for r in range(101):
                values += [cells[name, t, k][top][0][r] for k in categories]
        return mean_of_valid(values)

    def recall(name, limit, thresholds):
        values = []
        for t in thresholds:
            values += [cells[name, t, k][limit][1] for k in categories]
        return mean_of_valid(values)

    every = range(10)
    metrics = {"AP": precision("", every), "AP50": precision("", [0]), "AP75": precision("", [5])}
    for name in names[1:]:
        metrics[f"AP{name}"] = precision(name, every)
    if kind == "keypoints":
        metrics["AR"] = recall("", 20, every)
        metrics["AR50"] = recall("", 20, [0])
        metrics["AR75"] = recall("", 20, [5])
    else:
        for limit in limits:
            metrics[f"AR{limit}"] = recall("", limit, every)
    for name in names[1:]:
        metrics[f"AR{name}"] = recall(name, top, every)
    return metrics


def random_box(rng):
    """On a grid of 32, so that IoU ties are common and areas meet the limits 1024 and 9216."""
    return [32.0 * rng.randrange(3), 32.0 * rng.randrange(3),
            32.0 * rng.randint(1, 3), 32.0 * rng.randint(1, 3)]


def random_segmentation(rng, form):
    """Mask of 128 x 128 made of 32 x 32 blocks, and as polygons, list of counts or string."""
    mask = np.zeros((128, 128), bool)
    polygons = []
    for x in range(0, 128, 32):
        for y in range(0, 128, 32):
            if rng.random() < rng.choice((0.2, 0.6, 0.9)):
                mask[y:y + 32, x:x + 32] = True
                polygons.append([x, y, x + 32, y, x + 32, y + 32, x, y + 32])
    if form == "polygons":
        return dict(mask=mask, segmentation=polygons)
    if form == "string":
        return dict(mask=mask, segmentation=train_dense.rle_encode(mask))
    runs = train_dense.mask_runs(mask).tolist()
    return dict(mask=mask, segmentation=dict(size=[128, 128], counts=runs))


def random_points(rng):
    points = []
    for _ in SIGMAS:
        points += [rng.randrange(128), rng.randrange(128), rng.randrange(3)]
    if rng.random() < 0.2:
        points[2::3] = [0] * len(SIGMAS)
    return points


def random_annotation(rng, kind, image_id, number):
    annotation = dict(
        id=number,
        image_id=image_id,
        category_id=rng.choice((2, 5)),
        bbox=random_box(rng),
        iscrowd=int(rng.random() < 0.2),
        area=rng.choice((500, 1024, 1025.5, 5000, 9216, 9217, 20000)),
        keypoints=random_points(rng),
    )
    annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
    if kind == "segm":
        form = "list" if annotation["iscrowd"] else rng.choice(("polygons", "string"))
        annotation |= random_segmentation(rng, form)
    return annotation


def random_result(rng, kind, image_id, near):
    result = dict(
        image_id=image_id,
        category_id=rng.choice((2, 5, 5, 7)),
        score=rng.choice((0, 0.25, 0.5, 0.75, 1.0)),
    )
    if kind == "keypoints":
        scale = rng.choice((0, 3, 8))
        result["keypoints"] = [float(c + rng.randint(-1, 1) * scale) for c in rng.choice(near)]
    elif kind == "segm":
        result |= random_segmentation(rng, "string")
    else:
        result["bbox"] = random_box(rng)
    return result


def random_problem(rng, kind):
    """Images, annotations, results: many equal scores and overlaps, crowds, images without some."""
    ids = rng.sample(range(40), rng.randint(1, 4))
    annotations = []
    results = []
    for i in ids:
        of_image = []
        for _ in range(rng.choice((0, 1, 4, 7))):
            number = len(annotations) + len(of_image)
            of_image.append(random_annotation(rng, kind, i, number))
        annotations += of_image
        near = [annotation["keypoints"] for annotation in of_image] or [random_points(rng)]
        many = {"bbox": 230, "segm": 30, "keypoints": 50}[kind]     # over three categories
        for _ in range(rng.choice((0, 2, 6, 12, 12, 12, many))):
            results.append(random_result(rng, kind, i, near))
    return [dict(id=i, height=128, width=128) for i in ids], annotations, results


def has_more_than(limit, results):
    """Whether an image has more than `limit` results of category 5."""
    ids = [r["image_id"] for r in results if r["category_id"] == 5]
    return any(ids.count(i) > limit for i in set(ids))


@pytest.mark.parametrize("kind, problems", [("bbox", 100), ("segm", 60), ("keypoints", 60)])
def test_metrics_equal_loops(kind, problems):
    rng = random.Random(kind)
    seen = set()
    crowded = False
    for _ in range(problems):
        problem = random_problem(rng, kind)
        expected = loop_evaluate(*problem, kind, CATEGORIES)
        metrics = evaluate_coco(*problem, kind, CATEGORIES)
        assert metrics == expected                  # exactly, to the last bit
        assert list(metrics) == list(expected)
        assert {type(value) for value in metrics.values()} == {float}
        seen |= set(metrics.items())
        crowded |= has_more_than(100, problem[2])
    for name in metrics:
        assert (name, -1.0) in seen                 # each metric was missing, and took many values
        assert len([value for key, value in seen if key == name]) > problems // 10
    assert crowded or kind != "bbox"


BOX_METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl"
POINT_METRICS = "AP AP50 AP75 APm APl AR AR50 AR75 ARm ARl"


@pytest.mark.parametrize("kind, names", [
    ("bbox", BOX_METRICS), ("segm", BOX_METRICS), ("keypoints", POINT_METRICS)])
def test_names_of_the_metrics(kind, names):
    metrics = evaluate_coco([dict(id=1)], [], [], kind, [1])
    assert metrics == dict.fromkeys(names.split(), -1.0)
    assert list(metrics) == names.split()


def join_problems(problems):
    """One problem of several, with image ids that differ."""
    joined = ([], [], [])
    for i, problem in enumerate(problems):
        for entries, target in zip(problem, joined):
            for entry in entries:
                entry["image_id" if "image_id" in entry else "id"] += 100 * i
            target += entries
    return joined


def separate(annotations):
    """Change boxes, points and masks so that no two objects overlap."""
    for number, annotation in enumerate(annotations):
        annotation["bbox"] = [100 * number, 0, 20, 50]
        annotation["num_keypoints"] = 17
        points = [c + 10 ** 4 * number for c in annotation["keypoints"]]
        points[2::3] = [1] * 17
        annotation["keypoints"] = points
        mask = np.zeros((128, 128), bool)
        mask[number % 128, 64 * (number // 128):][:64] = True
        annotation["segmentation"] = train_dense.rle_encode(mask)


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_perfect_results_reach_one(kind):
    rng = random.Random(0)
    images, annotations, _ = join_problems([random_problem(rng, kind) for _ in range(5)])
    separate(annotations)
    keys = ("image_id", "category_id", "bbox", "segmentation", "keypoints")
    results = []
    for annotation in annotations:
        if not annotation["iscrowd"]:
            results.append({key: annotation[key] for key in keys} | dict(score=1.0))
    metrics = evaluate_coco(images, annotations, results, kind, CATEGORIES)
    assert max(metrics.values()) <= 1
    assert min(metrics[name] for name in metrics if name not in ("AR1", "AR10")) > 1 - 1e-14


def one_image(boxes, detections, area=None):
    """Problem of image 1, category 1: boxes, and (box, score) pairs."""
    annotations = []
    for i, box in enumerate(boxes):
        size = box[2] * box[3] if area is None else area
        annotations.append(dict(id=i, image_id=1, category_id=1, bbox=box, area=size, iscrowd=0))
    results = [dict(image_id=1, category_id=1, bbox=box, score=s) for box, s in detections]
    return [dict(id=1)], annotations, results


A = [0, 0, 40, 40]
B = [100, 0, 40, 40]
C = [200, 0, 40, 40]


def test_metrics_worked_by_hand():
    problem = one_image([A, B], [(A, 0.9), (C, 0.8), (B, 0.7)])
    metrics = evaluate_coco(*problem, "bbox", [1])
    # recall 0.5 at precision 1, recall 1 at 2 / 3: 51 and 50 of the 101 points
    assert metrics["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-15)
    assert metrics["AR1"] == 0.5
    assert metrics["AR10"] == 1
    assert metrics["APs"] == -1
    assert metrics["ARm"] == 1


def test_nothing_detected_is_zero_not_missing():
    missed = evaluate_coco(*one_image([A, B], [(C, 0.8)]), "bbox", [1])
    assert missed["AP"] == 0
    assert missed["AR100"] == 0
    assert evaluate_coco(*one_image([A], []), "bbox", [1])["AR100"] == 0


def test_an_object_with_id_0_counts_as_matched():
    metrics = evaluate_coco(*one_image([A], [(A, 0.5)]), "bbox", [1])
    assert metrics["AP"] == pytest.approx(1, abs=1e-15)  # 1 / (1 + eps), as in COCO's tools
    assert metrics["AR1"] == 1


def test_size_split_takes_the_annotated_area():
    problem = one_image([A], [(A, 0.5)], area=900)  # the box's 1600 would be medium
    metrics = evaluate_coco(*problem, "bbox", [1])
    assert metrics["ARs"] == 1
    assert metrics["ARm"] == -1


@pytest.mark.parametrize("area, expected", [({}, 0.5), ({"area": 99999}, 1)])
def test_an_area_in_the_keypoint_result_goes_first(area, expected):
    points = [9, 9, 2, 60, 60, 2]
    truth = dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 70, 70], area=2000, iscrowd=0)
    truth |= dict(keypoints=points, num_keypoints=2)
    far = dict(image_id=1, category_id=1, keypoints=[500, 500, 1, 550, 550, 1], score=0.9)
    far |= area                                     # 2500 pixels, medium, without it
    good = dict(image_id=1, category_id=1, keypoints=points, score=0.5)
    metrics = evaluate_coco(
        [dict(id=1)], [truth], [far, good], "keypoints", [1], sigmas=(0.1, 0.1))
    assert metrics["APm"] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", ["bbox", "keypoints"])
def test_images_can_be_matched_anywhere_and_gathered_in_any_order(kind):
    rng = random.Random(1)
    for _ in range(20):
        images, annotations, results = random_problem(rng, kind)
        matches = []
        for image in images:
            gt = [a for a in annotations if a["image_id"] == image["id"]]
            dt = [r for r in results if r["image_id"] == image["id"]]
            matches.append(train_dense.match_image(image, gt, dt, kind, SIGMAS))
        shuffled = pickle.loads(pickle.dumps(rng.sample(matches, len(matches))))
        metrics = train_dense.accumulate(shuffled, kind, CATEGORIES[::-1])
        problem = (images, annotations, results)
        assert metrics == evaluate_coco(*problem, kind, CATEGORIES)


def test_ap_of_categories_averages_to_that_of_all():
    images, annotations, results = random_problem(random.Random(3), "bbox")
    matches = []
    for image in images:
        gt = [a for a in annotations if a["image_id"] == image["id"]]
        dt = [r for r in results if r["image_id"] == image["id"]]
        matches.append(train_dense.match_image(image, gt, dt, "bbox", SIGMAS))
    values = train_dense.category_ap(matches, "bbox", [*CATEGORIES, 99])
    assert len(values) == len(CATEGORIES) + 1
    assert math.isnan(values[-1])                   # of a category without objects
    expected = evaluate_coco(images, annotations, results, "bbox", CATEGORIES)["AP"]
    assert np.nanmean(values) == pytest.approx(expected)


def test_other_categories_are_left_out():
    images, annotations, results = random_problem(random.Random(3), "bbox")
    expected = evaluate_coco(images, annotations, results, "bbox", [2])
    assert 0 < expected["AP"] < 1
    annotations_2 = [a for a in annotations if a["category_id"] == 2]
    results_2 = [r for r in results if r["category_id"] == 2]
    assert evaluate_coco(images, annotations_2, results_2, "bbox", [2]) == expected


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(score):
    with pytest.raises(ValueError, match="image 1 has a score"):
        evaluate_coco(*one_image([], [([0, 0, 9, 9], score)]), "bbox", [1])


def test_a_wrong_number_of_keypoints_is_refused():
    result = dict(image_id=1, category_id=1, keypoints=[0.0] * 51, score=1.0)
    with pytest.raises(ValueError, match="51"):
        evaluate_coco(
            [dict(id=1)], [], [result], "keypoints", [1], sigmas=(0.1,) * 133)

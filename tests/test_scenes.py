"""The drawn scenes: both layouts say the same, and say what the pixels show."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import train_dense

COUNTS = {"train": 60, "val": 4}
IDS = range(1, COUNTS["train"] + 1)
LENGTHS = {
    "keypoints": 17,
    "foot_kpts": 6,
    "face_kpts": 68,
    "lefthand_kpts": 21,
    "righthand_kpts": 21,
}
PAIRS = """1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16 17-20 18-21 19-22 23-39 24-38 25-37 26-36 27-35
28-34 29-33 30-32 40-49 41-48 42-47 43-46 44-45 54-58 55-57 59-68 60-67 61-66 62-65 63-70 64-69
71-77 72-76 73-75 78-82 79-81 83-87 84-86 88-90"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "drawn"
    train_dense.write_scenes(folder, images=tuple(COUNTS.values()), seed=0)
    return folder


def load(folder, name):
    return json.loads((folder / "annotations" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def instances(scenes):
    return load(scenes, "instances_train2017")


@pytest.fixture(scope="module")
def people(scenes):
    return load(scenes, "coco_wholebody_train_v1.0")["annotations"]


def sizes_of(data):
    return {image["id"]: (image["width"], image["height"]) for image in data["images"]}


def labels_of(folder, image_id):
    return np.array(Image.open(folder / f"annotations/training/ADE_train_{image_id:08}.png"))


def keypoints_of(person):
    """x, y and v, each (133,)."""
    return np.concatenate([np.reshape(person[field], (-1, 3)) for field in LENGTHS]).T


def loop_decode(rle):
    """Slow loop from the definition: down each column, the first run is of zeros."""
    height, width = rle["size"]
    mask = np.zeros((height, width), bool)
    pixel = 0
    for run, count in enumerate(rle["counts"]):
        for _ in range(count):
            mask[pixel % height, pixel // height] = run % 2
            pixel += 1
    assert pixel == height * width
    return mask


def winding(corners, width, height):
    """Pixels whose centre the polygon winds around: its edges turn by a full circle around it."""
    x = np.arange(width) + 0.5 + 1e-6               # a hair off, so that none is on an edge
    y = np.arange(height)[:, None] + 0.5 + 1e-9
    centre = x + 1j * y
    points = np.array(corners[::2]) + 1j * np.array(corners[1::2])
    angle = np.zeros((height, width))
    for p, q in zip(points, np.roll(points, -1)):
        if p != q:
            angle += np.angle((q - centre) / (p - centre))
    return abs(angle) > np.pi


def mask_of(annotation, width, height):
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict):
        assert segmentation["size"] == [height, width]
        return loop_decode(segmentation)
    return train_dense.polygons_to_mask(segmentation, height, width)


def files(folder):
    """{relative path: content} of all files below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


# -------------------------------------------------------------------------------------------- files
def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_dense.write_scenes(tmp_path / name, images=(5, 2), seed=seed)
    first = files(tmp_path / "a")
    other_seed = files(tmp_path / "c")
    assert first == files(tmp_path / "b")
    assert set(first) == set(other_seed)
    for path in first:
        assert path.suffix != ".jpg" or first[path] != other_seed[path]


def test_no_scene_occurs_twice(tmp_path):
    train_dense.write_scenes(tmp_path / "scenes", images=(5, 2), seed=1)
    written = files(tmp_path / "scenes")
    images = [written[path] for path in written if path.parts[0] in ("train2017", "val2017")]
    assert len(images) == len(set(images)) == 7


def test_a_second_call_writes_only_what_is_missing(tmp_path):
    folder = tmp_path / "deep" / "scenes"
    train_dense.write_scenes(folder, images=(2, 1))
    image = folder / "train2017" / "000000000001.jpg"
    image.write_bytes(b"mine")
    train_dense.write_scenes(folder, images=(2, 1))
    assert image.read_bytes() == b"mine"


@pytest.mark.parametrize("change", ["images", "seed", "version"])
def test_other_scenes_are_replaced(tmp_path, monkeypatch, change):
    folder = tmp_path / "scenes"
    train_dense.write_scenes(folder, images=(2, 1))
    image = folder / "train2017" / "000000000001.jpg"
    image.write_bytes(b"mine")
    count = 3 if change == "images" else 2
    if change == "version":
        monkeypatch.setattr(train_dense, "SCENE_VERSION", train_dense.SCENE_VERSION + 1)
    train_dense.write_scenes(folder, images=(count, 1), seed=int(change == "seed"))
    assert image.read_bytes() != b"mine"
    assert len(list((folder / "train2017").iterdir())) == count
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_an_interrupted_call_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("train_dense.json.dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        train_dense.write_scenes(tmp_path / "scenes", images=(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear to me")
    with pytest.raises(train_dense.InputError, match=f"{tmp_path} contains other files"):
        train_dense.write_scenes(tmp_path, images=(1, 1))
    assert files(tmp_path) == {Path("photo.jpg"): b"dear to me"}


# ------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("split, ade", [("train", "training"), ("val", "validation")])
def test_layouts(scenes, split, ade):
    coco = load(scenes, f"instances_{split}2017")
    names = [f"ADE_{split}_{i:08}" for i in range(1, COUNTS[split] + 1)]
    assert sorted(path.stem for path in (scenes / "images" / ade).iterdir()) == names
    assert sorted(path.stem for path in (scenes / "annotations" / ade).iterdir()) == names
    coco_names = sorted(path.name for path in (scenes / f"{split}2017").iterdir())
    assert coco_names == [image["file_name"] for image in coco["images"]]
    assert load(scenes, f"coco_wholebody_{split}_v1.0")["images"] == coco["images"]
    categories = {c["name"]: c["id"] for c in coco["categories"]}
    assert categories == train_dense.SCENE_CATEGORIES
    for image, name in zip(coco["images"], names):
        file = scenes / f"{split}2017" / image["file_name"]
        assert file.read_bytes() == (scenes / "images" / ade / f"{name}.jpg").read_bytes()
        labels = Image.open(scenes / "annotations" / ade / f"{name}.png")
        assert labels.mode == "L"
        assert Image.open(file).size == labels.size == (image["width"], image["height"])


def test_image_sizes_vary(instances):
    sizes = np.array([*set(sizes_of(instances).values())])
    assert len(sizes) > 30
    assert (sizes.min(0) >= (144, 112)).all()
    assert (sizes.max(0) <= (176, 144)).all()


def test_annotation_files_pass_the_checks(scenes):
    for split in COUNTS:
        for name in (f"instances_{split}2017", f"coco_wholebody_{split}_v1.0"):
            data = train_dense.read_annotations(scenes / "annotations" / f"{name}.json")
            assert data == load(scenes, name)


def test_object_info_lists_the_classes(scenes):
    rows = (scenes / "objectInfo.txt").read_text().splitlines()
    table = [row.split("\t") for row in rows]
    names = [[str(i), name] for i, name in enumerate(train_dense.SCENE_CLASSES, 1)]
    assert table == [["Idx", "Name"], *names]


def test_annotations_show_what_the_label_maps_show(scenes, instances):
    names = {number: name for name, number in train_dense.SCENE_CATEGORIES.items()}
    sizes = sizes_of(instances)
    things = {i: np.zeros(size[::-1], int) for i, size in sizes.items()}
    for annotation in instances["annotations"]:
        mask = mask_of(annotation, *sizes[annotation["image_id"]])
        y, x = mask.nonzero()
        assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert annotation["area"] == mask.sum() >= 30
        of_image = things[annotation["image_id"]]
        assert (of_image[mask] == 0).all()          # a pixel belongs to one thing
        label = 1 + train_dense.SCENE_CLASSES.index(names[annotation["category_id"]])
        of_image[mask] = label
    for i in IDS:
        labels = labels_of(scenes, i)
        assert (np.where(labels > 1, labels, 0) == things[i]).all()


def test_only_a_thin_frame_is_unlabelled(scenes):
    for i in IDS:
        labels = labels_of(scenes, i)
        frame = np.ones(labels.shape, bool)
        frame[2:-2, 2:-2] = False
        assert (labels[frame] != 1).all()
        assert (labels[frame] == 0).any()
        assert (labels[~frame] != 0).all()
        assert (labels[~frame] == 1).any()
        assert labels.max() <= len(train_dense.SCENE_CLASSES)


def test_polygons_fit_another_raster(instances):
    """Pixels whose centre is inside differ from COCO's raster along the outline only."""
    sizes = sizes_of(instances)
    for annotation in instances["annotations"]:
        if isinstance(annotation["segmentation"], list):
            corners, = annotation["segmentation"]
            width, height = sizes[annotation["image_id"]]
            outline = Image.new("1", (width, height))
            shifted = np.round(np.array(corners) - 0.5).astype(int).tolist()
            ImageDraw.Draw(outline).line(shifted + shifted[:2], fill=1, width=3)
            mask = mask_of(annotation, width, height)
            differs = mask != winding(corners, width, height)
            assert not (differs & ~np.array(outline)).any()
            assert differs.sum() < annotation["area"] / 4


def test_images_show_the_annotated_things(scenes):
    """Colours jump where the label changes, from background to thing and from thing to thing."""
    steps = {"within background": [], "background to thing": [], "within": [], "thing to thing": []}
    for i in IDS:
        labels = labels_of(scenes, i)
        image = np.array(Image.open(scenes / f"train2017/{i:012}.jpg"), float)
        step = abs(np.diff(image, axis=1)).sum(-1)
        a = labels[:, :-1]
        b = labels[:, 1:]
        steps["within background"].append(step[(a == 1) & (b == 1)])
        steps["background to thing"].append(step[(np.minimum(a, b) == 1) & (a != b)])
        steps["within"].append(step[(a > 1) & (a == b)])
        steps["thing to thing"].append(step[(np.minimum(a, b) > 1) & (a != b)])
    mean = {key: np.concatenate(values).mean() for key, values in steps.items()}
    assert mean["background to thing"] > 4 * mean["within background"]
    assert mean["thing to thing"] > 2 * mean["within"]


# -------------------------------------------------------------------------------------- annotations
SQUARE = [0, 0, 2, 0, 2, 2, 0, 2]


def square_mask():
    mask = np.zeros((3, 4), bool)
    mask[:2, :2] = True
    return mask


def segmentation(geometry, visible, crowd=False):
    return train_dense.annotate("square", crowd, geometry, visible)["segmentation"]


def test_a_whole_shape_is_a_polygon():
    assert segmentation([SQUARE], square_mask()) == [SQUARE]


@pytest.mark.parametrize("geometry, crowd", [
    ([SQUARE], True),
    ([[0, 0, 3, 0, 3, 3, 0, 3]], False),            # partly hidden
    ([[0, 0, 2, 0, 2, 1, 0, 1]], False),
])
def test_other_masks_are_run_lengths(geometry, crowd):
    runs = {"size": [3, 4], "counts": [0, 2, 1, 2, 7]}
    assert segmentation(geometry, square_mask(), crowd) == runs


def test_an_annotation_by_hand():
    visible = np.zeros((5, 6), bool)
    visible[1:4, 2:5] = True
    visible[1, 2] = False
    annotation = train_dense.annotate("triangle", False, [SQUARE], visible)
    assert annotation["bbox"] == [2, 1, 3, 3]
    assert annotation["area"] == 8
    assert annotation["iscrowd"] == 0
    assert annotation["category_id"] == train_dense.SCENE_CATEGORIES["triangle"]


def test_keypoints_of_an_annotation_by_hand():
    visible = np.zeros((50, 60), bool)
    visible[10:20, 30:40] = True
    visible[15:18, 30:33] = False
    points = np.full(133, 5 + 5j)                   # outside: not labelled
    points[0] = 30 + 10j                            # seen
    points[16] = 39 + 19j
    points[18] = 31 + 16j                           # hidden, in the box of what is seen
    points[100] = 40 + 19j                          # right of it
    annotation = train_dense.annotate("person", False, points, visible)
    x, y, v = keypoints_of(annotation)
    assert v.nonzero()[0].tolist() == [0, 16, 18]
    assert v[[0, 16, 18]].tolist() == [2, 2, 1]
    assert x[[0, 16, 18]].tolist() == [30, 39, 31]
    assert y[[0, 16, 18]].tolist() == [10, 19, 16]
    assert x.sum() == 30 + 39 + 31
    assert annotation["num_keypoints"] == 2
    assert annotation["foot_valid"] is True
    assert annotation["face_valid"] is annotation["lefthand_valid"] is False


def test_crowds_are_discs_in_run_lengths(instances):
    crowds = [a for a in instances["annotations"] if a["iscrowd"]]
    assert 5 <= len(crowds) <= 8
    assert {a["category_id"] for a in crowds} == {train_dense.SCENE_CATEGORIES["disc"]}
    assert all(isinstance(a["segmentation"], dict) for a in crowds)


def test_all_kinds_of_annotations_occur(instances):
    categories = train_dense.SCENE_CATEGORIES
    forms = set()
    for annotation in instances["annotations"]:
        if not annotation["iscrowd"]:
            forms.add((annotation["category_id"], type(annotation["segmentation"])))
    for name in train_dense.SHAPES:
        assert (categories[name], list) in forms
        assert (categories[name], dict) in forms
    assert (categories["person"], dict) in forms
    assert (categories["person"], list) not in forms


def test_some_scenes_are_empty(scenes, instances):
    empty = set(IDS) - {a["image_id"] for a in instances["annotations"]}
    assert len(empty) == 3
    for i in empty:
        assert set(np.unique(labels_of(scenes, i))) == {0, 1}


# ------------------------------------------------------------------------------------------- people
def test_people_are_the_persons_of_the_instances(instances, people):
    person = train_dense.SCENE_CATEGORIES["person"]
    assert people == [a for a in instances["annotations"] if a["category_id"] == person]
    assert len(people) > 20


def test_whole_body_fields(people):
    for person in people:
        assert {field: len(person[field]) / 3 for field in LENGTHS} == LENGTHS
        v = keypoints_of(person)[2]
        assert set(v) <= {0, 1, 2}
        assert person["num_keypoints"] == (v[:17] > 0).sum()
        for part in ("foot", "face", "lefthand", "righthand"):
            assert person[f"{part}_valid"] == any(person[f"{part}_kpts"][2::3])


def test_keypoints_are_visible_where_the_person_is(instances, people):
    sizes = sizes_of(instances)
    for person in people:
        x, y, v = keypoints_of(person)
        labelled = v > 0
        assert not x[~labelled].any()
        assert not y[~labelled].any()
        left, top, w, h = person["bbox"]
        assert ((x >= left) & (x < left + w))[labelled].all()
        assert ((y >= top) & (y < top + h))[labelled].all()
        mask = mask_of(person, *sizes[person["image_id"]])
        assert (mask[y, x] == (v == 2))[labelled].all()


def test_visible_hidden_and_unlabelled_keypoints_occur(people):
    v = np.concatenate([keypoints_of(person)[2] for person in people])
    assert (v == 2).mean() > 0.6
    assert (v == 1).mean() > 0.01
    assert (v == 0).mean() > 0.01
    assert not all(person["lefthand_valid"] and person["righthand_valid"] for person in people)


def is_clockwise(points, origin, a, b):
    """Whether the turn from `a` to `b`, seen from `origin`, is clockwise in the image."""
    turn = (points[a] - points[origin]).conj() * (points[b] - points[origin])
    return turn.imag > 0


def is_person(points):
    """Whether complex points (133,) fit a person who shows us the face and the palms."""
    across = (points * (points[3] - points[4]).conj()).real        # from ear to ear
    down = (points * (points[31] - points[27]).conj()).real        # towards the chin
    rows = (
        (23, 27, 31, 35, 39), (40, 42, 44, 45, 47, 49), (54, 56, 58), (59, 62, 65, 68),
        (71, 74, 77), (83, 85, 87), (2, 0, 1))
    levels = (
        ([42], [63, 64]), ([47], [69, 70]), ([60, 61], [63, 64]), ([66, 67], [69, 70]),
        ([53], [80]), ([73, 74, 75], [79, 80, 81]))
    facts = [(np.diff(across[list(row)]) > 0).all() for row in rows]
    facts += [down[upper].mean() < down[lower].mean() for upper, lower in levels]
    turns = ((31, 5, 11), (31, 12, 6), (91, 95, 111), (112, 132, 116))   # shoulders, thumbs
    facts += [is_clockwise(points, *turn) for turn in turns]
    facts.append((np.diff(points.real[[19, 17, 18]]) > 0).all())    # left heel, big, small toe
    facts.append((np.diff(points.real[[22, 20, 21]]) < 0).all())
    return all(facts)


def mirror_order():
    pairs = [tuple(map(int, pair.split("-"))) for pair in PAIRS.split()]
    pairs += [(i, i + 21) for i in range(91, 112)]
    assert len(pairs) == 61
    order = np.arange(133)
    for a, b in pairs:
        order[a] = b
        order[b] = a
    return order


@pytest.mark.parametrize("seed", range(40))
def test_people_are_people_in_the_mirror_too(seed):
    points = train_dense.person_points(np.random.default_rng(seed))
    order = mirror_order()
    mirrored = -points.conj()
    assert points.shape == (133,)
    assert is_person(points)
    assert is_person(mirrored[order])
    assert not is_person(mirrored)
    assert not is_person(points[order])


def render(points, monkeypatch, seed=0):
    """render_person with given keypoints (of height 1), in an image that holds all of it."""
    monkeypatch.setattr(train_dense, "person_points", lambda rng: points)
    rng = np.random.default_rng(seed)
    return train_dense.render_person(rng, 600, 500)


@pytest.mark.parametrize("seed", range(40))
def test_every_keypoint_lies_on_the_figure(monkeypatch, seed):
    points = train_dense.person_points(np.random.default_rng(seed))
    colours, placed = render(points, monkeypatch, seed)
    mask = colours.any(2)
    assert mask[placed.imag.astype(int), placed.real.astype(int)].all()
    assert 50 <= np.ptp(mask.nonzero()[0]) <= 130


@pytest.mark.parametrize("joint", [*range(5, 23), 31, *range(91, 133)])
def test_moving_a_keypoint_moves_what_is_rendered(monkeypatch, joint):
    points = train_dense.person_points(np.random.default_rng(1))
    before, _ = render(points, monkeypatch)
    points[joint] += 0.25j
    after, _ = render(points, monkeypatch)
    assert (before.any(2) != after.any(2)).any()


# ------------------------------------------------------------------------------------------- shapes
AREAS = {  # of radius 1
    "disc": math.pi,
    "square": 2,
    "triangle": 0.75 * math.sqrt(3),
    "cross": 2 * 0.56 * 1.9 - 0.56 ** 2,
    "ring": 0.75 * math.pi,
}


@pytest.mark.parametrize("name", AREAS)
def test_outlines_enclose_the_area_of_their_shape(name):
    polygon = (100 + 100j + 90 * train_dense.OUTLINES[name]).view(float).tolist()
    area = train_dense.polygons_to_mask([polygon], 200, 200).sum()
    assert area == pytest.approx(AREAS[name] * 90 ** 2, rel=0.02)


@pytest.mark.parametrize("name", AREAS)
def test_a_shape_covers_its_polygon(name):
    rng = np.random.default_rng(3)
    colours, polygons = train_dense.render_shape(rng, name, False, 160, 120)
    assert len(polygons) == 1
    mask = train_dense.polygons_to_mask(polygons, 120, 160)
    assert np.array_equal(colours.any(2), mask)
    assert len(np.unique(colours[mask], axis=0)) == 1


def test_a_crowd_is_many_discs():
    _, polygons = train_dense.render_shape(np.random.default_rng(3), "disc", True, 160, 120)
    assert len(polygons) == 20
    widths = [np.ptp(polygon[::2]) for polygon in polygons]
    assert widths == pytest.approx([8] * 20, abs=0.1)

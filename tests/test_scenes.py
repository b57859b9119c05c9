"""The drawn scenes: both layouts say the same, and what the pixels show."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from train_dense import SCENE_CATEGORIES, SCENE_CLASSES, draw_figure, person_points, segmentation, write_scenes

COUNTS = {"train": 60, "val": 4}
LENGTHS = {"keypoints": 17, "foot_kpts": 6, "face_kpts": 68, "lefthand_kpts": 21, "righthand_kpts": 21}
ORDER = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
PAIRS = """1-2 3-4 5-6 7-8 9-10 11-12 13-14 15-16 17-20 18-21 19-22 23-39 24-38 25-37 26-36 27-35 28-34 29-33 30-32 40-49 41-48
42-47 43-46 44-45 54-58 55-57 59-68 60-67 61-66 62-65 63-70 64-69 71-77 72-76 73-75 78-82 79-81 83-87 84-86 88-90"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "drawn"
    write_scenes(folder, images=tuple(COUNTS.values()), seed=0)
    return folder


def load(folder, name):
    return json.loads((folder / "annotations" / f"{name}.json").read_text())


def instances(folder):
    return load(folder, "instances_train2017")


def people(folder):
    return load(folder, "coco_wholebody_train_v1.0")["annotations"]


def labels_of(folder, image_id):
    return np.array(Image.open(folder / f"annotations/training/ADE_train_{image_id:08}.png"))


def table(person):
    return np.concatenate([np.reshape(person[name], (-1, 3)) for name in ORDER])    # (133, 3): x, y, v


def decode(rle):
    """Slow loop from the definition: down each column, the first run is of zeros."""
    (height, width), pixel = rle["size"], 0
    mask = np.zeros((height, width), bool)
    for run, count in enumerate(rle["counts"]):
        for _ in range(count):
            mask[pixel % height, pixel // height] = run % 2
            pixel += 1
    assert pixel == height * width
    return mask


def filled(corners, width, height):
    """Pixels whose centre the polygon winds around: the angles under which its edges are seen add up to a full turn."""
    centre = np.arange(width) + 0.5 + 1e-6 + 1j * (np.arange(height)[:, None] + 0.5 + 1e-9)    # a hair off, so none is on an edge
    a = np.reshape(corners, (-1, 2)) @ (1, 1j)
    return abs(sum(np.angle((q - centre) / (p - centre)) for p, q in zip(a, np.roll(a, -1)))) > np.pi


def mask_of(annotation, width, height):
    form = annotation["segmentation"]
    return decode(form) if isinstance(form, dict) else filled(*form, width, height)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_scenes(tmp_path / name, images=(5, 2), seed=seed)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and set(a) == set(c)
    assert all(a[path] != c[path] for path in a if path.suffix == ".jpg")
    coco = {split: [data for path, data in sorted(a.items()) if path.parts[0] == f"{split}2017"] for split in COUNTS}
    assert len({*coco["train"], *coco["val"]}) == 7    # no scene twice, none in both splits


def test_second_call_draws_only_what_is_missing(tmp_path):
    folder = tmp_path / "deep" / "scenes"
    write_scenes(folder, images=(2, 1))
    picture = folder / "train2017" / "000000000001.jpg"
    picture.write_bytes(b"mine")
    write_scenes(folder, images=(2, 1))
    assert picture.read_bytes() == b"mine"
    write_scenes(folder, images=(3, 1))    # other parameters: all is drawn anew
    assert picture.read_bytes() != b"mine" and len(list((folder / "train2017").iterdir())) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["scenes"]


def test_an_interrupted_call_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt
    monkeypatch.setattr("train_dense.json.dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", images=(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear to me")
    with pytest.raises(ValueError, match="holds something else"):
        write_scenes(tmp_path, images=(1, 1))
    assert files(tmp_path) == {Path("photo.jpg"): b"dear to me"}


def test_layouts(scenes):
    for split, ade in (("train", "training"), ("val", "validation")):
        coco = load(scenes, f"instances_{split}2017")
        names = [f"ADE_{split}_{i:08}" for i in range(1, COUNTS[split] + 1)]
        assert sorted(path.name for path in (scenes / "images" / ade).iterdir()) == [f"{name}.jpg" for name in names]
        assert sorted(path.name for path in (scenes / "annotations" / ade).iterdir()) == [f"{name}.png" for name in names]
        assert sorted(path.name for path in (scenes / f"{split}2017").iterdir()) == [image["file_name"] for image in coco["images"]]
        assert load(scenes, f"coco_wholebody_{split}_v1.0")["images"] == coco["images"]
        assert {c["id"]: c["name"] for c in coco["categories"]} == {v: k for k, v in SCENE_CATEGORIES.items()}
        for image, name in zip(coco["images"], names):
            picture, labels = scenes / f"{split}2017" / image["file_name"], Image.open(scenes / "annotations" / ade / f"{name}.png")
            assert picture.read_bytes() == (scenes / "images" / ade / f"{name}.jpg").read_bytes()
            assert Image.open(picture).size == labels.size == (image["width"], image["height"]) and labels.mode == "L"
    sizes = {(image["width"], image["height"]) for image in instances(scenes)["images"]}
    assert len(sizes) > 30 and np.min(list(sizes), 0).tolist() >= [144, 112] and (np.max(list(sizes), 0) <= (176, 144)).all()


def test_annotations_show_what_the_label_maps_show(scenes):
    coco, names = instances(scenes), {i: name for name, i in SCENE_CATEGORIES.items()}
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
    for image in coco["images"]:
        labels, things = labels_of(scenes, image["id"]), np.zeros((image["height"], image["width"]), int)
        assert set(np.unique(labels)) <= set(range(len(SCENE_CLASSES) + 1))
        frame = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        assert (frame == 0).any() and (frame != 1).all() and (labels[2:-2, 2:-2] == 1).any()
        for a in (a for a in coco["annotations"] if a["image_id"] == image["id"]):
            mask = mask_of(a, image["width"], image["height"])
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            assert a["bbox"] == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert a["area"] == mask.sum() >= 30
            assert (things[mask] == 0).all()            # a pixel belongs to one thing
            things[mask] = 1 + SCENE_CLASSES.index(names[a["category_id"]])
        assert (np.where(labels > 1, labels, 0) == things).all()


def test_polygons_fit_another_raster(scenes):
    """Pillow's fill (its pixel (i, j) is centred at (j, i), ours at (j + 0.5, i + 0.5)) differs along the outline only."""
    coco = instances(scenes)
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for a in (a for a in coco["annotations"] if isinstance(a["segmentation"], list)):
        (corners,), (width, height) = a["segmentation"], sizes[a["image_id"]]
        mask, outline = (Image.new("1", (width, height)) for _ in range(2))
        shifted = np.round(np.array(corners) - 0.5).astype(int).tolist()
        ImageDraw.Draw(mask).polygon(shifted, fill=1)
        ImageDraw.Draw(outline).line(shifted + shifted[:2], fill=1, width=3)
        differs = np.array(mask) != filled(corners, width, height)
        assert not (differs & ~np.array(outline)).any() and differs.sum() < a["area"] / 4


def test_pictures_show_the_annotated_things(scenes):
    """Colours jump where the label changes, from background to thing and from thing to thing (textured, so they vary within)."""
    steps = {key: [] for key in ("background within", "background edge", "things within", "things edge")}
    for image_id in range(1, COUNTS["train"] + 1):
        labels = labels_of(scenes, image_id)
        step = abs(np.diff(np.array(Image.open(scenes / f"train2017/{image_id:012}.jpg"), float), axis=1)).sum(-1)
        a, b = labels[:, :-1], labels[:, 1:]
        for key, where in (("background within", (a == 1) & (b == 1)), ("background edge", (np.minimum(a, b) == 1) & (a != b)),
                           ("things within", (a > 1) & (a == b)), ("things edge", (np.minimum(a, b) > 1) & (a != b))):
            steps[key].append(step[where])
    mean = {key: np.concatenate(values).mean() for key, values in steps.items()}
    assert mean["background edge"] > 4 * mean["background within"] and mean["things edge"] > 2 * mean["things within"]


def test_segmentation_is_a_polygon_only_if_it_says_all():
    mask = np.zeros((3, 4), bool)
    mask[:2, :2] = True
    square = [np.array([(0, 0), (2, 0), (2, 2), (0, 2)])]
    assert segmentation(square, mask, mask) == [[0, 0, 2, 0, 2, 2, 0, 2]]
    runs = {"size": [3, 4], "counts": [0, 2, 1, 2, 7]}
    assert segmentation([], mask, mask) == runs                               # a person or a swarm
    assert segmentation([*square, square[0] / 2], mask, mask) == runs         # with a hole
    assert segmentation([square[0] - (1, 0)], mask, mask) == segmentation([square[0] + (3, 0)], mask, mask) == runs    # cut off
    assert segmentation(square, np.ones((3, 4), bool), mask) == runs          # partly hidden


def test_all_kinds_of_annotations_occur(scenes):
    coco = instances(scenes)
    crowds = [a for a in coco["annotations"] if a["iscrowd"]]
    assert 5 <= len(crowds) <= 8 and all(a["category_id"] == SCENE_CATEGORIES["disc"] for a in crowds)
    assert all(isinstance(a["segmentation"], dict) for a in crowds)
    single = [a for a in coco["annotations"] if not a["iscrowd"]]
    assert {a["category_id"] for a in single} == set(SCENE_CATEGORIES.values())
    forms = {(a["category_id"], type(a["segmentation"])) for a in single}
    assert {(i, list) for name, i in SCENE_CATEGORIES.items() if name not in ("ring", "person")} <= forms
    assert (SCENE_CATEGORIES["ring"], list) not in forms and (SCENE_CATEGORIES["square"], dict) in forms
    empty = {image["id"] for image in coco["images"]} - {a["image_id"] for a in coco["annotations"]}
    assert len(empty) == 3
    assert all(set(np.unique(labels_of(scenes, i))) == {0, 1} for i in empty)


def test_whole_body_annotations(scenes):
    objects = {a["id"]: a for a in instances(scenes)["annotations"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in instances(scenes)["images"]}
    assert [p["id"] for p in people(scenes)] == [i for i, a in objects.items() if a["category_id"] == SCENE_CATEGORIES["person"]]
    for person in people(scenes):
        assert objects[person["id"]].items() <= person.items()
        assert {name: len(person[name]) / 3 for name in ORDER} == LENGTHS
        x, y, v = table(person).T
        on, (left, top, w, h) = v > 0, person["bbox"]
        slack = 1 + 0.1 * max(w, h)
        assert set(v) <= {0, 1, 2} and not x[~on].any() and not y[~on].any()
        assert (x[on] >= 0).all() and (y[on] >= 0).all()
        assert (x[on] < sizes[person["image_id"]][0]).all() and (y[on] < sizes[person["image_id"]][1]).all()
        assert ((x[on] >= left - slack) & (x[on] <= left + w + slack) & (y[on] >= top - slack) & (y[on] <= top + h + slack)).all()
        mask = decode(person["segmentation"])
        assert (mask[y[on], x[on]] == (v[on] == 2)).all()      # visible is what lies on the person's own pixels
        assert person["num_keypoints"] == (v[:17] > 0).sum()
        for part in ("foot", "face", "lefthand", "righthand"):
            points = np.reshape(person[f"{part}_kpts"], (-1, 3))
            points = points[points[:, 2] > 0, :2]
            assert person[f"{part}_valid"] == (len(points) > 0)
            if part != "foot":
                box = [*points.min(0), *(np.ptp(points, axis=0) + 1)] if len(points) else [0] * 4
                assert person[f"{part}_box"] == box
    seen = np.concatenate([table(person)[:, 2] for person in people(scenes)])
    assert (seen == 2).mean() > 0.7 and (seen == 1).any() and (seen == 0).any()
    assert not all(p["lefthand_valid"] and p["righthand_valid"] for p in people(scenes))


def is_figure(points):
    """Does the arrangement fit a person who shows us the face and the palms?"""
    def clockwise(origin, a, b):
        (ax, ay), (bx, by) = points[a] - points[origin], points[b] - points[origin]
        return ax * by - ay * bx > 0
    across, down = points @ (points[3] - points[4]), points @ (points[31] - points[27])    # from ear to ear, to the chin
    rows = (23, 27, 31, 35, 39), (40, 42, 44, 45, 47, 49), (54, 56, 58), (59, 62, 65, 68), (71, 74, 77), (83, 85, 87), (2, 0, 1)
    levels = ([42], [63, 64]), ([47], [69, 70]), ([60, 61], [63, 64]), ([66, 67], [69, 70]), ([53], [80]), ([73, 74, 75], [79, 80, 81])
    feet = [(points[[heel, big, small], 0] * sign).tolist() for heel, big, small, sign in ((19, 17, 18, 1), (22, 20, 21, -1))]
    return (all(across[a] < across[b] for row in rows for a, b in zip(row, row[1:]))
            and all(down[a].mean() < down[b].mean() for a, b in levels)
            and clockwise(31, 5, 11) and clockwise(31, 12, 6)           # chin, shoulder, hip
            and clockwise(91, 95, 111) and clockwise(112, 132, 116)                       # thumb to little finger
            and all(foot == sorted(foot) for foot in feet))


def test_figures_are_figures_in_the_mirror_too():
    order = np.arange(133)
    pairs = [tuple(map(int, pair.split("-"))) for pair in PAIRS.split()] + [(i, i + 21) for i in range(91, 112)]
    for a, b in pairs:
        order[[a, b]] = b, a
    assert len(pairs) == 61
    for seed in range(40):
        points, size = person_points(np.random.default_rng(seed), 160, 128)
        flipped = points * (-1, 1) + (159, 0)
        assert is_figure(points) and is_figure(flipped[order]) and not is_figure(flipped) and not is_figure(points[order])
        colours = np.repeat(np.arange(8)[:, None], 3, axis=1)
        (mask, parts), (mirror, mirrored) = (draw_figure(p, size, colours, 160, 128) for p in (points, flipped[order]))
        assert (mask & mirror[:, ::-1]).sum() > 0.8 * (mask | mirror[:, ::-1]).sum()    # lines of even thickness lean to one side
        assert (parts == mirrored[:, ::-1])[mask].mean() > 0.85


def test_figures_are_drawn_from_their_keypoints():
    """Every keypoint lies on the figure; moving one of a pair of joints moves what is drawn."""
    colours = np.zeros((8, 3))
    for seed in range(40):
        points, size = person_points(np.random.default_rng(seed), 160, 128)
        points += 100    # all of it inside the image
        mask, _ = draw_figure(points, size, colours, 400, 400)
        assert mask[points[:, 1], points[:, 0]].all()
        assert 50 <= np.ptp(np.nonzero(mask)[0]) <= 120
    for joint in (*range(5, 23), 31, *range(91, 133)):
        moved = points.copy()
        moved[joint] += (0, 20)
        assert (draw_figure(moved, size, colours, 400, 400)[0] != mask).any(), joint

"""train_dense.py's parts of Mask R-CNN and its cascade against slow loops that follow mmdetection 2.x sample by sample, box by box."""
import math
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from test_train_dense import loop_assign, loop_nms, random_boxes
from torch.testing import assert_close

import train_dense as T

STRIDES = (4, 8, 16, 32)


# ----------------------------------------------------------------------------------------------------------- RoI pooling
def loop_roi_align(maps, box, S, scale, ratio):
    """Aligned RoIAlign of one box: maps (C, H, W) -> (C, S, S). The loop yields each bin's weights of the pixels, the rest is a product."""
    C, H, W = maps.shape
    x1, y1, x2, y2 = (v * scale - 0.5 for v in box)
    w, h = (x2 - x1) / S, (y2 - y1) / S                                                 # of a bin
    columns, rows = (ratio or math.ceil(side) for side in (w, h))
    weights = [[0.0] * (H * W) for _ in range(S * S)]
    for p, q, i, j in product(range(S), range(S), range(rows), range(columns)):
        y, x = y1 + p * h + (i + 0.5) * h / rows, x1 + q * w + (j + 0.5) * w / columns
        if -1 <= y <= H and -1 <= x <= W:
            y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
            top, left = int(y), int(x)
            for row, column in product((top, top + 1), (left, left + 1)):
                if row < H and column < W:
                    weights[p * S + q][row * W + column] += (1 - abs(y - row)) * (1 - abs(x - column)) / (rows * columns)
    return (maps.flatten(1) @ torch.tensor(weights, dtype=maps.dtype).T).view(C, S, S)


def boxes_in_cells(H, W, S):
    """Boxes in cells of an H x W map. Corners are such that no sample lies just on -1 or on the side, where a rounding decides."""
    return [*random_boxes(6, side=min(H, W)).tolist(), [0, 0, W, H], [2, 1, 8, 5], [W - 2.2, H - 3.3, W, H],
            [1.25, 2.125, 1.25 + 2 * S, 2.125 + 3 * S],                                 # bins of exactly 2 x 3 cells
            [3.3, 2.2, 3.31, 2.21], [-0.3, -0.2, -0.29, -0.19], [W - 0.01, H - 0.01, W, H],                     # tiny
            [-3.107, -2.342, 4.513, 3.731], [W - 1.204, H - 0.708, W + 6.109, H + 4.309], [-1.117, -1.213, 0.309, 0.219],   # partly out
            [-9.1, -9.2, -4.3, -4.4], [W + 3.1, 1, W + 9.2, 5], [2, -7.7, 6, -3.1],                                         # outside
            [0.4, 3.1, W - 0.3, 3.4], [5.2, -8.113, 5.5, H + 9.307], [-40.313, -30.617, W + 50.109, H + 60.719]]            # long, huge


@pytest.mark.parametrize("scale, S", [(1.0, 2), (0.25, 7), (0.5, 5), (0.125, 1)])
@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_roi_align_matches_loops(ratio, scale, S, device):
    features = torch.randn(3, 2, 7, 10, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor(boxes_in_cells(7, 10, S), dtype=torch.float64) / scale
    rois = torch.cat([torch.randint(0, 3, (len(boxes), 1)), boxes], 1)
    slow = torch.stack([loop_roi_align(features[int(roi[0])], roi[1:], S, scale, ratio) for roi in rois.tolist()])
    fast = T.roi_align(features.to(device), rois.to(device), S, scale, ratio).cpu()
    assert_close(fast, slow)
    weight = torch.randn_like(slow)
    assert_close(*(torch.autograd.grad((result * weight).sum(), features)[0] for result in (fast, slow)))


def test_roi_align_by_hand(device):
    """A constant stays, a ramp gives the centres of the bins, whatever the number of samples; pixel i is at i + 1/2."""
    y, x = torch.arange(9.)[:, None].expand(9, 12), torch.arange(12.).expand(9, 12)
    maps = torch.stack([torch.full_like(x, 5), 2 * x + 3 * y + 1])[None].to(device)
    rois = torch.tensor([[0., 4., 2., 16., 14.], [0., 1., 1., 23., 17.]], device=device)                        # cells of 2 pixels
    for ratio in (0, 1, 2):
        pooled = T.roi_align(maps, rois, 3, 0.5, ratio).cpu()
        assert_close(pooled[:, 0], torch.full((2, 3, 3), 5.))
        for roi, result in zip(rois.tolist(), pooled[:, 1]):
            centre_x, centre_y = ([(roi[k] + (b + 0.5) * (roi[k + 2] - roi[k]) / 3) / 2 - 0.5 for b in range(3)] for k in (1, 2))
            assert_close(result, torch.tensor([[2 * u + 3 * v + 1 for u in centre_x] for v in centre_y]))


@pytest.mark.parametrize("shift, expected", [(0, (1, 3)), (-0.25, (0, 3)), (0.25, (1, 0))])
def test_roi_align_keeps_samples_up_to_one_cell_outside(shift, expected, device):
    """Two samples, at -1 and at the width 3 but for the shift: within the rule both ends belong."""
    maps = torch.tensor([1., 2., 3.], device=device).view(1, 1, 1, 3)
    pooled = T.roi_align(maps, torch.tensor([[0, shift - 2.5, 0, shift + 5.5, 1]], device=device), 2, 1.0, 1)
    assert pooled[0, 0].tolist() == [list(expected)] * 2


@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_of_nothing(ratio, device):
    features = torch.randn(2, 3, 5, 6, device=device)
    assert T.roi_align(features, torch.zeros(0, 5, device=device), 4, 0.25, ratio).shape == (0, 3, 4, 4)
    flat = torch.tensor([[0., 8., 8., 8., 8.], [1., 4., 4., 4., 16.], [1., 4., 4., 16., 4.]], device=device)    # no extent
    assert T.roi_align(features, flat, 4, 0.25, ratio).isfinite().all()


def loop_level(w, h):
    return min(max(math.floor(math.log2(math.sqrt(w * h) / 56 + 1e-6)), 0), 3)


def test_rois_are_pooled_from_the_level_of_their_size(device):
    """Also boxes at 112, 224 and 448 and just below (1e-5 is within the rule's 1e-6, 1e-3 is not), and elongated ones."""
    maps = [torch.randn(2, 2, h, w, dtype=torch.float64, requires_grad=True) for h, w in ((41, 61), (21, 31), (11, 16), (6, 8))]
    sides = [(side - below,) * 2 for side in (112., 224., 448.) for below in (0, 1e-5, 1e-3, -1)]
    sides += [(56., 224.), (896., 56.), (1792., 112.), (0.01, 0.01), (3., 2.), (30., 70.), (300., 90.), (150., 800.), (1500., 900.)]
    levels = [loop_level(*side) for side in sides]
    assert levels == [1, 1, 0, 1, 2, 2, 1, 2, 3, 3, 2, 3, 1, 2, 3, 0, 0, 0, 1, 2, 3]
    corner = torch.randint(-20, 120, (len(sides), 2)) + 0.375                           # keeps samples off the limits, see above
    rois = torch.cat([torch.randint(0, 2, (len(sides), 1)), corner, corner + torch.tensor(sides, dtype=torch.float64)], 1)
    slow = torch.stack([loop_roi_align(maps[level][int(roi[0])], roi[1:], 3, 1 / STRIDES[level], 0)
                        for roi, level in zip(rois.tolist(), levels)])
    given = [level.to(device) for level in maps]
    fast = T.pool_rois(given, rois.to(device), 3, STRIDES).cpu()
    assert_close(fast, slow)
    weight = torch.randn_like(slow)
    for a, b in zip(*(torch.autograd.grad((result * weight).sum(), maps) for result in (fast, slow))):
        assert_close(a, b)
    assert_close(T.pool_rois(given, rois[-1:].to(device), 3, STRIDES).cpu(), slow[-1:])                         # three levels have none
    assert T.pool_rois(given, rois[:0].to(device), 3, STRIDES).shape == (0, 2, 3, 3)


# ---------------------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("side, dtype", [(3, torch.bool), (28, torch.uint8)])
def test_mask_targets_match_loops(side, dtype, device):
    """Blobs and noise; boxes inside, partly outside, larger and smaller than the result. Means within 1e-4 of 1/2 may fall either way."""
    blobs = F.interpolate(torch.randn(1, 3, 6, 7), size=(45, 61), mode="bilinear")[0] > 0
    masks = torch.cat([blobs, torch.rand(1, 45, 61) < 0.5]).to(dtype)
    boxes = torch.cat([random_boxes(8, side=44).float(), torch.tensor([[-8.3, -5.1, 30.7, 20.2], [40.6, 20.9, 75.3, 60.4],
                      [-20.1, -30.2, 90.3, 80.4], [20.17, 13.3, 22.29, 14.11], [1.31, 2.77, 60.13, 5.21]])])
    index = torch.arange(len(boxes)) % 4
    rows = []
    for (x1, y1, x2, y2), number in zip(boxes.tolist(), index):
        clipped = [max(x1, 0.0), max(y1, 0.0), min(x2, 61.0), min(y2, 45.0)]
        rows.append(loop_roi_align(masks[number][None].double(), clipped, side, 1.0, 0)[0])
    mean = torch.stack(rows)
    clear = (mean - 0.5).abs() > 1e-4
    targets = T.mask_targets(masks.to(device), boxes.to(device), index.to(device), side).cpu()
    assert clear.double().mean() > 0.99 and 0.2 < targets.double().mean() < 0.8
    assert targets.dtype == torch.bool and targets.shape == (len(boxes), side, side)
    assert torch.equal(targets[clear], mean[clear] >= 0.5)


def test_mask_targets_by_hand(device):
    """Two samples a bin, on 0 and 1: a mean of exactly 1/2 is inside. No box, even no mask: no target."""
    masks = torch.tensor([[[0, 1, 0, 0]] * 2, [[1, 1, 0, 1]] * 2], dtype=torch.uint8, device=device)
    targets = T.mask_targets(masks, torch.tensor([[0., 0., 4., 2.]], device=device).expand(3, 4), torch.tensor([0, 1, 0], device=device), 2)
    assert targets[:, 0].tolist() == targets[:, 1].tolist() == [[True, False], [True, True], [True, False]]
    for G in (0, 2):
        none = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.long, device=device)
        assert T.mask_targets(masks[:G], *none, 28).shape == (0, 28, 28)


def loop_paste(mask, box, H, W):
    """Bilinear in the mask's cells, whose centres are at 1/2, 3/2, ... of the box's S parts; zeros all around."""
    S, (x1, y1, x2, y2), image = len(mask), box, []
    for y, x in product(range(H), range(W)):
        v, u = (y + 0.5 - y1) / (y2 - y1) * S - 0.5, (x + 0.5 - x1) / (x2 - x1) * S - 0.5
        cells = product((math.floor(v), math.floor(v) + 1), (math.floor(u), math.floor(u) + 1))
        image.append(sum((1 - abs(v - i)) * (1 - abs(u - j)) * mask[i][j] for i, j in cells if 0 <= i < S and 0 <= j < S))
    return torch.tensor(image, dtype=torch.float64).view(H, W)


def test_pasted_masks_match_loops_and_grid_sample(device):
    H, W = 19, 26
    boxes = torch.cat([random_boxes(6, side=18), torch.tensor([[-6.3, -4.2, 9.7, 30.1], [20.2, 12.1, 40.3, 17.7], [30., 30., 40., 45.],
                       [5.49, 6.48, 5.51, 6.53], [0., 0., 26., 19.], [3., 7.4, 24., 7.6]], dtype=torch.float64)])
    masks = torch.rand(len(boxes), 5, 5, dtype=torch.float64)
    fast = T.paste_masks(masks.to(device), boxes.to(device), (H, W)).cpu()
    assert_close(fast, torch.stack([loop_paste(mask, box, H, W) for mask, box in zip(masks.tolist(), boxes.tolist())]))
    low, extent = boxes[:, None, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None, None]
    centres = torch.stack(torch.meshgrid(torch.arange(W) + 0.5, torch.arange(H) + 0.5, indexing="xy"), -1)      # (H, W, 2)
    assert_close(fast, F.grid_sample(masks[:, None], (centres - low) / extent * 2 - 1, align_corners=False)[:, 0])
    assert fast[8].eq(0).all() and fast[9, 6, 5] > 0                                    # all outside; smaller than a pixel, on a centre


def test_pasted_masks_of_nothing(device):
    assert T.paste_masks(torch.zeros(0, 28, 28, device=device), torch.zeros(0, 4, device=device), (7, 9)).shape == (0, 7, 9)


def test_pasted_masks_of_flat_boxes_are_numbers(device):
    flat = torch.tensor([[2.5, 1., 2.5, 5.], [1., 3., 8., 3.], [9., 2., 9., 2.]], device=device)                # also on pixel centres
    pasted = T.paste_masks(torch.ones(3, 4, 4, device=device), flat, (7, 9))
    assert ((pasted >= 0) & (pasted <= 1)).all()                                                                # no NaN


# --------------------------------------------------------------------------------------------------------- drawn samples
def test_samples_are_positives_then_negatives_then_nothing(device):
    for trial in range(100):
        torch.manual_seed(trial)
        B, N, count = 3, *torch.randint(1, 30, (2,)).tolist()
        most, share = torch.randint(0, count + 1, ()).item(), torch.rand(B, 1) * (trial % 4 > 0)
        draw = torch.rand(B, N)
        positive, negative = draw < share, (draw >= share) & (torch.rand(B, N) < 0.7)
        index, kind = (t.cpu() for t in T.sample(positive.to(device), negative.to(device), count, most))
        assert index.shape == kind.shape == (B, min(count, N))
        assert ((index >= 0) & (index < N)).all()                                       # unused places too, so that they can be gathered
        for b in range(B):
            positives = min(most, int(positive[b].sum()))
            negatives = min(count - positives, int(negative[b].sum()))
            assert kind[b].tolist() == [1] * positives + [0] * negatives + [-1] * (min(count, N) - positives - negatives)
            assert len(set(index[b, kind[b] >= 0].tolist())) == positives + negatives
            assert positive[b, index[b, kind[b] == 1]].all() and negative[b, index[b, kind[b] == 0]].all()


def test_samples_are_drawn_evenly(device):
    """4000 draws of 2 of 5 positives and 3 of 6 negatives; 5 standard deviations around every candidate's and every pair's share."""
    positive, negative = torch.zeros(2, 12, dtype=torch.bool, device=device)
    positive[[0, 3, 4, 8, 11]] = True
    negative[[1, 2, 5, 6, 7, 10]] = True
    masks = [mask.expand(4000, 12) for mask in (positive, negative)]
    index, kind = (t.cpu() for t in T.sample(*masks, 5, 2))
    for value, mask, drawn in ((1, positive, 2), (0, negative, 3)):
        members, rows = mask.cpu().nonzero().flatten().tolist(), index[kind == value].view(4000, drawn)
        for size in (1, 2):
            share = math.comb(drawn, size) / math.comb(len(members), size)
            for group in combinations(members, size):
                found = torch.stack([(rows == member).any(1) for member in group]).all(0).sum().item()
                assert abs(found - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share)), group


def test_samples_follow_the_seed(device):
    positive = torch.rand(2, 50, device=device) < 0.5
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(torch.stack(T.sample(positive, ~positive, 20, 10)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ------------------------------------------------------------------------------------------------------- boxes of the heads
def loop_giou(a, b):
    """Of two boxes, as floats or scalar tensors."""
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = w * h if w > 0 and h > 0 else 0 * w
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = area_a + area_b - inter
    return inter / union - (hull - union) / hull


def test_giou_loss_matches_loops(device):
    boxes, targets = random_boxes(40, side=30), random_boxes(40, side=30)
    boxes[:3] = torch.tensor([[0., 0., 2., 2.], [1., 1., 2., 3.], [40., 50., 60., 70.]])
    targets[:3] = torch.tensor([[5., 6., 7., 9.], [0.5, 0.5, 8., 9.], [42., 51., 50., 60.]])                    # apart, within, around
    boxes.requires_grad_()
    fast = T.giou_loss(boxes.to(device), targets.to(device)).cpu()
    slow = torch.stack([1 - loop_giou(a, b) for a, b in zip(boxes, targets)])
    assert fast.shape == (40,) and (slow > 1).any() and (slow < 1).any()
    assert_close(fast, slow)
    weight = torch.rand(40, dtype=torch.float64)
    assert_close(*(torch.autograd.grad((loss * weight).sum(), boxes)[0] for loss in (fast, slow)))


def test_giou_loss_by_hand(device):
    """Equal: 0. Two unit squares a square apart: hull 3, union 2. Half covered: IoU 1/2, no gap. Without area: finite."""
    boxes = torch.tensor([[3., 4., 9., 8.], [0., 0., 1., 1.], [0., 0., 1., 1.], [5., 5., 5., 5.], [2., 2., 2., 6.], [1., 1., 1., 1.]])
    targets = torch.tensor([[3., 4., 9., 8.], [2., 0., 3., 1.], [0., 0., 2., 1.], [5., 5., 5., 5.], [2., 2., 4., 6.], [4., 4., 4., 4.]])
    boxes = boxes.to(device).requires_grad_()
    loss = T.giou_loss(boxes, targets.to(device))
    assert_close(loss[:3].cpu(), torch.tensor([0, 4 / 3, 1 / 2]))
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), boxes)[0].isfinite().all()
    assert T.giou_loss(boxes[:0], targets[:0].to(device)).shape == (0,)


def loop_decode(box, delta):
    limit, result = math.log(1000 / 16), []
    for low, high, shift, growth in zip(box[:2], box[2:], delta[:2], delta[2:]):
        centre, size = (low + high) / 2 + shift * (high - low), (high - low) * math.e ** min(max(growth, -limit), limit)
        result.append((centre - size / 2, centre + size / 2))
    return [result[0][0], result[1][0], result[0][1], result[1][1]]


@pytest.mark.parametrize("specific", [True, False])
def test_refined_boxes_match_loops(specific, device):
    """Labels of all classes and background (5), also where background scores best; sizes that the limit cuts off."""
    R, K, stds = 60, 5, (0.1, 0.05, 0.2, 0.25)
    boxes, labels, scores = random_boxes(R), torch.randint(0, K + 1, (R,)), torch.randn(R, K + 1, dtype=torch.float64)
    deltas = (8 * torch.randn(R, 4 * K if specific else 4, dtype=torch.float64)).requires_grad_()
    assert ((labels == K) & (scores.argmax(1) == K)).any() and (deltas.abs() * 0.25 > math.log(1000 / 16)).any()
    expected = []
    for box, delta, label, row in zip(boxes.tolist(), deltas.tolist(), labels.tolist(), scores.tolist()):
        chosen = label if label < K else max(range(K), key=lambda k: row[k])
        own = delta[4 * chosen:4 * chosen + 4] if specific else delta
        expected.append(loop_decode(box, [d * std for d, std in zip(own, stds)]))
    refined = T.refine(*(t.to(device) for t in (boxes, deltas, labels, scores)), stds)
    assert not refined.requires_grad
    assert_close(refined.cpu(), torch.tensor(expected, dtype=torch.float64))


def test_proposals_match_loops(device):
    """Three levels, the last with less than `per_level`; a quarter of the anchors, with the best scores, lies off the image."""
    H, W, counts = 70, 100, [60, 40, 9]
    for trial, (per_level, most) in enumerate(((20, 15), (30, 1000), (1000, 1000), (20, 4))):
        torch.manual_seed(trial)
        anchors, off = (20 + random_boxes(12, side=60))[torch.randint(0, 12, (109,))], torch.rand(109) < 0.25
        anchors[off] += torch.tensor([200., 0., 200., 0.]) if trial % 2 else torch.tensor([0., -200., 0., -200.])
        deltas, scores = 0.1 * torch.randn(109, 4, dtype=torch.float64), 2 * torch.randn(109, dtype=torch.float64) + 3 * off
        expected, dropped, suppressed = [], 0, 0
        for start, count in zip((0, 60, 100), counts):
            best = sorted(range(start, start + count), key=lambda a: -scores[a].item())[:per_level]
            moved = [loop_decode(anchors[a].tolist(), deltas[a].tolist()) for a in best]
            boxes = [[min(max(v, 0.0), side) for v, side in zip(box, (W, H, W, H))] for box in moved]
            found = [(scores[a].item(), box) for a, box in zip(best, boxes) if box[2] > box[0] and box[3] > box[1]]
            kept = loop_nms([box for _, box in found], [score for score, _ in found], 0.7)
            expected += [found[i] for i in kept]
            dropped, suppressed = dropped + len(best) - len(found), suppressed + len(found) - len(kept)
        assert dropped and suppressed and (len(expected) > most or most == 1000)
        expected = [box for _, box in sorted(expected, key=lambda entry: -entry[0])[:most]]
        given = scores.to(device), deltas.to(device), anchors.to(device), counts, (H, W)
        assert_close(T.proposals(*given, per_level=per_level, most=most).cpu(), torch.tensor(expected, dtype=torch.float64))
    anchors += 1000
    assert T.proposals(*given[:2], anchors.to(device), *given[3:], per_level=20, most=20).shape == (0, 4)


@pytest.mark.parametrize("least, most", [(0.05, 100), (0.2, 12), (0.9999, 100)])
@pytest.mark.parametrize("specific", [True, False])
def test_best_pairs_match_loops(specific, least, most, device):
    """Softmax with background, which is no object however likely; pairs above the threshold; NMS class by class; the best few."""
    R, K = 50, 3
    logits, boxes = 2 * torch.randn(R, K + 1, dtype=torch.float64), random_boxes(R, K if specific else 1, side=40, grid=5)
    found = {label: [] for label in range(K)}
    for row, own in zip(logits.tolist(), boxes.tolist()):
        for label in range(K):
            score = math.exp(row[label]) / sum(math.exp(logit) for logit in row)
            if score > least:
                found[label].append((score, label, own[label if specific else 0]))
    kept = []
    for entries in found.values():
        kept += [entries[i] for i in loop_nms([e[2] for e in entries], [e[0] for e in entries], 0.5)]
    assert least > 0.9 or len(kept) < sum(map(len, found.values()))
    assert least != 0.2 or len(kept) > most
    kept = sorted(kept, key=lambda e: -e[0])[:most]
    found_boxes, scores, labels = T.best_pairs(boxes.to(device), logits.softmax(1)[:, :-1].to(device), least, most)
    assert labels.tolist() == [e[1] for e in kept]
    assert_close(scores.cpu(), torch.tensor([e[0] for e in kept], dtype=torch.float64))
    assert_close(found_boxes.cpu(), torch.tensor([e[2] for e in kept], dtype=torch.float64).view(-1, 4))


def test_best_pairs_of_nothing(device):
    boxes, scores, labels = T.best_pairs(torch.zeros(0, 3, 4, device=device), torch.zeros(0, 3, device=device))
    assert boxes.shape == (0, 4) and scores.shape == labels.shape == (0,)


# ------------------------------------------------------------------------------------------------------------ whole models
def train_batch(device):
    """Two images of different size, the first with two objects, the second with none: images, sizes, boxes, labels, masks."""
    masks = torch.zeros(2, 70, 99, dtype=torch.bool, device=device)
    masks[0, 10:50, 5:60], masks[1, 30:64, 40:90] = True, True
    boxes = torch.tensor([[[5., 10, 60, 50], [40, 30, 90, 64]], [[0, 0, 0, 0], [0, 0, 0, 0]]], device=device)
    labels = torch.tensor([[3, 0], [-1, -1]], device=device)
    return torch.randn(2, 3, 70, 99, device=device), torch.tensor([[70, 99], [60, 64]], device=device), boxes, labels, masks


@pytest.mark.parametrize("task, options", [("mask_rcnn", {}), ("cascade_mask_rcnn", {}), ("cascade_mask_rcnn", {"box_head": "2fc"})])
def test_models_take_any_size_and_train_every_parameter(tiny, task, options, device):
    model = T.build_model(task, "secvit_t", 5, frozen_bn=False, options={"samples": 16, **options}).to(device).train()
    batch = train_batch(device)
    model(*batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.zero_grad()
    model(*batch[:2], batch[2] * 0, torch.full_like(batch[3], -1), batch[4][:0]).backward()             # no object at all
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        model, images = model.double().eval(), batch[0].double()                        # so that no rounding decides the order
        found, alone = model(images, batch[1]), model(images[:1], batch[1][:1])[0]
    for boxes, scores, labels, masks in found:
        assert boxes.shape == (len(scores), 4) and masks.shape == (len(scores), 28, 28) and ((labels >= 0) & (labels < 5)).all()
        assert (scores.diff() <= 0).all() and len(scores) <= 100 and ((masks >= 0) & (masks <= 1)).all()
    assert len(alone[0]) > 0
    for one, both in zip(alone, found[0]):
        assert_close(one, both)


@pytest.mark.parametrize("task", ["mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize("part", ["rpn", "box_heads", "mask_heads"])
def test_diverged_weights_give_a_loss_that_is_not_finite(tiny, task, part, device):
    """Nothing is found, or places that are no numbers: the loop, not an index, must say what happened."""
    model = T.build_model(task, "secvit_t", 5, frozen_bn=False, options={"samples": 16}).to(device).train()
    with torch.no_grad():
        for parameter in getattr(model, part).parameters():
            parameter.fill_(math.nan)
    assert model(*train_batch(device)).isnan()


def test_unknown_box_heads_are_refused():
    with pytest.raises(ValueError, match="unknown box_head '3fc', expected '2fc' or '4conv1fc'"):
        T.build_model("cascade_mask_rcnn", "linglo_b0", 3, options={"box_head": "3fc"})


# -------------------------------------------------------------------------------------------------------------- losses
def loop_encode(start, box):
    (w, h), (u, v) = ((b[2] - b[0], b[3] - b[1]) for b in (start, box))
    return [(box[0] + u / 2 - start[0] - w / 2) / w, (box[1] + v / 2 - start[1] - h / 2) / h, math.log(u / w), math.log(v / h)]


def loop_smooth_l1(difference, beta):
    return abs(difference) - beta / 2 if abs(difference) >= beta else difference ** 2 / 2 / beta


@pytest.mark.parametrize("beta", [0, 1 / 9])
def test_rpn_loss_matches_loops(beta, device):
    """Too many positives, no box, too few anchors: 128 + 128, 0 + 256 and all that count are drawn; the divisor is their number."""
    labels = torch.tensor([[1, 0], [-1, -1], [2, 0]])
    boxes = random_boxes(3, 2, side=60) * (labels >= 0)[..., None]
    boxes[2, 1] = torch.tensor([11., 12., 13., 14.])                                    # no anchor overlaps it by 0.3
    anchors = torch.cat([boxes[0].repeat(140, 1) + torch.randn(280, 4, dtype=torch.float64), random_boxes(420, side=60, grid=5)])
    scores, deltas = (torch.randn(3, 700, *shape, dtype=torch.float64, requires_grad=True) for shape in ((), (4,)))
    there = torch.rand(3, 700) < torch.tensor([[0.9], [0.9], [0.1]])
    torch.manual_seed(7)
    fast = T.rpn_loss(*(t.to(device) for t in (scores, deltas, anchors, there, boxes, labels)), beta=beta).cpu()
    index = torch.tensor([loop_assign(boxes[b], labels[b], anchors, there[b], 0.7, 0.3, 0.3) for b in range(3)], device=device)
    torch.manual_seed(7)
    pick, kind = (t.cpu() for t in T.sample(index >= 0, index == -1, 256, 128))
    count, positives = (kind >= 0).sum(1).tolist(), (kind == 1).sum(1).tolist()
    assert count[:2] == [256, 256] and 0 < count[2] < 256 and positives[:2] == [128, 0] and positives[2]
    slow = 0
    for b, i in (kind >= 0).nonzero().tolist():
        a = int(pick[b, i])
        p = 1 / (1 + (-scores[b, a]).exp())
        slow = slow - (p if kind[b, i] else 1 - p).log() / sum(count)
        if kind[b, i]:
            target = loop_encode(anchors[a].tolist(), boxes[b, index[b, a]].tolist())
            slow = slow + sum(loop_smooth_l1(d - t, beta) for d, t in zip(deltas[b, a], target)) / sum(count)
    assert_close(fast, slow)
    for x, y in zip(*(torch.autograd.grad(loss, (scores, deltas)) for loss in (fast, slow))):
        assert_close(x, y)


def loop_box_loss(logits, deltas, roi, label, box, stds, kind):
    """Of one RoI, before the division; logits and deltas are tensors, the boxes numbers."""
    loss = logits.exp().sum().log() - logits[label]
    if label == len(logits) - 1:
        return loss
    own = deltas if kind == "smooth L1" else deltas[4 * label:4 * label + 4]
    if kind == "GIoU":
        return loss + 10 * (1 - loop_giou(loop_decode(roi, [d * s for d, s in zip(own, stds)]), box))
    return loss + sum(loop_smooth_l1(d - t / s, kind == "smooth L1") for d, t, s in zip(own, loop_encode(roi, box), stds))


BETAS = {"L1": 0.0, "smooth L1": 1.0, "GIoU": None}


@pytest.mark.parametrize("kind", BETAS)
def test_box_loss_matches_loops(kind, device):
    """Both parts are divided by the number of all RoIs. Without a positive one only the classes count, without any the loss is 0."""
    R, K, stds = 40, 3, (0.1, 0.05, 0.2, 0.25)
    logits, deltas = (torch.randn(R, n, dtype=torch.float64, requires_grad=True) for n in (K + 1, 4 if kind == "smooth L1" else 4 * K))
    rois, boxes = random_boxes(R, side=60), random_boxes(R)
    for labels in (torch.randint(0, K + 1, (R,)), torch.full((R,), K), torch.randint(0, K, (R,))):
        given = [t.to(device) for t in (logits, deltas, rois, labels, boxes)]
        fast, slow = T.box_loss(*given, stds, BETAS[kind]).cpu(), 0
        for r, label in enumerate(labels.tolist()):
            slow = slow + loop_box_loss(logits[r], deltas[r], rois[r].tolist(), label, boxes[r].tolist(), stds, kind) / R
        assert_close(fast, slow)
        for x, y in zip(*(torch.autograd.grad(loss, (logits, deltas), materialize_grads=True) for loss in (fast, slow))):
            assert_close(x, y)
    assert T.box_loss(*(t[:0] for t in given), stds, BETAS[kind]) == 0


# ------------------------------------------------------------------------------------------------------ all stages of heads
STAGES = [(0.5, (0.1, 0.1, 0.2, 0.2), 1), (0.6, (0.05, 0.05, 0.1, 0.1), 0.5), (0.7, (0.033, 0.033, 0.067, 0.067), 0.25)]
KINDS = {"L1": {}, "smooth L1": dict(cascade=True, box_head="2fc"), "GIoU": dict(cascade=True, box_head="4conv1fc")}


def small_model(kind, classes, monkeypatch, device):
    """A MaskRCNN of tiny heads without a norm, all in float64, and maps of three images; strides are doubled, since loops are slow."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(T.MaskRCNN, "strides", (8, 16, 32, 64, 128))
    with torch.device("meta"):
        model = T.MaskRCNN(type("Backbone", (), {"channels": [1] * 4}), classes, samples=20, **KINDS[kind])
    stages = STAGES[:len(model.stages)]
    model.box_heads = torch.nn.ModuleList(T.BoxHead(classes, "2fc", kind != "smooth L1", dim=2, hidden=8) for _ in stages)
    model.mask_heads = torch.nn.ModuleList(T.mask_head(classes, dim=2) for _ in stages)
    for heads in (model.box_heads, model.mask_heads):
        for name, parameter in heads.to(device, torch.float64).named_parameters():
            torch.nn.init.normal_(parameter, std=2 if "classifier" in name else 0.3)
    sides = [(25, 33), (13, 17), (7, 9), (4, 5)]
    return model, stages, [torch.randn(3, 2, h, w, dtype=torch.float64, device=device, requires_grad=True) for h, w in sides]


def loop_pool(maps, image, box, side):
    level = loop_level(box[2] - box[0], box[3] - box[1])
    return loop_roi_align(maps[level][image].cpu(), box, side, 1 / T.MaskRCNN.strides[level], 0)[None].to(maps[0].device)


def loop_refine(box, logits, deltas, label, stds, size):
    """A box moved by the deltas of its label, or of the best class if that is background, and clipped to the image (H, W)."""
    scores = logits.tolist()[:-1]
    label = label if label < len(scores) else scores.index(max(scores))
    own = deltas.tolist()[4 * label:][:4] or deltas.tolist()                            # for all classes the same ones
    return [min(max(v, 0.0), side) for v, side in zip(loop_decode(box, [d * s for d, s in zip(own, stds)]), (size[1], size[0]) * 2)]


def loop_stages(model, stages, kind, maps, found, sizes, boxes, labels, masks):
    """Loss, and positive candidates of each stage. Boxes are plain numbers, so that no gradient can flow through them."""
    (B, G), K, total, positive = labels.shape, model.classes, 0, []
    places = [x.tolist() + [None] * (max(map(len, found)) - len(x)) for x in found]     # candidates; None: nothing there
    for (iou, stds, weight), head, mask_head in zip(stages, model.box_heads, model.mask_heads):
        index = []
        for b in range(B):
            candidates, there = torch.tensor([box or [0.] * 4 for box in places[b]], dtype=torch.float64), [bool(box) for box in places[b]]
            index.append([g if labels[b, g] >= 0 else -2 for g in range(G)]
                         + loop_assign(boxes[b], labels[b], candidates, there, iou, iou, 0.5 if kind == "L1" else 2))
            places[b] = boxes[b].tolist() + places[b]
        given = torch.tensor(index, device=maps[0].device)
        pick, sort = (t.tolist() for t in T.sample(given >= 0, given == -1, 20, 5))
        drawn = [(b, i) for b, row in enumerate(sort) for i, value in enumerate(row) if value >= 0]
        positives, following = sum(sort[b][i] for b, i in drawn), [[None] * len(row) for row in pick]
        positive.append(sum(sort[b][i] for b, i in drawn if pick[b][i] >= G))
        for b, i in drawn:
            roi, number = places[b][pick[b][i]], index[b][pick[b][i]]
            label = labels[b, number].item() if sort[b][i] else K
            logits, deltas = (x[0] for x in head(loop_pool(maps, b, roi, 7)))
            total = total + weight / len(drawn) * loop_box_loss(logits, deltas, roi, label, boxes[b, number].tolist(), stds, kind)
            if sort[b][i]:
                x = mask_head(loop_pool(maps, b, roi, 14))[0, label].cpu()
                target = T.mask_targets(masks[b, number][None], torch.tensor([roi], dtype=x.dtype), torch.tensor([0]), 28)[0]
                total = total + weight / positives / 28 ** 2 * ((1 + x.exp()).log() - x * target).sum().to(total.device)
            if pick[b][i] >= G:                                                         # objects do not come back
                following[b][i] = loop_refine(roi, logits, deltas, label, stds, sizes[b])
        places = following
    return total, positive


@pytest.mark.parametrize("kind, classes", [("L1", 3), ("L1", 1), ("smooth L1", 3), ("GIoU", 3)])
def test_losses_of_all_stages_match_loops(kind, classes, device, monkeypatch):
    """Images of several sizes, the second without objects; in the third the second object's best candidate is nearer to the first."""
    model, stages, maps = small_model(kind, classes, monkeypatch, device)
    sizes, labels = [(200, 260), (150, 250), (190, 180)], torch.tensor([[2, 0], [-1, -1], [1, 2]]).clamp(max=classes - 1)       # H, W
    boxes = [[[20.3, 30.1, 181.4, 169.2], [1.3, 1.1, 258.8, 199.3]], [[0.] * 4] * 2, [[3.1, 5.2, 88.4, 78.3], [10.2, 10.3, 99.9, 90.4]]]
    boxes, masks = torch.tensor(boxes, dtype=torch.float64), torch.rand(3, 2, 7, 9) < 0.5
    masks, found = masks.repeat_interleave(31, 2).repeat_interleave(31, 3)[..., :200, :260], []
    near = [boxes[0].repeat(5, 1), boxes[1, :0], (0.6 * boxes[2, :1] + 0.4 * boxes[2, 1:]).repeat(3, 1)]
    for b, size in enumerate(sizes):
        some = [near[b] + (10 - 5 * b) * torch.randn(near[b].shape, dtype=torch.float64), random_boxes(6 + 8 * b, side=min(size)) + 20]
        found.append(torch.minimum(torch.cat(some).clamp(min=0), torch.tensor(size[::-1] * 2)))
    given = [t.to(device) for t in (torch.tensor(sizes), boxes, labels, masks[labels >= 0])]
    torch.manual_seed(7)
    fast = model.train_heads(maps, [x.to(device) for x in found], *given)
    torch.manual_seed(7)
    slow, positive = loop_stages(model, stages, kind, maps, found, sizes, boxes, labels, masks)
    assert all(positive) and fast.dtype == torch.float64
    assert_close(fast, slow)
    variables = [*maps, *model.box_heads.parameters(), *model.mask_heads.parameters()]
    for x, y in zip(*(torch.autograd.grad(loss, variables, materialize_grads=True) for loss in (fast, slow))):
        assert_close(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_found_objects_match_loops(kind, device, monkeypatch):
    """Mean logits of all stages, the last one's boxes of every class, and the mean of all stages' mask probabilities on these."""
    K, (H, W), found, kept = 3, (190, 250), [], []
    model, stages, maps = small_model(kind, K, monkeypatch, device)
    start = torch.cat([random_boxes(9, side=150) + 30, torch.tensor([[0., 0, 250, 190]], dtype=torch.float64)]).repeat(2, 1)
    start[10:] += 2 * torch.rand(10, 1, dtype=torch.float64)                            # a little aside
    for box in start.tolist():
        total = 0
        for (_, stds, _), head in zip(stages, model.box_heads):
            logits, deltas = (x[0] for x in head(loop_pool(maps, 1, box, 7)))
            *last, box = (loop_refine(box, logits, deltas, label, stds, (H, W)) for label in range(K + 1))
            total = total + logits / len(stages)
        found += [(score, label, last[label]) for label, score in enumerate(total.softmax(0)[:K].tolist()) if score > 0.05]
    for label in range(K):
        entries = [entry for entry in found if entry[1] == label]
        kept += [entries[i] for i in loop_nms([e[2] for e in entries], [e[0] for e in entries], 0.5)]
    assert 3 < len(kept) < len(found) < K * len(start)
    scores, labels, boxes = zip(*sorted(kept, key=lambda entry: -entry[0]))
    masks = [sum(head(loop_pool(maps, 1, box, 14))[0, label].sigmoid() for head in model.mask_heads) / len(stages)
             for box, label in zip(boxes, labels)]
    fast = model.find(maps, 1, start.to(device), torch.tensor([H, W], device=device))
    for x, y in zip(fast, (boxes, scores, labels)):
        assert_close(x.cpu(), torch.tensor(y, dtype=x.dtype))
    assert_close(fast[3], torch.stack(masks))

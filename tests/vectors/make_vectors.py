"""Write the reference vectors of tests/eval_vectors.rs: scikit-learn for everything it has, plain numpy and scipy for AUPRO.

    python -m pip install scikit-learn numpy scipy
    python tests/vectors/make_vectors.py            # rewrites image_metrics.json and pixel_metrics.json beside this file

Scores are float32 values with few digits, so that JSON carries them exactly.
"""

import json
import pathlib

import numpy as np
import scipy.ndimage
import sklearn
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

HERE = pathlib.Path(__file__).parent
AUPRO_LIMIT = 0.3


def figures(labels, scores):
    labels, scores = np.asarray(labels, dtype=int), np.asarray(scores, dtype=np.float32)
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)[:-1]
    best = f1.max()
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "average_precision": float(average_precision_score(labels, scores)),
        "f1_max": float(best),
        # The lowest threshold that reaches it, up to rounding.
        "f1_threshold": float(thresholds[np.flatnonzero(f1 > best - 1e-12)[0]]),
    }


def aupro(maps, masks, limit=AUPRO_LIMIT):
    """MVTec-AD's definition, threshold by threshold: 8-connected regions, mean overlap against the false-positive rate over all good pixels."""
    labelled = [scipy.ndimage.label(m, structure=np.ones((3, 3), dtype=int)) for m in masks]
    good = sum(int((m == 0).sum()) for m in masks)
    rates, overlaps = [0.0], [0.0]
    for threshold in sorted({float(v) for m in maps for v in m.ravel()}, reverse=True):
        called = [m >= threshold for m in maps]
        rates.append(sum(int((c & (m == 0)).sum()) for c, m in zip(called, masks)) / good)
        share = [c[lab == i].mean() for c, (lab, n) in zip(called, labelled) for i in range(1, n + 1)]
        overlaps.append(float(np.mean(share)))
    rates, overlaps = np.array(rates), np.array(overlaps)
    inside = rates <= limit
    x, y = rates[inside], overlaps[inside]
    if not inside.all():
        k = int(np.argmax(~inside))
        cut = overlaps[k - 1] + (overlaps[k] - overlaps[k - 1]) * (limit - rates[k - 1]) / (rates[k] - rates[k - 1])
        x, y = np.append(x, limit), np.append(y, cut)
    return float(np.trapezoid(y, x) / limit)


def short(values):
    """float32 values that survive a decimal round trip."""
    return np.round(np.asarray(values, dtype=np.float64), 5).astype(np.float32)


def image_cases(rng):
    def case(name, good, bad):
        scores = short(np.concatenate([good, bad]))
        labels = np.concatenate([np.zeros(len(good), int), np.ones(len(bad), int)])
        order = rng.permutation(len(scores))
        scores, labels = scores[order], labels[order]
        return {"name": name, "scores": [round(float(s), 5) for s in scores], "defective": [bool(v) for v in labels], **figures(labels, scores)}

    return [
        case("continuous", rng.normal(0, 1, 120), rng.normal(1, 1.5, 80)),
        case("few distinct scores", rng.integers(0, 6, 100) / 4, rng.integers(2, 9, 60) / 4),
        case("all scores equal", np.full(10, 0.5), np.full(7, 0.5)),
        case("separated", rng.uniform(0, 1, 30), rng.uniform(2, 3, 30)),
        case("the wrong way round", rng.uniform(2, 3, 30), rng.uniform(0, 1, 20)),
        case("one defect among many", rng.normal(0, 1, 300), [1.7]),
        case("one good part among many", [0.4], rng.normal(0.8, 1, 150)),
        case("negative and huge", rng.normal(-1000, 700, 50), rng.normal(0, 900, 50)),
    ]


def pixel_cases(rng):
    def blobs(shape, count, size):
        mask = np.zeros(shape, dtype=np.uint8)
        for _ in range(count):
            h, w = rng.integers(1, size + 1, 2)
            y, x = rng.integers(0, shape[0] - h + 1), rng.integers(0, shape[1] - w + 1)
            mask[y : y + h, x : x + w] = 1
        return mask

    def case(name, shape, parts, strength, step):
        maps, masks = [], []
        for blob_count, size in parts:
            mask = blobs(shape, blob_count, size)
            noise = scipy.ndimage.gaussian_filter(rng.normal(0, 1, shape), 1.5) * 3
            values = noise + strength * scipy.ndimage.gaussian_filter(mask.astype(float), 0.8)
            maps.append(short(np.round(values / step) * step if step else values))
            masks.append(mask)
        flat_scores = np.concatenate([m.ravel() for m in maps])
        flat_labels = np.concatenate([m.ravel() for m in masks])
        return {
            "name": name,
            "height": shape[0],
            "width": shape[1],
            "maps": [[round(float(v), 5) for v in m.ravel()] for m in maps],
            "masks": ["".join("#" if v else "." for v in m.ravel()) for m in masks],
            "regions": sum(scipy.ndimage.label(m, structure=np.ones((3, 3), dtype=int))[1] for m in masks),
            "aupro": aupro(maps, masks),
            **figures(flat_labels, flat_scores),
        }

    return [
        case("smooth maps", (16, 20), [(2, 5), (1, 3), (0, 0), (4, 2)], 3.0, 0),
        case("ties everywhere", (14, 14), [(3, 3), (0, 0), (1, 8)], 2.0, 0.5),
        case("weak defects", (12, 18), [(5, 2), (5, 2)], 0.8, 0),
        case("one pixel", (10, 10), [(1, 1), (0, 0)], 9.0, 0),
        case("mostly defect", (10, 12), [(6, 9)], 1.5, 0),
    ]


if __name__ == "__main__":
    rng = np.random.default_rng(20250607)
    made_by = f"make_vectors.py, scikit-learn {sklearn.__version__}"
    for name, cases in (("image_metrics", image_cases(rng)), ("pixel_metrics", pixel_cases(rng))):
        lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases)
        (HERE / f"{name}.json").write_text(f'{{"made_by":{json.dumps(made_by)},"cases":[\n{lines}\n]}}\n')

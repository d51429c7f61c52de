"""Classification metrics, all from one confusion matrix of counts: summed first, divided last."""

import torch
from torch import Tensor


def confusion(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64 counts: row the true label, column the prediction.

    logits: (n, classes); labels: (n,) int64, negative where the row is padding.
    """
    real = labels >= 0
    cells = labels[real] * classes + logits[real].argmax(dim=1)
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def summarise(matrix: Tensor, class_names: tuple[str, ...]) -> dict[str, float]:
    """Accuracy, mean recall over the classes that have images, and each class's recall."""
    counts = matrix.double().cpu()
    hits, totals = counts.diagonal(), counts.sum(dim=1)
    recalls = hits / totals
    result = {
        "accuracy": float(hits.sum() / totals.sum()),
        "mean_recall": float(recalls[totals > 0].mean()),
    }
    for name, recall, total in zip(class_names, recalls, totals, strict=True):
        if total > 0:
            result[f"recall/{name}"] = float(recall)
    return result
